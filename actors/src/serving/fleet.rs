//! The replicas behind an endpoint: which of them gets a request, and what happens when one fails.
//!
//! Invariants:
//! 1. Each replica has a batcher of its own, with a bounded queue; a replica that failed gets no
//!    requests until it has answered a probe.
//! 2. Of two replicas the one with fewer rows in flight is chosen (power of two choices).
//! 3. A request that a replica did not answer is sent once more, to another one if there is one:
//!    inference changes nothing, so twice is harmless. A request never takes longer than
//!    [`REQUEST_TIMEOUT`].
//! 4. A request that finds no replica waits a little for one: they come back within moments.
//! 5. Dropping a fleet ends its tasks.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::batcher::{BatchAnswer, BatchError, BatchRunner, Batcher, BatcherConfig, BatcherHandle};
use super::oip::OipError;
use super::replica::Inference;

/// Rows in a batch: large enough that the model, not the call around it, takes the time.
pub const BATCH_ROWS_MAX: usize = 128;

/// Requests that wait for one replica: two or three batches of single rows. More would only wait
/// longer than their callers do.
const QUEUED_REQUESTS_MAX: usize = 256;

/// How long a batch may take before its requests are sent elsewhere. A batch takes milliseconds;
/// this is how long it takes to find that a process has vanished.
pub const BATCH_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a request may take with its second try.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request waits for any replica to take requests. Who waits holds a connection, and
/// those are bounded.
const OPEN_TIMEOUT: Duration = Duration::from_secs(1);

/// One replica, as the fleet reaches it.
pub trait Backend: Clone + Send + Sync + 'static {
    /// Answers rows; they come one after the other.
    fn infer(
        &self,
        rows: Vec<f32>,
    ) -> impl Future<Output = Result<Inference, BackendFailure>> + Send;
}

/// Why a replica gave no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendFailure {
    /// It answered that it cannot.
    Refused(String),
    /// It did not answer.
    Lost(String),
}

/// What the model says about one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The probability of each class.
    pub probabilities: Vec<f32>,
    /// The most probable class.
    pub class: u32,
}

/// A replica's own words; another one would say the same.
type Refusal = String;

/// What a replica's batcher answers.
type Answer = Result<BatchAnswer<Result<Prediction, Refusal>>, BatchError>;

/// The fleet's end of one replica, for whoever finds it and probes it.
#[derive(Debug)]
pub struct Berth<B> {
    backend: watch::Sender<Option<B>>,
    /// Counts how often any berth of the fleet was opened.
    openings: Arc<watch::Sender<u64>>,
}

impl<B: Backend> Berth<B> {
    /// The replica takes requests from now on.
    pub fn open(&self, backend: B) {
        self.backend.send_replace(Some(backend));
        self.openings.send_modify(|count| *count += 1);
    }

    /// The replica is gone: what it has not answered is sent elsewhere at once.
    pub fn close(&self) {
        self.backend.send_replace(None);
    }

    /// Waits until the replica has failed a request.
    pub async fn failed(&self) {
        // The sender is ours, so waiting cannot fail.
        let _ = self.backend.subscribe().wait_for(Option::is_none).await;
    }
}

struct Lane<B> {
    number: u32,
    berth: Arc<Berth<B>>,
    queue: BatcherHandle<Vec<f32>, Result<Prediction, Refusal>>,
    rows_in_flight: AtomicUsize,
    _batcher: Batcher,
}

impl<B> Lane<B> {
    fn is_open(&self) -> bool {
        self.berth.backend.borrow().is_some()
    }
}

/// The replicas behind an endpoint.
pub struct Fleet<B> {
    lanes: Vec<Lane<B>>,
    openings: Arc<watch::Sender<u64>>,
    ticket: AtomicU64,
}

impl<B: Backend> Fleet<B> {
    /// A fleet of `replicas`, none of which takes requests yet.
    #[must_use]
    pub fn new(replicas: u32) -> Self {
        let openings = Arc::new(watch::Sender::new(0));
        let lanes = (1..=replicas).map(|number| {
            let berth = Arc::new(Berth {
                backend: watch::Sender::new(None),
                openings: Arc::clone(&openings),
            });
            let config = BatcherConfig {
                max_batch_rows: BATCH_ROWS_MAX,
                // What queues up while a batch runs is the next batch; an idle replica answers at
                // once.
                max_delay: Duration::ZERO,
                max_queued_requests: QUEUED_REQUESTS_MAX,
            };
            let runner = Runner {
                number,
                berth: Arc::clone(&berth),
            };
            let (batcher, queue) = Batcher::start(config, runner);
            Lane {
                number,
                berth,
                queue,
                rows_in_flight: AtomicUsize::new(0),
                _batcher: batcher,
            }
        });
        Fleet {
            lanes: lanes.collect(),
            openings,
            ticket: AtomicU64::new(0),
        }
    }

    /// Each replica's number, counted from 1, with its berth.
    pub fn berths(&self) -> impl Iterator<Item = (u32, Arc<Berth<B>>)> {
        self.lanes
            .iter()
            .map(|lane| (lane.number, Arc::clone(&lane.berth)))
    }

