//! A small value that one writer at a time replaces, safe against writers that should be dead: what
//! durable actors keep.
//!
//! Every commit creates a blob under the next number, `<prefix>/<version>`, with a create that
//! fails where the name is taken. A new writer first creates a *claim* under the next number; from
//! then on the one before it, wherever it still runs, fails at its next commit, because that is
//! just the number it would need. So the store alone decides who may write. No clock, no lease and
//! no head takes part, which keeps the head off the path of calls and lets durable actors go on
//! without one.
//!
//! Invariants:
//! 1. A version is created at most once. Whoever finds the next number taken by another writer
//!    never writes again.
//! 2. Claims are kept, so that the number which a stale writer needs stays taken: the latest
//!    [`CLAIMS_KEPT`] of them, which is as many starts as a stale writer would have to sleep through.
//! 3. The state before the latest one is deleted only when the latest is durable, and the state
//!    that a claim rests on only when its writer has committed.
//! 4. [`StateLog::open`] answers the latest state that was committed by anyone, verified.

use bytes::{BufMut, Bytes, BytesMut};

use crate::blob::{BlobError, BlobErrorKind, BlobStore, PutOutcome};

/// How many claims stay behind: each is one small blob for one start of the writer.
pub const CLAIMS_KEPT: usize = 1000;

/// The largest state: each commit writes all of it.
pub const STATE_BYTES_MAX: usize = 4 << 20;

/// States that are replaced are deleted so many at a time, to spare the store requests.
const DELETE_AT_ONCE: usize = 8;

/// Blobs that one log may have: claims, the states between two clean-ups, and those that crashed
/// writers did not come to delete.
const BLOBS_MAX: usize = 100_000;

/// How often a claim is tried when other writers claim at the same time.
const CLAIM_TRIES: u32 = 16;

const MAGIC: &[u8; 4] = b"MST1";
const HEAD_BYTES: usize = 4 + 8 + 8;
const HASH_BYTES: usize = 32;
/// A claim has no state; a state has one byte at least.
const CLAIM_BYTES: u64 = (HEAD_BYTES + HASH_BYTES) as u64;

/// Why a state was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateLogError {
    /// The store failed; whether the commit took place is not known.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A newer writer has taken over.
    #[error(
        "writer {writer} of `{prefix}` is superseded by writer {by}: it may not write any more"
    )]
    Superseded {
        /// The log.
        prefix: String,
        /// Who was refused.
        writer: u64,
        /// Who has taken over.
        by: u64,
    },
    /// An earlier commit failed, so that the next number is not known.
    #[error("an earlier commit to `{prefix}` failed: open the state anew")]
    Poisoned {
        /// The log.
        prefix: String,
    },
    /// The state is larger than allowed.
    #[error(
        "the state has {size_bytes} bytes, the limit is {STATE_BYTES_MAX}: every commit writes all \
         of it, so keep what is large in blobs of its own"
    )]
    TooLarge {
        /// Its size.
        size_bytes: usize,
    },
    /// What the store gave is not what was written.
    #[error("`{path}` in the store is damaged: {reason}")]
    Damaged {
        /// The blob.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Others claim all the time.
    #[error("`{prefix}` was claimed by others {CLAIM_TRIES} times in a row: too many writers")]
    Contended {
        /// The log.
        prefix: String,
    },
}

/// One blob of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    writer: u64,
    /// The version whose state is the latest: itself, or for a claim the one it found; 0 is none.
    base: u64,
    /// Empty for a claim.
    state: Bytes,
}

