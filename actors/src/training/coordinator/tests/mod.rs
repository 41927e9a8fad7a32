//! The coordinator with trainers in this process, which die, lag, err and leave on schedule. The oracle is
//! the same job run alone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use mobula_core::{Incarnation, JobId};
use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::checkpoint::{
    CheckpointReader, CheckpointSource, CheckpointWriter, Piece, SaveRequest,
};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::*;
use crate::checkpoint::sharing;
use crate::training::collective::InProcess;
use crate::training::collective::runner::{Board, Runner, RunnerHandle};
use crate::training::crew::LinkError;
use crate::training::data::Files;
use crate::training::job::now_ms;
use crate::training::local::LocalTrainer;
use crate::training::messages::{Greeting, Handover, News, TrainerError};
use crate::training::models::ModelSpec;
use crate::training::protocol::exchange::{Ask, Contribution};
use crate::training::protocol::leader::StateDigest;
use crate::training::protocol::plan::Plan;
use crate::training::random::{Purpose, Stream};
use crate::training::replica::{Kept, Replica, load};
use crate::training::snapshot::StateSnapshot;

/// What happens to a trainer when it first sends or asks for something of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The process dies before, and starts again.
    Crash,
    /// The message is sent, then the process dies.
    CrashAfter,
    /// The message takes longer than is usual.
    Slow,
    /// Its next update is wrong in a bit.
    FlippedBit,
    /// Its node is given notice.
    Notice,
}

static WEAK_SPOT: AtomicUsize = AtomicUsize::new(0);

#[derive(Clone)]
struct FakeTrainer {
    slot: u32,
    others: InProcess,
    blobs: BlobStore,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    spec: TrainSpec,
    replica: Arc<Mutex<Replica>>,
    incarnation: u64,
    entry: u64,
    notice_ms: Option<u64>,
    epoch: Epoch,
    running: Option<(RunnerHandle, watch::Receiver<Board>, JoinSet<()>)>,
    faults: BTreeMap<u64, Fault>,
    /// Trainers to which nothing of this one gets.
    cut_off: Vec<u32>,
    handover: Option<Handover>,
    log: Vec<&'static str>,
}

impl Inner {
    fn me(&self, slot: u32) -> MemberId {
        MemberId {
            slot,
            incarnation: self.incarnation,
            entry: self.entry,
        }
    }

    fn restart(&mut self) {
        self.incarnation += 1;
        self.entry = 0;
        self.notice_ms = None;
        self.epoch = Epoch::default();
        self.running = None;
        self.replica = Arc::new(Mutex::new(Replica::new(self.spec.clone())));
    }

    fn shown(&self) -> Result<(RunnerHandle, watch::Receiver<Board>), LinkError> {
        let running = self.running.as_ref();
        let (handle, board, _) = running.ok_or(TrainerError::Unprepared)?;
        Ok((handle.clone(), board.clone()))
    }
}

impl FakeTrainer {
    fn fault(&self, step: u64) -> Option<Fault> {
        let mut inner = self.inner.lock();
        let due = inner
            .faults
            .first_entry()
            .filter(|due| *due.key() <= step)?;
        let fault = due.remove();
        match fault {
            Fault::FlippedBit => {
                let spot = WEAK_SPOT.fetch_add(1, Ordering::Relaxed);
                inner.replica.lock().spoil_next_update(spot);
            }
            Fault::Notice => inner.notice_ms = Some(1),
            Fault::Crash => self.crash(&mut inner),
            Fault::CrashAfter | Fault::Slow => {}
        }
        Some(fault)
    }

    fn crash(&self, inner: &mut Inner) {
        self.others.leave(self.slot);
        inner.restart();
    }

    async fn pass<T>(
        &self,
        to: MemberId,
        step: u64,
        message: impl Future<Output = Result<T, Unreachable>>,
    ) -> Result<T, Unreachable> {
        if self.inner.lock().cut_off.contains(&to.slot) {
            let reason = "the way is cut".to_owned();
            return Err(Unreachable { member: to, reason });
        }
        let fault = self.fault(step);
        if fault == Some(Fault::Slow) {
            tokio::time::sleep(Duration::from_millis(1500)).await;
        }
        if fault == Some(Fault::Crash) {
            let reason = "killed".to_owned();
            return Err(Unreachable { member: to, reason });
        }
        let answer = message.await;
        if fault == Some(Fault::CrashAfter) {
            self.crash(&mut self.inner.lock());
        }
        answer
    }
}

