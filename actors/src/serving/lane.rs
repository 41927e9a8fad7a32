//! One replica of a fleet: its place and its queue. What it is sent from that queue, `runner` says; how fast it is, `pace`.

mod pace;
mod runner;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use mobula_core::id::NodeId;
use tokio::sync::watch;
use tokio::time::Instant;

use self::pace::Pace;
use self::runner::Runner;
use super::batcher::{BatchAnswer, BatchError, Batcher, BatcherHandle};
use super::guard::traffic::Traffic;
use super::replica::{Inference, RefusedRow};
use super::replica_settings::Batching;
use super::rows::{Batch, Row};

/// Rows in a batch: large enough that the model, not the call around it, takes the time.
pub const BATCH_ROWS_MAX: usize = 128;

/// How long a batch may take before its requests are sent elsewhere. A batch takes milliseconds;
/// this is how long it takes to find that a process has vanished.
pub const BATCH_TIMEOUT: Duration = Duration::from_secs(2);

/// One replica, as the fleet reaches it.
pub trait Backend: Clone + Send + Sync + 'static {
    /// Answers rows that are computed at once.
    fn infer(&self, rows: Batch) -> impl Future<Output = Result<Inference, BackendFailure>> + Send;

    /// The same for callers that wait no longer than `limit`.
    fn infer_within(
        &self,
        rows: Batch,
        limit: Duration,
    ) -> impl Future<Output = Result<Inference, BackendFailure>> + Send {
        let _ = limit;
        self.infer(rows)
    }
}

/// Why a replica gave no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendFailure {
    /// It answered that it cannot.
    Refused(String),
    /// Some rows are no input for the model; it would answer the others.
    RowsRefused(Vec<RefusedRow>),
    /// It failed on some rows; it would answer the others.
    RowsFailed(Vec<RefusedRow>),
    /// The outputs of so many bytes are too large for one answer; it would answer fewer rows.
    OutputsTooLarge(u64),
    /// The deadline passed, which says more about that than about the replica.
    Late,
    /// It did not answer.
    Lost(String),
}

/// A replica's own words; another one would say the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It failed on the batch.
    Failed(String),
    /// The row is no input for the model.
    Row(String),
    /// There was not the time for it.
    Late,
}

/// What a replica's batcher answers.
pub(super) type Answer = Result<BatchAnswer<Result<Row, Refusal>>, BatchError>;

/// The fleet's end of one replica, for whoever finds it and probes it.
#[derive(Debug)]
pub struct Berth<B> {
    backend: watch::Sender<Option<B>>,
    /// How often it was opened.
    opened: AtomicU64,
    /// The node on which the replica runs that was opened last, if that is known.
    node: watch::Sender<Option<NodeId>>,
    /// Counts how often any berth of the fleet was opened.
    openings: Arc<watch::Sender<u64>>,
    /// Closed when the replica's place is gone.
    retired: watch::Sender<bool>,
}

impl<B: Backend> Berth<B> {
    /// The replica takes requests from now on.
    pub fn open(&self, backend: B) {
        // Another start may run elsewhere.
        self.node.send_replace(None);
        self.backend.send_replace(Some(backend));
        self.opened.fetch_add(1, Ordering::Release);
        self.openings.send_modify(|count| *count += 1);
    }

    /// The replica is gone: what it has not answered is sent elsewhere at once.
    pub fn close(&self) {
        self.backend.send_replace(None);
    }

    /// The replica while it takes requests, and how often one was opened here by then: for who asks it past its queue.
    pub fn opened(&self) -> Option<(u64, B)> {
        // Counted before it is taken: one that is opened in between counts as the one before it, and is asked again.
        let opened = self.opened.load(Ordering::Acquire);
        Some((opened, self.backend.borrow().clone()?))
    }

    /// The replica that was opened last runs on this node.
    pub fn runs_on(&self, node: NodeId) {
        self.node.send_replace(Some(node));
    }

    /// The node of the replica that was the `opened`-th here, if that is known and no other was opened since.
    pub fn node_of(&self, opened: u64) -> Option<NodeId> {
        // Taken before it is compared: another one is counted before it is known where that one runs.
        let node = *self.node.borrow();
        node.filter(|_| self.opened.load(Ordering::Acquire) == opened)
    }

    /// Waits until the replica has failed a request.
    pub async fn failed(&self) {
        // The sender is ours, so waiting cannot fail.
        let _ = self.backend.subscribe().wait_for(Option::is_none).await;
    }

    /// Waits until the replica is wanted no more and its last request is gone.
    pub async fn retired(&self) {
        let _ = self.retired.subscribe().wait_for(|retired| *retired).await;
    }
}

pub(super) struct Lane<B> {
    pub(super) number: u32,
    pub(super) berth: Arc<Berth<B>>,
    queue: BatcherHandle<Row, Result<Row, Refusal>>,
    pub(super) rows_in_flight: AtomicUsize,
    pace: Arc<Pace>,
    _batcher: Batcher,
}

impl<B> Drop for Lane<B> {
    fn drop(&mut self) {
        self.berth.retired.send_replace(true);
    }
}