impl Record {
    fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(HEAD_BYTES + HASH_BYTES + self.state.len());
        bytes.put_slice(MAGIC);
        bytes.put_u64_le(self.writer);
        bytes.put_u64_le(self.base);
        bytes.put_slice(&self.state);
        let hash = blake3::hash(&bytes);
        bytes.put_slice(hash.as_bytes());
        bytes.freeze()
    }

    fn decode(bytes: Bytes) -> Result<Self, &'static str> {
        let body_bytes = bytes
            .len()
            .checked_sub(HASH_BYTES)
            .filter(|length| *length >= HEAD_BYTES)
            .ok_or("it is too short")?;
        let (body, hash) = (bytes.slice(..body_bytes), bytes.slice(body_bytes..));
        if blake3::hash(&body).as_bytes() != &hash[..] {
            return Err("its hash differs");
        }
        if &body[..4] != MAGIC {
            return Err("it is of another format");
        }
        let number = |at: usize| {
            let bytes = body[at..at + 8]
                .try_into()
                .expect("the slice has eight bytes");
            u64::from_le_bytes(bytes)
        };
        Ok(Record {
            writer: number(4),
            base: number(12),
            state: body.slice(HEAD_BYTES..),
        })
    }

    fn is_claim(&self) -> bool {
        self.state.is_empty()
    }
}

/// One writer's hold on a log.
#[derive(Debug)]
pub struct StateLog {
    store: BlobStore,
    prefix: String,
    writer: u64,
    /// The latest version, which is ours.
    latest: u64,
    /// The version that has the latest state; 0 is none.
    base: u64,
    replaced: Vec<u64>,
    poisoned: bool,
}

impl StateLog {
    /// Takes over the log under `prefix` (a whole number of path segments) as `writer`, whose
    /// number is larger than that of all before it; answers the latest state, if there is one.
    pub async fn open(
        store: BlobStore,
        prefix: impl Into<String>,
        writer: u64,
    ) -> Result<(Self, Option<Bytes>), StateLogError> {
        let mut log = StateLog {
            store,
            prefix: prefix.into(),
            writer,
            latest: 0,
            base: 0,
            replaced: Vec::new(),
            poisoned: false,
        };
        for _ in 0..CLAIM_TRIES {
            let blobs = log.store.list(&log.prefix, BLOBS_MAX).await?;
            let versions: Vec<(u64, u64)> = blobs
                .iter()
                .filter_map(|blob| Some((version_of(&blob.path)?, blob.size_bytes)))
                .collect();
            let found = versions.last().map_or(0, |(version, _)| *version);
            if !log.claim_after(found).await? {
                continue;
            }
            let state = match log.base {
                0 => None,
                base => Some(log.read(base).await?.state),
            };
            log.clean_up(&versions).await;
            return Ok((log, state));
        }
        Err(StateLogError::Contended { prefix: log.prefix })
    }

    /// Claims the number behind `found`; false when somebody else did meanwhile.
    async fn claim_after(&mut self, found: u64) -> Result<bool, StateLogError> {
        let mut base = 0;
        if found > 0 {
            let last = match self.read(found).await {
                // Replaced and deleted since it was listed.
                Err(StateLogError::Blob(error)) if error.kind() == BlobErrorKind::NotFound => {
                    return Ok(false);
                }
                other => other?,
            };
            if last.writer > self.writer {
                return Err(self.superseded(last.writer));
            }
            base = last.base;
        }
        let claim = Record {
            writer: self.writer,
            base,
            state: Bytes::new(),
        };
        if !self.create(found + 1, &claim).await? {
            return Ok(false);
        }
        (self.latest, self.base) = (found + 1, base);
        Ok(true)
    }

    /// Creates a version; false when it is there and is not this very record.
    async fn create(&self, version: u64, record: &Record) -> Result<bool, StateLogError> {
        let path = self.path(version);
        match self.store.put_if_absent(&path, record.encode()).await? {
            PutOutcome::Created => Ok(true),
            // The reply to our own first try may have been lost.
            PutOutcome::AlreadyExists => Ok(self.read(version).await? == *record),
        }
    }

