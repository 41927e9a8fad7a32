//! What a sweep removes, and what it must not.

use bytes::Bytes;
use futures::TryStreamExt;

use super::*;
use crate::blob::BlobStore;
use crate::blob::fault::Fault;

/// A moment behind everything that was written so far, by the store's clock.
pub(super) async fn later_ms(blobs: &BlobStore) -> u64 {
    let all = blobs.list("", 1000).await.unwrap();
    all.iter().map(|blob| blob.modified_ms).max().unwrap() + 1
}

/// Waits until the store's clock has reached `now_ms`, a millisecond or two away.
pub(super) async fn pass(blobs: &BlobStore, now_ms: u64) {
    while later_ms(blobs).await <= now_ms {
        blobs.renew("clock", Bytes::new()).await.unwrap();
    }
}

/// More than there is.
pub(super) const MANY: usize = 1000;

fn committed(checkpoints: &[&CheckpointHandle]) -> Kept {
    Kept {
        committed: checkpoints
            .iter()
            .map(|checkpoint| checkpoint.reference.clone())
            .collect(),
        ..Kept::default()
    }
}

#[tokio::test]
async fn a_sweep_removes_what_nobody_keeps_and_nothing_else() {
    let blobs = in_memory();
    let dropped = saved(&blobs, 1).await;
    let kept = saved(&blobs, 2).await;
    let orphan = writer(&blobs)
        .save(request(9, None), state(9, 400))
        .await
        .unwrap()
        .handle;
    blobs.delete(&orphan.reference.path).await.unwrap();
    let sweeper = Sweeper::new(blobs.clone());
    let now_ms = later_ms(&blobs).await;
    let keep = committed(&[&kept]);
    let stored = sweeper.list().await.unwrap();
    let plan = |age_min_ms, blobs_max| sweeper.plan(&stored, &keep, now_ms, age_min_ms, blobs_max);
    let young = plan(1_000_000, MANY).await.unwrap();
    assert!(
        young.manifests.is_empty() && young.chunks.is_empty(),
        "all of it is young"
    );
    let few = plan(0, 3).await.unwrap();
    assert_eq!((few.manifests.len(), few.chunks.len()), (1, 2));
    let plan = plan(0, MANY).await.unwrap();
    assert_eq!(
        plan.manifests,
        std::slice::from_ref(&dropped.reference.path)
    );
    assert_eq!(plan.chunks.len(), 14, "seven of each of two");
    let report = sweeper.sweep(&plan).await.unwrap();
    assert_eq!(
        report,
        GcReport {
            deleted: 15,
            deleted_bytes: plan.size_bytes,
            spared: 0
        }
    );
    assert_eq!(loaded(&blobs, &kept.reference).await, state(2, 400));
    let left = blobs.list("", 100).await.unwrap();
    assert_eq!(
        left.len(),
        10,
        "seven chunks and a manifest, the plan and that it is over: {left:?}"
    );
    // Savers count from when a plan was stored, so it is stored once more.
    let again = sweeper.sweep(&plan).await.unwrap();
    assert_eq!(again, GcReport::default());
    assert_eq!(blobs.list("gc", 100).await.unwrap().len(), 4);
    let much_later = GcPlan {
        created_ms: now_ms + 24 * 3_600_000,
        ..GcPlan::default()
    };
    sweeper.sweep(&much_later).await.unwrap();
    let left = blobs.list("", 100).await.unwrap();
    assert_eq!(left.len(), 8, "old plans are forgotten: {left:?}");
}

/// Forgetting a plan takes two steps, and a head may die between them.
#[tokio::test]
async fn a_mark_whose_plan_was_removed_goes_as_well() {
    let (faults, through, direct) = faulty();
    saved(&direct, 1).await;
    let now_ms = later_ms(&direct).await;
    let sweeper = Sweeper::new(direct.clone());
    let stored = sweeper.list().await.unwrap();
    let kept = Kept::default();
    let plan = sweeper.plan(&stored, &kept, now_ms, 0, MANY).await.unwrap();
    sweeper.sweep(&plan).await.unwrap();
    let much_later = GcPlan {
        created_ms: now_ms + 24 * 3_600_000,
        ..GcPlan::default()
    };
    // Plans and marks are listed, and the plan is deleted.
    faults.crash_at(2, Fault::BeforeStore);
    Sweeper::new(through).sweep(&much_later).await.unwrap_err();
    let left = direct.list("gc", 100).await.unwrap();
    assert!(
        left.len() == 1 && left[0].path.ends_with(".done"),
        "{left:?}"
    );
    // One that is young may be of a plan that was not listed yet.
    let now = GcPlan {
        created_ms: now_ms,
        ..GcPlan::default()
    };
    sweeper.sweep(&now).await.unwrap();
    assert_eq!(direct.list("gc", 100).await.unwrap(), left);
    sweeper.sweep(&much_later).await.unwrap();
    assert_eq!(direct.list("gc", 100).await.unwrap(), []);
}

