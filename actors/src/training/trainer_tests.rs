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
        sharing: Arc::default(),
        giving: Semaphore::new(GIVEN_AT_ONCE),
        inner: Mutex::new(Inner {
            epoch: Epoch::first_of(1),
            replica: Arc::clone(&replica),
            arriving: Arriving::default(),
            leaving: Vec::new(),
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
    assert!(!trainer.share(STEPS - 1).await, "that step is over");
    assert!(trainer.share(STEPS).await);
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
    trainer.unshare(STEPS - 1).await;
    assert!(trainer.part(STEPS, parts[0]).await.is_ok(), "another step");
    trainer.unshare(STEPS).await;
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
async fn an_order_to_keep_a_state_no_more_does_not_overtake_the_one_to_keep_it() {
    let (trainer, _, replica) = alone();
    // No such step: it is wanted for as long as it is not ended.
    let step = STEPS + 1;
    let (locked, is_locked) = tokio::sync::oneshot::channel();
    let (release, is_released) = std::sync::mpsc::channel::<()>();
    let shard = Arc::clone(&replica);
    let computing = tokio::task::spawn_blocking(move || {
        let _computing = shard.lock();
        locked.send(()).expect("it is waited for");
        is_released.recv().expect("it is released");
    });
    is_locked.await.unwrap();
    let mut kept = Box::pin(trainer.share(step));
    assert!(futures::poll!(kept.as_mut()).is_pending());
    // Whoever asked for it has given up waiting.
    drop(kept);
    let mut ended = Box::pin(trainer.unshare(step));
    assert!(futures::poll!(ended.as_mut()).is_pending());
    assert!(
        trainer.sharing.try_lock().is_err(),
        "the first has its turn"
    );
    release.send(()).unwrap();
    computing.await.unwrap();
    ended.await;
    assert!(matches!(replica.lock().shared(step), Kept::Never));
    assert!(trainer.inner.lock().shared.is_none());
}

#[tokio::test]
async fn few_parts_are_read_at_once_and_who_asks_for_another_waits() {
    let (trainer, _, replica) = alone();
    assert!(trainer.share(STEPS).await);
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
    assert!(trainer.share(step).await);
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
