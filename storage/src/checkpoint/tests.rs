use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use mobula_core::id::{Incarnation, JobId};
use object_store::memory::InMemory;

use super::*;
use crate::blob::fault::{Fault, FaultStore};
use crate::blob::{BlobErrorKind, BlobStore, RetryPolicy, S3Options};

const JOB: JobId = JobId(7);
const CHUNK: usize = 64;

fn in_memory() -> BlobStore {
    BlobStore::open("memory://", &S3Options::default()).unwrap()
}

/// Two views of one store: through faults, and directly.
fn faulty() -> (FaultStore, BlobStore, BlobStore) {
    let direct: Arc<dyn object_store::ObjectStore> = Arc::new(InMemory::new());
    let faults = FaultStore::new(Arc::clone(&direct));
    let through = BlobStore::over(
        Arc::new(faults.clone()),
        "faulty://",
        RetryPolicy::IMMEDIATE,
    );
    (
        faults,
        through,
        BlobStore::over(direct, "direct://", RetryPolicy::IMMEDIATE),
    )
}

/// Bytes that differ from step to step in every chunk.
fn state(step: u64, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&step.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

fn request(step: u64, parent: Option<&CheckpointHandle>) -> SaveRequest {
    SaveRequest {
        job: JOB,
        step,
        incarnation: Incarnation(3),
        parent: parent.cloned(),
        sections: vec![Section {
            name: "w".to_owned(),
            offset: 10,
            length: 100,
        }],
        metadata: BTreeMap::from([("seed".to_owned(), "42".to_owned())]),
    }
}

fn writer(blobs: &BlobStore) -> CheckpointWriter {
    CheckpointWriter::new(blobs.clone()).with_chunk_bytes(CHUNK)
}

fn reader(blobs: &BlobStore) -> CheckpointReader {
    CheckpointReader::new(blobs.clone(), 1 << 20)
}

async fn saved(blobs: &BlobStore, step: u64) -> CheckpointHandle {
    writer(blobs)
        .save(request(step, None), state(step, 400))
        .await
        .unwrap()
        .handle
}

#[tokio::test]
async fn what_is_saved_is_loaded_with_its_sections_and_metadata() {
    let blobs = in_memory();
    for length in [110, CHUNK * 2, 400] {
        let step = length as u64;
        let bytes = state(step, length);
        let saved = writer(&blobs)
            .save(request(step, None), bytes.clone())
            .await
            .unwrap();
        let loaded = reader(&blobs).load(&saved.handle.reference).await.unwrap();
        assert_eq!(loaded.bytes, bytes);
        assert_eq!(loaded.handle, saved.handle);
        assert_eq!(loaded.section("w").unwrap(), bytes[10..110]);
        assert_eq!(loaded.section("v"), None);
        assert_eq!(loaded.handle.manifest.metadata["seed"], "42");
    }
    let empty = SaveRequest {
        sections: Vec::new(),
        ..request(1, None)
    };
    let saved = writer(&blobs).save(empty, Bytes::new()).await.unwrap();
    assert!(
        reader(&blobs)
            .load(&saved.handle.reference)
            .await
            .unwrap()
            .bytes
            .is_empty()
    );
}

#[tokio::test]
async fn chunks_of_the_parent_and_equal_chunks_are_sent_once() {
    let blobs = in_memory();
    let mut bytes = state(1, CHUNK * 4).to_vec();
    let first = writer(&blobs)
        .save(request(1, None), bytes.clone().into())
        .await
        .unwrap();
    assert_eq!((first.uploaded_bytes, first.reused_bytes), (256, 0));
    bytes[0] ^= 1;
    let second = writer(&blobs)
        .save(request(2, Some(&first.handle)), bytes.clone().into())
        .await
        .unwrap();
    assert_eq!((second.uploaded_bytes, second.reused_bytes), (64, 192));
    assert_eq!(
        second.handle.manifest.parent,
        Some(first.handle.reference.digest)
    );
    assert_eq!(
        reader(&blobs)
            .load(&second.handle.reference)
            .await
            .unwrap()
            .bytes,
        bytes
    );
    let zeros = writer(&blobs)
        .save(request(3, None), vec![0; 640].into())
        .await
        .unwrap();
    assert_eq!((zeros.uploaded_bytes, zeros.reused_bytes), (64, 576));
}

#[tokio::test]
async fn saving_again_finishes_and_another_state_under_the_same_name_is_fenced() {
    let blobs = in_memory();
    let first = saved(&blobs, 5).await;
    assert_eq!(saved(&blobs, 5).await, first);
    let error = writer(&blobs)
        .save(request(5, None), state(6, 400))
        .await
        .unwrap_err();
    assert!(matches!(error, SaveError::Fenced { .. }), "{error}");
    assert_eq!(
        reader(&blobs).load(&first.reference).await.unwrap().bytes,
        state(5, 400)
    );
    let next = SaveRequest {
        incarnation: Incarnation(4),
        ..request(5, None)
    };
    let next = writer(&blobs).save(next, state(6, 400)).await.unwrap();
    assert_ne!(next.handle.reference.path, first.reference.path);
}

#[tokio::test]
async fn a_request_that_contradicts_itself_writes_nothing() {
    let blobs = in_memory();
    let error = writer(&blobs)
        .save(request(1, None), state(1, 50))
        .await
        .unwrap_err();
    assert!(matches!(error, SaveError::Invalid(_)), "{error}");
    assert_eq!(blobs.list("", 10).await.unwrap(), []);
}

/// Invariant 1: the writer dies at each of its operations in turn, before or after the store did
/// it. What is visible then is the old checkpoint or the new one, whole; and a second attempt
/// brings the new one.
#[tokio::test]
async fn a_crash_at_every_write_leaves_a_loadable_checkpoint() {
    let mut points = 0;
    for chunk_count in [1, 3, 20, 40] {
        let length = CHUNK * chunk_count - 1;
        let section_free = |step| SaveRequest {
            sections: Vec::new(),
            ..request(step, None)
        };
        for fault in [Fault::BeforeStore, Fault::ReplyLost] {
            for at in 0.. {
                let (faults, through, direct) = faulty();
                let old = saved(&direct, 1).await.reference;
                faults.crash_at(at, fault);
                let outcome = writer(&through)
                    .save(section_free(2), state(2, length))
                    .await;
                let reached = faults.operations() > at;
                let mut references = Vec::new();
                for stored in reader(&direct).list(JOB).await.unwrap() {
                    references.push(reader(&direct).reference(&stored.name).await.unwrap());
                }
                let restored = reader(&direct).load_newest(&references).await.unwrap();
                assert_eq!(
                    restored.rejected,
                    [],
                    "nothing half visible, {fault:?} at {at}"
                );
                match &outcome {
                    Ok(_) => assert_eq!(restored.checkpoint.bytes, state(2, length)),
                    Err(_) if restored.checkpoint.handle.reference == old => {
                        assert_eq!(restored.checkpoint.bytes, state(1, 400));
                    }
                    Err(_) => assert_eq!(restored.checkpoint.bytes, state(2, length)),
                }
                faults.reset();
                let again = writer(&through)
                    .save(section_free(2), state(2, length))
                    .await
                    .unwrap();
                let loaded = reader(&direct).load(&again.handle.reference).await.unwrap();
                assert_eq!(loaded.bytes, state(2, length));
                if !reached {
                    assert!(outcome.is_ok(), "no operation failed");
                    break;
                }
                points += 1;
            }
        }
    }
    assert!(points >= 100, "{points} crash points");
}

#[tokio::test]
async fn one_lost_request_or_reply_is_ridden_out_wherever_it_falls() {
    for fault in [Fault::BeforeStore, Fault::ReplyLost] {
        for at in 0.. {
            let (faults, through, direct) = faulty();
            faults.plan(at, fault);
            let saved = writer(&through)
                .save(request(2, None), state(2, 400))
                .await
                .unwrap();
            if faults.operations() <= at {
                break;
            }
            let loaded = reader(&direct).load(&saved.handle.reference).await.unwrap();
            assert_eq!(loaded.bytes, state(2, 400), "{fault:?} at {at}");
        }
    }
}

/// What a store may answer instead of doing its work, at each operation in turn: the save succeeds.
#[tokio::test]
async fn server_errors_conflicts_and_stalls_are_ridden_out_wherever_they_fall() {
    let stalled = Fault::Stalled(std::time::Duration::from_millis(1));
    for fault in [Fault::ServerError, Fault::Conflict, stalled] {
        for at in 0.. {
            let (faults, through, direct) = faulty();
            // Also where chunks are there already, and are written once more.
            saved(&direct, 2).await;
            faults.plan(at, fault);
            let again = SaveRequest {
                incarnation: Incarnation(4),
                ..request(2, None)
            };
            let saved = writer(&through).save(again, state(2, 400)).await.unwrap();
            if faults.operations() <= at {
                break;
            }
            let loaded = reader(&direct).load(&saved.handle.reference).await.unwrap();
            assert_eq!(loaded.bytes, state(2, 400), "{fault:?} at {at}");
        }
    }
}

/// A full disk, and a store that is away for longer than anybody tries: nothing of the save is visible,
/// and when that is over the same save finishes.
#[tokio::test]
async fn a_store_that_fails_for_long_costs_nothing_that_was_saved() {
    for (fault, kind) in [
        (Fault::NoSpace, BlobErrorKind::NoSpace),
        (Fault::BeforeStore, BlobErrorKind::Unreachable),
        (Fault::ServerError, BlobErrorKind::Unreachable),
    ] {
        for begins_at in 0..8 {
            let (faults, through, direct) = faulty();
            let old = saved(&direct, 1).await.reference;
            for number in begins_at..100 {
                faults.plan(number, fault);
            }
            let writer = writer(&through);
            let save = || writer.save(request(2, None), state(2, 400));
            match save().await.unwrap_err() {
                SaveError::Blob(error) => assert_eq!(error.kind(), kind, "{error}"),
                other => panic!("{other}"),
            }
            let stored = reader(&direct).list(JOB).await.unwrap();
            assert_eq!(stored.len(), 1, "{fault:?} from operation {begins_at} on");
            assert_eq!(
                reader(&direct).load(&old).await.unwrap().bytes,
                state(1, 400)
            );
            faults.reset();
            let saved = save().await.unwrap();
            let loaded = reader(&direct).load(&saved.handle.reference).await.unwrap();
            assert_eq!(loaded.bytes, state(2, 400));
        }
    }
}

/// A read that ends early and does not say so is no reason to believe half of it.
#[tokio::test]
async fn a_truncated_read_is_noticed() {
    let (faults, through, direct) = faulty();
    let saved = saved(&direct, 1).await;
    for at in 0.. {
        for kept in [0, 1, CHUNK - 1] {
            faults.reset();
            faults.plan(at, Fault::Truncated(kept));
            let loaded = reader(&through).load(&saved.reference).await;
            if faults.operations() <= at {
                assert!(at > 7);
                return;
            }
            // The last chunk is short: all of it may have come.
            if let Ok(loaded) = loaded {
                assert_eq!(loaded.bytes, state(1, 400));
                assert!(at == 7 && kept == CHUNK - 1, "read {at} with {kept} bytes");
            }
        }
    }
}

/// Several who hold equal bytes send a share each; who holds others is found out before a byte is sent.
#[tokio::test]
async fn a_save_can_be_shared_and_whoever_holds_other_bits_is_named() {
    let blobs = in_memory();
    let bytes = state(5, CHUNK * 10 + 7);
    let whole: Arc<dyn CheckpointSource> = Arc::new(bytes.clone());
    for parts in [1, 2, 3, 20] {
        let step = 100 + parts as u64;
        let prepared = writer(&blobs)
            .prepare(request(step, None), Arc::clone(&whole))
            .await
            .unwrap();
        for share in split_pieces(prepared.missing(), parts) {
            let held: Arc<dyn CheckpointSource> = Arc::new(bytes.clone());
            writer(&blobs).upload(held, &share).await.unwrap();
        }
        let saved = writer(&blobs).finish(prepared).await.unwrap();
        let loaded = reader(&blobs).load(&saved.handle.reference).await.unwrap();
        assert_eq!(loaded.bytes, bytes, "{parts} parts");
    }
    let store = in_memory();
    let prepared = writer(&store)
        .prepare(request(1, None), whole)
        .await
        .unwrap();
    let mut other = bytes.to_vec();
    other[CHUNK * 3 + 1] ^= 1;
    let wrong = &prepared.missing()[3..4];
    let error = writer(&store)
        .upload(Arc::new(Bytes::from(other)), wrong)
        .await
        .unwrap_err();
    assert!(
        matches!(error, SaveError::Differs { offset: 192, .. }),
        "{error}"
    );
    assert_eq!(store.list("", 100).await.unwrap(), []);
}

#[tokio::test]
async fn a_manifest_without_its_chunks_is_passed_over() {
    let blobs = in_memory();
    let old = saved(&blobs, 1).await.reference;
    let new = saved(&blobs, 2).await;
    for chunk in &new.manifest.chunks {
        blobs.delete(&chunk.path()).await.unwrap();
    }
    let mut hollow = (*new.manifest).clone();
    (hollow.step, hollow.chunks) = (3, Vec::new());
    let bytes = hollow.to_bytes();
    let hollow = ManifestRef {
        path: hollow.path(),
        digest: crate::digest::Digest::of(&bytes),
    };
    blobs.put_if_absent(&hollow.path, bytes).await.unwrap();
    let references = [hollow, new.reference, old];
    let restored = reader(&blobs).load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.bytes, state(1, 400));
    let reasons: Vec<&str> = restored
        .rejected
        .iter()
        .map(|rejected| rejected.reason.as_str())
        .collect();
    assert!(reasons[0].contains("do not add up"), "{reasons:?}");
    assert!(reasons[1].contains("is missing"), "{reasons:?}");
}

