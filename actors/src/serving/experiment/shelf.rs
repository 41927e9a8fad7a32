//! Where the counts of experiments lie in the cluster's object store: `experiments/<endpoint>/<BLAKE3>`. The
//! experiment's row says which of them it is.
//!
//! Invariants:
//! 1. A count is named by its hash: what is read is what the row means, or an error.
//! 2. A router keeps three counts at the most: the one of the row, the one that shall be it, and one that was it. One
//!    that dies may leave those beside the row's. All go when an experiment is over.

use std::time::Duration;

use bytes::Bytes;
use mobula_storage::blob::{BlobError, BlobErrorKind, BlobStore};

use super::plan::Plan;
use super::tally::Tally;
use super::tally::stored::{NotATally, TALLY_BYTES_MAX};

/// Where the counts of all endpoints are.
const ROOT: &str = "experiments";

/// Counts that are removed at once. What more there should ever be goes with the next experiment.
const REMOVED_MAX: usize = 1_000;

/// How long removing them may take: the treatment's replicas stay until then.
const CLEARING_MAX: Duration = Duration::from_secs(10);

/// Why a count cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotRead {
    /// The store does not give it.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// It is not what was written.
    #[error("`{path}` in the store is damaged: its hash is another one")]
    Damaged {
        /// Where it is.
        path: String,
    },
    /// It is none.
    #[error("`{path}` in the store: {source}")]
    NotATally {
        /// Where it is.
        path: String,
        /// What is wrong with it.
        source: NotATally,
    },
}

impl NotRead {
    /// Whether another try cannot help.
    pub(super) fn is_final(&self) -> bool {
        match self {
            NotRead::Blob(error) => matches!(
                error.kind(),
                BlobErrorKind::NotFound | BlobErrorKind::TooLarge
            ),
            NotRead::Damaged { .. } | NotRead::NotATally { .. } => true,
        }
    }
}

/// Why counts are not all removed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotCleared {
    /// The store refuses.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// It takes too long.
    #[error("the store has not removed them within {} s", CLEARING_MAX.as_secs())]
    Late,
}

fn folder(endpoint: &str) -> String {
    format!("{ROOT}/{endpoint}")
}

fn path(endpoint: &str, blake3: [u8; 32]) -> String {
    let name = blake3::Hash::from_bytes(blake3).to_hex();
    format!("{}/{name}", folder(endpoint))
}

/// Stores a count; its hash.
pub(super) async fn write(
    blobs: &BlobStore,
    endpoint: &str,
    bytes: Bytes,
) -> Result<[u8; 32], BlobError> {
    let blake3 = *blake3::hash(&bytes).as_bytes();
    blobs.renew(&path(endpoint, blake3), bytes).await?;
    Ok(blake3)
}

/// A count of a plan, as it was when it was stored.
pub(super) async fn read(
    blobs: &BlobStore,
    plan: &Plan,
    alpha: f64,
    blake3: [u8; 32],
) -> Result<Tally, NotRead> {
    let path = path(&plan.endpoint, blake3);
    let fetch = || blobs.get(&path, TALLY_BYTES_MAX as u64);
    let is_damaged = |bytes: &Bytes| *blake3::hash(bytes).as_bytes() != blake3;
    let mut bytes = fetch().await?;
    if is_damaged(&bytes) {
        // Once more: a connection may have ended early, and all evidence is lost with what is given up.
        bytes = fetch().await?;
    }
    if is_damaged(&bytes) {
        return Err(NotRead::Damaged { path });
    }
    Tally::from_bytes(plan.clone(), alpha, &bytes)
        .map_err(|source| NotRead::NotATally { path, source })
}

/// Removes a count that nobody will go on with.
pub(super) async fn remove(
    blobs: &BlobStore,
    endpoint: &str,
    blake3: [u8; 32],
) -> Result<(), BlobError> {
    blobs.delete(&path(endpoint, blake3)).await
}

/// Removes all counts of an endpoint's experiments.
pub(super) async fn clear(blobs: &BlobStore, endpoint: &str) -> Result<(), NotCleared> {
    let removing = async {
        let left = blobs
            .list_after(&folder(endpoint), None, REMOVED_MAX)
            .await?;
        for blob in left {
            blobs.delete(&blob.path).await?;
        }
        Ok::<(), NotCleared>(())
    };
    let removed = tokio::time::timeout(CLEARING_MAX, removing).await;
    removed.unwrap_or(Err(NotCleared::Late))
}

