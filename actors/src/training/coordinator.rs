//! The coordinator: says who takes part, and keeps a copy of the state that follows the trainers.
//!
//! The trainers go from step to step by themselves ([`protocol`](super::protocol)). The coordinator is
//! needed when somebody comes, goes, lags or is wrong: then it publishes a plan. Its own copy takes the
//! sums of every step from the buckets' owners, as a member without a seat does. So a trainer that comes
//! gets the state from here, or from others by the hashes that are said here (`giving`); a checkpoint is a copy
//! of it; it is a voice when two trainers differ; and even the loss of all trainers costs no step.
//!
//! Invariants:
//! 1. The copy changes only between steps, by the canonical sums of all shards.
//! 2. A trainer computes only after it has said that it holds the very state that it was sent, or the one
//!    that it had under an earlier coordinator.
//! 3. A lost trainer's shards of the present step are given to the others at once. Nobody waits for who joins: it gets a
//!    seat when it has caught up. Only where it came too late before, the others may stand at the gate for it, for a
//!    share of the time that it was left alone, and for all such trainers together for a share of the time (`holds`).
//! 4. A coordinator that meets a newer driver's epoch stops.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mobula_storage::checkpoint::CHUNK_BYTES_DEFAULT;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::collective::{Collective, Unreachable};
use super::crew::{Crew, Event, Happened, Slot, TrainerLink, Witness};
use super::job_log::JobLog;
use super::messages::{Epoch, Handover, short_digest};
use super::numerics::Probe;
use super::optimizer::{Optimizer, StepReport};
use super::parts::PART_BYTES;
use super::progress::{StepBreakdown, TrainerUsage};
use super::protocol::exchange::{Action, Content, Refusal};
use super::protocol::leader::Leader;
use super::protocol::member::Member;
use super::protocol::plan::{DRIVER_SLOT, MemberId};
use super::reduction::Partial;
use super::shape::{leader_shape, member_shape};
use super::spec::TrainSpec;
use super::state::TrainState;
use super::workload::{Workload, WorkloadError};
use crate::checkpoint::sharing::Helper;
use giving::Giving;
use holds::HoldBudget;
use joining::HeldGate;
use stall::Stall;
use unreached::Unreached;

mod counters;
mod error;
mod giving;
mod holds;
mod joining;
mod membership;
mod stall;
mod unreached;

pub use counters::Counters;
pub use error::CoordinatorError;

/// How often what failed is sent again.
const RETRY_EVERY: Duration = Duration::from_millis(50);
/// How often a job that waits for trainers says so.
const WAITING_REPORT: Duration = Duration::from_secs(5);
/// How long a last confirmation of the final bits is waited for.
const CONFIRM_MAX: Duration = Duration::from_secs(5);
const CONFIRM_PAUSE: Duration = Duration::from_millis(20);

/// What became of a call that the driver's copy made.
enum Done {
    Contributed(MemberId, Content, Result<Result<(), Refusal>, Unreachable>),
    Answered(
        MemberId,
        u64,
        u32,
        Result<Result<Partial, Refusal>, Unreachable>,
    ),
}

/// Leads a job's trainers.
pub struct Coordinator<L, C> {
    spec: TrainSpec,
    optimizer: Optimizer,
    state: TrainState,
    digest: String,
    /// What our machine computes.
    probe: Probe,
    me: MemberId,
    leader: Leader,
    member: Member,
    collective: C,
    calls: JoinSet<Done>,
    crew: Crew<L>,
    /// The state as bytes, for those who join at this step.
    packed: Option<Arc<Vec<u8>>>,
    /// Who does not reach whom, since the copy's last step.
    unreached: Unreached,
    /// Steps before which states were found to differ, and about which trainers are being asked.
    judging: BTreeSet<u64>,
    counters: Counters,
    /// How often trainers of each machine were found with other bits.
    strikes: BTreeMap<String, u32>,
    /// Whether trainers with notice stay, to help with a save.
    keeps_doomed: bool,
    /// For whom the gate is held.
    held_gate: Option<HeldGate>,
    /// For how long it may be, for all who come.
    holds: HoldBudget,
    /// The state that some trainers keep for those who join, and in parts of how many bytes states are given.
    giving: Option<Giving>,
    part_bytes: usize,
    /// How long a step takes as usual, if one was taken.
    usual_step: Option<Duration>,
    next_report: Instant,
    /// For how long the present step has waited for trainers, and the last one did.
    stall: Stall,
    waited: Duration,
    log: JobLog,
}

