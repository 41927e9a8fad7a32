//! Sends one replica its batches, and makes the most of what it says about them.
//!
//! Invariants:
//! 1. A row that the replica names costs no other row its answer.
//! 2. Outputs that are too large for one answer come in several; how large they are is learnt, so that the next batch is cut
//!    before it is computed in vain.
//! 3. A replica that does not answer is closed, and gets no batch until it has answered a probe.

use std::collections::{BTreeMap, VecDeque};
use std::iter;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;

use super::{BATCH_TIMEOUT, Backend, BackendFailure, Berth, Pace, Refusal};
use crate::serving::arm::lock;
use crate::serving::batcher::{BatchRunner, Computed};
use crate::serving::guard::traffic::Traffic;
use crate::serving::replica::{InferError, Inference, RefusedRow};
use crate::serving::rows::{BATCH_BYTES_MAX, Batch, Row};

/// When a batch's outputs have so many bytes, no more of its rows are computed: a router holds them all, and one answer more.
const OUTPUT_BYTES_MAX: usize = 16 * BATCH_BYTES_MAX;

/// What becomes of each row, and what of its time was the way to the replica and back.
type Answers = Computed<Result<Row, Refusal>>;

/// Why a call gave no answer, and how long it had.
struct Unanswered {
    failure: BackendFailure,
    limit: Duration,
}

/// Sends one replica its batches.
pub(super) struct Runner<B> {
    number: u32,
    berth: Arc<Berth<B>>,
    pace: Arc<Pace>,
    traffic: Arc<Traffic>,
    /// Bytes of outputs for each byte of inputs, as the last batch had them; absent as long as no outputs were too large.
    growth: Mutex<Option<f64>>,
}

/// What came of one call.
enum Asked {
    Answered(Answers),
    /// These rows are to be asked for in smaller parts.
    TooLarge(Vec<Row>),
}

impl<B> Runner<B> {
    pub(super) fn new(
        number: u32,
        berth: Arc<Berth<B>>,
        pace: Arc<Pace>,
        traffic: Arc<Traffic>,
    ) -> Self {
        Runner {
            number,
            berth,
            pace,
            traffic,
            growth: Mutex::new(None),
        }
    }
}

impl<B: Backend> BatchRunner for Runner<B> {
    type Row = Row;
    type Output = Result<Row, Refusal>;

    fn joins(first: &Row, rows: usize, next: &Row) -> bool {
        next.joins(first, rows)
    }

    async fn run(&mut self, rows: Vec<Row>) -> Result<Answers, String> {
        let until = Instant::now() + BATCH_TIMEOUT;
        self.run_until(rows, until).await
    }

    async fn run_until(&mut self, rows: Vec<Row>, until: Instant) -> Result<Answers, String> {
        let mut berth = self.berth.backend.subscribe();
        let backend = berth.borrow_and_update().clone();
        // Requests that queued up behind the one that found the replica dead.
        let Some(backend) = backend else {
            return Err(format!("replica {} is not running", self.number));
        };
        let count = rows.len();
        let running = self.pace.begin(count);
        let Unanswered { failure, limit } = tokio::select! {
            answer = self.infer(&backend, rows, until) => match answer {
                Ok(answers) => {
                    running.answered();
                    return Ok(answers);
                }
                Err(unanswered) => unanswered,
            },
            // Closed by whoever watches the replica, or opened with a newer start of it.
            _ = berth.changed() => {
                running.failed();
                return Err(format!("replica {} ended while it held the batch", self.number));
            }
        };
        match failure {
            // Its callers were gone before its end.
            BackendFailure::Late if limit < BATCH_TIMEOUT => drop(running),
            _ => running.failed(),
        }
        match failure {
            BackendFailure::Refused(reason) => Ok(all(count, Refusal::Failed(reason))),
            // Only a replica that names other rows than before gets here.
            BackendFailure::RowsRefused(_)
            | BackendFailure::RowsFailed(_)
            | BackendFailure::OutputsTooLarge(_) => {
                let reason = "it refused rows that it had not refused before".to_owned();
                Ok(all(count, Refusal::Failed(reason)))
            }
            // Its callers were in a hurry: that says little about the replica, and they are gone.
            BackendFailure::Late if limit < BATCH_TIMEOUT => Ok(all(count, Refusal::Late)),
            failure => {
                let reason = match failure {
                    BackendFailure::Lost(reason) => reason,
                    _ => format!("no answer within {} ms", limit.as_millis()),
                };
                tracing::warn!(replica = self.number, reason, "a replica does not answer");
                self.berth.close();
                Err(format!("replica {}: {reason}", self.number))
            }
        }
    }
}