/// A store that acknowledges half a write must be noticed by the reader.
#[tokio::test]
async fn a_truncated_write_is_noticed_and_the_older_checkpoint_is_used() {
    for at in 0.. {
        for kept in [0, 1, CHUNK - 1] {
            let (faults, through, direct) = faulty();
            let old = saved(&direct, 1).await.reference;
            faults.plan(at, Fault::Truncated(kept));
            let request = SaveRequest {
                sections: Vec::new(),
                ..request(2, None)
            };
            let new = writer(&through)
                .save(request, state(2, CHUNK * 6))
                .await
                .unwrap();
            if faults.operations() <= at {
                assert!(at > 6);
                return;
            }
            let references = [new.handle.reference.clone(), old];
            let restored = reader(&direct).load_newest(&references).await.unwrap();
            assert_eq!(restored.checkpoint.bytes, state(1, 400));
            assert_eq!(restored.rejected.len(), 1);
            assert!(
                restored.rejected[0].reason.contains("damaged"),
                "{:?}",
                restored.rejected
            );
        }
    }
}

/// Invariant 3, bit by bit: every byte of every blob of a checkpoint, one bit flipped.
#[tokio::test]
async fn a_flipped_bit_anywhere_is_detected_and_the_older_checkpoint_is_used() {
    let blobs = in_memory();
    let old = saved(&blobs, 1).await;
    let new = saved(&blobs, 2).await;
    let references = [new.reference.clone(), old.reference];
    let mut paths: Vec<String> = new.manifest.chunks.iter().map(ChunkRef::path).collect();
    paths.push(new.reference.path.clone());
    let mut flips = 0;
    for path in paths {
        let intact = blobs.get(&path, 1 << 20).await.unwrap();
        for at in 0..intact.len() {
            let mut flipped = intact.to_vec();
            flipped[at] ^= 1 << (at % 8);
            blobs.renew(&path, flipped.into()).await.unwrap();
            let restored = reader(&blobs).load_newest(&references).await.unwrap();
            assert_eq!(restored.checkpoint.bytes, state(1, 400), "{path} byte {at}");
            assert!(restored.rejected[0].reason.contains(&path));
            flips += 1;
        }
        blobs.renew(&path, intact).await.unwrap();
    }
    assert!(flips > 1000);
    let restored = reader(&blobs).load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.bytes, state(2, 400));
}

