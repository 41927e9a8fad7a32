//! A trainer without a process around it.

use mobula_storage::blob::{BlobStore, S3Options};

use super::*;
use crate::training::collective::InProcess;
use crate::training::parts::parts_of;
use crate::training::protocol::leader::Leader;
use crate::training::shape::leader_shape;

/// How long the steps may take on a machine that is busy with other tests.
const STEPS_MAX: Duration = Duration::from_secs(60);

const STEPS: u64 = 4;

/// A trainer that takes the steps of its job alone, the name under which it does, and its replica.
fn alone() -> (Trainer, MemberId, Arc<Mutex<Replica>>) {
    let spec = TrainSpec {
        steps: STEPS,
        ..TrainSpec::digits_mlp("a")
    };
    let mut replica = Replica::new(spec.clone());
    let held = replica.prepare(None).unwrap();
    let value_count = replica.value_count();
    let me = MemberId {
        slot: 0,
        incarnation: 1,
        entry: 1,
    };
    let shape = leader_shape(&spec, value_count);
    let mut leader = Leader::new(shape, Epoch::first_of(1), held.step);
    leader.seat([me]);
    let shape = member_shape(&spec, value_count);
    let mut member = Member::new(me, shape, held.step, held.short());
    member.adopt(leader.plan().clone()).unwrap();
    let replica = Arc::new(Mutex::new(replica));
    let collective = InProcess::default();
    let (runner, handle, board) = Runner::new(member, held, Arc::clone(&replica), collective);
    let mut task = JoinSet::new();
    task.spawn(runner.run());
    let shown = Shown {
        member: me,
        memory: Arc::new(SharedMemory::reader()),
        handle,
        board,
    };
    let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
    let trainer = Trainer {
        slot: 0,
        writer: CheckpointWriter::new(blobs),
        gpu: WatchedGpu::of(spec.device),
        turn: tokio::sync::Mutex::default(),
        giving: Semaphore::new(GIVEN_AT_ONCE),
        inner: Mutex::new(Inner {
            epoch: Epoch::first_of(1),
            replica: Arc::clone(&replica),
            arriving: Arriving::default(),
            leaving: Vec::new(),
            keep_order: KeepOrder::default(),
            share_order: KeepOrder::default(),
            shared: None,
            handover: None,
            entries: 1,
            memory: None,
            running: Some(Running { shown, _task: task }),
        }),
        spec,
    };
    (trainer, me, replica)
}

/// An order of the driver under which it takes its steps.
fn order(number: u64) -> KeepOrder {
    KeepOrder {
        driver_incarnation: 1,
        number,
    }
}

#[tokio::test]
async fn what_a_trainer_holds_is_told_while_it_computes() {
    let (trainer, me, replica) = alone();
    {
        // As the thread has it that computes a shard.
        let computing = replica.lock();
        let held = trainer.held();
        assert_eq!(held, computing.held().map(|held| (me, held)));
        assert!(held.is_some_and(|(_, held)| held.step == 0));
    }
    let taken = async {
        while trainer.held().is_none_or(|(_, held)| held.step < STEPS) {
            tokio::task::yield_now().await;
        }
    };
    let taken = tokio::time::timeout(STEPS_MAX, taken).await;
    taken.expect("it takes its steps");
    let held = replica.lock().held().map(|held| (me, held));
    assert_eq!(trainer.held(), held);
    // One whose work has ended is to be prepared anew.
    if let Some(running) = &mut trainer.inner.lock().running {
        running._task.abort_all();
    }
    let ended = async {
        while trainer.held().is_some() {
            tokio::task::yield_now().await;
        }
    };
    let ended = tokio::time::timeout(STEPS_MAX, ended).await;
    ended.expect("it holds nothing that could go on");
}

#[tokio::test]
async fn what_is_kept_for_those_who_join_is_given_in_parts_until_it_is_kept_no_more() {
    let (trainer, _, replica) = alone();
    let taken = async {
        while trainer.held().is_none_or(|(_, held)| held.step < STEPS) {
            tokio::task::yield_now().await;
        }
    };
    let taken = tokio::time::timeout(STEPS_MAX, taken).await;
    taken.expect("it takes its steps");
    let can = trainer.share(order(1), STEPS - 1).await.unwrap();
    assert!(!can, "that step is over");
    assert!(trainer.share(order(2), STEPS).await.unwrap());
    let bytes = replica.lock().state().unwrap();
    let parts = parts_of(&bytes, 10_000);
    let mut joined = Vec::new();
    for part in &parts {
        joined.extend(trainer.part(STEPS, *part).await.unwrap());
    }
    assert!(joined == bytes);
    let mut beyond = parts[0];
    beyond.offset = bytes.len() as u64 - 1;
    for (step, part) in [(STEPS, beyond), (STEPS - 1, parts[0])] {
        let error = trainer.part(step, part).await.unwrap_err();
        assert!(matches!(error, TrainerError::NotGiven(_)), "{error}");
    }
    trainer.unshare(order(1)).await;
    assert!(trainer.part(STEPS, parts[0]).await.is_ok(), "another order");
    trainer.unshare(order(2)).await;
    let error = trainer.part(STEPS, parts[0]).await.unwrap_err();
    assert!(matches!(error, TrainerError::NotGiven(_)), "{error}");
}

