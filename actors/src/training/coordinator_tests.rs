//! The coordinator with trainers in this process, which die, lag, lie and leave on schedule. The
//! oracle is the same job run alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::*;
use crate::training::crew::LinkError;
use crate::training::data::Files;
use crate::training::local::LocalTrainer;
use crate::training::messages::{Greeting, Held};
use crate::training::random::{Purpose, Stream};
use crate::training::replica::{Replica, load};

/// What happens to one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The process dies before the call, and starts again.
    Crash,
    /// The call is carried out, then the process dies.
    CrashAfter,
    /// The answer takes longer than is usual.
    Slow,
    /// A bit of its parameters flips.
    FlippedBit,
    /// Its node is given notice.
    Notice,
}

static WEAK_SPOT: AtomicUsize = AtomicUsize::new(0);

#[derive(Clone)]
struct FakeTrainer(Arc<Mutex<Inner>>);

struct Inner {
    spec: TrainSpec,
    replica: Replica,
    incarnation: u64,
    notice_ms: Option<u64>,
    calls: u64,
    faults: BTreeMap<u64, Fault>,
    log: Vec<&'static str>,
    /// Which parameter of this one is damaged, so that no two are damaged alike.
    weak_spot: usize,
}

impl FakeTrainer {
    fn new(spec: &TrainSpec, faults: impl IntoIterator<Item = (u64, Fault)>) -> Self {
        FakeTrainer(Arc::new(Mutex::new(Inner {
            spec: spec.clone(),
            replica: Replica::new(spec.clone()),
            incarnation: 1,
            notice_ms: None,
            calls: 0,
            faults: faults.into_iter().collect(),
            log: Vec::new(),
            weak_spot: WEAK_SPOT.fetch_add(1, Ordering::Relaxed),
        })))
    }
}

impl Inner {
    fn restart(&mut self) {
        self.incarnation += 1;
        self.notice_ms = None;
        self.replica = Replica::new(self.spec.clone());
    }

    fn step(&mut self, order: &StepOrder) -> Result<StepReply, LinkError> {
        self.calls += 1;
        let fault = self.faults.remove(&self.calls);
        match fault {
            Some(Fault::Crash) => {
                self.restart();
                return Err(LinkError::Lost("killed".into()));
            }
            Some(Fault::FlippedBit) => {
                let mut state = TrainState::from_bytes(&self.replica.state()?).unwrap();
                let damaged = &mut state.params[self.weak_spot];
                *damaged = f32::from_bits(damaged.to_bits() ^ 1);
                self.replica.prepare(order.epoch, Some(&state.to_bytes()))?;
            }
            Some(Fault::Notice) => self.notice_ms = Some(1),
            _ => {}
        }
        let mut reply = self.replica.step(order)?;
        reply.notice_ms = self.notice_ms;
        if fault == Some(Fault::CrashAfter) {
            self.restart();
            return Err(LinkError::Lost("killed".into()));
        }
        Ok(reply)
    }
}

impl TrainerLink for FakeTrainer {
    async fn greet(&self) -> Result<Greeting, LinkError> {
        let inner = self.0.lock();
        Ok(Greeting {
            incarnation: inner.incarnation,
            node_name: "here".to_owned(),
            held: inner.replica.held(),
            notice_ms: inner.notice_ms,
        })
    }

    async fn prepare(&self, epoch: Epoch, state: Vec<u8>) -> Result<Held, LinkError> {
        let mut inner = self.0.lock();
        inner.log.push("prepare");
        Ok(inner.replica.prepare(epoch, Some(&state))?)
    }

    async fn step(&self, order: StepOrder) -> Result<StepReply, LinkError> {
        let (answer, slow) = {
            let mut inner = self.0.lock();
            let slow = inner.faults.get(&(inner.calls + 1)) == Some(&Fault::Slow);
            (inner.step(&order), slow)
        };
        if slow {
            tokio::time::sleep(SLOW_AFTER_MIN * 5).await;
        }
        answer
    }

    async fn leave(&self) -> Result<(), LinkError> {
        let mut inner = self.0.lock();
        inner.log.push("leave");
        inner.restart();
        Ok(())
    }
}

