//! Joins waiting requests into batches (Triton's dynamic batching).
//!
//! 1. Requests that fit each other keep their order, and none is split over two batches; a request may hold several rows.
//! 2. A batch leaves when the next request would exceed the largest batch or does not fit the others, when it has a preferred size,
//!    when its oldest request has waited for the largest delay, when no delay is allowed, or when waiting for one more is not worth it.
//! 3. The queue is bounded; past it a request is refused at once and was not executed.
//! 4. A caller who has gone before the batch leaves is dropped from it, and a batch is dropped when all of its callers have gone.
//!    One batch runs at a time, so a runner needs no lock.

mod line;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use self::line::Line;

/// The bounds of a batcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatcherConfig {
    /// Rows in a batch, at least 1.
    pub max_batch_rows: usize,
    /// Sizes, in rows, at which a batch leaves at once; none if empty. A request that has waited for a fixed delay leaves with
    /// whatever is there.
    pub preferred_rows: Vec<usize>,
    /// How long requests wait for others.
    pub delay: Delay,
    /// Requests that wait while a batch runs, at least 1; past it callers get [`BatchError::Overloaded`].
    pub max_queued_requests: usize,
}

/// How long requests wait for others to share a batch with. What has queued up while the last batch ran is always joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// The oldest so long; zero is not at all.
    Fixed(Duration),
    /// As long as that saves more than it costs ([`super::patience`]), the oldest at most so long, and none past its
    /// deadline.
    Adaptive {
        /// The longest.
        max: Duration,
    },
}

/// Why a request got no answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BatchError {
    /// The queue is full. Not executed; retrying later can help.
    #[error("{limit} requests wait already, the request was not executed")]
    Overloaded {
        /// The bound of the queue.
        limit: usize,
    },
    /// The request has no rows, or more than a batch takes. Not executed; retrying cannot help.
    #[error("a request of {rows} rows, expected 1 to {max_batch_rows}")]
    RowCount {
        /// Rows of the request.
        rows: usize,
        /// Rows in a batch.
        max_batch_rows: usize,
    },
    /// The batcher stops. Not executed.
    #[error("shutting down, the request was not executed")]
    ShuttingDown,
    /// The runner failed on the batch.
    #[error("the batch failed: {reason}")]
    Failed {
        /// The runner's words.
        reason: String,
    },
    /// The runner broke its promise of one output a row.
    #[error("the batch of {rows} rows gave {outputs} outputs")]
    OutputCount {
        /// Rows in the batch.
        rows: usize,
        /// Outputs returned.
        outputs: usize,
    },
    /// The batcher's task ended while it held the request (a panic in the runner): executed or not is unknown.
    #[error("the batcher was lost while it held the request, the outcome is unknown")]
    Lost,
}

/// What became of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Computed<O> {
    /// One output for each row, in order.
    pub outputs: Vec<O>,
    /// Of the time that it took, what was spent on the way to where it was computed and back.
    pub hop: Duration,
}

impl<O> From<Vec<O>> for Computed<O> {
    /// It was computed right here.
    fn from(outputs: Vec<O>) -> Self {
        let hop = Duration::ZERO;
        Computed { outputs, hop }
    }
}

/// Computes batches.
pub trait BatchRunner: Send + 'static {
    /// One row of a request.
    type Row: Send + 'static;
    /// What one row becomes.
    type Output: Send + 'static;

    /// Whether a row may be part of a batch that begins with `first` and has `rows` rows already.
    fn joins(first: &Self::Row, rows: usize, next: &Self::Row) -> bool {
        let _ = (first, rows, next);
        true
    }

    /// Computes one output a row, in order.
    ///
    /// # Errors
    /// A reason, which every request of the batch is given.
    fn run(
        &mut self,
        rows: Vec<Self::Row>,
    ) -> impl Future<Output = Result<Computed<Self::Output>, String>> + Send;

    /// The same for callers none of whom waits after `until`. Dropped when all of them have gone earlier.
    ///
    /// # Errors
    /// A reason, which every request of the batch is given.
    fn run_until(
        &mut self,
        rows: Vec<Self::Row>,
        until: Instant,
    ) -> impl Future<Output = Result<Computed<Self::Output>, String>> + Send {
        let _ = until;
        self.run(rows)
    }
}

