//! The replicas behind an endpoint: which of them gets a request, and what happens when one fails.
//!
//! Invariants:
//! 1. Each replica has a batcher of its own, with a bounded queue; a replica that failed gets no
//!    requests until it has answered a probe, and one that fails again and again none for a while.
//! 2. Of two replicas the one with fewer rows in flight is chosen (power of two choices).
//! 3. A request that a replica did not answer is sent once more, to another one if there is one and the
//!    budget allows it: inference changes nothing, so twice is harmless. A request never takes longer than
//!    its deadline.
//! 4. A request that finds no replica waits a little for one: they come back within moments. Where there
//!    was none at all it waits for the first, and of those that wait there are not many.
//! 5. A replica that is wanted no more gets no new requests, and is gone with its last one.
//! 6. Dropping a fleet ends its tasks.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::batcher::{BatchAnswer, BatchError};
use super::guard::outlier::Outliers;
use super::guard::traffic::Traffic;
use super::lane::{Deadline, Lane, QUEUED_REQUESTS_MAX, Refusal};
use super::oip::OipError;
use super::rows::Row;

pub use super::lane::{BATCH_ROWS_MAX, BATCH_TIMEOUT, Backend, BackendFailure, Berth};

/// How long a request may take with its second try, if it does not say itself.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request may take at the most, whatever it says.
pub const DEADLINE_MAX: Duration = Duration::from_secs(60);

/// How long a request waits for any replica to take requests. Who waits holds a connection, and
/// those are bounded.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a request waits for the first replica of an endpoint that had none: a process is started, and
/// loads the model.
pub(super) const WAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// Requests that wait for a replica, as many as for one that is busy.
const HELD_REQUESTS_MAX: usize = QUEUED_REQUESTS_MAX;

/// How long a replica must have had a request, without answering any, before its being late counts as a
/// failure: callers with shorter deadlines say more about themselves than about it.
const LATE_MIN: Duration = Duration::from_millis(100);

/// The replicas of one version of an endpoint.
pub struct Fleet<B> {
    lanes: RwLock<Vec<Arc<Lane<B>>>>,
    /// Lanes that are wanted no more and may have requests.
    leaving: Mutex<Vec<Weak<Lane<B>>>>,
    openings: Arc<watch::Sender<u64>>,
    /// Whether there was no replica, and none has answered since.
    is_waking: AtomicBool,
    /// Requests that wait for a replica.
    held: AtomicUsize,
    ticket: AtomicU64,
    outliers: Mutex<Outliers>,
    traffic: Arc<Traffic>,
}

impl<B: Backend> Fleet<B> {
    /// A fleet of `replicas`, none of which takes requests yet.
    #[must_use]
    pub fn new(replicas: u32) -> Self {
        Fleet::sharing(replicas, Arc::default())
    }

    /// The same as part of an endpoint's traffic.
    #[must_use]
    pub fn sharing(replicas: u32, traffic: Arc<Traffic>) -> Self {
        let fleet = Fleet {
            lanes: RwLock::default(),
            leaving: Mutex::default(),
            openings: Arc::new(watch::Sender::new(0)),
            is_waking: AtomicBool::new(replicas == 0),
            held: AtomicUsize::new(0),
            ticket: AtomicU64::new(0),
            outliers: Mutex::default(),
            traffic,
        };
        fleet.resize(replicas);
        fleet
    }

    /// Has so many replicas from now on. The berths of new ones, with their numbers.
    pub fn resize(&self, replicas: u32) -> Vec<(u32, Arc<Berth<B>>)> {
        let mut lanes = self.lanes.write().unwrap_or_else(PoisonError::into_inner);
        let known = lanes.len() as u32;
        if replicas == 0 {
            self.is_waking.store(true, Ordering::Relaxed);
        }
        if replicas < known {
            let leaving = lanes.split_off(replicas as usize);
            let leaving: Vec<Weak<Lane<B>>> = leaving.iter().map(Arc::downgrade).collect();
            lock(&self.leaving).extend(leaving);
            lock(&self.outliers).keep(replicas);
        }
        let new: Vec<Arc<Lane<B>>> = (known + 1..=replicas)
            .map(|number| {
                let (openings, traffic) = (&self.openings, &self.traffic);
                Arc::new(Lane::new(number, Arc::clone(openings), Arc::clone(traffic)))
            })
            .collect();
        lanes.extend(new.iter().cloned());
        new.iter()
            .map(|lane| (lane.number, Arc::clone(&lane.berth)))
            .collect()
    }

    fn lanes(&self) -> Vec<Arc<Lane<B>>> {
        let lanes = self.lanes.read().unwrap_or_else(PoisonError::into_inner);
        lanes.clone()
    }

