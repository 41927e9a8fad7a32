//! What becomes of one request to a fleet.
//!
//! Invariants:
//! 1. A request that a replica did not answer is sent once more, to another one if there is one and the
//!    budget allows it: inference changes nothing, so twice is harmless. A request never takes longer than
//!    its deadline.
//! 2. A request that finds no replica waits a little for one: they come back within moments. Where there
//!    was none at all it waits for the first, and of those that wait there are not many.
//! 3. A replica that had the time and answered nobody has failed, also where the caller goes away.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::affinity::Affinity;
use super::{Backend, DEADLINE_MAX, Fleet, REQUEST_TIMEOUT, WAKE_TIMEOUT, lock};
use crate::serving::batcher::{BatchAnswer, BatchError};
use crate::serving::lane::{Deadline, Lane, Refusal};
use crate::serving::oip::OipError;
use crate::serving::replica_settings::QUEUED_REQUESTS;
use crate::serving::rows::Row;

/// How long a request waits for any replica to take requests. Who waits holds a connection, and
/// those are bounded.
pub(super) const OPEN_TIMEOUT: Duration = Duration::from_secs(1);

/// Requests that wait for a replica, as many as usually for one that is busy.
pub(super) const HELD_REQUESTS_MAX: usize = QUEUED_REQUESTS as usize;

/// How long a replica must have had a request, without answering any, before its being late counts as a
/// failure: callers with shorter deadlines say more about themselves than about it.
const LATE_MIN: Duration = Duration::from_millis(100);

/// What a request wants beside its answer.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::serving) struct Terms {
    /// The answer within this time, or none.
    pub(in crate::serving) limit: Option<Duration>,
    /// The replica that it prefers.
    pub(in crate::serving) affinity: Option<Affinity>,
}

impl<B: Backend> Fleet<B> {
    /// Answers the rows of one request, within [`REQUEST_TIMEOUT`].
    pub async fn infer(&self, model: &str, rows: Vec<Row>) -> Result<BatchAnswer<Row>, OipError> {
        self.infer_within(model, rows, None).await
    }

    /// Answers the rows of one request before `limit` has passed, if it has one.
    pub async fn infer_within(
        &self,
        model: &str,
        rows: Vec<Row>,
        limit: Option<Duration>,
    ) -> Result<BatchAnswer<Row>, OipError> {
        let affinity = None;
        self.infer_on(model, rows, Terms { limit, affinity }).await
    }

    /// Answers the rows of one request as it wants it.
    pub(in crate::serving) async fn infer_on(
        &self,
        model: &str,
        rows: Vec<Row>,
        Terms { limit, affinity }: Terms,
    ) -> Result<BatchAnswer<Row>, OipError> {
        let entered = self.traffic.load.enter();
        self.traffic.earn_retry();
        let deadline = match limit {
            Some(limit) => Deadline::of(limit.min(DEADLINE_MAX)).behind(self.traffic.lag.lately()),
            // Waiting for a replica does not count then.
            None => Deadline::of(WAKE_TIMEOUT + REQUEST_TIMEOUT),
        };
        let is_given = limit.is_some();
        let first = self.choose_or_wait(model, &deadline, is_given).await?;
        let deadline = if is_given {
            deadline
        } else {
            Deadline::of(REQUEST_TIMEOUT)
        };
        let preferred = affinity.and_then(|affinity| self.preferred(affinity, &rows, &deadline));
        let first = preferred.unwrap_or(first);
        let tried = self.try_twice(&first, rows, &deadline).await;
        let answer = tried.map_err(|error| {
            // Where an idle replica would be late too, no number of them would do.
            if error.is_want_of_room() && first.least_batch_time() <= deadline.limit {
                entered.refused();
            }
            self.outcome(error, &deadline, is_given)
        })?;
        let BatchAnswer {
            outputs,
            queued,
            computed,
            hop,
            batch_rows,
            is_first_in_batch,
        } = answer;
        let rows = outputs.into_iter().enumerate();
        let row = |(row, answer): (usize, Result<Row, Refusal>)| {
            answer.map_err(|refusal| match refusal {
                Refusal::Failed(reason) => OipError::Failed { reason },
                Refusal::Row(reason) => OipError::RowRefused {
                    row: row as u64,
                    reason,
                },
                Refusal::Late => self.outcome(TryError::Late, &deadline, is_given),
            })
        };
        let outputs: Vec<Row> = rows.map(row).collect::<Result<_, _>>()?;
        entered.answered();
        Ok(BatchAnswer {
            outputs,
            queued,
            computed,
            hop,
            batch_rows,
            is_first_in_batch,
        })
    }