#[tokio::test]
async fn parts_that_do_not_follow_what_has_arrived_are_not_asked_for() {
    let (trainer, ..) = alone();
    let epoch = Epoch::first_of(1);
    let parts = parts_of(&[7; 100], 10);
    trainer.receive(epoch, 0, vec![7; 10]).await.unwrap();
    let begin = |parts: &[Piece]| trainer.begin_pull(epoch, parts).map(|(offset, _)| offset);
    assert_eq!(begin(&parts[1..4]), Ok(10));
    let apart = [parts[1], parts[3]];
    for wrong in [&parts[2..], &apart[..]] {
        let error = begin(wrong).unwrap_err();
        assert!(matches!(error, TrainerError::Misplaced { .. }), "{error}");
    }
    let error = trainer.begin_pull(Epoch::default(), &parts).unwrap_err();
    assert!(matches!(error, TrainerError::Stale { .. }), "{error}");
    // The first part is the beginning of another state.
    assert_eq!(begin(&parts), Ok(0));
    assert_eq!(trainer.inner.lock().arriving.length(), 0);
}

#[tokio::test]
async fn an_order_to_keep_a_state_that_has_ended_while_it_waited_for_the_replica_keeps_nothing() {
    let (trainer, _, replica) = alone();
    // No such step: it is wanted for as long as it is not ended.
    let step = STEPS + 1;
    let (release, computing) = busy(&replica).await;
    let mut kept = Box::pin(trainer.share(order(1), step));
    assert!(futures::poll!(kept.as_mut()).is_pending());
    // Whoever asked for it has given up waiting.
    drop(kept);
    let mut ended = Box::pin(trainer.unshare(order(1)));
    assert!(futures::poll!(ended.as_mut()).is_pending());
    assert!(trainer.inner.lock().shared.is_none());
    release.send(()).unwrap();
    computing.await.unwrap();
    ended.await;
    assert!(matches!(replica.lock().shared(step), Kept::Never));
    // Nor does it where it comes again, or late.
    assert!(!trainer.share(order(1), step).await.unwrap());
    assert!(trainer.inner.lock().shared.is_none());
    assert!(trainer.share(order(2), step).await.unwrap());
}

/// The replica, with a shard that is computed until that is released.
async fn busy(
    replica: &Arc<Mutex<Replica>>,
) -> (std::sync::mpsc::Sender<()>, tokio::task::JoinHandle<()>) {
    let (locked, is_locked) = tokio::sync::oneshot::channel();
    let (release, is_released) = std::sync::mpsc::channel::<()>();
    let shard = Arc::clone(replica);
    let computing = tokio::task::spawn_blocking(move || {
        let _computing = shard.lock();
        locked.send(()).expect("it is waited for");
        is_released.recv().expect("it is released");
    });
    is_locked.await.unwrap();
    (release, computing)
}

#[tokio::test]
async fn a_late_order_of_an_older_driver_to_keep_a_state_is_refused() {
    let (trainer, _, replica) = alone();
    // No such steps: they are wanted for as long as they are not ended.
    let [ours, theirs] = [STEPS + 1, STEPS + 2];
    let next = KeepOrder::before_all_of(2).next();
    assert!(trainer.share(next, ours).await.unwrap());
    assert!(trainer.keep(next, ours).await.unwrap());
    let shared = trainer.share(order(7), theirs).await.unwrap_err();
    let kept = trainer.keep(order(7), theirs).await.unwrap_err();
    for error in [shared, kept] {
        assert!(matches!(error, TrainerError::Stale { .. }), "{error}");
    }
    trainer.unshare(order(8)).await;
    {
        let replica = replica.lock();
        for kept in [replica.shared(ours), replica.kept(ours)] {
            assert!(matches!(kept, Kept::Coming), "{kept:?}");
        }
        for kept in [replica.shared(theirs), replica.kept(theirs)] {
            assert!(matches!(kept, Kept::Never), "{kept:?}");
        }
    }
    // Nor does one of the same driver count that comes after a later one.
    let later = next.next();
    assert!(trainer.share(later.next(), ours).await.unwrap());
    assert!(trainer.keep(later.next(), ours).await.unwrap());
    assert!(!trainer.share(later, theirs).await.unwrap());
    assert!(!trainer.keep(later, theirs).await.unwrap());
    let order = trainer.inner.lock().shared.as_ref().map(|it| it.order);
    assert_eq!(order, Some(later.next()));
}

