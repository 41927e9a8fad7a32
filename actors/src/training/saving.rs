//! Checkpoints in the background: at most one is under way and one waits, the newest.
//!
//! Invariants:
//! 1. Training never waits for a save, except at its end and before the driver leaves its node.
//! 2. The driver keeps a state until it is committed; a store that is out of reach costs nothing
//!    but age, and the job's log says so.
//! 3. A step is saved by one and the same order, however often that is sent.

use std::sync::Arc;
use std::time::Duration;

use mobula::{CallFailure, Cluster};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::job_log::JobLog;
use super::named_actor::NamedActor;
use crate::checkpoint::actor::{
    CheckpointError, Checkpointer, CheckpointerCalls, RestoreReport, SaveOrder,
};
use crate::checkpoint::state::CheckpointRef;
use mobula_core::Incarnation;

/// Pauses between attempts while the store is out of reach.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// How long one attempt may take: what a store's slowest request may.
const ATTEMPT_MAX: Duration = Duration::from_secs(120);
/// What a save is thought to take before one was measured.
const USUAL_SAVE: Duration = Duration::from_secs(1);
const RESTARTS_MAX: u32 = 1000;

/// What one attempt brought.
struct Attempt {
    order: Arc<SaveOrder>,
    took: Duration,
    outcome: Result<CheckpointRef, CheckpointError>,
}

/// Sends states to the checkpointer.
pub struct Saver {
    actor: Arc<NamedActor<Checkpointer>>,
    attempts: JoinSet<Attempt>,
    waiting: Option<Arc<SaveOrder>>,
    under_way: Option<u64>,
    pause: Duration,
    committed_step: Option<u64>,
    committed_count: u64,
    latest: Option<Duration>,
    log: JobLog,
}

impl Saver {
    /// Saves through the job's checkpointer.
    #[must_use]
    pub fn new(cluster: &Cluster, log: JobLog) -> Self {
        let actor = NamedActor::new(cluster, |cluster| {
            cluster
                .actor(Checkpointer::new())
                .name("checkpointer")
                .max_restarts(RESTARTS_MAX)
        });
        Saver {
            actor: Arc::new(actor),
            attempts: JoinSet::new(),
            waiting: None,
            under_way: None,
            pause: PAUSE_FIRST,
            committed_step: None,
            committed_count: 0,
            latest: None,
            log,
        }
    }

    /// Checkpoints that were committed.
    #[must_use]
    pub fn committed_count(&self) -> u64 {
        self.committed_count
    }

    /// The step of the last one that was committed.
    #[must_use]
    pub fn committed_step(&self) -> Option<u64> {
        self.committed_step
    }

    /// What a save takes, as the latest one did.
    #[must_use]
    pub fn expected_time(&self) -> Duration {
        self.latest.unwrap_or(USUAL_SAVE)
    }

    /// Goes on from a job's earlier checkpoints.
    pub fn resume(&mut self, committed_count: u64, step: u64) {
        self.committed_count = committed_count;
        self.committed_step = Some(step);
    }

    /// The newest checkpoint that verifies. While the store or the head is out of reach the job
    /// waits, and says so.
    pub async fn restore(
        &mut self,
        incarnation: Incarnation,
    ) -> Result<RestoreReport, CheckpointError> {
        let mut pause = PAUSE_FIRST;
        loop {
            let found = match self.actor.get().await {
                Ok(actor) => actor.restore(incarnation).timeout(ATTEMPT_MAX).await,
                Err(error) => Err(CallFailure::System(error)),
            };
            match found.map_err(|failure| judged(&self.actor, failure)) {
                Err(CheckpointError::Unavailable(reason)) => {
                    self.log.line(format_args!(
                        "checkpoints cannot be read: {reason}; waiting, next attempt in {} ms",
                        pause.as_millis()
                    ));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                outcome => return outcome,
            }
        }
    }

    /// Saves a state as soon as the one before it is done; of those that wait the newest counts.
    pub fn offer(&mut self, order: SaveOrder) {
        if self.under_way == Some(order.step) || self.committed_step == Some(order.step) {
            return;
        }
        self.waiting = Some(Arc::new(order));
        self.start_next(Duration::ZERO);
    }

    /// Takes note of what is done, without waiting.
    pub fn poll(&mut self) -> Result<(), CheckpointError> {
        while let Some(attempt) = self.attempts.try_join_next() {
            self.settle(attempt.expect("an attempt does not panic, and is not aborted"))?;
        }
        Ok(())
    }

    /// Waits until everything is committed, or until `deadline`. Answers whether it is.
    pub async fn flush(&mut self, deadline: Option<Instant>) -> Result<bool, CheckpointError> {
        while !self.attempts.is_empty() {
            let next = self.attempts.join_next();
            let attempt = match deadline {
                None => next.await,
                Some(deadline) => match tokio::time::timeout_at(deadline, next).await {
                    Ok(attempt) => attempt,
                    Err(_) => return Ok(false),
                },
            };
            if let Some(attempt) = attempt {
                self.settle(attempt.expect("an attempt does not panic, and is not aborted"))?;
            }
        }
        Ok(true)
    }

    fn settle(&mut self, attempt: Attempt) -> Result<(), CheckpointError> {
        let Attempt {
            order,
            took,
            outcome,
        } = attempt;
        self.under_way = None;
        match outcome {
            Ok(checkpoint) => {
                self.pause = PAUSE_FIRST;
                self.committed_step = Some(checkpoint.step);
                self.committed_count += 1;
                self.latest = Some(took);
                self.log.line(format_args!(
                    "checkpoint of step {} committed: {} bytes in {} ms, {}",
                    checkpoint.step,
                    checkpoint.size_bytes,
                    took.as_millis(),
                    checkpoint.manifest_path
                ));
                self.start_next(Duration::ZERO);
                Ok(())
            }
            Err(CheckpointError::Unavailable(reason)) => {
                self.log.line(format_args!(
                    "checkpoint of step {} is not saved: {reason}; waiting, next attempt in {} ms",
                    order.step,
                    self.pause.as_millis()
                ));
                self.waiting.get_or_insert(order);
                self.start_next(self.pause);
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn start_next(&mut self, pause: Duration) {
        if self.under_way.is_some() {
            return;
        }
        let Some(order) = self.waiting.take() else {
            return;
        };
        self.under_way = Some(order.step);
        let actor = Arc::clone(&self.actor);
        self.attempts.spawn(async move {
            tokio::time::sleep(pause).await;
            let begun = Instant::now();
            let outcome = match actor.get().await {
                Ok(checkpointer) => {
                    checkpointer
                        .save(SaveOrder::clone(&order))
                        .timeout(ATTEMPT_MAX)
                        .await
                }
                Err(error) => Err(CallFailure::System(error)),
            };
            let outcome = outcome.map_err(|failure| judged(&actor, failure));
            Attempt {
                order,
                took: begun.elapsed(),
                outcome,
            }
        });
    }
}

fn judged(
    actor: &NamedActor<Checkpointer>,
    failure: CallFailure<CheckpointError>,
) -> CheckpointError {
    match failure {
        CallFailure::User(error) => error,
        CallFailure::System(error) => {
            actor.after(&error);
            CheckpointError::Unavailable(error.to_string())
        }
    }
}