    /// Sends the rows to `first`, and to another one if that does not answer them.
    async fn try_twice(
        &self,
        first: &Lane<B>,
        rows: Vec<Row>,
        deadline: &Deadline,
    ) -> Result<BatchAnswer<Result<Row, Refusal>>, TryError> {
        let another = self.choose(Some(first.number));
        let another = another.filter(|another| another.number != first.number);
        let (first, until) = match first.first_try(deadline, &rows, another.is_some()) {
            Ok(until) => (first, until),
            // It has fewer rows in flight, and may be much slower than the other one, or hang.
            Err(wait) => another
                .as_deref()
                .and_then(|another| {
                    Some((another, another.first_try(deadline, &rows, false).ok()?))
                })
                .ok_or(TryError::WouldBeLate { wait })?,
        };
        let error = match self.try_once(first, rows.clone(), until).await {
            Ok(answer) => return Ok(answer),
            Err(TryError::Batch(error @ BatchError::RowCount { .. })) => {
                // The protocol's layer has checked this against the model's metadata.
                return Err(TryError::Batch(error));
            }
            Err(error) => error,
        };
        let second = self.choose(Some(first.number));
        let Some(second) = second.filter(|_| deadline.left() > Duration::ZERO) else {
            return Err(error);
        };
        if !self.traffic.may_retry() {
            return Err(error);
        }
        tracing::debug!(first = first.number, second = second.number, %error, "a second try");
        self.try_once(&second, rows, deadline.at).await
    }

    async fn try_once(
        &self,
        lane: &Lane<B>,
        rows: Vec<Row>,
        until: Instant,
    ) -> Result<BatchAnswer<Result<Row, Refusal>>, TryError> {
        // What is given up here, or by a caller who goes away, is counted when this is dropped.
        let waiting = Waiting::begin(self, lane);
        let Ok(tried) = tokio::time::timeout_at(until, lane.submit(rows, until)).await else {
            return Err(TryError::Late);
        };
        let is_late = |answer: &Result<Row, Refusal>| matches!(answer, Err(Refusal::Late));
        if matches!(&tried, Ok(answer) if answer.outputs.iter().any(is_late)) {
            return Err(TryError::Late);
        }
        waiting.end();
        match &tried {
            Ok(answer) if answer.outputs.iter().any(is_failure) => self.failed(lane),
            Ok(_) => lock(&self.outliers).succeeded(lane.number),
            Err(BatchError::Failed { .. } | BatchError::Lost | BatchError::OutputCount { .. }) => {
                self.failed(lane);
            }
            Err(
                BatchError::Overloaded { .. }
                | BatchError::RowCount { .. }
                | BatchError::ShuttingDown,
            ) => {}
        }
        tried.map_err(TryError::Batch)
    }

    async fn choose_or_wait(
        &self,
        model: &str,
        deadline: &Deadline,
        is_given: bool,
    ) -> Result<Arc<Lane<B>>, OipError> {
        if let Some(lane) = self.choose(None) {
            return Ok(lane);
        }
        let held = Held::enter(&self.held);
        if held.count > HELD_REQUESTS_MAX {
            self.traffic.count(|counts| counts.shed += 1);
            return Err(OipError::Overloaded {
                queued: HELD_REQUESTS_MAX as u64,
                limit: HELD_REQUESTS_MAX as u64,
            });
        }
        let is_waking = self.is_waking.load(Ordering::Relaxed);
        let patience = if is_waking {
            WAKE_TIMEOUT
        } else {
            OPEN_TIMEOUT
        };
        // From before we look, so that no opening is missed.
        let mut openings = self.openings.subscribe();
        let found = async {
            loop {
                if let Some(lane) = self.choose(None) {
                    return lane;
                }
                // The fleet holds the sender, so waiting cannot fail.
                let _ = openings.changed().await;
            }
        };
        let until = deadline.at.min(Instant::now() + patience);
        let found = tokio::time::timeout_at(until, found).await;
        found.map_err(|_| {
            if is_given && deadline.left() == Duration::ZERO {
                return self.outcome(TryError::Late, deadline, is_given);
            }
            self.none_open(model)
        })
    }