#[tokio::test]
async fn a_late_end_of_a_save_takes_nothing_from_a_newer_save_of_the_same_step() {
    let (trainer, _, replica) = alone();
    // No such step: it is wanted for as long as it is not ended.
    let step = STEPS + 1;
    let is_kept = || matches!(replica.lock().kept(step), Kept::Coming);
    assert!(trainer.keep(order(1), step).await.unwrap());
    assert!(trainer.keep(order(2), step).await.unwrap());
    trainer.release(order(1)).await;
    assert!(is_kept(), "another order");
    // The next driver saves that step again.
    let next = KeepOrder::before_all_of(2).next();
    assert!(trainer.keep(next, step).await.unwrap());
    trainer.release(order(2)).await;
    assert!(is_kept(), "an order of another driver");
    // One that was heard before the newer order, and waits for the replica when that comes.
    let (release, computing) = busy(&replica).await;
    let mut ended = Box::pin(trainer.release(next));
    assert!(futures::poll!(ended.as_mut()).is_pending());
    let later = next.next();
    let mut kept = Box::pin(trainer.keep(later, step));
    assert!(futures::poll!(kept.as_mut()).is_pending());
    release.send(()).unwrap();
    computing.await.unwrap();
    ended.await;
    assert!(kept.await.unwrap() && is_kept());
    trainer.release(later).await;
    assert!(!is_kept());
    // Nor does it come to be kept by an order that comes behind its end.
    assert!(!trainer.keep(later, step).await.unwrap());
}

#[tokio::test]
async fn what_a_replaced_driver_asked_to_keep_for_a_checkpoint_ends_by_its_word() {
    let (trainer, _, replica) = alone();
    let step = STEPS + 1;
    assert!(trainer.keep(order(1), step).await.unwrap());
    let next = Epoch::first_of(2);
    trainer.receive(next, 0, Vec::new()).await.unwrap();
    trainer.release(order(1)).await;
    assert!(matches!(replica.lock().kept(step), Kept::Never));
}

#[tokio::test]
async fn an_order_that_waits_for_the_replica_when_another_driver_comes_keeps_nothing() {
    let (trainer, _, replica) = alone();
    let step = STEPS + 1;
    let (release, computing) = busy(&replica).await;
    let mut kept = Box::pin(trainer.share(order(1), step));
    assert!(futures::poll!(kept.as_mut()).is_pending());
    let next = Epoch::first_of(2);
    trainer.receive(next, 0, Vec::new()).await.unwrap();
    release.send(()).unwrap();
    computing.await.unwrap();
    assert!(!kept.await.unwrap());
    assert!(trainer.inner.lock().shared.is_none());
    let ended = async {
        while !matches!(replica.lock().shared(step), Kept::Never) {
            tokio::task::yield_now().await;
        }
    };
    let ended = tokio::time::timeout(STEPS_MAX, ended).await;
    ended.expect("it is kept no more");
}

#[tokio::test]
async fn few_parts_are_read_at_once_and_who_asks_for_another_waits() {
    let (trainer, _, replica) = alone();
    assert!(trainer.share(order(1), STEPS).await.unwrap());
    let taken = async {
        // The first who asks waits for the step.
        while !matches!(replica.lock().shared(STEPS), Kept::Here(_)) {
            tokio::task::yield_now().await;
        }
    };
    let taken = tokio::time::timeout(STEPS_MAX, taken).await;
    taken.expect("it takes its steps");
    let bytes = replica.lock().state().unwrap();
    let part = parts_of(&bytes, 10_000)[0];
    trainer.part(STEPS, part).await.unwrap();
    let all = trainer.giving.acquire_many(GIVEN_AT_ONCE as u32).await;
    let mut asked = Box::pin(trainer.part(STEPS, part));
    assert!(futures::poll!(asked.as_mut()).is_pending());
    drop(all);
    let free = trainer.giving.available_permits();
    assert_eq!(free, GIVEN_AT_ONCE - 1, "it has waited for its turn");
    assert_eq!(asked.await.unwrap().len() as u64, part.chunk.length);
    assert_eq!(trainer.giving.available_permits(), GIVEN_AT_ONCE);
}

#[tokio::test]
async fn what_is_kept_for_those_who_join_does_not_outlive_the_driver_that_asked_for_it() {
    let (trainer, _, replica) = alone();
    // No such step: it is wanted for as long as it is not ended.
    let step = STEPS + 1;
    assert!(trainer.share(order(1), step).await.unwrap());
    let first = Epoch::first_of(1).next();
    trainer.receive(first, 0, Vec::new()).await.unwrap();
    assert!(trainer.inner.lock().shared.is_some(), "the same driver");
    assert!(matches!(replica.lock().shared(step), Kept::Coming));
    let next = Epoch::first_of(2);
    trainer.receive(next, 0, Vec::new()).await.unwrap();
    assert!(trainer.inner.lock().shared.is_none());
    let ended = async {
        while !matches!(replica.lock().shared(step), Kept::Never) {
            tokio::task::yield_now().await;
        }
    };
    let ended = tokio::time::timeout(STEPS_MAX, ended).await;
    ended.expect("it is kept no more");
}
