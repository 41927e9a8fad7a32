//! The checkpointer over a store in memory and a table in memory.

use mobula_storage::blob::S3Options;

use super::*;
use crate::checkpoint::ledger::memory::MemoryLedger;

const JOB: JobId = JobId(5);

struct World {
    blobs: BlobStore,
    ledger: Arc<MemoryLedger>,
}

impl World {
    fn new() -> Self {
        World {
            blobs: BlobStore::open("memory://", &S3Options::default()).unwrap(),
            ledger: Arc::default(),
        }
    }

    /// The checkpointer of a process that has just begun.
    fn checkpointer(&self) -> Checkpointer {
        let blobs = self.blobs.clone();
        Checkpointer::new(move || Ok(blobs.clone()), self.ledger.clone(), JOB, None)
    }
}

fn order(step: u64, incarnation: u64, state: &str) -> SaveOrder {
    SaveOrder {
        step,
        incarnation: Incarnation(incarnation),
        state: Arc::new(Bytes::copy_from_slice(state.as_bytes())),
        sections: vec![("all".to_owned(), 0, state.len() as u64)],
        weights_blake3: blake3::hash(state.as_bytes()).to_hex().to_string(),
        metric: Some(1.5),
        metadata: BTreeMap::from([("seed".to_owned(), "7".to_owned())]),
        helpers: Vec::new(),
        spread: Spread::default(),
    }
}

#[tokio::test]
async fn what_was_committed_is_restored_by_the_next_start() {
    let world = World::new();
    let first = world.checkpointer();
    assert_eq!(
        first.restore(Incarnation(1)).await.unwrap(),
        RestoreReport::default()
    );
    first.save(&order(10, 1, "ten")).await.unwrap();
    let saved = first
        .save(&order(20, 1, "twenty"))
        .await
        .unwrap()
        .checkpoint;
    assert_eq!(saved.metric.unwrap().value(), 1.5);
    let second = world.checkpointer();
    let report = second.restore(Incarnation(2)).await.unwrap();
    let restored = report.restored.unwrap();
    assert_eq!(restored.checkpoint, saved);
    assert_eq!(restored.state, "twenty");
    assert_eq!(restored.metadata["seed"], "7");
    // The one before is fenced from then on, whatever it may still have in hand.
    let late = first.save(&order(30, 1, "thirty")).await.unwrap_err();
    assert!(matches!(late, CheckpointError::Fenced(_)), "{late}");
    assert_eq!(world.ledger.list(JOB).await.unwrap().checkpoints.len(), 2);
}

#[tokio::test]
async fn damage_is_rejected_by_name_with_its_reason_and_what_is_left_is_used() {
    let world = World::new();
    let first = world.checkpointer();
    first.save(&order(10, 1, "ten")).await.unwrap();
    let newest = first
        .save(&order(20, 1, "twenty"))
        .await
        .unwrap()
        .checkpoint;
    world
        .blobs
        .renew(&newest.manifest_path, "{}".into())
        .await
        .unwrap();
    let report = world.checkpointer().restore(Incarnation(2)).await.unwrap();
    assert_eq!(report.restored.unwrap().state, "ten");
    assert_eq!(report.rejected[0].0, 20);
    let known = world.ledger.list(JOB).await.unwrap();
    assert_eq!(known.rejections[0].step, 20);
    assert!(
        known.rejections[0].reason.contains("is damaged"),
        "{:?}",
        known.rejections
    );
    // The step can be taken and saved again, by the start that found the damage.
    let again = world.checkpointer();
    again.save(&order(20, 2, "twenty")).await.unwrap();
    let report = again.restore(Incarnation(3)).await.unwrap();
    assert_eq!(report.restored.unwrap().checkpoint.step, 20);
}

#[tokio::test]
async fn a_manifest_of_an_earlier_attempt_is_adopted_if_it_holds_the_same_state() {
    let world = World::new();
    let first = world.checkpointer();
    first.save(&order(10, 1, "ten")).await.unwrap();
    // The head is lost after the manifest was written; the next process knows no parent.
    *world.ledger.is_away.lock() = true;
    let lost = first.save(&order(20, 1, "twenty")).await.unwrap_err();
    assert!(matches!(lost, CheckpointError::Unavailable(_)), "{lost}");
    *world.ledger.is_away.lock() = false;
    let second = world.checkpointer();
    let adopted = second
        .save(&order(20, 1, "twenty"))
        .await
        .unwrap()
        .checkpoint;
    assert_eq!(adopted.step, 20);
    let other = world.checkpointer().save(&order(20, 1, "other")).await;
    assert!(
        matches!(other, Err(CheckpointError::Fenced(_))),
        "{other:?}"
    );
}

#[tokio::test]
async fn a_store_that_cannot_be_opened_is_one_that_is_out_of_reach() {
    let ledger: Arc<MemoryLedger> = Arc::default();
    let open = || BlobStore::open("nowhere://", &S3Options::default());
    let checkpointer = Checkpointer::new(open, ledger.clone(), JOB, None);
    let error = checkpointer.save(&order(1, 1, "one")).await.unwrap_err();
    assert!(matches!(error, CheckpointError::Unavailable(_)), "{error}");
    assert!(ledger.list(JOB).await.unwrap().checkpoints.is_empty());
}

#[test]
fn damage_that_stays_is_not_waited_for() {
    let path = || "manifest/job-1/000000000010-7.json".to_owned();
    let damaged = LoadError::Damaged {
        path: path(),
        reason: "it is cut off".to_owned(),
    };
    let judged = load_error(&damaged);
    assert!(matches!(judged, CheckpointError::Refused(_)), "{judged}");
    let judged = load_error(&LoadError::Missing { path: path() });
    assert!(
        matches!(judged, CheckpointError::Unavailable(_)),
        "{judged}"
    );
}
