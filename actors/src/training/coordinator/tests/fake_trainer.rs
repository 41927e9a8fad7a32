//! A trainer without a process: a replica and its runner, with faults by step.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::checkpoint::{CheckpointSource, CheckpointWriter, Piece};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::training::collective::runner::{Board, Runner, RunnerHandle};
use crate::training::collective::{Collective, InProcess, Unreachable};
use crate::training::crew::{LinkError, Preparation, TrainerLink};
use crate::training::messages::{
    Admission, Epoch, Greeting, Handover, KeepOrder, News, TrainerError,
};
use crate::training::numerics::Probe;
use crate::training::parts::{SharedState, pull};
use crate::training::protocol::exchange::{Ask, Contribution, Refusal};
use crate::training::protocol::leader::StateDigest;
use crate::training::protocol::member::Member;
use crate::training::protocol::plan::{MemberId, Plan};
use crate::training::reduction::Partial;
use crate::training::replica::{Kept, Replica};
use crate::training::shape::member_shape;
use crate::training::spec::TrainSpec;

/// What happens to a trainer when it first sends or asks for something of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
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

/// How long a trainer is listened to that says nothing.
const SILENT_MAX: Duration = Duration::from_millis(1250);
/// How often a silent one looks whether it may go on.
const SILENT_PAUSE: Duration = Duration::from_millis(10);
/// How long a trainer is waited for that has yet to come to the state that it keeps, and how often is looked.
const KEPT_MAX: Duration = Duration::from_secs(5);
const KEPT_PAUSE: Duration = Duration::from_millis(1);
/// How long others may take to give a state.
const PULL_MAX: Duration = Duration::from_secs(45);

#[derive(Clone)]
pub(super) struct FakeTrainer {
    slot: u32,
    pub(super) others: InProcess,
    pub(super) blobs: BlobStore,
    /// All trainers of the job, which give states to each other.
    all: Arc<Mutex<Vec<Arc<Mutex<Inner>>>>>,
    pub(super) inner: Arc<Mutex<Inner>>,
}

pub(super) struct Inner {
    spec: TrainSpec,
    pub(super) replica: Arc<Mutex<Replica>>,
    incarnation: u64,
    /// The start that was greeted last, and what tells of the next one.
    greeted: u64,
    restarts: Arc<Notify>,
    entry: u64,
    pub(super) notice_ms: Option<u64>,
    epoch: Epoch,
    running: Option<(RunnerHandle, watch::Receiver<Board>, JoinSet<()>)>,
    faults: BTreeMap<u64, Fault>,
    /// Trainers to which nothing of this one gets.
    pub(super) cut_off: Vec<u32>,
    pub(super) handover: Option<Handover>,
    /// Whether its machine has other bits than the others.
    pub(super) computes_otherwise: bool,
    /// How often it takes a state over; as often as it is asked to, if absent.
    pub(super) turns: Option<Arc<Semaphore>>,
    /// Parts of states that it gave to others.
    pub(super) given: usize,
    /// How often it does not hear that it is to keep a state no more.
    pub(super) unshares_lost: usize,
    /// Whether it refuses every state.
    pub(super) refuses: bool,
    /// Whether nothing is heard of it until it is greeted again.
    pub(super) is_silent: bool,
    pub(super) log: Vec<&'static str>,
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
        self.restarts.notify_waiters();
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