    fn none_open(&self, model: &str) -> OipError {
        OipError::NotReady {
            model: model.to_owned(),
            reason: format!(
                "none of its {} replicas is running; they are being started",
                self.replica_count()
            ),
        }
    }

    fn outcome(&self, error: TryError, deadline: &Deadline, is_given: bool) -> OipError {
        let limit_ms = u64::try_from(deadline.limit.as_millis()).unwrap_or(u64::MAX);
        match error {
            TryError::Late if is_given => {
                self.traffic.count(|counts| counts.late += 1);
                OipError::DeadlineExceeded { limit_ms }
            }
            TryError::Late => OipError::ReplicaLost {
                reason: format!("no answer within {limit_ms} ms"),
            },
            TryError::WouldBeLate { wait } => {
                self.traffic.count(|counts| counts.shed += 1);
                OipError::WouldBeLate {
                    wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                    limit_ms,
                }
            }
            TryError::Batch(error) => {
                if matches!(error, BatchError::Overloaded { .. }) {
                    self.traffic.count(|counts| counts.shed += 1);
                }
                outcome(error)
            }
        }
    }
}

/// Why a try gave no answer.
#[derive(Debug, thiserror::Error)]
enum TryError {
    #[error("no answer in time")]
    Late,
    #[error("its queue takes {} ms", wait.as_millis())]
    WouldBeLate { wait: Duration },
    #[error(transparent)]
    Batch(BatchError),
}

impl TryError {
    /// Whether there was no room for it at the replicas that there are.
    fn is_want_of_room(&self) -> bool {
        matches!(
            self,
            TryError::WouldBeLate { .. } | TryError::Batch(BatchError::Overloaded { .. })
        )
    }
}

/// A request that is with a replica. Dropped before its end, it speaks against a replica that has had the time and has
/// not answered anybody meanwhile.
struct Waiting<'a, B: Backend> {
    fleet: &'a Fleet<B>,
    lane: &'a Lane<B>,
    began: Instant,
    /// Batches that the replica had answered then.
    answered: u64,
}

impl<'a, B: Backend> Waiting<'a, B> {
    fn begin(fleet: &'a Fleet<B>, lane: &'a Lane<B>) -> Self {
        Waiting {
            fleet,
            lane,
            began: Instant::now(),
            answered: lane.answered(),
        }
    }

    /// The replica has had its say.
    fn end(self) {
        std::mem::forget(self);
    }
}

impl<B: Backend> Drop for Waiting<'_, B> {
    fn drop(&mut self) {
        let has_answered = self.lane.answered() != self.answered;
        if !has_answered && self.began.elapsed() >= LATE_MIN {
            self.fleet.failed(self.lane);
        }
    }
}

/// Counts a request that waits for a replica.
struct Held<'a> {
    counter: &'a AtomicUsize,
    count: usize,
}

impl<'a> Held<'a> {
    fn enter(counter: &'a AtomicUsize) -> Self {
        let count = counter.fetch_add(1, Ordering::Relaxed) + 1;
        Held { counter, count }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(1, Ordering::Relaxed);
    }
}

fn outcome(error: BatchError) -> OipError {
    match error {
        BatchError::Overloaded { limit } => OipError::Overloaded {
            queued: limit as u64,
            limit: limit as u64,
        },
        BatchError::ShuttingDown => OipError::ShuttingDown,
        BatchError::Failed { reason } => OipError::ReplicaLost { reason },
        error @ (BatchError::Lost
        | BatchError::OutputCount { .. }
        | BatchError::RowCount { .. }) => OipError::Failed {
            reason: error.to_string(),
        },
    }
}

/// Whether an answer speaks against the replica, and not against what it was asked.
fn is_failure(answer: &Result<Row, Refusal>) -> bool {
    matches!(answer, Err(Refusal::Failed(_)))
}
