//! A request on its way to a version's replicas, past the answers that are kept.

use std::time::Duration;

use tokio::time::Instant;

use super::responses::{Flight, Lookup, Outputs, key_of};
use crate::serving::arm::Arm;
use crate::serving::batcher::BatchAnswer;
use crate::serving::fleet::affinity::Affinity;
use crate::serving::fleet::{Backend, DEADLINE_MAX, REQUEST_TIMEOUT, Terms, WAKE_TIMEOUT};
use crate::serving::oip::OipError;
use crate::serving::rows::Row;
use crate::serving::statistics::Cached;

/// How long a request that does not say waits for an answer that another one gets: as long as that one may.
const PATIENCE: Duration = WAKE_TIMEOUT.saturating_add(REQUEST_TIMEOUT);

/// An answer that can be kept, once it is known to be one.
pub(in crate::serving) struct Asked<'a> {
    /// The rows of the answer.
    pub(in crate::serving) answer: BatchAnswer<Row>,
    looked: Duration,
    how: How<'a>,
}

enum How<'a> {
    /// Nothing is kept.
    Plain,
    /// It was kept, or somebody else had asked the same.
    Again,
    /// It was computed.
    Computed(Flight<'a>),
}

impl Asked<'_> {
    /// The answer, which is good and may be given again.
    pub(in crate::serving) fn keep(self) -> (BatchAnswer<Row>, Option<Cached>) {
        let cached = match self.how {
            How::Plain => None,
            How::Again => Some(Cached::Hit(self.looked)),
            How::Computed(flight) => {
                let keeping = Instant::now();
                flight.land(&self.answer.outputs);
                Some(Cached::Miss(self.looked + keeping.elapsed()))
            }
        };
        (self.answer, cached)
    }
}

/// How long a caller waits for the answer that another one has computed.
struct Waiting {
    /// What its request allows.
    limit: Option<Duration>,
    affinity: Option<Affinity>,
    until: Instant,
    /// Whether it has waited, so that it has less time left than it was given.
    has_waited: bool,
}

impl Waiting {
    fn begin(terms: Terms) -> Self {
        let limit = terms.limit.map(|limit| limit.min(DEADLINE_MAX));
        Waiting {
            limit,
            affinity: terms.affinity,
            // Without a limit as long as the one who computes it: the endpoint may have to wake for it.
            until: Instant::now() + limit.unwrap_or(PATIENCE),
            has_waited: false,
        }
    }

    /// Has the replicas answer, in the time that is left.
    async fn compute<B: Backend>(
        &self,
        arm: &Arm<B>,
        model: &str,
        rows: Vec<Row>,
    ) -> Result<BatchAnswer<Row>, OipError> {
        let affinity = self.affinity;
        let within = |limit| arm.fleet().infer_on(model, rows, Terms { limit, affinity });
        if !self.has_waited {
            return within(self.limit).await;
        }
        if self.limit.is_none() {
            let asking = within(None);
            let answered = tokio::time::timeout_at(self.until, asking).await;
            return answered.unwrap_or_else(|_| Err(self.late()));
        }
        let left = self.until.saturating_duration_since(Instant::now());
        let answered = within(Some(left)).await;
        answered.map_err(|error| match error {
            // What is left is not what the request allows.
            OipError::DeadlineExceeded { .. } => self.late(),
            other => other,
        })
    }

    /// The error where no answer came in time: the one that whoever computes it would get.
    fn late(&self) -> OipError {
        let millis = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        match self.limit {
            Some(limit) => OipError::DeadlineExceeded {
                limit_ms: millis(limit),
            },
            None => OipError::ReplicaLost {
                reason: format!("no answer within {} ms", millis(PATIENCE)),
            },
        }
    }
}

/// Asks a version's replicas, unless the answer is known.
pub(in crate::serving) async fn ask<'a, B: Backend>(
    arm: &'a Arm<B>,
    model: &str,
    rows: Vec<Row>,
    terms: Terms,
) -> Result<Asked<'a>, OipError> {
    let began = Instant::now();
    let plain = |answer| Asked {
        answer,
        looked: Duration::ZERO,
        how: How::Plain,
    };
    if !arm.responses().is_on() {
        return arm.fleet().infer_on(model, rows, terms).await.map(plain);
    }
    let again = |outputs: &Outputs| Asked {
        answer: BatchAnswer {
            outputs: outputs.to_vec(),
            queued: Duration::ZERO,
            computed: Duration::ZERO,
            hop: Duration::ZERO,
            batch_rows: 0,
            is_first_in_batch: false,
        },
        looked: began.elapsed(),
        how: How::Again,
    };
    let key = key_of(&rows);
    let mut waiting = Waiting::begin(terms);
    loop {
        match arm.responses().look(key) {
            Lookup::Off => return waiting.compute(arm, model, rows).await.map(plain),
            Lookup::Hit(outputs) => return Ok(again(&outputs)),
            Lookup::Underway(mut landed) => {
                let landing = landed.wait_for(Option::is_some);
                match tokio::time::timeout_at(waiting.until, landing).await {
                    Ok(Ok(landed)) => {
                        if let Some(outputs) = landed.as_ref() {
                            return Ok(again(outputs));
                        }
                    }
                    // Whoever computed it has failed or gone: somebody takes their place.
                    Ok(Err(_)) => {}
                    Err(_) => return Err(waiting.late()),
                }
                waiting.has_waited = true;
            }
            Lookup::Missing(flight) => {
                let looked = began.elapsed();
                let answer = waiting.compute(arm, model, rows).await?;
                return Ok(Asked {
                    answer,
                    looked,
                    how: How::Computed(flight),
                });
            }
        }
    }
}

#[cfg(test)]
#[path = "asking_tests.rs"]
mod tests;