    pub(super) fn crash(&self, inner: &mut Inner) {
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
        while self.inner.lock().is_silent {
            tokio::time::sleep(SILENT_PAUSE).await;
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

impl FakeTrainer {
    pub(super) fn greeting(&self) -> Greeting {
        let mut inner = self.inner.lock();
        (inner.is_silent, inner.greeted) = (false, inner.incarnation);
        let running = inner.running.as_ref();
        let held = running.and_then(|(_, board, _)| board.borrow().held.clone());
        let member = inner.running.is_some().then(|| inner.me(self.slot));
        Greeting {
            incarnation: inner.incarnation,
            node_name: format!("worker-{}", self.slot),
            held: member.zip(held),
            notice_ms: inner.notice_ms,
        }
    }
}

impl FakeTrainer {
    /// The state that others keep, from them, if they give all of it.
    async fn pull(&self, shared: &SharedState) -> Option<Vec<u8>> {
        let step = shared.step;
        let all = self.all.lock().clone();
        let ask = |giver: usize, part: Piece| {
            let giver = Arc::clone(&all[shared.from[giver] as usize]);
            async move {
                loop {
                    let replica = Arc::clone(&giver.lock().replica);
                    let kept = replica.lock().shared(step);
                    match kept {
                        Kept::Here(state) => {
                            giver.lock().given += 1;
                            return Ok(state.read(part.range()).to_vec());
                        }
                        Kept::Coming => tokio::time::sleep(KEPT_PAUSE).await,
                        Kept::Never => return Err("it does not keep it".to_owned()),
                    }
                }
            }
        };
        let pulled = pull(&shared.parts, shared.from.len(), PULL_MAX, ask).await;
        let parts: Option<Vec<Vec<u8>>> = pulled.parts.into_iter().collect();
        Some(parts?.concat())
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
        Ok(self.greeting())
    }

    async fn ended(&self) {
        let restarts = Arc::clone(&self.inner.lock().restarts);
        loop {
            let restarted = restarts.notified();
            let is_over = {
                let inner = self.inner.lock();
                inner.incarnation != inner.greeted
            };
            if is_over {
                return;
            }
            restarted.await;
        }
    }

    async fn prepare(&self, order: Preparation) -> Result<Admission, LinkError> {
        let Preparation {
            plan,
            mut state,
            shared,
            probe: expected,
        } = order;
        let turns = self.inner.lock().turns.clone();
        if let Some(turns) = turns {
            turns.acquire().await.expect("it is never closed").forget();
        }
        if let Some(shared) = shared
            && let Some(pulled) = self.pull(&shared).await
        {
            assert!(
                pulled == *state,
                "the driver has named what it holds itself"
            );
            self.inner.lock().log.push("pull");
            state = Arc::new(pulled);
        }
        let mut inner = self.inner.lock();
        inner.log.push("prepare");
        if inner.refuses {
            let (found, expected) = (2, 1);
            return Err(TrainerError::Misplaced { found, expected }.into());
        }
        inner.epoch = inner.epoch.max(plan.epoch);
        inner.running = None;
        let mut replica = inner.replica.lock().successor();
        let held = replica.prepare(Some(&state))?;
        let computes = match inner.computes_otherwise {
            true => Probe::of(0.5, b"other bits"),
            false => replica.probe()?,
        };
        inner.replica = Arc::new(Mutex::new(replica));
        if let Some(expected) = expected.filter(|expected| *expected != computes) {
            return Err(TrainerError::OtherBits { computes, expected }.into());
        }
        inner.entry += 1;
        let me = inner.me(self.slot);
        let value_count = inner.replica.lock().value_count();
        let shape = member_shape(&inner.spec, value_count);
        let mut member = Member::new(me, shape, held.step, held.short());
        member.adopt(plan).unwrap();
        let replica = Arc::clone(&inner.replica);
        let (runner, handle, board) = Runner::new(member, held.clone(), replica, self.clone());
        let mut task = JoinSet::new();
        task.spawn(runner.run());
        self.others.enter(me, handle.clone());
        inner.running = Some((handle, board, task));
        Ok(Admission {
            member: me,
            held,
            probe: computes,
        })
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
        if self.inner.lock().is_silent {
            tokio::time::sleep(SILENT_MAX).await;
            return Err(LinkError::Lost("it is silent".to_owned()));
        }
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
            cpu: Duration::ZERO,
            number: shown.number,
            member: inner.me(self.slot),
            step: shown.step,
            reports: new.map(|(_, report)| *report).collect(),
            notice_ms: inner.notice_ms,
            gpu_utilization: None,
        })
    }

    async fn digest_before(&self, step: u64) -> Result<Option<StateDigest>, LinkError> {
        let (handle, _) = self.inner.lock().shown()?;
        let lost = || LinkError::Lost("killed".to_owned());
        handle.digest_before(step).await.ok_or_else(lost)
    }

    async fn keep(&self, order: KeepOrder, step: u64) -> Result<bool, LinkError> {
        let replica = Arc::clone(&self.inner.lock().replica);
        let keeps = replica.lock().keep(order, step);
        Ok(keeps)
    }

    async fn store(&self, step: u64, pieces: Vec<Piece>) -> Result<(), LinkError> {
        let end = Instant::now() + KEPT_MAX;
        let state = loop {
            let replica = Arc::clone(&self.inner.lock().replica);
            let kept = replica.lock().kept(step);
            match kept {
                Kept::Here(state) => break state,
                // The copy may be ahead of a trainer that has all sums as well.
                Kept::Coming if Instant::now() < end => tokio::time::sleep(KEPT_PAUSE).await,
                Kept::Coming | Kept::Never => return Err(TrainerError::NotKept { step }.into()),
            }
        };
        let writer = CheckpointWriter::new(self.blobs.clone());
        let stored = writer.upload(state, &pieces).await;
        stored.map_err(|error| LinkError::Lost(error.to_string()))
    }

    async fn release(&self, order: KeepOrder) -> Result<(), LinkError> {
        self.inner.lock().replica.lock().release(order);
        Ok(())
    }

    async fn share(&self, order: KeepOrder, step: u64) -> Result<bool, LinkError> {
        let replica = Arc::clone(&self.inner.lock().replica);
        let shares = replica.lock().share(order, step);
        Ok(shares)
    }

    async fn unshare(&self, order: KeepOrder) -> Result<(), LinkError> {
        let mut inner = self.inner.lock();
        if inner.unshares_lost > 0 {
            inner.unshares_lost -= 1;
            return Err(LinkError::Lost("the way is cut".to_owned()));
        }
        inner.replica.lock().unshare(order);
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
pub(super) fn trainers(
    spec: &TrainSpec,
    faults: impl IntoIterator<Item = Vec<(u64, Fault)>>,
) -> Vec<FakeTrainer> {
    let others = InProcess::default();
    let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
    let all: Arc<Mutex<Vec<Arc<Mutex<Inner>>>>> = Arc::default();
    let trainer = |(slot, faults): (usize, Vec<(u64, Fault)>)| FakeTrainer {
        slot: slot as u32,
        others: others.clone(),
        blobs: blobs.clone(),
        all: Arc::clone(&all),
        inner: Arc::new(Mutex::new(Inner {
            spec: spec.clone(),
            replica: Arc::new(Mutex::new(Replica::new(spec.clone()))),
            incarnation: 1,
            greeted: 0,
            restarts: Arc::default(),
            entry: 0,
            notice_ms: None,
            epoch: Epoch::default(),
            running: None,
            faults: faults.into_iter().collect(),
            cut_off: Vec::new(),
            handover: None,
            computes_otherwise: false,
            turns: None,
            given: 0,
            unshares_lost: 0,
            refuses: false,
            is_silent: false,
            log: Vec::new(),
        })),
    };
    let trainers: Vec<FakeTrainer> = faults.into_iter().enumerate().map(trainer).collect();
    *all.lock() = trainers.iter().map(|it| Arc::clone(&it.inner)).collect();
    trainers
}