impl Collective for FakeTrainer {
    async fn contribute(
        &self,
        to: MemberId,
        contribution: Contribution,
    ) -> Result<Result<(), Refusal>, Unreachable> {
        let step = contribution.step;
        let message = self.others.contribute(to, contribution);
        self.pass(to, step, message).await
    }

    async fn ask(&self, to: MemberId, ask: Ask) -> Result<Result<Partial, Refusal>, Unreachable> {
        self.pass(to, ask.step, self.others.ask(to, ask)).await
    }
}

impl TrainerLink for FakeTrainer {
    async fn greet(&self) -> Result<Greeting, LinkError> {
        let inner = self.inner.lock();
        let held = inner.replica.lock().held();
        let member = inner.running.is_some().then(|| inner.me(self.slot));
        Ok(Greeting {
            incarnation: inner.incarnation,
            node_name: format!("worker-{}", self.slot),
            held: member.zip(held),
            notice_ms: inner.notice_ms,
        })
    }

    async fn prepare(
        &self,
        plan: Plan,
        state: Arc<Vec<u8>>,
    ) -> Result<(MemberId, Held), LinkError> {
        let mut inner = self.inner.lock();
        inner.log.push("prepare");
        inner.epoch = inner.epoch.max(plan.epoch);
        inner.running = None;
        let mut replica = inner.replica.lock().successor();
        let held = replica.prepare(Some(&state))?;
        inner.replica = Arc::new(Mutex::new(replica));
        inner.entry += 1;
        let me = inner.me(self.slot);
        let value_count = inner.replica.lock().value_count();
        let shape = member_shape(&inner.spec, value_count);
        let mut member = Member::new(me, shape, held.step, held.short());
        member.adopt(plan).unwrap();
        let (runner, handle, board) = Runner::new(member, Arc::clone(&inner.replica), self.clone());
        let mut task = JoinSet::new();
        task.spawn(runner.run());
        self.others.enter(me, handle.clone());
        inner.running = Some((handle, board, task));
        Ok((me, held))
    }

    async fn adopt(&self, plan: Plan) -> Result<(), LinkError> {
        let found = plan.epoch;
        let (handle, _) = {
            let mut inner = self.inner.lock();
            inner.epoch = inner.epoch.max(plan.epoch);
            inner.shown()?
        };
        match handle.adopt(plan).await {
            Some(Ok(())) => Ok(()),
            Some(Err(current)) => Err(TrainerError::Stale { found, current }.into()),
            None => Err(LinkError::Lost("killed".to_owned())),
        }
    }

    async fn news(&self, epoch: Epoch, known: u64) -> Result<News, LinkError> {
        let (_, mut board) = self.inner.lock().shown()?;
        let reported = board.wait_for(|board| board.number > known);
        let _ = tokio::time::timeout(Duration::from_millis(10), reported).await;
        let shown = board.borrow().clone();
        if let Some(failed) = shown.failed {
            return Err(failed.into());
        }
        if board.has_changed().is_err() {
            return Err(LinkError::Lost("killed".to_owned()));
        }
        let inner = self.inner.lock();
        let current = inner.epoch;
        if current.driver_incarnation() > epoch.driver_incarnation() {
            let found = epoch;
            return Err(TrainerError::Stale { found, current }.into());
        }
        let new = shown.reports.iter().filter(|(number, _)| *number > known);
        Ok(News {
            spent: Default::default(),
            number: shown.number,
            member: inner.me(self.slot),
            step: shown.step,
            reports: new.map(|(_, report)| *report).collect(),
            notice_ms: inner.notice_ms,
        })
    }

    async fn digest_before(&self, step: u64) -> Result<Option<StateDigest>, LinkError> {
        let (handle, _) = self.inner.lock().shown()?;
        let lost = || LinkError::Lost("killed".to_owned());
        handle.digest_before(step).await.ok_or_else(lost)
    }