#[tokio::test]
async fn what_is_missing_is_passed_over_and_an_outage_is_not() {
    let (faults, through, direct) = faulty();
    let old = saved(&direct, 1).await.reference;
    let new = saved(&direct, 2).await;
    let references = [new.reference.clone(), old];
    faults.crash_at(0, Fault::BeforeStore);
    let error = reader(&through).load_newest(&references).await.unwrap_err();
    assert!(
        matches!(error, RestoreError::Load(LoadError::Blob(_))),
        "invariant 4: {error}"
    );
    let small = CheckpointReader::new(direct.clone(), 399);
    let error = small.load_newest(&references).await.unwrap_err();
    assert!(
        matches!(error, RestoreError::Load(LoadError::TooLarge { .. })),
        "{error}"
    );
    direct.delete(&new.manifest.chunks[2].path()).await.unwrap();
    let restored = reader(&direct).load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.bytes, state(1, 400));
    assert!(restored.rejected[0].reason.contains("is missing"));
    let error = reader(&direct)
        .load_newest(&references[..1])
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("none of 1 checkpoints"),
        "{error}"
    );
    assert!(reader(&direct).load_newest(&[]).await.is_err());
}

#[tokio::test]
async fn a_damaged_chunk_is_mended_by_the_next_save_of_the_same_bytes() {
    let blobs = in_memory();
    let first = saved(&blobs, 1).await;
    let path = first.manifest.chunks[0].path();
    blobs.renew(&path, "damage".into()).await.unwrap();
    assert!(reader(&blobs).load(&first.reference).await.is_err());
    saved(&blobs, 1).await;
    assert_eq!(
        reader(&blobs).load(&first.reference).await.unwrap().bytes,
        state(1, 400)
    );
}

