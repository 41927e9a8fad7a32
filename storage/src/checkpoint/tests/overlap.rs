//! Saves and sweeps at the same time: in whatever order their operations come, what is saved is whole.

use std::time::Duration;

use futures::future::join;

use super::sweep::{MANY, later_ms, pass};
use super::*;
use crate::blob::fault::Fault;
use crate::checkpoint::plans::{SWEEP_TIME_MAX, announced, mark_of};

/// How long one operation is held up, so that all of the other side comes in between.
const HELD_UP: Duration = Duration::from_secs(1);

/// The plan to delete chunks that nobody names and that are old by now: those of [`save_again`].
async fn plan_of_orphans(direct: &BlobStore) -> GcPlan {
    let dropped = saved(direct, 1).await;
    direct.delete(&dropped.reference.path).await.unwrap();
    let now_ms = later_ms(direct).await;
    let sweeper = Sweeper::new(direct.clone());
    let stored = sweeper.list().await.unwrap();
    let kept = Kept::default();
    let plan = sweeper.plan(&stored, &kept, now_ms, 0, MANY);
    let plan = plan.await.unwrap();
    assert_eq!(plan.chunks.len(), 7);
    pass(direct, now_ms).await;
    plan
}

async fn save_again(blobs: &BlobStore) -> Result<Saved, SaveError> {
    writer(blobs).save(request(1, None), state(1, 400)).await
}

#[tokio::test(start_paused = true)]
async fn a_save_that_comes_into_the_middle_of_a_sweep_loses_no_chunk() {
    for at in 0.. {
        let (faults, through, direct) = faulty();
        let plan = plan_of_orphans(&direct).await;
        faults.plan(at, Fault::Stalled(HELD_UP));
        // The sweep is polled first, and comes to the operation that is held up.
        let sweeper = Sweeper::new(through);
        let (swept, again) = join(sweeper.sweep(&plan), save_again(&direct)).await;
        swept.unwrap();
        let reference = again.unwrap().handle.reference;
        assert_eq!(loaded(&direct, &reference).await, state(1, 400), "at {at}");
        if faults.operations() <= at {
            assert!(at > 9, "the plans, the plan, seven looks, and the mark");
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_sweep_that_comes_into_the_middle_of_a_save_takes_no_chunk_of_it() {
    for at in 0.. {
        let (faults, through, direct) = faulty();
        let plan = plan_of_orphans(&direct).await;
        faults.plan(at, Fault::Stalled(HELD_UP));
        let sweeper = Sweeper::new(direct.clone());
        // Time passes only when the save is held up.
        let sweep = async {
            tokio::time::sleep(HELD_UP / 2).await;
            sweeper.sweep(&plan).await
        };
        let (again, swept) = join(save_again(&through), sweep).await;
        swept.unwrap();
        let reference = again.unwrap().handle.reference;
        assert_eq!(loaded(&direct, &reference).await, state(1, 400), "at {at}");
        if faults.operations() <= at {
            assert!(at > 14, "each chunk twice");
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn chunks_that_nothing_but_the_tables_will_name_are_safe_as_well() {
    for at in 0..12 {
        let (faults, through, direct) = faulty();
        let plan = plan_of_orphans(&direct).await;
        faults.plan(at, Fault::Stalled(HELD_UP));
        let sweeper = Sweeper::new(through);
        let writer = writer(&direct);
        let save = writer.save_chunks(Arc::new(state(1, 400)));
        let (swept, chunks) = join(sweeper.sweep(&plan), save).await;
        swept.unwrap();
        for chunk in chunks.unwrap() {
            let found = direct.head(&chunk.path()).await.unwrap();
            assert!(found.is_some(), "held up at {at}");
        }
    }
}

/// A sweep that dies may have sent a deletion that the store has not carried out yet.
#[tokio::test(start_paused = true)]
async fn a_sweep_that_gives_no_sign_is_waited_for_and_holds_up_nobody_else() {
    let (faults, through, direct) = faulty();
    let plan = plan_of_orphans(&direct).await;
    // The first look goes well; nobody knows of the deletion.
    faults.crash_at(3, Fault::BeforeStore);
    Sweeper::new(through).sweep(&plan).await.unwrap_err();
    let late = save_again(&direct).await.unwrap_err();
    assert!(matches!(late, SaveError::TooSlow { .. }), "{late}");
    assert_eq!(reader(&direct).list(JOB).await.unwrap(), []);
    // What no sweep names is saved at once.
    let begun = tokio::time::Instant::now();
    saved(&direct, 2).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);

    // It is carried out now, and somebody says that the sweep is over.
    direct.delete(&plan.chunks[0]).await.unwrap();
    let plans = announced(&direct).await.unwrap();
    let mark = mark_of(&plans[0].path);
    direct.put_if_absent(&mark, Bytes::new()).await.unwrap();
    let again = save_again(&direct).await.unwrap();
    assert_eq!(
        loaded(&direct, &again.handle.reference).await,
        state(1, 400)
    );
}

/// What S3 answers to two of our own tries at the same time looks like a plan of somebody else, as does what a try left
/// whose reply was lost.
#[tokio::test(start_paused = true)]
async fn a_sweep_knows_its_own_plan_again_and_no_save_waits_for_it() {
    for fault in [Fault::ReplyLost, Fault::Conflict] {
        let (faults, through, direct) = faulty();
        let plan = plan_of_orphans(&direct).await;
        // Behind the list of old plans.
        faults.plan(1, fault);
        let report = Sweeper::new(through).sweep(&plan).await.unwrap();
        assert_eq!(report.deleted, 7, "{fault:?}");
        let plans = announced(&direct).await.unwrap();
        assert_eq!((plans.len(), plans[0].is_over), (1, true), "{fault:?}");
        let begun = tokio::time::Instant::now();
        save_again(&direct).await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_sweep_whose_time_is_over_asks_for_nothing_more_and_does_not_say_that_it_is_over() {
    let (faults, through, direct) = faulty();
    let plan = plan_of_orphans(&direct).await;
    // A look, and the deletion that does not end.
    faults.plan(3, Fault::Stalled(SWEEP_TIME_MAX * 2));
    let swept = Sweeper::new(through).sweep(&plan).await;
    assert!(matches!(swept, Err(GcError::OutOfTime { .. })), "{swept:?}");
    assert_eq!(faults.operations(), 4);
    for path in &plan.chunks {
        assert!(direct.head(path).await.unwrap().is_some());
    }
    let plans = announced(&direct).await.unwrap();
    assert_eq!((plans.len(), plans[0].is_over), (1, false));
}