    /// Each replica's number, counted from 1, with its berth.
    pub fn berths(&self) -> impl Iterator<Item = (u32, Arc<Berth<B>>)> {
        self.lanes()
            .into_iter()
            .map(|lane| (lane.number, Arc::clone(&lane.berth)))
    }

    /// How many replicas take requests.
    #[must_use]
    pub fn open_count(&self) -> usize {
        self.lanes().iter().filter(|lane| lane.is_open()).count()
    }

    /// How many replicas there should be.
    #[must_use]
    pub fn replica_count(&self) -> usize {
        self.lanes().len()
    }

    /// How many requests wait for a replica.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        let queued: usize = self.lanes().iter().map(|lane| lane.queued()).sum();
        queued + self.held.load(Ordering::Relaxed)
    }

    /// The memory that the processes of its replicas have in use, in percent: the most that any of them said.
    #[must_use]
    pub fn memory_percent(&self) -> u8 {
        let lanes = self.lanes();
        let open = lanes.iter().filter(|lane| lane.is_open());
        open.map(|lane| lane.memory_percent()).max().unwrap_or(0)
    }

    /// Whether it has no replica and gets one with the first request.
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        self.replica_count() == 0
    }

    /// Whether no request is left with a replica that is wanted no more.
    pub fn is_drained(&self) -> bool {
        let mut leaving = lock(&self.leaving);
        leaving.retain(|lane| lane.strong_count() > 0);
        leaving.is_empty()
    }

    /// What passes through the endpoint that it is part of.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

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
        let entered = self.traffic.load.enter();
        self.traffic.earn_retry();
        let deadline = match limit {
            Some(limit) => Deadline::of(limit.min(DEADLINE_MAX)),
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
        let tried = self.try_twice(&first, rows, &deadline).await;
        let answer = tried.map_err(|error| self.outcome(error, &deadline, is_given))?;
        let BatchAnswer {
            outputs,
            queued,
            computed,
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
        if let Some(wait) = first.wait_beyond(deadline, &rows) {
            return Err(TryError::WouldBeLate { wait });
        }
        let another = self.choose(Some(first.number));
        let has_another = another.is_some_and(|another| another.number != first.number);
        // Half of the time is left for a second try, where there is one to be had.
        let until = if has_another {
            deadline.half()
        } else {
            deadline.at
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

    fn failed(&self, lane: &Lane<B>) {
        let open = self.open_count();
        let now_ms = self.traffic.now_ms();
        if let Some(lasts_ms) = lock(&self.outliers).failed(lane.number, open, now_ms) {
            self.traffic.count(|counts| counts.ejections += 1);
            tracing::warn!(replica = lane.number, lasts_ms, "a replica is ejected");
        }
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

    /// The less busy of two replicas that take requests, other than `except` if there is another.
    fn choose(&self, except: Option<u32>) -> Option<Arc<Lane<B>>> {
        let lanes = self.lanes.read().unwrap_or_else(PoisonError::into_inner);
        let open: Vec<&Arc<Lane<B>>> = lanes.iter().filter(|lane| lane.is_open()).collect();
        if !open.is_empty() {
            self.is_waking.store(false, Ordering::Relaxed);
        }
        let now_ms = self.traffic.now_ms();
        let outliers = lock(&self.outliers);
        let others: Vec<&Arc<Lane<B>>> = open
            .iter()
            .copied()
            .filter(|lane| Some(lane.number) != except)
            .filter(|lane| !outliers.is_ejected(lane.number, now_ms))
            .collect();
        drop(outliers);
        let candidates = if others.is_empty() { open } else { others };
        let count = candidates.len();
        if count < 2 {
            return candidates.first().copied().cloned();
        }
        let hash = mixed(self.ticket.fetch_add(1, Ordering::Relaxed));
        let one = (hash >> 32) as usize % count;
        // Any of the others, each as likely.
        let other = (one + 1 + (hash & 0xFFFF_FFFF) as usize % (count - 1)) % count;
        let load = |at: usize| candidates[at].rows_in_flight.load(Ordering::Relaxed);
        let less_busy = if load(other) < load(one) { other } else { one };
        Some(Arc::clone(candidates[less_busy]))
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole after every single update, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Spreads neighbouring numbers over all bits (the finalizer of SplitMix64). Which replicas are
/// compared needs no secrecy, only evenness.
fn mixed(ticket: u64) -> u64 {
    let mut z = ticket.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Whether an answer speaks against the replica, and not against what it was asked.
fn is_failure(answer: &Result<Row, Refusal>) -> bool {
    matches!(answer, Err(Refusal::Failed(_)))
}

#[cfg(test)]
#[path = "fleet_tests.rs"]
mod tests;