/// A moment behind everything that was written so far, by the store's clock.
async fn later_ms(blobs: &BlobStore) -> u64 {
    let all = blobs.list("", 1000).await.unwrap();
    all.iter().map(|blob| blob.modified_ms).max().unwrap() + 1
}

/// Waits until the store's clock has reached `now_ms`, a millisecond or two away.
async fn pass(blobs: &BlobStore, now_ms: u64) {
    while later_ms(blobs).await <= now_ms {
        blobs.renew("clock", Bytes::new()).await.unwrap();
    }
}

/// More than there is.
const MANY: usize = 1000;

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
    assert_eq!(
        reader(&blobs).load(&kept.reference).await.unwrap().bytes,
        state(2, 400)
    );
    let left = blobs.list("", 100).await.unwrap();
    assert_eq!(
        left.len(),
        8,
        "seven chunks and a manifest; the plan is gone: {left:?}"
    );
    assert_eq!(
        sweeper.sweep(&plan).await.unwrap(),
        GcReport::default(),
        "again"
    );
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
        committed: Vec::new(),
        may_be_committed: stored.manifests().collect(),
    };
    let plan = sweeper.plan(&stored, &kept, now_ms, 0, MANY).await.unwrap();
    assert!(plan.is_empty(), "{plan:?}");
    sweeper.sweep(&plan).await.unwrap();
    assert!(reader(&blobs).load(&open.reference).await.is_ok());
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
