//! The coordinator: leads the trainers through the job, one step after the other, and lets nobody
//! who is lost, slow or wrong change the result.
//!
//! It holds a copy of the state itself and applies every update as the trainers do, so a trainer
//! that comes back gets the state from here, and even the loss of all trainers costs no step.
//!
//! Invariants:
//! 1. The state changes only between steps, by the canonical reduction of all shards.
//! 2. A reply counts only if it was computed from the very bits that this coordinator holds.
//! 3. A lost trainer's shards of the present step are given to the others at once; who joins, joins
//!    with the state of the present step; nobody waits for either.
//! 4. A coordinator that meets a newer driver's epoch stops.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::assignment::{Assignment, Order};
use super::crew::{Crew, Event, Happened, Slot, TrainerLink};
use super::job_log::JobLog;
use super::layout::Layout;
use super::messages::{Epoch, StepOrder, StepReply};
use super::optimizer::{Optimizer, StepError, StepReport};
use super::reduction::{Partial, ReductionError, TreeReducer};
use super::spec::TrainSpec;
use super::state::TrainState;
use super::updates::RecentUpdates;

mod membership;

/// An answer is called slow after this, and after [`SLOW_FACTOR`] usual steps.
const SLOW_AFTER_MIN: Duration = Duration::from_millis(250);
const SLOW_FACTOR: u32 = 8;
/// How often a job that waits for trainers says so.
const WAITING_REPORT: Duration = Duration::from_secs(5);
/// How long a last confirmation of the final bits is waited for.
const CONFIRM_MAX: Duration = Duration::from_secs(5);

/// Why training cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoordinatorError {
    /// A newer driver leads the trainers.
    #[error("a newer driver (incarnation {0}) leads the trainers; this one stops")]
    Fenced(u64),
    /// A trainer cannot do what the job asks.
    #[error("trainer-{slot} on {node}: {reason}")]
    Unfit {
        /// Which trainer.
        slot: usize,
        /// Where it runs.
        node: String,
        /// What it said.
        reason: String,
    },
    /// A partial does not fit the model.
    #[error("a sum does not fit: {0}")]
    Reduction(#[from] ReductionError),
    /// The update could not be made.
    #[error("{0}")]
    Update(String),
    /// Most trainers agree on other bits than this coordinator.
    #[error(
        "step {step}: {count} trainers agree on parameters {theirs} and this coordinator has \
         {ours}: its copy is damaged; start again from a checkpoint"
    )]
    Outvoted {
        /// The step.
        step: u64,
        /// How many agree.
        count: usize,
        /// Their digest.
        theirs: String,
        /// Ours.
        ours: String,
    },
}

impl CoordinatorError {
    /// Whether another start of the driver would come to the same.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            CoordinatorError::Unfit { .. }
                | CoordinatorError::Reduction(_)
                | CoordinatorError::Update(_)
        )
    }
}

impl From<StepError> for CoordinatorError {
    fn from(error: StepError) -> Self {
        CoordinatorError::Update(error.to_string())
    }
}

/// What happened so far, over all starts of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Trainers that were lost while they took part.
    pub trainers_lost: u64,
    /// New starts of trainers that were seen.
    pub trainer_restarts: u64,
    /// Trainers that left a node with notice.
    pub handoffs: u64,
    /// Shards that another trainer had to compute because theirs was lost.
    pub reassigned_shards: u64,
    /// Orders that took so long that others computed the same shards.
    pub slow_orders: u64,
    /// Replies computed from other bits, refused.
    pub digest_mismatches: u64,
}

/// A step under way.
struct Step {
    reducer: TreeReducer,
    assignment: Assignment,
    root: Option<Partial>,
    /// Trainers by the digest that they have instead of ours.
    dissent: BTreeMap<String, Vec<usize>>,
}

/// Leads a job's trainers.
pub struct Coordinator<L> {
    spec: TrainSpec,
    optimizer: Optimizer,
    state: TrainState,
    digest: String,
    epoch: Epoch,
    crew: Crew<L>,
    updates: RecentUpdates,
    next_order: u64,
    /// Smoothed time of a step.
    usual_step: Option<Duration>,
    counters: Counters,
    log: JobLog,
}

