//! How an endpoint answers one request.
//!
//! Invariants:
//! 1. A request's rows reach the feed of the active version's monitor after they were answered, whichever version did, and never
//!    delay anybody. Copies of requests reach none.
//! 2. What a candidate does not answer, the active version does: a trial costs no caller an answer, nor more
//!    time than the request allows. The candidate's failure is counted all the same.
//! 3. A number that is none is no answer of a version that was trained here.
//! 4. Versions that are compared are held to the same time, and a caller who goes away speaks against the one
//!    that it waited for, whichever it is. They are judged by what they take, not by how near to the router they run.

use std::time::Duration;

use tokio::time::Instant;

use super::EndpointService;
use crate::serving::about::time_limit;
use crate::serving::arm::{Arm, Assigned, Attempt};
use crate::serving::cache;
use crate::serving::feed::ObservedRequest;
use crate::serving::fleet::affinity::Affinity;
use crate::serving::fleet::{Backend, DEADLINE_MAX, REQUEST_TIMEOUT, Terms};
use crate::serving::oip::{Explanation, InferRequest, InferResponse, OipError, Parameters, Tensor};
use crate::serving::rollout::trial::Outcome;
use crate::serving::rows::Row;
use crate::serving::shadow::mirror::COPY_TIMEOUT;
use crate::serving::statistics::{Cached, FailureReason, RequestTimes};

/// A caller who goes away earlier says more about itself than about the version that it waited for.
const PATIENCE_MIN: Duration = Duration::from_millis(100);

/// So much of a hop is where a replica happens to run, on the router's machine or beyond a network, and nothing that a version is
/// judged by. A longer one is of how large its outputs are, or of a process that has too little of its machine.
const HOP_MAX: Duration = Duration::from_millis(1);

/// What a version answered.
struct Answered {
    response: InferResponse,
    /// The batch's way to its replica and back.
    hop: Duration,
}

/// What a request wants beside its answer.
#[derive(Debug, Clone)]
struct Asked {
    /// What the answer says about itself.
    explain: bool,
    /// The answer within this time, or none.
    limit: Option<Duration>,
    /// The replica that it prefers.
    affinity: Option<Affinity>,
    /// What the monitor shall know about it; nothing of a copy, whose request another version answers.
    observed: Option<ObservedRequest>,
}

/// A request that a version is to answer. Dropped before its end, its caller has gone away: without such requests
/// a version that hangs would have failed none, and a slow one would lose just its slow answers.
struct Waiting<'a, B> {
    assigned: &'a Assigned<B>,
    began: Instant,
    is_over: bool,
}

impl<'a, B> Waiting<'a, B> {
    fn begin(assigned: &'a Assigned<B>) -> Self {
        Waiting {
            assigned,
            began: Instant::now(),
            is_over: false,
        }
    }

    /// It is over, and this came of it.
    fn end(mut self, outcome: Outcome<'_>) {
        self.is_over = true;
        self.assigned.count(outcome);
    }
}

impl<B> Drop for Waiting<'_, B> {
    fn drop(&mut self) {
        let waited = self.began.elapsed();
        if self.is_over || waited < PATIENCE_MIN {
            return;
        }
        let reason = format!("the caller went away after {} ms", waited.as_millis());
        self.assigned.count(Outcome::Failed(&reason));
    }
}