    /// How many replicas take requests.
    #[must_use]
    pub fn open_count(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.is_open()).count()
    }

    /// How many replicas there should be.
    #[must_use]
    pub fn replica_count(&self) -> usize {
        self.lanes.len()
    }

    /// Answers the rows of one request.
    pub async fn infer(
        &self,
        model: &str,
        rows: Vec<Vec<f32>>,
    ) -> Result<BatchAnswer<Prediction>, OipError> {
        let answered = tokio::time::timeout(REQUEST_TIMEOUT, self.infer_or_retry(model, rows));
        let Ok(answer) = answered.await else {
            let reason = format!("no answer within {} ms", REQUEST_TIMEOUT.as_millis());
            return Err(OipError::ReplicaLost { reason });
        };
        let BatchAnswer {
            outputs,
            queued,
            computed,
            batch_rows,
            is_first_in_batch,
        } = answer?;
        let outputs: Result<Vec<Prediction>, Refusal> = outputs.into_iter().collect();
        let outputs = outputs.map_err(|reason| OipError::Failed { reason })?;
        Ok(BatchAnswer {
            outputs,
            queued,
            computed,
            batch_rows,
            is_first_in_batch,
        })
    }

    async fn infer_or_retry(
        &self,
        model: &str,
        rows: Vec<Vec<f32>>,
    ) -> Result<BatchAnswer<Result<Prediction, Refusal>>, OipError> {
        let first = self
            .choose_or_wait()
            .await
            .ok_or_else(|| self.none_open(model))?;
        let error = match first.submit(rows.clone()).await {
            Err(BatchError::RowCount {
                rows,
                max_batch_rows,
            }) => {
                // The protocol's layer has checked this against the model's metadata.
                return Err(OipError::Failed {
                    reason: format!("{rows} rows, where 1 to {max_batch_rows} are possible"),
                });
            }
            Err(error) => error,
            Ok(answer) => return Ok(answer),
        };
        let Some(second) = self.choose(Some(first.number)) else {
            return Err(outcome(error));
        };
        tracing::debug!(first = first.number, second = second.number, %error, "a second try");
        second.submit(rows).await.map_err(outcome)
    }

    async fn choose_or_wait(&self) -> Option<&Lane<B>> {
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
        tokio::time::timeout(OPEN_TIMEOUT, found).await.ok()
    }

    /// The less busy of two replicas that take requests, other than `except` if there is another.
    fn choose(&self, except: Option<u32>) -> Option<&Lane<B>> {
        let open: Vec<&Lane<B>> = self.lanes.iter().filter(|lane| lane.is_open()).collect();
        let others: Vec<&Lane<B>> = open
            .iter()
            .copied()
            .filter(|lane| Some(lane.number) != except)
            .collect();
        let candidates = if others.is_empty() { open } else { others };
        let count = candidates.len();
        if count < 2 {
            return candidates.first().copied();
        }
        let hash = mixed(self.ticket.fetch_add(1, Ordering::Relaxed));
        let one = (hash >> 32) as usize % count;
        // Any of the others, each as likely.
        let other = (one + 1 + (hash & 0xFFFF_FFFF) as usize % (count - 1)) % count;
        let load = |at: usize| candidates[at].rows_in_flight.load(Ordering::Relaxed);
        Some(candidates[if load(other) < load(one) { other } else { one }])
    }

    fn none_open(&self, model: &str) -> OipError {
        OipError::NotReady {
            model: model.to_owned(),
            reason: format!(
                "none of its {} replicas is running; they are being started",
                self.lanes.len()
            ),
        }
    }
}

impl<B> Lane<B> {
    async fn submit(&self, rows: Vec<Vec<f32>>) -> Answer {
        let _counted = InFlight::enter(&self.rows_in_flight, rows.len());
        self.queue.submit(rows).await
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

/// Sends one replica its batches.
struct Runner<B> {
    number: u32,
    berth: Arc<Berth<B>>,
}

impl<B: Backend> BatchRunner for Runner<B> {
    type Row = Vec<f32>;
    type Output = Result<Prediction, Refusal>;

    async fn run(&mut self, rows: Vec<Vec<f32>>) -> Result<Vec<Self::Output>, String> {
        let mut berth = self.berth.backend.subscribe();
        let backend = berth.borrow_and_update().clone();
        // Requests that queued up behind the one that found the replica dead.
        let Some(backend) = backend else {
            return Err(format!("replica {} is not running", self.number));
        };
        let count = rows.len();
        let failure = tokio::select! {
            answer = backend.infer(rows.concat()) => match answer {
                Ok(inference) => return Ok(predictions(inference)),
                Err(failure) => failure,
            },
            // Closed by whoever watches the replica, or opened with a newer start of it.
            _ = berth.changed() => {
                return Err(format!("replica {} ended while it held the batch", self.number));
            }
            () = tokio::time::sleep(BATCH_TIMEOUT) => {
                BackendFailure::Lost(format!("no answer within {} ms", BATCH_TIMEOUT.as_millis()))
            }
        };
        match failure {
            BackendFailure::Refused(reason) => Ok(vec![Err(reason); count]),
            BackendFailure::Lost(reason) => {
                tracing::warn!(replica = self.number, reason, "a replica does not answer");
                self.berth.close();
                Err(format!("replica {}: {reason}", self.number))
            }
        }
    }
}

fn predictions(inference: Inference) -> Vec<Result<Prediction, Refusal>> {
    // A replica answers at least one row, and as many probabilities for each.
    let width = inference.probabilities.len() / inference.classes.len().max(1);
    let rows = inference
        .probabilities
        .chunks_exact(width.max(1))
        .zip(inference.classes);
    rows.map(|(row, class)| {
        Ok(Prediction {
            probabilities: row.to_vec(),
            class,
        })
    })
    .collect()
}

#[cfg(test)]
#[path = "fleet_tests.rs"]
mod tests;