/// A request's outputs and where its time went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchAnswer<O> {
    /// One output for each row of the request.
    pub outputs: Vec<O>,
    /// From the call to the start of its batch.
    pub queued: Duration,
    /// The batch's computation, the way there and back included.
    pub computed: Duration,
    /// That way.
    pub hop: Duration,
    /// Rows in the batch, this request's included.
    pub batch_rows: usize,
    /// Whether this request is the first of its batch: summing over these counts each execution once.
    pub is_first_in_batch: bool,
}

struct Pending<R, O> {
    rows: Vec<R>,
    queued_at: Instant,
    /// When the caller stops waiting, if ever.
    until: Option<Instant>,
    reply: oneshot::Sender<Result<BatchAnswer<O>, BatchError>>,
}

/// Sends requests to a batcher; clones share its queue.
pub struct BatcherHandle<R, O> {
    queue: mpsc::Sender<Pending<R, O>>,
    /// Requests that have left the queue for a batch that is not full.
    gathered: Arc<AtomicUsize>,
    config: BatcherConfig,
}

impl<R, O> Clone for BatcherHandle<R, O> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            gathered: Arc::clone(&self.gathered),
            config: self.config.clone(),
        }
    }
}

impl<R: Send, O: Send> BatcherHandle<R, O> {
    /// Waits for the outputs of a request. Dropping the future before its batch leaves takes the request back.
    ///
    /// # Errors
    /// [`BatchError`]; each kind says whether the request was executed.
    pub async fn submit(&self, rows: Vec<R>) -> Result<BatchAnswer<O>, BatchError> {
        self.send(rows, None).await
    }

    /// The same for a caller who does not wait after `until`: the runner is told.
    ///
    /// # Errors
    /// [`BatchError`]; each kind says whether the request was executed.
    pub async fn submit_until(
        &self,
        rows: Vec<R>,
        until: Instant,
    ) -> Result<BatchAnswer<O>, BatchError> {
        self.send(rows, Some(until)).await
    }

    async fn send(
        &self,
        rows: Vec<R>,
        until: Option<Instant>,
    ) -> Result<BatchAnswer<O>, BatchError> {
        let max_batch_rows = self.config.max_batch_rows;
        if rows.is_empty() || rows.len() > max_batch_rows {
            return Err(BatchError::RowCount {
                rows: rows.len(),
                max_batch_rows,
            });
        }
        let (reply, answer) = oneshot::channel();
        let pending = Pending {
            rows,
            queued_at: Instant::now(),
            until,
            reply,
        };
        self.queue.try_send(pending).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => BatchError::Overloaded {
                limit: self.config.max_queued_requests,
            },
            mpsc::error::TrySendError::Closed(_) => BatchError::ShuttingDown,
        })?;
        answer.await.unwrap_or(Err(BatchError::Lost))
    }

    /// Requests that wait now, in the queue or for their batch.
    #[must_use]
    pub fn queued_requests(&self) -> usize {
        let queued = self.queue.max_capacity() - self.queue.capacity();
        queued + self.gathered.load(Ordering::Relaxed)
    }
}

/// Owns a batcher's task; dropping it aborts the task.
#[derive(Debug)]
pub struct Batcher {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Batcher {
    /// Starts a batcher on the current tokio runtime.
    #[must_use]
    pub fn start<B: BatchRunner>(
        config: BatcherConfig,
        runner: B,
    ) -> (Self, BatcherHandle<B::Row, B::Output>) {
        let config = BatcherConfig {
            max_batch_rows: config.max_batch_rows.max(1),
            max_queued_requests: config.max_queued_requests.max(1),
            ..config
        };
        let (queue, incoming) = mpsc::channel(config.max_queued_requests);
        let (stop, stopping) = watch::channel(false);
        let gathered = Arc::new(AtomicUsize::new(0));
        let worker = Worker {
            line: Line::new(config.clone()),
            runner,
            incoming,
            gathered: Arc::clone(&gathered),
            stopping,
        };
        let task = tokio::spawn(worker.work());
        let handle = BatcherHandle {
            queue,
            gathered,
            config,
        };
        (Self { stop, task }, handle)
    }