impl<B: Backend> EndpointService<B> {
    /// Answers a request with the versions that it was assigned to.
    pub(super) async fn answer(
        &self,
        assigned: Assigned<B>,
        request: InferRequest,
    ) -> Result<InferResponse, OipError> {
        assigned.arm.fleet().traffic().admit()?;
        if request.low_priority {
            assigned.arm.take_low_priority()?;
        }
        let started = Instant::now();
        let asked = Asked {
            explain: request.explain,
            limit: time_limit(&request)?,
            affinity: Affinity::of_request(&request),
            observed: Some(ObservedRequest::of(&request)),
        };
        // A request that no version could answer says nothing about one.
        let rows = match self.signature.rows_of(request) {
            Ok(rows) => rows,
            Err(error) => {
                let reason = FailureReason::of(&error);
                let mut statistics = assigned.arm.statistics();
                statistics.record_failure(started.elapsed(), reason);
                return Err(error);
            }
        };
        let input = started.elapsed();
        let given = asked.limit;
        let limit = given.unwrap_or(REQUEST_TIMEOUT).min(DEADLINE_MAX);
        // So much a version gets that another one would answer for.
        let share = limit.saturating_sub(input) / 2;
        let first = Asked {
            limit: match assigned.second {
                Some(_) => Some(share),
                None => given,
            },
            ..asked.clone()
        };
        let waiting = Waiting::begin(&assigned);
        let answered = self
            .infer_rows(&assigned.arm, rows.clone(), input, first)
            .await;
        let error = match answered {
            Ok(Answered { response, hop }) => {
                let waited = started.elapsed();
                if waited <= input + share {
                    waiting.end(Outcome::Answered(waited.saturating_sub(hop.min(HOP_MAX))));
                } else {
                    // The version that this one is compared with would not have had the time.
                    let (waited_ms, limit_ms) = (waited.as_millis(), limit.as_millis());
                    let reason = format!(
                        "answered after {waited_ms} ms, more than half of the request's {limit_ms} ms"
                    );
                    waiting.end(Outcome::Failed(&reason));
                }
                if let Some(shadowed) = &assigned.copied {
                    self.mirror
                        .offer(shadowed, waited, || (rows, response.outputs.clone()));
                }
                return Ok(response);
            }
            Err(error) => error,
        };
        let reason = error.to_string();
        waiting.end(match error {
            // Not executed, which says nothing about an answer.
            OipError::Overloaded { .. }
            | OipError::WouldBeLate { .. }
            | OipError::RowRefused { .. }
            | OipError::ShuttingDown => Outcome::Refused,
            _ => Outcome::Failed(&reason),
        });
        let Some(second) = &assigned.second else {
            return Err(error);
        };
        tracing::debug!(
            version = assigned.arm.version(),
            %error,
            "the active version answers for the candidate"
        );
        let left = limit.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Err(out_of_time(limit, given.is_some()));
        }
        let asked = Asked {
            // Waiting for a first replica does not count against who gave no limit.
            limit: (given.is_some() || second.is_open()).then_some(left),
            ..asked
        };
        let answered = self.infer_rows(second, rows, input, asked).await;
        let answered = answered.map_err(|error| match error {
            // What it got is not what the request allows.
            OipError::DeadlineExceeded { .. } => out_of_time(limit, given.is_some()),
            other => other,
        })?;
        Ok(answered.response)
    }

    /// A shadowed candidate's answer to a copy of a request, which nobody waits for.
    pub(in crate::serving) async fn answer_copy(
        &self,
        arm: &Arm<B>,
        rows: Vec<Row>,
    ) -> Result<Vec<Tensor>, OipError> {
        let asked = Asked {
            explain: false,
            limit: Some(COPY_TIMEOUT),
            affinity: None,
            observed: None,
        };
        let answered = self.infer_rows(arm, rows, Duration::ZERO, asked).await;
        answered.map(|answered| answered.response.outputs)
    }

    async fn infer_rows(
        &self,
        arm: &Arm<B>,
        rows: Vec<Row>,
        compute_input: Duration,
        asked: Asked,
    ) -> Result<Answered, OipError> {
        let attempt = Attempt::begin(arm, compute_input);
        let result = self.infer_with(arm, rows, compute_input, asked).await;
        attempt.end(result.as_ref().err());
        result
    }

    async fn infer_with(
        &self,
        arm: &Arm<B>,
        rows: Vec<Row>,
        compute_input: Duration,
        asked: Asked,
    ) -> Result<Answered, OipError> {
        let terms = Terms {
            limit: asked.limit,
            affinity: asked.affinity,
        };
        let found = cache::ask(arm, &self.metadata.name, rows.clone(), terms).await?;
        let splitting = Instant::now();
        let mut response = self.response(arm.version(), found.answer.outputs.clone())?;
        let compute_output = splitting.elapsed();
        // Only what is an answer is given again.
        let (answer, cached) = found.keep();
        let times = RequestTimes {
            queue: answer.queued,
            compute_input,
            compute_infer: answer.computed,
            compute_output,
        };
        arm.record(&answer, times, cached);
        response.explanation = asked.explain.then(|| {
            let origin = arm.origin();
            Explanation {
                digest: origin.digest,
                signers: origin.signers,
                assemble: times.compute_input,
                queue: times.queue,
                compute: answer.computed.saturating_sub(answer.hop),
                split: times.compute_output,
                hop: answer.hop,
                cached: cached.map(|cached| matches!(cached, Cached::Hit(_))),
                ..Explanation::default()
            }
        });
        // Only the active version has a monitor. It logs what others answered, and compares its own version's answers alone.
        let version = arm.version();
        let said = asked
            .observed
            .and_then(|request| self.signature.observation(version, request, rows, &answer));
        if let Some(observation) = said {
            self.routes.borrow().active.feed().offer(observation);
        }
        let hop = answer.hop;
        Ok(Answered { response, hop })
    }

    fn response(&self, version: u64, rows: Vec<Row>) -> Result<InferResponse, OipError> {
        Ok(InferResponse {
            model_name: self.metadata.name.clone(),
            model_version: version.to_string(),
            id: None,
            parameters: Parameters::new(),
            outputs: self.signature.outputs_of(version, rows)?,
            explanation: None,
        })
    }
}

/// Why a request has no answer after its time, which it gave itself or not.
fn out_of_time(limit: Duration, is_given: bool) -> OipError {
    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    if is_given {
        return OipError::DeadlineExceeded { limit_ms };
    }
    OipError::ReplicaLost {
        reason: format!("no answer within {limit_ms} ms"),
    }
}