impl<L: TrainerLink, C: Collective> Coordinator<L, C> {
    /// The coordinator of a job at `state`, which leads the trainers of `links` from now on. Its copy takes sums by
    /// way of `collective`. Computes a shard, to compare with what trainers compute of it.
    pub fn new(
        workload: &Workload,
        state: TrainState,
        first_epoch: Epoch,
        links: Vec<L>,
        collective: C,
        counters: Counters,
        log: JobLog,
    ) -> Result<Self, WorkloadError> {
        let spec = workload.spec();
        let digest = state.weights_blake3();
        let me = MemberId {
            slot: DRIVER_SLOT,
            incarnation: first_epoch.driver_incarnation(),
            entry: 0,
        };
        let value_count = state.params.len();
        let shape = member_shape(spec, value_count);
        Ok(Coordinator {
            probe: workload.probe()?,
            optimizer: Optimizer::new(spec, workload.layout()),
            me,
            leader: Leader::new(leader_shape(spec, value_count), first_epoch, state.step),
            member: Member::new(me, shape, state.step, short_digest(&digest)),
            collective,
            calls: JoinSet::new(),
            digest,
            spec: spec.clone(),
            state,
            crew: Crew::new(links, first_epoch),
            packed: None,
            unreached: Unreached::default(),
            judging: BTreeSet::new(),
            counters,
            strikes: BTreeMap::new(),
            keeps_doomed: false,
            held_gate: None,
            holds: HoldBudget::new(Instant::now()),
            giving: None,
            part_bytes: PART_BYTES,
            usual_step: None,
            next_report: Instant::now() + WAITING_REPORT,
            stall: Stall::default(),
            waited: Duration::ZERO,
            log,
        })
    }

    /// The state after the steps taken so far.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// BLAKE3 of weights and optimizer state at that step, in hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// How many trainers take part.
    pub fn ready_count(&self) -> usize {
        self.leader.seated().len()
    }

