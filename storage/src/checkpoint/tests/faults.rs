//! A writer that dies, and a store that fails, stalls or lies, at each operation in turn.

use mobula_core::id::Incarnation;

use super::*;
use crate::blob::BlobErrorKind;
use crate::blob::fault::Fault;

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
            assert_eq!(
                loaded(&direct, &saved.handle.reference).await,
                state(2, 400),
                "{fault:?} at {at}"
            );
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
            assert_eq!(
                loaded(&direct, &saved.handle.reference).await,
                state(2, 400),
                "{fault:?} at {at}"
            );
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
            assert_eq!(loaded(&direct, &old).await, state(1, 400));
            faults.reset();
            let saved = save().await.unwrap();
            assert_eq!(
                loaded(&direct, &saved.handle.reference).await,
                state(2, 400)
            );
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

/// A store that acknowledges half a write must be noticed by the reader.
#[tokio::test]
async fn a_truncated_write_is_noticed_and_the_older_checkpoint_is_used() {
    // Between the last chunk and the manifest is asked which sweeps there are, which writes nothing.
    for at in (0..).filter(|at| *at != 6) {
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