#[tokio::test]
async fn an_uncommitted_but_young_manifest_protects_its_chunks() {
    let blobs = in_memory();
    let parent = saved(&blobs, 1).await;
    let now_ms = later_ms(&blobs).await;
    pass(&blobs, now_ms).await;
    let child = writer(&blobs)
        .save(request(2, Some(&parent)), state(1, 400))
        .await
        .unwrap();
    let sweeper = Sweeper::new(blobs.clone());
    let stored = sweeper.list().await.unwrap();
    let plan = sweeper
        .plan(&stored, &Kept::default(), now_ms, 0, MANY)
        .await
        .unwrap();
    assert_eq!(plan.manifests, [parent.reference.path]);
    assert!(plan.chunks.is_empty(), "the child names all of them");
    Sweeper::new(blobs.clone()).sweep(&plan).await.unwrap();
    assert!(reader(&blobs).load(&child.handle.reference).await.is_ok());
}

#[tokio::test]
async fn a_kept_checkpoint_that_cannot_be_read_stops_the_sweep() {
    let blobs = in_memory();
    let kept = saved(&blobs, 1).await;
    blobs
        .renew(&kept.reference.path, "damage".into())
        .await
        .unwrap();
    let now_ms = later_ms(&blobs).await;
    let sweeper = Sweeper::new(blobs.clone());
    let stored = sweeper.list().await.unwrap();
    let keep = committed(&[&kept]);
    let result = sweeper.plan(&stored, &keep, now_ms, 0, MANY).await;
    assert!(
        matches!(result, Err(GcError::KeptUnreadable(_))),
        "{result:?}"
    );
    // One that somebody deleted protects nothing, and stops nothing.
    blobs.delete(&kept.reference.path).await.unwrap();
    let plan = sweeper.plan(&stored, &keep, now_ms, 0, MANY).await.unwrap();
    assert_eq!(plan.chunks.len(), kept.manifest.chunks.len());
}

#[tokio::test]
async fn an_old_manifest_that_may_still_be_committed_is_spared_with_its_chunks() {
    let blobs = in_memory();
    let open = saved(&blobs, 1).await;
    let now_ms = later_ms(&blobs).await;
    let sweeper = Sweeper::new(blobs.clone());
    let stored = sweeper.list().await.unwrap();
    let kept = Kept {
        may_be_committed: stored.manifests().collect(),
        ..Kept::default()
    };
    let plan = sweeper.plan(&stored, &kept, now_ms, 0, MANY).await.unwrap();
    assert!(plan.is_empty(), "{plan:?}");
    sweeper.sweep(&plan).await.unwrap();
    assert!(reader(&blobs).load(&open.reference).await.is_ok());
}

#[tokio::test]
async fn chunks_that_the_tables_name_are_spared_and_join_to_what_was_saved() {
    let blobs = in_memory();
    let other = saved(&blobs, 1).await;
    // The second piece is the first once more, and the last is shorter.
    let bytes = Bytes::from([state(5, 64).repeat(2), vec![7; 10]].concat());
    let writer = writer(&blobs).with_chunk_bytes(64);
    let chunks = writer.save_chunks(Arc::new(bytes.clone())).await.unwrap();
    assert_eq!(
        chunks.iter().map(|chunk| chunk.length).collect::<Vec<_>>(),
        [64, 64, 10]
    );
    let sweeper = Sweeper::new(blobs.clone());
    let stored = sweeper.list().await.unwrap();
    let kept = Kept {
        chunks: chunks.iter().map(|chunk| chunk.blake3).collect(),
        ..Kept::default()
    };
    let now_ms = later_ms(&blobs).await;
    let plan = sweeper.plan(&stored, &kept, now_ms, 0, MANY).await.unwrap();
    assert_eq!(plan.manifests, [other.reference.path]);
    assert_eq!(plan.chunks.len(), other.manifest.chunks.len());
    sweeper.sweep(&plan).await.unwrap();
    let joined: Vec<Bytes> = reader(&blobs)
        .chunks(chunks.clone())
        .try_collect()
        .await
        .unwrap();
    assert_eq!(joined.concat(), bytes);

    blobs
        .renew(&chunks[2].path(), vec![8; 10].into())
        .await
        .unwrap();
    let damaged = reader(&blobs).chunks(chunks).try_collect::<Vec<_>>().await;
    assert!(damaged.unwrap_err().condemns_the_checkpoint());
}

#[tokio::test]
async fn a_store_is_swept_by_the_cluster_that_claimed_it_first() {
    let sweeper = Sweeper::new(in_memory());
    sweeper.claim("one").await.unwrap();
    sweeper.claim("one").await.unwrap();
    let refused = sweeper.claim("two").await.unwrap_err().to_string();
    assert!(refused.contains("that of cluster `one`"), "{refused}");
    assert!(refused.contains("delete `gc/owner`"), "{refused}");
}

#[tokio::test]
async fn a_chunk_that_was_renewed_since_the_plan_is_spared() {
    let blobs = in_memory();
    let dropped = saved(&blobs, 1).await;
    let now_ms = later_ms(&blobs).await;
    let sweeper = Sweeper::new(blobs.clone());
    let stored = sweeper.list().await.unwrap();
    let plan = sweeper
        .plan(&stored, &Kept::default(), now_ms, 0, MANY)
        .await
        .unwrap();
    pass(&blobs, now_ms).await;
    let renewed = saved(&blobs, 1).await;
    let report = sweeper.sweep(&plan).await.unwrap();
    assert_eq!(report.spared, dropped.manifest.chunks.len());
    assert_eq!(renewed.reference, dropped.reference);
}