    /// Replaces the state. When this returns it is durable, and any later open finds it. After
    /// an error whether it took place is not known, and this log takes no more.
    pub async fn commit(&mut self, state: Bytes) -> Result<(), StateLogError> {
        if self.poisoned {
            return Err(StateLogError::Poisoned {
                prefix: self.prefix.clone(),
            });
        }
        if state.len() > STATE_BYTES_MAX {
            let size_bytes = state.len();
            return Err(StateLogError::TooLarge { size_bytes });
        }
        debug_assert!(!state.is_empty(), "an empty state looks like a claim");
        let version = self.latest + 1;
        let record = Record {
            writer: self.writer,
            base: version,
            state,
        };
        // Until it is known to have succeeded: this future may be dropped half-way as well.
        self.poisoned = true;
        if !self.create(version, &record).await? {
            let by = self.read(version).await?.writer;
            return Err(self.superseded(by));
        }
        self.poisoned = false;
        if self.base > 0 {
            self.replaced.push(self.base);
        }
        (self.latest, self.base) = (version, version);
        if self.replaced.len() >= DELETE_AT_ONCE {
            let replaced = std::mem::take(&mut self.replaced);
            self.delete(&replaced).await;
        }
        Ok(())
    }

    /// The version of the latest state: counts commits and claims.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.latest
    }

    async fn read(&self, version: u64) -> Result<Record, StateLogError> {
        let path = self.path(version);
        let limit = STATE_BYTES_MAX as u64 + CLAIM_BYTES;
        let bytes = self.store.get(&path, limit).await?;
        let damaged = |reason: &str| StateLogError::Damaged {
            path: path.clone(),
            reason: reason.to_owned(),
        };
        let record = Record::decode(bytes).map_err(damaged)?;
        if !record.is_claim() && record.base != version {
            return Err(damaged("it has the number of another version"));
        }
        Ok(record)
    }

    /// Deletes what nobody needs any more. In vain is no harm: the next writer tries again.
    async fn clean_up(&self, versions: &[(u64, u64)]) {
        let is_claim = |size_bytes: u64| size_bytes == CLAIM_BYTES;
        let claims = versions.iter().filter(|(_, size)| is_claim(*size)).count();
        let mut claims_to_delete = claims.saturating_sub(CLAIMS_KEPT);
        let mut old = Vec::new();
        for (version, size_bytes) in versions {
            if is_claim(*size_bytes) {
                if claims_to_delete > 0 {
                    claims_to_delete -= 1;
                    old.push(*version);
                }
            } else if *version < self.base {
                old.push(*version);
            }
        }
        self.delete(&old).await;
    }

    async fn delete(&self, versions: &[u64]) {
        let deletions = versions.iter().map(|version| {
            let path = self.path(*version);
            async move {
                if let Err(error) = self.store.delete(&path).await {
                    tracing::warn!(%error, "a replaced state stays behind for now");
                }
            }
        });
        futures::future::join_all(deletions).await;
    }

    fn path(&self, version: u64) -> String {
        format!("{}/{version:020}", self.prefix)
    }

    fn superseded(&self, by: u64) -> StateLogError {
        StateLogError::Superseded {
            prefix: self.prefix.clone(),
            writer: self.writer,
            by,
        }
    }
}