    async fn keep(&self, step: u64) -> Result<bool, LinkError> {
        let replica = Arc::clone(&self.inner.lock().replica);
        let keeps = replica.lock().keep(step);
        Ok(keeps)
    }

    async fn store(&self, step: u64, pieces: Vec<Piece>) -> Result<(), LinkError> {
        let replica = Arc::clone(&self.inner.lock().replica);
        let Kept::Here(state) = replica.lock().kept(step) else {
            return Err(TrainerError::NotKept { step }.into());
        };
        let writer = CheckpointWriter::new(self.blobs.clone());
        let stored = writer.upload(state, &pieces).await;
        stored.map_err(|error| LinkError::Lost(error.to_string()))
    }

    async fn release(&self, step: u64) -> Result<(), LinkError> {
        self.inner.lock().replica.lock().release(step);
        Ok(())
    }

    async fn entrust(&self, _: Epoch, handover: Handover) -> Result<(), LinkError> {
        self.inner.lock().handover = Some(handover);
        Ok(())
    }

    async fn leave(&self) -> Result<(), LinkError> {
        let mut inner = self.inner.lock();
        inner.log.push("leave");
        self.crash(&mut inner);
        Ok(())
    }
}

/// Trainers of a job, each with its faults by step.
fn trainers(
    spec: &TrainSpec,
    faults: impl IntoIterator<Item = Vec<(u64, Fault)>>,
) -> Vec<FakeTrainer> {
    let others = InProcess::default();
    let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
    let trainer = |(slot, faults): (usize, Vec<(u64, Fault)>)| FakeTrainer {
        slot: slot as u32,
        others: others.clone(),
        blobs: blobs.clone(),
        inner: Arc::new(Mutex::new(Inner {
            spec: spec.clone(),
            replica: Arc::new(Mutex::new(Replica::new(spec.clone()))),
            incarnation: 1,
            entry: 0,
            notice_ms: None,
            epoch: Epoch::default(),
            running: None,
            faults: faults.into_iter().collect(),
            cut_off: Vec::new(),
            handover: None,
            log: Vec::new(),
        })),
    };
    faults.into_iter().enumerate().map(trainer).collect()
}

fn spec(steps: u64, min: u32, max: u32) -> TrainSpec {
    let mut spec = TrainSpec {
        steps,
        global_batch: 64,
        // Large enough that every trainer owns a bucket and so sends something in every step, which is when
        // faults happen.
        model: ModelSpec::Mlp {
            hidden: vec![256, 192],
        },
        ..TrainSpec::digits_mlp("a")
    };
    spec.workers = crate::training::spec::WorkerRange { min, max };
    spec
}

fn expected(spec: &TrainSpec) -> String {
    let workload = load(spec, &Files::local()).unwrap();
    let mut alone = LocalTrainer::new(&workload).unwrap();
    alone.run(1).unwrap();
    alone.state().weights_blake3()
}

type Tested = Coordinator<FakeTrainer, InProcess>;

fn coordinator(spec: &TrainSpec, driver_incarnation: u64, trainers: &[FakeTrainer]) -> Tested {
    let workload = load(spec, &Files::local()).unwrap();
    let state = TrainState::initial(&workload);
    Coordinator::new(
        &workload,
        state,
        Epoch::first_of(driver_incarnation),
        trainers.to_vec(),
        trainers[0].others.clone(),
        Counters::default(),
        JobLog::Silent,
    )
}