    /// Finishes the batch that runs, refuses what waits with [`BatchError::ShuttingDown`], and ends the task.
    pub async fn shut_down(mut self) {
        self.stop.send_replace(true);
        // A panic of the runner has reached its callers as `Lost`; there is nothing more to report here.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Worker<B: BatchRunner> {
    runner: B,
    incoming: mpsc::Receiver<Pending<B::Row, B::Output>>,
    line: Line<B>,
    /// How many stand in it.
    gathered: Arc<AtomicUsize>,
    stopping: watch::Receiver<bool>,
}

impl<B: BatchRunner> Worker<B> {
    async fn work(mut self) {
        while self.grow_batch().await {
            let batch = self.line.take();
            self.gathered.store(self.line.len(), Ordering::Relaxed);
            if !batch.is_empty() {
                self.run_batch(batch).await;
            }
        }
        self.incoming.close();
        let mut waiting = self.line.take_all();
        while let Ok(pending) = self.incoming.try_recv() {
            waiting.push_back(pending);
        }
        for pending in waiting {
            // A caller that has gone needs no answer.
            let _ = pending.reply.send(Err(BatchError::ShuttingDown));
        }
    }

    /// Waits until a batch is due; false when the batcher stops.
    async fn grow_batch(&mut self) -> bool {
        loop {
            if *self.stopping.borrow() {
                return false;
            }
            // What is there already joins without waiting, so that a zero delay still batches under load.
            while self.line.has_room() {
                match self.incoming.try_recv() {
                    Ok(pending) => self.arrived(pending),
                    Err(_) => break,
                }
            }
            let due = self.line.due();
            if due.is_some_and(|due| due <= Instant::now()) {
                return true;
            }
            let next = async {
                match due {
                    Some(due) => timeout_at(due, self.incoming.recv()).await,
                    None => Ok(self.incoming.recv().await),
                }
            };
            tokio::select! {
                biased;
                _ = self.stopping.changed() => return false,
                next = next => match next {
                    Ok(Some(pending)) => self.arrived(pending),
                    // Every handle is gone and the queue is empty: what waits is still answered.
                    Ok(None) => return !self.line.is_empty(),
                    Err(_elapsed) => return true,
                },
            }
        }
    }

    fn arrived(&mut self, pending: Pending<B::Row, B::Output>) {
        self.line.arrived(pending);
        self.gathered.store(self.line.len(), Ordering::Relaxed);
    }

    async fn run_batch(&mut self, batch: Vec<Pending<B::Row, B::Output>>) {
        let started = Instant::now();
        let mut rows = Vec::new();
        let mut callers = Vec::with_capacity(batch.len());
        // A batch may take as long as any of its callers waits.
        let mut until = Some(started);
        for pending in batch {
            until = until.zip(pending.until).map(|(one, other)| one.max(other));
            callers.push((
                pending.rows.len(),
                started - pending.queued_at,
                pending.reply,
            ));
            rows.extend(pending.rows);
        }
        let batch_rows = rows.len();
        let running = async {
            match until {
                Some(until) => self.runner.run_until(rows, until).await,
                None => self.runner.run(rows).await,
            }
        };
        let all_gone = async {
            for (_, _, reply) in &mut callers {
                reply.closed().await;
            }
        };
        let result = tokio::select! {
            biased;
            result = running => result,
            () = all_gone => return,
        };
        let computed = started.elapsed();
        let (mut outputs, hop) = match result {
            Ok(Computed { outputs, hop }) if outputs.len() == batch_rows => {
                self.line.ran(batch_rows, computed);
                (outputs.into_iter(), hop)
            }
            failed => {
                let error = match failed {
                    Ok(Computed { outputs, .. }) => BatchError::OutputCount {
                        rows: batch_rows,
                        outputs: outputs.len(),
                    },
                    Err(reason) => BatchError::Failed { reason },
                };
                for (_, _, reply) in callers {
                    let _ = reply.send(Err(error.clone()));
                }
                return;
            }
        };
        for (index, (rows, queued, reply)) in callers.into_iter().enumerate() {
            let outputs = outputs.by_ref().take(rows).collect();
            let is_first_in_batch = index == 0;
            let answer = BatchAnswer {
                outputs,
                queued,
                computed,
                hop,
                batch_rows,
                is_first_in_batch,
            };
            let _ = reply.send(Ok(answer));
        }
    }
}

#[cfg(test)]
#[path = "batcher_tests.rs"]
mod tests;