impl<L: TrainerLink> Coordinator<L> {
    /// A coordinator at `state`, which leads the trainers of `links` from now on.
    pub fn new(
        spec: &TrainSpec,
        layout: &Layout,
        state: TrainState,
        first_epoch: Epoch,
        links: Vec<L>,
        counters: Counters,
        log: JobLog,
    ) -> Self {
        Coordinator {
            optimizer: Optimizer::new(spec, layout),
            digest: state.weights_blake3(),
            spec: spec.clone(),
            state,
            epoch: first_epoch,
            crew: Crew::new(links),
            updates: RecentUpdates::default(),
            next_order: 0,
            usual_step: None,
            counters,
            log,
        }
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
        self.crew.which(Slot::is_ready).len()
    }

    /// Takes one step. When this is dropped half-way the state is as before, and the step can be
    /// taken again.
    pub async fn advance(&mut self) -> Result<StepReport, CoordinatorError> {
        self.let_noticed_leave();
        let begun = Instant::now();
        let waited = self.ready_count() < self.spec.workers.min as usize;
        let root = self.reduce().await?;
        let report = self.optimizer.step(&mut self.state, &root)?;
        self.digest = self.state.weights_blake3();
        self.updates.push(root);
        if !waited {
            let took = begun.elapsed();
            self.usual_step = Some(self.usual_step.map_or(took, |usual| (usual * 7 + took) / 8));
        }
        Ok(report)
    }

    /// Has the trainers apply the last update, and counts those that end with our very bits.
    pub async fn confirm(&mut self) -> usize {
        let order_for = |slot: &Slot<L>| {
            Some(StepOrder {
                epoch: self.epoch,
                step: self.state.step,
                updates: self.updates_since(slot.step)?,
                shards: 0..0,
            })
        };
        let replies = self.crew.ask_free(order_for, CONFIRM_MAX).await;
        let is_equal = |reply: &&StepReply| reply.digest == self.digest;
        replies.iter().filter(is_equal).count()
    }

    async fn reduce(&mut self) -> Result<Partial, CoordinatorError> {
        let samples = self.spec.global_batch / u64::from(self.spec.virtual_shards);
        let mut step = Step {
            reducer: TreeReducer::new(self.spec.virtual_shards, samples, self.state.params.len()),
            assignment: Assignment::new(self.next_order),
            root: None,
            dissent: BTreeMap::new(),
        };
        let mut next_report = Instant::now() + WAITING_REPORT;
        loop {
            self.give_orders(&mut step);
            let wake = self.slow_at(&step).unwrap_or(next_report);
            tokio::select! {
                event = self.crew.next_event() => self.handle(event, &mut step)?,
                () = tokio::time::sleep_until(wake) => {
                    self.mark_slow(&mut step);
                    if Instant::now() >= next_report {
                        self.report_waiting(&step);
                        next_report = Instant::now() + WAITING_REPORT;
                    }
                }
            }
            if let Some(root) = step.root.take() {
                return Ok(root);
            }
        }
    }

    fn give_orders(&mut self, step: &mut Step) {
        let fresh = step.reducer.missing().len() == self.spec.virtual_shards as usize
            && step.assignment.is_fresh();
        let workers = if fresh {
            let free = self.crew.which(Slot::is_free);
            // Below the minimum a step does not begin; one that has begun is finished by whoever
            // is left.
            if free.len() < self.required_count() {
                return;
            }
            free
        } else {
            // Whoever is still busy with an earlier step would answer too late.
            let at_step = self.state.step;
            let takes_part =
                |slot: &Slot<L>| slot.is_free() || (slot.is_ready() && slot.step == at_step);
            self.crew.which(takes_part)
        };
        for order in step.assignment.plan(&step.reducer.missing(), &workers) {
            self.next_order = step.assignment.next_number();
            self.send(order, step);
        }
    }