impl<B: Backend> Runner<B> {
    /// Has rows computed, in as many calls as their outputs need.
    async fn infer(
        &self,
        backend: &B,
        rows: Vec<Row>,
        until: Instant,
    ) -> Result<Answers, Unanswered> {
        let mut answers = Answers::from(Vec::with_capacity(rows.len()));
        let mut size_bytes = 0;
        let mut parts = VecDeque::from([rows]);
        while let Some(part) = parts.pop_front() {
            if size_bytes >= OUTPUT_BYTES_MAX {
                let reason = format!(
                    "the outputs of the rows before it have {size_bytes} bytes, the limit is {OUTPUT_BYTES_MAX}: send fewer \
                     rows at once, or smaller ones"
                );
                let refused = all(part.len(), Refusal::Failed(reason));
                answers.outputs.extend(refused.outputs);
                continue;
            }
            let fitting = self.fitting(&part);
            if fitting < part.len() {
                cut(part, fitting, &mut parts);
                continue;
            }
            match self.infer_part(backend, part, until).await? {
                Asked::Answered(answered) => {
                    let outputs = answered.outputs.iter().flatten();
                    size_bytes += outputs.map(Row::size_bytes).sum::<usize>();
                    answers.outputs.extend(answered.outputs);
                    answers.hop += answered.hop;
                }
                Asked::TooLarge(part) => {
                    let fitting = self.fitting(&part).min(part.len() - 1);
                    cut(part, fitting, &mut parts);
                }
            }
        }
        Ok(answers)
    }