fn spec(steps: u64, min: u32, max: u32) -> TrainSpec {
    let mut spec = TrainSpec {
        steps,
        global_batch: 64,
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

fn coordinator(
    spec: &TrainSpec,
    driver_incarnation: u64,
    trainers: &[FakeTrainer],
) -> Coordinator<FakeTrainer> {
    let workload = load(spec, &Files::local()).unwrap();
    let state = TrainState::initial(&workload);
    let epoch = Epoch::first_of(driver_incarnation);
    let counters = Counters::default();
    Coordinator::new(
        spec,
        workload.layout(),
        state,
        epoch,
        trainers.to_vec(),
        counters,
        JobLog::Silent,
    )
}

async fn run(spec: &TrainSpec, trainers: &[FakeTrainer]) -> Coordinator<FakeTrainer> {
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
    let trainers: Vec<_> = (0..3).map(|_| FakeTrainer::new(&spec, [])).collect();
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
async fn each_fault_is_survived_and_counted() {
    let spec = spec(14, 1, 3);
    let hash = expected(&spec);
    let after = async |fault| {
        let trainers = [
            FakeTrainer::new(&spec, []),
            FakeTrainer::new(&spec, [(5, fault)]),
        ];
        let coordinator = run(&spec, &trainers).await;
        let log = trainers[1].0.lock().log.clone();
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
    assert!(counters.slow_orders >= 1);
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
    let spec = spec(10, 2, 2);
    let trainers: Vec<_> = (0..2)
        .map(|_| FakeTrainer::new(&spec, [(4, Fault::Crash), (9, Fault::CrashAfter)]))
        .collect();
    let coordinator = run(&spec, &trainers).await;
    assert_eq!(coordinator.digest(), expected(&spec));
    assert_eq!(coordinator.counters().trainers_lost, 4);
    assert_eq!(coordinator.counters().trainer_restarts, 4);
}

#[tokio::test]
async fn random_faults_never_change_the_bits() {
    let spec = spec(24, 1, 4);
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
        let trainers: Vec<_> = (0..4u32)
            .map(|trainer| {
                let faults = (1..24).filter_map(|call| {
                    let bits = stream.bits(call, trainer);
                    bits.is_multiple_of(5)
                        .then(|| (call, kinds[(bits >> 8) as usize % kinds.len()]))
                });
                FakeTrainer::new(&spec, faults)
            })
            .collect();
        let coordinator = run(&spec, &trainers).await;
        assert_eq!(coordinator.digest(), hash, "seed {seed}");
        let counters = coordinator.counters();
        disturbances += counters.trainers_lost + counters.handoffs + counters.digest_mismatches;
    }
    assert!(disturbances > 60, "only {disturbances} disturbances");
}

#[tokio::test]
async fn a_newer_driver_stops_an_older_one() {
    let spec = spec(20, 2, 2);
    let trainers: Vec<_> = (0..2).map(|_| FakeTrainer::new(&spec, [])).collect();
    let mut old = coordinator(&spec, 5, &trainers);
    for _ in 0..3 {
        old.advance().await.unwrap();
    }
    let mut new = coordinator(&spec, 9, &trainers);
    new.advance().await.unwrap();
    assert_eq!(
        old.advance().await.unwrap_err(),
        CoordinatorError::Fenced(9)
    );
    while new.state().step < spec.steps {
        new.advance().await.unwrap();
    }
    assert_eq!(new.digest(), expected(&spec));
}

#[tokio::test]
async fn a_damaged_coordinator_is_outvoted() {
    let spec = spec(5, 2, 2);
    let trainers: Vec<_> = (0..2).map(|_| FakeTrainer::new(&spec, [])).collect();
    let mut coordinator = coordinator(&spec, 1, &trainers);
    coordinator.advance().await.unwrap();
    coordinator.advance().await.unwrap();
    coordinator.state.params[0] += 1.0;
    coordinator.digest = coordinator.state.weights_blake3();
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
    let mut coordinator = coordinator(&spec, 1, &[FakeTrainer::new(&absent, [])]);
    let error = coordinator.advance().await.unwrap_err().to_string();
    assert!(
        error.starts_with("trainer-0 on here: cannot read data file /nowhere.csv"),
        "{error}"
    );
}
