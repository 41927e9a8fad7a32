//! Joins waiting requests into batches (Triton's dynamic batching, in its simple form).
//!
//! 1. Requests keep their order and are never split over two batches; a request may hold several rows.
//! 2. A batch leaves when the next request would exceed the largest batch, or when its oldest request has waited for the
//!    largest delay, or when no delay is allowed.
//! 3. The queue is bounded; past it a request is refused at once and was not executed.
//! 4. A caller who has gone before the batch leaves is dropped from it, and a batch is dropped when all of its callers have gone.
//!    One batch runs at a time, so a runner needs no lock.

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

/// The bounds of a batcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatcherConfig {
    /// Rows in a batch, at least 1.
    pub max_batch_rows: usize,
    /// How long the oldest request waits for others; zero sends whatever has queued up while the last batch ran.
    pub max_delay: Duration,
    /// Requests that wait while a batch runs, at least 1; past it callers get [`BatchError::Overloaded`].
    pub max_queued_requests: usize,
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

/// Computes batches.
pub trait BatchRunner: Send + 'static {
    /// One row of a request.
    type Row: Send + 'static;
    /// What one row becomes.
    type Output: Send + 'static;

    /// Computes one output a row, in order.
    ///
    /// # Errors
    /// A reason, which every request of the batch is given.
    fn run(
        &mut self,
        rows: Vec<Self::Row>,
    ) -> impl Future<Output = Result<Vec<Self::Output>, String>> + Send;

    /// The same for callers none of whom waits after `until`. Dropped when all of them have gone earlier.
    ///
    /// # Errors
    /// A reason, which every request of the batch is given.
    fn run_until(
        &mut self,
        rows: Vec<Self::Row>,
        until: Instant,
    ) -> impl Future<Output = Result<Vec<Self::Output>, String>> + Send {
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
    /// The batch's computation.
    pub computed: Duration,
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
    config: BatcherConfig,
}

impl<R, O> Clone for BatcherHandle<R, O> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
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

    /// Requests in the queue now.
    #[must_use]
    pub fn queued_requests(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
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
        let worker = Worker {
            config: config.clone(),
            runner,
            incoming,
            waiting: VecDeque::new(),
            stopping,
        };
        let task = tokio::spawn(worker.work());
        (Self { stop, task }, BatcherHandle { queue, config })
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
    config: BatcherConfig,
    runner: B,
    incoming: mpsc::Receiver<Pending<B::Row, B::Output>>,
    /// The batch that grows, at most one batch of rows and one request that did not fit.
    waiting: VecDeque<Pending<B::Row, B::Output>>,
    stopping: watch::Receiver<bool>,
}

impl<B: BatchRunner> Worker<B> {
    async fn work(mut self) {
        while self.grow_batch().await {
            let batch = self.take_batch();
            if !batch.is_empty() {
                self.run_batch(batch).await;
            }
        }
        self.incoming.close();
        while let Ok(pending) = self.incoming.try_recv() {
            self.waiting.push_back(pending);
        }
        for pending in self.waiting {
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
            while self.waiting_rows() < self.config.max_batch_rows {
                match self.incoming.try_recv() {
                    Ok(pending) => self.waiting.push_back(pending),
                    Err(_) => break,
                }
            }
            let due = self
                .waiting
                .front()
                .map(|oldest| oldest.queued_at + self.config.max_delay);
            if due.is_some_and(|due| due <= Instant::now())
                || self.waiting_rows() >= self.config.max_batch_rows
            {
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
                    Ok(Some(pending)) => self.waiting.push_back(pending),
                    // Every handle is gone and the queue is empty: what waits is still answered.
                    Ok(None) => return !self.waiting.is_empty(),
                    Err(_elapsed) => return true,
                },
            }
        }
    }

    fn waiting_rows(&self) -> usize {
        self.waiting.iter().map(|pending| pending.rows.len()).sum()
    }

    /// Takes requests from the front while they fit into one batch.
    fn take_batch(&mut self) -> Vec<Pending<B::Row, B::Output>> {
        self.waiting.retain(|pending| !pending.reply.is_closed());
        let (mut batch, mut rows) = (Vec::new(), 0);
        while let Some(next) = self.waiting.front() {
            if rows + next.rows.len() > self.config.max_batch_rows {
                break;
            }
            rows += next.rows.len();
            batch.extend(self.waiting.pop_front());
        }
        batch
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
        let mut outputs = match result {
            Ok(outputs) if outputs.len() == batch_rows => outputs.into_iter(),
            failed => {
                let error = match failed {
                    Ok(outputs) => BatchError::OutputCount {
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
