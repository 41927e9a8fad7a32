//! A trainer without a process around it.

use mobula_storage::blob::{BlobStore, S3Options};

use super::*;
use crate::training::collective::InProcess;
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
        inner: Mutex::new(Inner {
            epoch: Epoch::first_of(1),
            replica: Arc::clone(&replica),
            arriving: Vec::new(),
            leaving: Vec::new(),
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
