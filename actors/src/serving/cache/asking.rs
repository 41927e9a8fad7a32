//! A request on its way to a version's replicas, past the answers that are kept.

use std::time::{Duration, Instant};

use super::responses::{Flight, Lookup, Outputs, key_of};
use crate::serving::arm::Arm;
use crate::serving::batcher::BatchAnswer;
use crate::serving::fleet::{Backend, REQUEST_TIMEOUT};
use crate::serving::oip::OipError;
use crate::serving::rows::Row;
use crate::serving::statistics::Cached;

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

/// Asks a version's replicas, unless the answer is known.
pub(in crate::serving) async fn ask<'a, B: Backend>(
    arm: &'a Arm<B>,
    model: &str,
    rows: Vec<Row>,
    limit: Option<Duration>,
) -> Result<Asked<'a>, OipError> {
    let began = Instant::now();
    let plain = |answer| Asked {
        answer,
        looked: Duration::ZERO,
        how: How::Plain,
    };
    if !arm.responses().is_on() {
        let answered = arm.fleet().infer_within(model, rows, limit);
        return answered.await.map(plain);
    }
    let again = |outputs: &Outputs| Asked {
        answer: BatchAnswer {
            outputs: outputs.to_vec(),
            queued: Duration::ZERO,
            computed: Duration::ZERO,
            batch_rows: 0,
            is_first_in_batch: false,
        },
        looked: began.elapsed(),
        how: How::Again,
    };
    let key = key_of(&rows);
    let patience = limit.unwrap_or(REQUEST_TIMEOUT);
    loop {
        match arm.responses().look(key) {
            Lookup::Off => {
                let answered = arm.fleet().infer_within(model, rows, limit);
                return answered.await.map(plain);
            }
            Lookup::Hit(outputs) => return Ok(again(&outputs)),
            Lookup::Underway(mut landed) => {
                let left = patience.saturating_sub(began.elapsed());
                let landing = landed.wait_for(Option::is_some);
                match tokio::time::timeout(left, landing).await {
                    Ok(Ok(landed)) => {
                        if let Some(outputs) = landed.as_ref() {
                            return Ok(again(outputs));
                        }
                    }
                    // Whoever computed it has failed or gone: somebody takes their place.
                    Ok(Err(_)) => {}
                    Err(_) => {
                        return Err(OipError::DeadlineExceeded {
                            limit_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
                        });
                    }
                }
            }
            Lookup::Missing(flight) => {
                let looked = began.elapsed();
                let answer = arm.fleet().infer_within(model, rows, limit).await?;
                return Ok(Asked {
                    answer,
                    looked,
                    how: How::Computed(flight),
                });
            }
        }
    }
}