#[cfg(test)]
mod tests {
    use mobula_storage::blob::fault::Fault;
    use mobula_storage::blob::{RetryPolicy, S3Options};

    use super::*;
    use crate::serving::experiment::tally::stored::tests::plan;
    use crate::serving::experiment::tally::{Unit, Variant};
    use crate::serving::rollout::trial::Outcome;

    const ALPHA: f64 = 0.05;

    fn store() -> BlobStore {
        BlobStore::open("memory://", &S3Options::default()).unwrap()
    }

    fn counted() -> Tally {
        let mut tally = Tally::new(plan(), ALPHA);
        for key in ["a", "b", "c"] {
            tally.record(Unit::of(key), Variant::Treatment, Outcome::Failed("no"));
        }
        tally
    }

    async fn found(blobs: &BlobStore, stored: [u8; 32]) -> Result<Tally, NotRead> {
        read(blobs, &plan(), ALPHA, stored).await
    }

    #[tokio::test]
    async fn a_count_is_read_as_it_was_written_and_goes_with_its_endpoints_experiment() {
        let blobs = store();
        let bytes = Bytes::from(counted().to_bytes());
        let first = write(&blobs, "digits", bytes.clone()).await.unwrap();
        let second = write(&blobs, "digits", Bytes::from_static(b"x")).await;
        let second = second.unwrap();
        write(&blobs, "digits2", bytes).await.unwrap();
        let mut again = found(&blobs, first).await.unwrap();
        assert_eq!(again.judge(), counted().judge());
        // Its keys are known.
        again.record(Unit::of("a"), Variant::Treatment, Outcome::Failed("no"));
        assert_eq!(again.exposed(), 3);
        let wrong = found(&blobs, second).await.unwrap_err();
        assert!(matches!(wrong, NotRead::NotATally { .. }) && wrong.is_final());

        remove(&blobs, "digits", second).await.unwrap();
        let gone = found(&blobs, second).await.unwrap_err();
        assert!(gone.is_final(), "{gone}");
        assert!(found(&blobs, first).await.is_ok());
        clear(&blobs, "digits").await.unwrap();
        assert!(found(&blobs, first).await.is_err());
        let left = blobs.list(ROOT, 10).await.unwrap();
        assert!(left.len() == 1 && left[0].path.starts_with("experiments/digits2/"));
        // There is nothing left to remove, and that is fine.
        clear(&blobs, "digits").await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_hangs_is_waited_for_no_longer_than_a_moment() {
        let (faults, blobs) = store().with_faults(RetryPolicy::IMMEDIATE);
        let bytes = Bytes::from_static(b"x");
        write(&blobs, "digits", bytes).await.unwrap();
        faults.stand(Some(Fault::Stalled(Duration::from_secs(3_600))));
        let late = clear(&blobs, "digits").await.unwrap_err();
        assert!(matches!(late, NotCleared::Late), "{late}");
    }

    #[tokio::test]
    async fn what_is_damaged_is_given_up_and_what_is_out_of_reach_is_tried_again() {
        let policy = RetryPolicy {
            attempts: 1,
            ..RetryPolicy::IMMEDIATE
        };
        let (faults, blobs) = store().with_faults(policy);
        let bytes = Bytes::from(counted().to_bytes());
        faults.plan(0, Fault::Truncated(9));
        let stored = write(&blobs, "digits", bytes.clone()).await.unwrap();
        let damaged = found(&blobs, stored).await.unwrap_err();
        assert!(matches!(damaged, NotRead::Damaged { .. }) && damaged.is_final());

        let stored = write(&blobs, "digits", bytes).await.unwrap();
        faults.reset();
        faults.plan(0, Fault::BeforeStore);
        let away = found(&blobs, stored).await.unwrap_err();
        assert!(!away.is_final(), "{away}");
        // One that arrives in part is asked for once more.
        faults.reset();
        faults.plan(0, Fault::Truncated(9));
        assert!(found(&blobs, stored).await.is_ok());
    }
}