impl<B: Backend> Lane<B> {
    /// The place of the replica with this number; `openings` is told when it is opened, and `traffic` what it computes.
    pub(super) fn new(
        number: u32,
        batching: &Batching,
        openings: Arc<watch::Sender<u64>>,
        traffic: Arc<Traffic>,
    ) -> Self {
        let berth = Arc::new(Berth {
            backend: watch::Sender::new(None),
            opened: AtomicU64::new(0),
            node: watch::Sender::new(None),
            openings,
            retired: watch::Sender::new(false),
        });
        let pace = Arc::new(Pace::default());
        let runner = Runner::new(number, Arc::clone(&berth), Arc::clone(&pace), traffic);
        let (batcher, queue) = Batcher::start(batching.to_config(), runner);
        Lane {
            number,
            berth,
            queue,
            rows_in_flight: AtomicUsize::new(0),
            pace,
            _batcher: batcher,
        }
    }
}

impl<B> Lane<B> {
    pub(super) fn is_open(&self) -> bool {
        self.berth.backend.borrow().is_some()
    }

    pub(super) async fn submit(&self, rows: Vec<Row>, until: Instant) -> Answer {
        let _counted = InFlight::enter(&self.rows_in_flight, rows.len());
        self.queue.submit_until(rows, until).await
    }

    /// Until when a first try may wait for this replica, or how long an answer would take if that is beyond the
    /// deadline. With `has_another` a second try is to be had elsewhere, and half of the time is left for it.
    ///
    /// Not so where this replica is known to take more than half: given up then, the request would come to the end of
    /// another queue with the smaller half of its time, and be answered by neither. It gets all of it, so that what is
    /// refused here and what is waited for are measured by one deadline.
    pub(super) fn first_try(
        &self,
        deadline: &Deadline,
        asked: &[Row],
        has_another: bool,
    ) -> Result<Instant, Duration> {
        let left = deadline.left();
        let rows = self.rows_in_flight.load(Ordering::Relaxed);
        let wait = self.expected_wait(rows, asked);
        // The caller has waited by now until the request was read, and will until its answer is written.
        let expected = wait + deadline.lag * 2;
        // An idle replica is always asked: it may have become faster.
        if rows > 0 && expected > left {
            return Err(expected);
        }
        let half = left / 2;
        if has_another && wait <= half {
            return Ok(deadline.at - half);
        }
        Ok(deadline.at)
    }

    /// How long an answer takes behind so many rows, at the pace of the last batches; nothing before the first.
    fn expected_wait(&self, rows: usize, asked: &[Row]) -> Duration {
        // What a model does not join is computed one after the other.
        let joined = asked.first().and_then(|row| row.batch_rows_max);
        let batch_rows_max = joined.map_or(1, |rows| rows.clamp(1, BATCH_ROWS_MAX));
        let batches = match rows {
            0 => 1,
            // The batch that runs, those that wait, and one's own.
            rows => (rows / batch_rows_max + 2) as u32,
        };
        // While a batch runs as many come as came during the one before, so all that is here may be one.
        let batch_rows = (rows + asked.len()).min(batch_rows_max);
        self.pace.batch(batch_rows).saturating_mul(batches)
    }

    /// What a batch of a single row takes; nothing before the first batch.
    pub(super) fn least_batch_time(&self) -> Duration {
        self.pace.batch(1)
    }

    /// What a batch takes, as a test has it.
    #[cfg(test)]
    pub(super) fn set_batch_time(&self, taken: Duration) {
        self.pace.set(taken);
    }

    /// Requests in its queue.
    pub(super) fn queued(&self) -> usize {
        self.queue.queued_requests()
    }

    /// The memory that its process had in use at its last answer, in percent; 0 if that is not known, or was long ago.
    pub(super) fn memory_percent(&self) -> u8 {
        self.pace.memory_percent()
    }

    /// Batches that it has answered.
    pub(super) fn answered(&self) -> u64 {
        self.pace.answered()
    }
}

/// When a request must be answered.
pub(super) struct Deadline {
    pub(super) limit: Duration,
    pub(super) at: Instant,
    /// How late the router is that reads the request and writes its answer.
    lag: Duration,
}

impl Deadline {
    /// So much from now on.
    pub(super) fn of(limit: Duration) -> Self {
        let at = Instant::now() + limit;
        let lag = Duration::ZERO;
        Deadline { limit, at, lag }
    }

    /// The same for a request that was read so late, and whose answer will be written so late.
    pub(super) fn behind(self, lag: Duration) -> Self {
        Deadline { lag, ..self }
    }

    pub(super) fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

/// Counts rows for as long as it lives, also when the caller goes away.
struct InFlight<'a> {
    counter: &'a AtomicUsize,
    rows: usize,
}

impl<'a> InFlight<'a> {
    fn enter(counter: &'a AtomicUsize, rows: usize) -> Self {
        counter.fetch_add(rows, Ordering::Relaxed);
        InFlight { counter, rows }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.rows, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[path = "lane_tests.rs"]
mod tests;