    /// The same for rows that are left of others.
    fn infer_rest<'a>(
        &'a self,
        backend: &'a B,
        rows: Vec<Row>,
        until: Instant,
    ) -> BoxFuture<'a, Result<Answers, Unanswered>> {
        Box::pin(self.infer(backend, rows, until))
    }

    /// One call. A replica has the whole time for each: it is there as long as it answers them.
    async fn call(
        &self,
        backend: &B,
        batch: Batch,
        until: Instant,
    ) -> Result<Inference, Unanswered> {
        // Nobody waits for an answer after the last deadline, here or at the replica.
        let left = until.saturating_duration_since(Instant::now());
        let limit = left.min(BATCH_TIMEOUT);
        let answer = tokio::time::timeout(limit, backend.infer_within(batch, limit)).await;
        let answer = answer.unwrap_or(Err(BackendFailure::Late));
        answer.map_err(|failure| Unanswered { failure, limit })
    }

    /// Has rows computed in one call; without those that the replica names, so that nobody's bad row costs others their answer.
    async fn infer_part(
        &self,
        backend: &B,
        rows: Vec<Row>,
        until: Instant,
    ) -> Result<Asked, Unanswered> {
        let count = rows.len();
        let inputs_bytes: usize = rows.iter().map(Row::size_bytes).sum();
        let batch = Batch::join(rows);
        // One row alone is not asked for twice.
        let kept = (count > 1).then(|| batch.clone());
        let began = Instant::now();
        let Unanswered { failure, limit } = match self.call(backend, batch, until).await {
            Ok(inference) => {
                let outputs_bytes = inference.outputs.size_bytes() as u64;
                if let Some(growth) = lock(&self.growth).as_mut() {
                    *growth = ratio(outputs_bytes, inputs_bytes);
                }
                let computed = Duration::from_nanos(inference.computed_ns);
                let hop = began.elapsed().saturating_sub(computed);
                let outputs = self.answered(inference, count);
                return Ok(Asked::Answered(Answers { outputs, hop }));
            }
            Err(unanswered) => unanswered,
        };
        let named = match failure {
            BackendFailure::RowsRefused(rows) => reasons(rows, Refusal::Row),
            BackendFailure::RowsFailed(rows) => reasons(rows, Refusal::Failed),
            BackendFailure::OutputsTooLarge(size_bytes) => {
                *lock(&self.growth) = Some(ratio(size_bytes, inputs_bytes));
                return Ok(match kept {
                    Some(batch) => Asked::TooLarge(split(batch, limit)?),
                    None => {
                        let reason = InferError::too_large(size_bytes).to_string();
                        Asked::Answered(all(1, Refusal::Failed(reason)))
                    }
                });
            }
            failure => return Err(Unanswered { failure, limit }),
        };
        let rows = kept.map_or(Ok(Vec::new()), |batch| split(batch, limit))?;
        let good = (0..).zip(rows).filter(|(row, _)| !named.contains_key(row));
        let good: Vec<Row> = good.map(|(_, row)| row).collect();
        if good.len() == count {
            let failure = BackendFailure::RowsRefused(Vec::new());
            return Err(Unanswered { failure, limit });
        }
        let Answers { outputs, hop } = match good.len() {
            0 => Answers::from(Vec::new()),
            _ => self.infer_rest(backend, good, until).await?,
        };
        let mut answers = outputs.into_iter();
        let unnamed = || Refusal::Failed("it refused rows and did not say which".to_owned());
        let answer = |row: u64| match named.get(&row) {
            Some(reason) => Err(reason.clone()),
            None => answers.next().unwrap_or_else(|| Err(unnamed())),
        };
        let outputs = (0..count as u64).map(answer).collect();
        Ok(Asked::Answered(Answers { outputs, hop }))
    }

    /// How many of these rows have outputs that fit into one answer, as far as is known; at least one.
    fn fitting(&self, rows: &[Row]) -> usize {
        let Some(growth) = *lock(&self.growth) else {
            return rows.len();
        };
        let inputs_bytes: usize = rows.iter().map(Row::size_bytes).sum();
        let outputs_bytes = (growth * inputs_bytes as f64).max(1.0);
        let share = BATCH_BYTES_MAX as f64 / outputs_bytes;
        ((rows.len() as f64 * share) as usize).clamp(1, rows.len())
    }

    /// The rows of an answer to `count` rows. One that does not fit them is a refusal: another replica would say the same.
    fn answered(&self, inference: Inference, count: usize) -> Vec<Result<Row, Refusal>> {
        self.traffic.load.computed(inference.computed_ns);
        self.pace.uses_memory(inference.memory_percent);
        match inference.outputs.split() {
            Ok(rows) => {
                let energies = inference.energies.into_iter().map(Some);
                rows.into_iter()
                    .zip(energies.chain(iter::repeat(None)))
                    .map(|(row, energy)| Ok(Row { energy, ..row }))
                    .collect()
            }
            Err(misfit) => vec![Err(Refusal::Failed(misfit.to_string())); count],
        }
    }
}

/// The same for each of so many rows.
fn all(count: usize, refusal: Refusal) -> Answers {
    vec![Err(refusal); count].into()
}

/// Puts rows back at the front of the line, in parts of so many.
fn cut(mut rows: Vec<Row>, count: usize, parts: &mut VecDeque<Vec<Row>>) {
    let rest = rows.split_off(count);
    parts.push_front(rest);
    parts.push_front(rows);
}

/// The rows that were joined; `limit` is what their call had.
fn split(batch: Batch, limit: Duration) -> Result<Vec<Row>, Unanswered> {
    // What was joined comes apart again.
    batch.split().map_err(|misfit| Unanswered {
        failure: BackendFailure::Refused(misfit.to_string()),
        limit,
    })
}

fn ratio(outputs_bytes: u64, inputs_bytes: usize) -> f64 {
    outputs_bytes as f64 / inputs_bytes.max(1) as f64
}

/// Rows by their places.
fn reasons(rows: Vec<RefusedRow>, kind: fn(String) -> Refusal) -> BTreeMap<u64, Refusal> {
    let rows = rows.into_iter();
    rows.map(|row| (row.row, kind(row.reason))).collect()
}