fn version_of(path: &str) -> Option<u64> {
    path.rsplit('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use super::*;
    use crate::blob::RetryPolicy;
    use crate::blob::fault::{Fault, FaultStore};

    fn store() -> (BlobStore, FaultStore) {
        let faults = FaultStore::new(Arc::new(InMemory::new()));
        let retry = RetryPolicy {
            attempts: 1,
            ..RetryPolicy::IMMEDIATE
        };
        let store = BlobStore::over(Arc::new(faults.clone()), "memory://", retry);
        (store, faults)
    }

    async fn open(store: &BlobStore, writer: u64) -> (StateLog, Option<Bytes>) {
        StateLog::open(store.clone(), "state/a", writer)
            .await
            .unwrap()
    }

    fn text(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    #[tokio::test]
    async fn the_next_writer_finds_what_was_committed_last() {
        let (store, _) = store();
        let (mut log, state) = open(&store, 3).await;
        assert_eq!(state, None);
        for state in ["one", "two"] {
            log.commit(text(state)).await.unwrap();
        }
        // Several that start and end without a commit.
        for writer in 4..7 {
            assert_eq!(open(&store, writer).await.1, Some(text("two")));
        }
        let (mut log, _) = open(&store, 7).await;
        log.commit(text("three")).await.unwrap();
        assert_eq!(open(&store, 8).await.1, Some(text("three")));
    }

    #[tokio::test]
    async fn a_superseded_writer_never_writes_again() {
        let (store, _) = store();
        let (mut stale, _) = open(&store, 1).await;
        stale.commit(text("old")).await.unwrap();
        let (mut new, state) = open(&store, 2).await;
        assert_eq!(state, Some(text("old")));
        // Long after: the numbers in between are gone, but not the claim.
        for _ in 0..40 {
            new.commit(text("new")).await.unwrap();
        }
        for _ in 0..2 {
            stale.commit(text("lost")).await.unwrap_err();
        }
        assert_eq!(open(&store, 3).await.1, Some(text("new")));
        let error = StateLog::open(store.clone(), "state/a", 2)
            .await
            .unwrap_err();
        assert!(
            matches!(
                error,
                StateLogError::Superseded {
                    by: 3,
                    writer: 2,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[tokio::test]
    async fn what_was_replaced_is_deleted_and_claims_stay() {
        let (store, _) = store();
        for writer in 1..=5 {
            let (mut log, _) = open(&store, writer).await;
            for _ in 0..20 {
                log.commit(text("state")).await.unwrap();
            }
        }
        let left = store.list("state/a", 1000).await.unwrap().len();
        assert!(
            (6..=5 + 2 * DELETE_AT_ONCE).contains(&left),
            "{left} blobs are left"
        );
    }

    /// A crash at each operation of a writer's life: the next one finds the last state that was
    /// acknowledged, or the one that was under way.
    #[tokio::test]
    async fn after_a_crash_at_any_step_nothing_acknowledged_is_lost() {
        for fault in [Fault::BeforeStore, Fault::ReplyLost] {
            for step in 0..120 {
                let (store, faults) = store();
                let (mut log, _) = open(&store, 1).await;
                log.commit(Bytes::from(vec![1])).await.unwrap();
                drop(log);
                faults.reset();
                faults.crash_at(step, fault);
                let mut acknowledged = 1;
                if let Ok((mut log, _)) = StateLog::open(store.clone(), "state/a", 2).await {
                    for state in 2..30 {
                        if log.commit(Bytes::from(vec![state])).await.is_err() {
                            break;
                        }
                        acknowledged = state;
                    }
                }
                faults.reset();
                let (_, state) = open(&store, 3).await;
                let found = state.expect("a state was committed")[0];
                assert!(
                    found == acknowledged || found == acknowledged + 1,
                    "{fault:?} at {step}: found {found}, acknowledged {acknowledged}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_lost_reply_is_read_back() {
        let faults = FaultStore::new(Arc::new(InMemory::new()));
        let store = BlobStore::over(
            Arc::new(faults.clone()),
            "memory://",
            RetryPolicy::IMMEDIATE,
        );
        let (mut log, _) = open(&store, 1).await;
        faults.reset();
        faults.plan(0, Fault::ReplyLost);
        log.commit(text("once")).await.unwrap();
        log.commit(text("twice")).await.unwrap();
        assert_eq!(open(&store, 2).await.1, Some(text("twice")));
    }

    #[tokio::test]
    async fn damage_and_excess_are_told() {
        let (store, faults) = store();
        let (mut log, _) = open(&store, 1).await;
        let error = log.commit(Bytes::from(vec![0; STATE_BYTES_MAX + 1])).await;
        assert!(matches!(error, Err(StateLogError::TooLarge { .. })));
        // It was refused before anything was tried, so the log goes on.
        faults.reset();
        faults.plan(0, Fault::Truncated(60));
        log.commit(text("a state that is cut")).await.unwrap();
        let error = StateLog::open(store, "state/a", 2).await.unwrap_err();
        assert!(matches!(error, StateLogError::Damaged { .. }), "{error}");
    }
}