async fn run(spec: &TrainSpec, trainers: &[FakeTrainer]) -> Tested {
    let mut coordinator = coordinator(spec, 1, trainers);
    let work = async {
        while coordinator.state().step < spec.steps {
            coordinator.advance().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .expect("the job ends");
    coordinator
}

#[tokio::test]
async fn undisturbed_trainers_give_the_oracles_bits() {
    let spec = spec(12, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = run(&spec, &trainers).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    assert_eq!(coordinator.confirm().await, 3);
    // A busy machine may make an answer slow; nothing else may happen.
    let slow_orders = coordinator.counters().slow_orders;
    let expected = Counters {
        slow_orders,
        ..Counters::default()
    };
    assert_eq!(coordinator.counters(), expected);
}

#[tokio::test]
async fn any_number_of_trainers_ends_in_the_same_bits() {
    let hash = expected(&spec(12, 1, 1));
    for count in [1, 2, 3, 4, 5, 7, 8] {
        let spec = spec(12, count, count);
        let trainers = trainers(&spec, vec![vec![]; count as usize]);
        let mut coordinator = run(&spec, &trainers).await;
        assert_eq!(coordinator.digest(), hash, "{count} trainers");
        assert_eq!(coordinator.confirm().await, count as usize);
    }
}

#[tokio::test]
async fn each_fault_is_survived_and_counted() {
    // More steps than trainers may be ahead of the coordinator's copy, which counts the faults.
    let spec = spec(90, 2, 2);
    let hash = expected(&spec);
    let after = async |fault| {
        let trainers = trainers(&spec, [vec![], vec![(5, fault)]]);
        let coordinator = run(&spec, &trainers).await;
        let log = trainers[1].inner.lock().log.clone();
        (coordinator.digest().to_owned(), coordinator.counters(), log)
    };
    for fault in [Fault::Crash, Fault::CrashAfter] {
        let (digest, counters, _) = after(fault).await;
        assert_eq!(
            (digest, counters.trainers_lost),
            (hash.clone(), 1),
            "{fault:?}"
        );
        assert!(
            (1..=8).contains(&counters.reassigned_shards),
            "{fault:?}: its half of one step at most, {counters:?}"
        );
    }
    let (digest, counters, _) = after(Fault::Slow).await;
    assert_eq!((digest, counters.trainers_lost), (hash.clone(), 0));
    let (digest, counters, log) = after(Fault::FlippedBit).await;
    assert_eq!((digest, counters.digest_mismatches), (hash.clone(), 1));
    assert_eq!(log, ["prepare", "prepare"]);
    let (digest, counters, log) = after(Fault::Notice).await;
    assert_eq!(
        (digest, counters.handoffs, counters.trainers_lost),
        (hash.clone(), 1, 0)
    );
    assert_eq!(log[..2], ["prepare", "leave"]);
}

#[tokio::test]
async fn when_all_trainers_die_no_step_is_lost() {
    let spec = spec(80, 2, 2);
    let faults = vec![(4, Fault::Crash), (70, Fault::CrashAfter)];
    let trainers = trainers(&spec, vec![faults; 2]);
    let coordinator = run(&spec, &trainers).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    let counters = coordinator.counters();
    assert!(counters.trainers_lost >= 2, "{counters:?}");
    assert!(counters.trainer_restarts >= 3, "{counters:?}");
}

#[tokio::test]
async fn random_faults_never_change_the_bits() {
    let spec = spec(100, 2, 4);
    let hash = expected(&spec);
    let mut disturbances = 0;
    for seed in 0..12 {
        let stream = Stream::new(seed, Purpose::DataOrder, "faults", 0);
        let kinds = [
            Fault::Crash,
            Fault::CrashAfter,
            Fault::FlippedBit,
            Fault::Notice,
        ];
        let faults = (0..4u32).map(|trainer| {
            let faults = (1..90).filter_map(|step| {
                let bits = stream.bits(step, trainer);
                bits.is_multiple_of(17)
                    .then(|| (step, kinds[(bits >> 8) as usize % kinds.len()]))
            });
            faults.collect()
        });
        let trainers = trainers(&spec, faults);
        let coordinator = run(&spec, &trainers).await;
        assert_eq!(coordinator.digest(), hash, "seed {seed}");
        let counters = coordinator.counters();
        disturbances += counters.trainers_lost + counters.handoffs + counters.digest_mismatches;
    }
    assert!(disturbances > 60, "only {disturbances} disturbances");
}

#[tokio::test]
async fn trainers_that_do_not_reach_each_other_stop_nobody() {
    let spec = spec(20, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    trainers[0].inner.lock().cut_off = vec![1];
    trainers[1].inner.lock().cut_off = vec![0];
    let mut spec_of_two = spec.clone();
    spec_of_two.workers.min = 2;
    let coordinator = run(&spec_of_two, &trainers).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    // The third one may do for both what they cannot do for each other, before one of them is left out.
    let counters = coordinator.counters();
    assert!(counters.trainers_lost + counters.slow_orders >= 1);
}

#[tokio::test]
async fn a_newer_driver_stops_an_older_one() {
    let spec = spec(200, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut old = coordinator(&spec, 5, &trainers);
    for _ in 0..3 {
        old.advance().await.unwrap();
    }
    let mut new = coordinator(&spec, 9, &trainers);
    new.advance().await.unwrap();
    let fenced = loop {
        if let Err(error) = old.advance().await {
            break error;
        }
    };
    assert_eq!(fenced, CoordinatorError::Fenced(9));
    while new.state().step < spec.steps {
        new.advance().await.unwrap();
    }
    assert_eq!(new.digest(), expected(&spec));
}

#[tokio::test]
async fn a_damaged_coordinator_is_outvoted() {
    let spec = spec(50, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    coordinator.advance().await.unwrap();
    coordinator.advance().await.unwrap();
    coordinator.state.params[0] += 1.0;
    coordinator.digest = coordinator.state.weights_blake3();
    let digest = short_digest(&coordinator.digest);
    let shape = member_shape(&spec, coordinator.state.params.len());
    coordinator.member = Member::new(coordinator.me, shape, 2, digest);
    // What was asked with the right bits may still be answered.
    coordinator.calls = JoinSet::new();
    coordinator.publish();
    let error = coordinator.advance().await.unwrap_err();
    assert!(
        matches!(
            error,
            CoordinatorError::Outvoted {
                count: 2,
                step: 2,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn unfit_data_ends_the_job_with_its_reason() {
    let spec = spec(5, 1, 1);
    let absent = TrainSpec {
        dataset: toml::from_str("[csv]\nfiles = [\"/nowhere.csv\"]\n").unwrap(),
        ..spec.clone()
    };
    let mut coordinator = coordinator(&spec, 1, &trainers(&absent, [vec![]]));
    let error = coordinator.advance().await.unwrap_err().to_string();
    assert!(
        error.starts_with("trainer-0 on worker-0: cannot read data file /nowhere.csv"),
        "{error}"
    );
}

#[tokio::test]
async fn a_witness_holds_the_very_bits_and_says_whether_its_machine_stays() {
    let spec = spec(40, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    while coordinator.state().step < 5 {
        coordinator.advance().await.unwrap();
    }
    let limit = Duration::from_secs(10);
    let slots = |witnesses: Vec<Witness>| -> Vec<(usize, bool)> {
        let slots = witnesses.iter();
        slots.map(|one| (one.slot, one.is_doomed)).collect()
    };
    // They are ahead of the copy by now, and know what they held where it stands.
    trainers[1].inner.lock().notice_ms = Some(1);
    let witnesses = coordinator.witnesses(limit).await;
    assert_eq!(slots(witnesses), [(0, false), (1, true), (2, false)]);
    let in_an_hour = now_ms() + 3_600_000;
    assert!(
        !coordinator.stays(1, in_an_hour),
        "a state of one chunk is saved alone"
    );
    trainers[2].crash(&mut trainers[2].inner.lock());
    let witnesses = coordinator.witnesses(limit).await;
    assert_eq!(slots(witnesses), [(0, false), (1, true)]);
    // A copy with other bits has none.
    coordinator.digest = blake3::hash(b"other").to_hex().to_string();
    assert_eq!(coordinator.witnesses(limit).await, []);
}

async fn follow_to(step: u64, coordinator: &mut Tested) {
    while coordinator.state().step < step {
        coordinator.advance().await.unwrap();
    }
}

#[tokio::test]
async fn trainers_keep_the_state_of_a_save_and_store_their_share_of_it() {
    let spec = spec(200, 3, 3);
    let trainers = trainers(&spec, vec![vec![]; 3]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(3, &mut coordinator).await;
    // None of them has taken that step yet, however far ahead they are.
    let step = 3 + coordinator.lead_max() + 1;
    coordinator.prepare_save(step, "worker-0");
    follow_to(step, &mut coordinator).await;
    let helpers = coordinator.helpers(step);
    let names: Vec<String> = helpers.iter().map(|helper| helper.name()).collect();
    assert_eq!(names, ["trainer-1 on worker-1", "trainer-2 on worker-2"]);
    assert!(coordinator.helpers(step + 1).is_empty());

    let blobs = &trainers[0].blobs;
    let writer = CheckpointWriter::new(blobs.clone()).with_chunk_bytes(10_000);
    let state: Arc<dyn CheckpointSource> = Arc::new(StateSnapshot::of(coordinator.state()));
    let request = SaveRequest {
        job: JobId(1),
        step,
        incarnation: Incarnation(1),
        parent: None,
        sections: Vec::new(),
        metadata: BTreeMap::new(),
    };
    let prepared = writer.prepare(request, Arc::clone(&state)).await.unwrap();
    let missing = prepared.missing();
    let shares = sharing::upload(&writer, &state, step, missing, &helpers).await;
    for share in shares.unwrap() {
        assert!(share.bytes > 0 && share.failed.is_none(), "{share}");
    }
    let saved = writer.finish(prepared).await.unwrap();
    let read = CheckpointReader::new(blobs.clone(), 1 << 30)
        .load(&saved.handle.reference)
        .await
        .unwrap();
    assert!(read.bytes == coordinator.state().to_bytes());
    // They keep it no more, and whoever asked again would be told.
    let kept = trainers[1].inner.lock().replica.lock().kept(step);
    assert!(matches!(kept, Kept::Never));
}

#[tokio::test]
async fn trainers_whose_machines_all_go_stay_until_the_save_is_shared_and_then_leave() {
    let mut spec = spec(200, 2, 2);
    // More than a chunk, with its moments.
    spec.model = ModelSpec::Mlp {
        hidden: vec![1024, 768],
    };
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(2, &mut coordinator).await;
    let in_an_hour = now_ms() + 3_600_000;
    assert!(
        coordinator.stays(0, in_an_hour),
        "the driver may need it soon"
    );
    assert!(!coordinator.stays(1, 1), "its time is over");
    for trainer in &trainers {
        trainer.inner.lock().notice_ms = Some(1);
    }
    let step = coordinator.gather("worker-0");
    follow_to(step, &mut coordinator).await;
    let helpers = coordinator.helpers(step);
    let names: Vec<String> = helpers.iter().map(|helper| helper.name()).collect();
    assert_eq!(names, ["trainer-1 on worker-1"]);
    let has_left = |trainer: &FakeTrainer| trainer.inner.lock().log.contains(&"leave");
    assert!(!trainers.iter().any(has_left));
    coordinator.disperse();
    while !trainers.iter().any(has_left) {
        assert!(
            coordinator.state().step < spec.steps,
            "they leave in the end"
        );
        coordinator.advance().await.unwrap();
    }
}

#[tokio::test]
async fn halted_trainers_come_to_the_gate_keep_what_is_left_with_them_and_go_on_when_they_may() {
    let spec = spec(200, 2, 2);
    let trainers = trainers(&spec, vec![vec![]; 2]);
    let mut coordinator = coordinator(&spec, 1, &trainers);
    follow_to(2, &mut coordinator).await;
    let gate = coordinator.halt();
    follow_to(gate, &mut coordinator).await;
    // Behind the gate there is nothing to follow to.
    let further = tokio::time::timeout(Duration::from_millis(100), coordinator.advance()).await;
    assert!(further.is_err());
    let handover = Handover {
        step: gate,
        metadata: BTreeMap::from([("history".to_owned(), "{}".to_owned())]),
    };
    let limit = Duration::from_secs(10);
    let witnesses = coordinator.witnesses(limit).await;
    let slots: Vec<usize> = witnesses.iter().map(|witness| witness.slot).collect();
    assert_eq!(slots, [0, 1]);
    assert_eq!(coordinator.entrust(&slots, &handover, limit).await, 2);
    for trainer in &trainers {
        let inner = trainer.inner.lock();
        assert_eq!(inner.replica.lock().step(), Some(gate));
        assert_eq!(inner.handover.as_ref(), Some(&handover));
    }
    coordinator.disperse();
    follow_to(gate + 1, &mut coordinator).await;
}