    /// Follows one step. When this is dropped half-way the state is as before, and the step can be
    /// followed again.
    pub async fn advance(&mut self) -> Result<StepReport, CoordinatorError> {
        let mut retry = tokio::time::interval(RETRY_EVERY);
        let begun = Instant::now();
        self.next_report = begun + WAITING_REPORT;
        let waits = self.ready_count() < self.spec.workers.min as usize;
        loop {
            if let Some(report) = self.act()? {
                let stalled = self.stall.take_since(begun);
                self.waited = if waits { begun.elapsed() } else { stalled };
                if !waits {
                    self.note_usual_step(begun.elapsed().saturating_sub(stalled));
                }
                return Ok(report);
            }
            tokio::select! {
                event = self.crew.next_event() => self.handle(event)?,
                Some(done) = self.calls.join_next() => match done {
                    Ok(done) => self.done(done),
                    // Only dropping the coordinator aborts them.
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                _ = retry.tick() => {
                    if self.member.is_resting() {
                        self.member.retry();
                    }
                    self.separate();
                    self.look_after_joining();
                    self.crew.look_after_sharing();
                    self.report_waiting();
                }
            }
        }
    }

    /// Where the time of the last step went, which took so long in all: as the slowest trainer said when it was
    /// last heard of.
    #[must_use]
    pub fn breakdown(&self, took: Duration) -> StepBreakdown {
        let ready = self.crew.slots().iter().filter(|slot| slot.is_ready());
        let slowest = ready
            .map(|slot| slot.spent)
            .max_by_key(|(data, compute)| *data + *compute);
        let (data, compute) = slowest.unwrap_or_default();
        StepBreakdown::of(took, data, compute, self.waited)
    }

    /// What the trainers that take part use, as far as they have said.
    #[must_use]
    pub fn usage(&self) -> TrainerUsage {
        let ready = || self.crew.slots().iter().filter(|slot| slot.is_ready());
        let gpus: Vec<f64> = ready().filter_map(|slot| slot.gpu).collect();
        TrainerUsage {
            trainers: self.ready_count(),
            cpu: ready().map(|slot| slot.cpu).sum(),
            gpu_utilization: (!gpus.is_empty())
                .then(|| gpus.iter().sum::<f64>() / gpus.len() as f64),
        }
    }

    /// Counts the trainers that end with our very bits.
    pub async fn confirm(&mut self) -> usize {
        let end = Instant::now() + CONFIRM_MAX;
        let digest = short_digest(&self.digest);
        loop {
            let ready = self.crew.which(Slot::is_ready).len();
            // They may have gone on from there, as those of a job that stops early have.
            let step = self.state.step;
            let said = self.crew.witnesses(step, digest, CONFIRM_MAX).await;
            let equal = said.iter().filter(|said| said.is_ok()).count();
            if equal == ready || Instant::now() >= end {
                return equal;
            }
            // The copy may be a moment ahead of a trainer that has all sums as well.
            tokio::time::sleep(CONFIRM_PAUSE).await;
        }
    }

    /// The trainers that said within `limit` that they hold the copy's very bits. They go on meanwhile, and keep what
    /// the copy would need to follow.
    pub async fn witnesses(&self, limit: Duration) -> Vec<Witness> {
        let digest = short_digest(&self.digest);
        let said = self.crew.witnesses(self.state.step, digest, limit).await;
        let holds = said.into_iter().filter_map(|said| {
            said.inspect_err(|why| self.log.line(format_args!("{why}")))
                .ok()
        });
        holds.collect()
    }

    /// Has trainers on machines other than `node`, one on each, keep the state after `step`, so that they can help to
    /// upload it. Asked again, it asks those who came since.
    pub fn prepare_save(&mut self, step: u64, node: &str) {
        self.crew.ask_to_keep(step, node);
    }

    /// Who keeps the state after `step`.
    pub fn helpers(&self, step: u64) -> Vec<Arc<dyn Helper>> {
        self.crew.helpers(step)
    }

    /// Whether a save of this state has enough bytes to be shared.
    pub fn can_be_shared(&self) -> bool {
        self.state.size_bytes() > CHUNK_BYTES_DEFAULT as u64
    }

    /// Has trainers on machines other than `node` keep a state that none of them can have passed yet, and passes. Answers
    /// the step after which that is; the copy follows them there.
    pub fn gather(&mut self, node: &str) -> u64 {
        // Held, it may be where trainers stand already.
        self.release_gate();
        let step = self.gather_here();
        self.prepare_save(step, node);
        step
    }

    /// Has trainers come to the gate, whatever becomes of their machines, and no further: what the copy holds after that
    /// step lacks nothing of what they have done. Answers the step; the copy follows them there.
    pub fn gather_here(&mut self) -> u64 {
        self.keeps_doomed = true;
        self.halt()
    }

    /// Lets trainers come to the gate and no further. Answers the step after which that is; the copy follows them
    /// there.
    pub fn halt(&mut self) -> u64 {
        self.leader.halt(true);
        self.gate()
    }

    /// Trainers with notice leave again, and all go on where they were halted.
    pub fn disperse(&mut self) {
        self.keeps_doomed = false;
        self.leader.halt(false);
        if self.leader.follow(self.state.step) {
            self.publish();
        }
    }

    /// The step after which trainers wait for the driver, if they come so far.
    pub fn gate(&self) -> u64 {
        self.leader.plan().gate
    }

    /// Leaves `handover` with the trainers of `slots` for the next driver, within `limit`. Answers how many have it.
    pub async fn entrust(&self, slots: &[usize], handover: &Handover, limit: Duration) -> usize {
        let epoch = self.leader.plan().epoch;
        self.crew.entrust(slots, epoch, handover, limit).await
    }

    /// How far trainers may be ahead of the copy.
    pub fn lead_max(&self) -> u64 {
        self.leader.shape().lead_max
    }

    /// Carries out what the copy wants, up to the next step.
    fn act(&mut self) -> Result<Option<StepReport>, CoordinatorError> {
        while let Some(action) = self.member.poll_action() {
            match action {
                Action::Ask { to, ask } => {
                    let collective = self.collective.clone();
                    self.calls.spawn(async move {
                        let outcome = collective.ask(to, ask).await;
                        Done::Answered(to, ask.step, ask.bucket, outcome)
                    });
                }
                Action::Contribute { to, contribution } => {
                    let collective = self.collective.clone();
                    self.calls.spawn(async move {
                        let content = contribution.content();
                        let outcome = collective.contribute(to, contribution).await;
                        Done::Contributed(to, content, outcome)
                    });
                }
                Action::Apply { root } => return self.apply(&root).map(Some),
                Action::Report(report) => self.reported(self.me, report),
                Action::Compute { .. } | Action::Answer { .. } => {
                    unreachable!("the copy has no seat, and nobody can ask it")
                }
            }
        }
        Ok(None)
    }

    fn apply(&mut self, root: &Partial) -> Result<StepReport, CoordinatorError> {
        let report = self.optimizer.step(&mut self.state, root)?;
        self.digest = self.state.weights_blake3();
        self.packed = None;
        self.unreached.clear();
        self.member.applied(short_digest(&self.digest));
        if self.leader.follow(self.state.step) {
            self.publish();
        }
        self.give_if_due();
        Ok(report)
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Contributed(to, content, outcome) => {
                self.member.contributed(to, &content, outcome.ok());
            }
            Done::Answered(to, step, bucket, outcome) => {
                self.member.answered(to, step, bucket, outcome.ok());
            }
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), CoordinatorError> {
        let index = event.slot;
        match event.what {
            Happened::Greeted(greeting) => self.greeted(index, greeting),
            Happened::Prepared { sent, took, answer } => match answer {
                Ok(admission) if admission.held != sent => {
                    let found = admission.held.digest;
                    let reason = format!("it holds {found} where {} was sent", sent.digest);
                    self.refuses(index, &reason);
                }
                Ok(admission) => {
                    self.crew.slot(index).attempts.prepared_in(took);
                    self.admitted(index, &admission);
                }
                Err(error) => self.failed(index, &error)?,
            },
            Happened::Adopted(answer) => {
                self.crew.adopted(index);
                match answer {
                    // There may be a newer one by now.
                    Ok(()) => self.publish(),
                    Err(error) => self.failed(index, &error)?,
                }
            }
            Happened::News(Ok(news)) => self.heard(index, &news),
            Happened::News(Err(error)) => self.failed(index, &error)?,
            // Who cannot be asked is lost, or will help with the next one.
            Happened::Keeps { order, answer } => {
                self.crew.keeps(index, order, answer.unwrap_or(false));
            }
            Happened::Shares { order, answer } => {
                self.shares(index, order, answer.unwrap_or(false));
            }
            Happened::Unshared(heard) => self.crew.unshared(index, heard),
            Happened::Judged { step, said } => self.judge(step, &said)?,
        }
        Ok(())
    }

    /// Tells everybody the plan that stands, the own copy first.
    fn publish(&mut self) {
        let plan = self.leader.plan();
        self.member
            .adopt(plan.clone())
            .expect("the leader's epochs only grow");
        self.crew.publish(plan);
    }

    fn report_waiting(&mut self) {
        if Instant::now() < self.next_report {
            return;
        }
        self.next_report = Instant::now() + WAITING_REPORT;
        if !self.leader.plan().hold {
            return;
        }
        self.log.line(format_args!(
            "step {} waits: {} trainers take part, at least {} are needed{}{}",
            self.state.step,
            self.ready_count(),
            self.spec.workers.min,
            self.struck_machines(),
            self.given_up(),
        ));
    }
}

#[cfg(test)]
mod tests;