    /// How many must be free for a step to begin: those that owe an answer count as present.
    fn required_count(&self) -> usize {
        let owing = self
            .crew
            .which(|slot| slot.is_ready() && !slot.is_free())
            .len();
        (self.spec.workers.min as usize)
            .saturating_sub(owing)
            .max(1)
    }

    fn send(&mut self, order: Order, step: &mut Step) {
        let index = order.worker;
        let Some(updates) = self.updates_since(self.crew.slots()[index].step) else {
            // It was away for too many steps.
            let _ = step.assignment.lost(index);
            self.prepare(index);
            return;
        };
        let number = order.number;
        let order = StepOrder {
            epoch: self.epoch,
            step: self.state.step,
            updates,
            shards: order.shards,
        };
        self.crew.order(index, number, order);
    }

    fn handle(&mut self, event: Event, step: &mut Step) -> Result<(), CoordinatorError> {
        let index = event.slot;
        match event.what {
            Happened::Greeted(greeting) => self.greeted(index, greeting),
            Happened::Prepared { sent, answer } => match answer {
                Ok(held) if held == sent => self.joined(index, held.step),
                Ok(held) => self.lose(
                    index,
                    &format!("it holds {} where {} was sent", held.digest, sent.digest),
                    step,
                ),
                Err(error) => self.failed(index, &error, step)?,
            },
            Happened::Stepped { number, answer } => match *answer {
                Ok(reply) => self.stepped(index, number, reply, step)?,
                Err(error) => self.failed(index, &error, step)?,
            },
        }
        Ok(())
    }

    fn stepped(
        &mut self,
        index: usize,
        number: u64,
        reply: StepReply,
        step: &mut Step,
    ) -> Result<(), CoordinatorError> {
        self.crew.slot(index).notice_ms = reply.notice_ms;
        step.assignment.answered(number);
        if reply.step != self.state.step {
            // A slow answer to a step that others have finished.
            return Ok(());
        }
        if reply.digest != self.digest {
            return self.disagree(index, reply.digest, step);
        }
        for partial in reply.partials {
            match step.reducer.offer(partial) {
                Ok(Some(root)) => step.root = Some(root),
                // Two have computed it; the bits are the same.
                Ok(None) | Err(ReductionError::Overlap { .. } | ReductionError::Complete) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn updates_since(&self, step: u64) -> Option<Vec<Partial>> {
        self.updates.last(self.state.step.checked_sub(step)?)
    }

    fn slow_after(&self) -> Duration {
        self.usual_step.map_or(SLOW_AFTER_MIN * 8, |usual| {
            SLOW_AFTER_MIN.max(usual * SLOW_FACTOR)
        })
    }

    /// When the next order of this step becomes slow.
    fn slow_at(&self, step: &Step) -> Option<Instant> {
        let orders = self.crew.slots().iter().flat_map(|slot| &slot.orders);
        orders
            .filter(|(number, _)| step.assignment.is_under_way(**number))
            .map(|(_, sent)| *sent + self.slow_after())
            .min()
    }

    fn mark_slow(&mut self, step: &mut Step) {
        let limit = self.slow_after();
        for slot in self.crew.slots() {
            for (number, sent) in &slot.orders {
                if sent.elapsed() >= limit
                    && let Some(worker) = step.assignment.mark_slow(*number)
                {
                    self.counters.slow_orders += 1;
                    self.log.line(format_args!(
                        "trainer-{worker} on {} has not answered step {} for {} ms: the others \
                         compute its shards too",
                        slot.node,
                        self.state.step,
                        sent.elapsed().as_millis()
                    ));
                }
            }
        }
    }

    fn report_waiting(&mut self, step: &Step) {
        let ready = self.ready_count();
        let min = self.spec.workers.min as usize;
        let missing = step.reducer.missing().len();
        self.log.line(format_args!(
            "step {} waits: {ready} trainers take part, at least {min} are needed, {missing} \
             shards are to be computed",
            self.state.step
        ));
    }
}

#[cfg(test)]
#[path = "coordinator_tests.rs"]
mod tests;
