//! An endpoint as the Open Inference Protocol sees it: a model, answered by the fleet of its active version
//! and, while one is tried, by that of a candidate.
//!
//! Invariants:
//! 1. The endpoint's name is the model's name in every answer; the version is the one that answered.
//! 2. A request's rows reach the monitor's feed after they were answered, and never delay anybody.
//! 3. What a candidate does not answer, the active version does: a trial costs no caller an answer, nor more
//!    time than the request allows. The candidate's failure is counted all the same.
//! 4. A number that is none is no answer of a version that was trained here.
//! 5. Versions that are compared are held to the same time, and a caller who goes away speaks against the one
//!    that it waited for, whichever it is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::about::{repository_fixed, server_metadata, time_limit};
use super::access::rates::TokenRates;
use super::access::rules::headers_of;
use super::access::state::Access;
use super::arm::{Arm, Asker, Assigned, Attempt, Routes};
use super::asynchronous::results::Results;
use super::auth::Caller;
use super::cache;
use super::feed::ObservedRequest;
use super::fleet::{Backend, DEADLINE_MAX, REQUEST_TIMEOUT};
use super::http::{InferenceService, RepositoryChange, ServiceFuture};
use super::oip::{
    Explanation, InferRequest, InferResponse, ModelMetadata, ModelState, OipError, Parameters,
    RepositoryEntry, ServerMetadata, Tensor,
};
use super::rollout::trial::Outcome;
use super::rows::Row;
use super::shadow::mirror::{COPY_TIMEOUT, Mirror};
use super::signature::Signature;
use super::statistics::{Cached, FailureReason, ModelStatistics, RequestTimes};

/// A caller who goes away earlier says more about itself than about the version that it waited for.
const PATIENCE_MIN: Duration = Duration::from_millis(100);

/// Answers the protocol for one endpoint.
pub struct EndpointService<B> {
    signature: Signature,
    /// Without its versions, which change.
    metadata: ModelMetadata,
    routes: watch::Receiver<Arc<Routes<B>>>,
    /// Counts requests without a key.
    keyless: AtomicU64,
    access: watch::Receiver<Arc<Access>>,
    rates: TokenRates,
    results: Results,
    /// Itself, once it is shared: requests whose callers do not wait keep it until they are answered.
    shared: Weak<Self>,
    mirror: Mirror<B>,
}

/// What a request wants beside its answer.
#[derive(Debug, Clone)]
struct Asked {
    /// What the answer says about itself.
    explain: bool,
    /// The answer within this time, or none.
    limit: Option<Duration>,
    /// What the monitor shall know about it.
    observed: ObservedRequest,
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
    /// The service of the endpoint `name`. What goes to a shadowed candidate is offered to `mirror`.
    #[must_use]
    pub fn new(
        name: &str,
        signature: Signature,
        routes: watch::Receiver<Arc<Routes<B>>>,
        mirror: Mirror<B>,
    ) -> Self {
        EndpointService {
            metadata: signature.metadata(name),
            signature,
            routes,
            keyless: AtomicU64::new(0),
            access: watch::channel(Arc::default()).1,
            rates: TokenRates::default(),
            results: Results::default(),
            shared: Weak::new(),
            mirror,
        }
    }

    /// The same for several users, with which callers need not wait for their answers.
    #[must_use]
    pub fn shared(self) -> Arc<Self> {
        Arc::new_cyclic(|shared| EndpointService {
            shared: Weak::clone(shared),
            ..self
        })
    }

    /// The same with limits of tokens and with rules, which may change.
    #[must_use]
    pub fn with_access(self, access: watch::Receiver<Arc<Access>>) -> Self {
        EndpointService { access, ..self }
    }

    fn routes(&self) -> Arc<Routes<B>> {
        Arc::clone(&self.routes.borrow())
    }

    /// The arm that a question is about: that of the version it names, or the active one.
    fn arm(&self, model: &str, version: Option<&str>) -> Result<Arc<Arm<B>>, OipError> {
        if model != self.metadata.name {
            return Err(OipError::UnknownModel {
                model: model.to_owned(),
            });
        }
        let routes = self.routes();
        let Some(version) = version else {
            return Ok(Arc::clone(&routes.active));
        };
        let found = routes.arm(version).map(Arc::clone);
        found.ok_or_else(|| OipError::UnknownVersion {
            model: model.to_owned(),
            version: version.to_owned(),
            served: routes.versions(),
        })
    }

    fn ready(&self, arm: &Arm<B>) -> Result<(), OipError> {
        // One without replicas gets them with the first request, which must come for that.
        if arm.is_open() || arm.fleet().is_asleep() {
            return Ok(());
        }
        let reason = format!(
            "none of its {} replicas answers yet",
            arm.fleet().replica_count()
        );
        Err(OipError::NotReady {
            model: self.metadata.name.clone(),
            reason,
        })
    }

    /// Where a request goes by weight that names no version.
    fn assign(&self, request: &InferRequest) -> Assigned<B> {
        let key = request.routing_key.as_ref().or(request.id.as_ref());
        let asker = match key {
            Some(key) => Asker::Key(key),
            None => Asker::Unknown(self.keyless.fetch_add(1, Ordering::Relaxed)),
        };
        self.routes().assign(asker)
    }

    async fn answer(
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
            observed: ObservedRequest::of(&request),
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
            Ok(response) => {
                let waited = started.elapsed();
                if waited <= input + share {
                    waiting.end(Outcome::Answered(waited));
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
        answered.map_err(|error| match error {
            // What it got is not what the request allows.
            OipError::DeadlineExceeded { .. } => out_of_time(limit, given.is_some()),
            other => other,
        })
    }

    /// A shadowed candidate's answer to a copy of a request, which nobody waits for.
    pub(super) async fn answer_copy(
        &self,
        arm: &Arm<B>,
        rows: Vec<Row>,
    ) -> Result<Vec<Tensor>, OipError> {
        let asked = Asked {
            explain: false,
            limit: Some(COPY_TIMEOUT),
            observed: ObservedRequest::default(),
        };
        let answered = self.infer_rows(arm, rows, Duration::ZERO, asked).await;
        answered.map(|response| response.outputs)
    }

    async fn infer_rows(
        &self,
        arm: &Arm<B>,
        rows: Vec<Row>,
        compute_input: Duration,
        asked: Asked,
    ) -> Result<InferResponse, OipError> {
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
    ) -> Result<InferResponse, OipError> {
        let found = cache::ask(arm, &self.metadata.name, rows.clone(), asked.limit).await?;
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
                compute: times.compute_infer,
                split: times.compute_output,
                cached: cached.map(|cached| matches!(cached, Cached::Hit(_))),
                ..Explanation::default()
            }
        });
        // A monitor compares with what its own version was trained on, and only the active one has one.
        if self.routes.borrow().active.version() == arm.version()
            && let Some(observation) = self.signature.observation(asked.observed, rows, &answer)
        {
            arm.feed().offer(observation);
        }
        Ok(response)
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

impl<B: Backend> InferenceService for EndpointService<B> {
    fn server_metadata(&self) -> ServerMetadata {
        server_metadata()
    }

    fn server_ready(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {
            let ready = self.ready(&self.routes().active);
            ready.map_err(|error| OipError::ServerNotReady {
                reason: error.to_string(),
            })
        })
    }

    fn model_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ModelMetadata> {
        Box::pin(async move {
            self.arm(model, version)?;
            Ok(ModelMetadata {
                versions: self.routes().versions(),
                ..self.metadata.clone()
            })
        })
    }

    fn model_ready<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ()> {
        Box::pin(async move {
            let arm = self.arm(model, version)?;
            self.ready(&arm)
        })
    }

    fn model_statistics<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, (String, ModelStatistics)> {
        Box::pin(async move {
            let arm = self.arm(model, version)?;
            let statistics = arm.statistics().clone();
            Ok((arm.version().to_string(), statistics))
        })
    }

    fn repository_index<'a>(
        &'a self,
        _caller: &'a Caller,
    ) -> ServiceFuture<'a, Vec<RepositoryEntry>> {
        Box::pin(async move {
            let routes = self.routes();
            let entry = |arm: &Arc<Arm<B>>| {
                let ready = self.ready(arm);
                RepositoryEntry {
                    name: self.metadata.name.clone(),
                    version: arm.version().to_string(),
                    state: match ready {
                        Ok(()) => ModelState::Ready,
                        Err(_) => ModelState::Unavailable,
                    },
                    reason: ready.err().map_or(String::new(), |error| error.to_string()),
                }
            };
            Ok(routes.arms().map(entry).collect())
        })
    }

    fn change_repository<'a>(
        &'a self,
        model: &'a str,
        change: RepositoryChange,
    ) -> ServiceFuture<'a, ()> {
        let is_endpoint = model == self.metadata.name;
        Box::pin(std::future::ready(Err(repository_fixed(
            model,
            change,
            is_endpoint,
        ))))
    }

    fn results(&self) -> Option<(Arc<dyn InferenceService>, &Results)> {
        Some((self.shared.upgrade()?, &self.results))
    }

    fn routing_headers(&self, _model: &str) -> Vec<String> {
        headers_of(&self.access.borrow().rules)
    }

    fn infer<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move {
            let arm = self.arm(model, version)?;
            let access = Arc::clone(&self.access.borrow());
            if let Some(token) = &request.token {
                let now_ms = arm.fleet().traffic().now_ms();
                self.rates.admit(&access.tokens, token, now_ms)?;
            }
            let (assigned, rule) = match version {
                // Who asks for a version gets it, or the error: such requests are no sample of all.
                Some(_) => (Assigned::uncounted(arm), None),
                None => match self.routes().assign_by_rule(&access.rules, &request) {
                    Some((assigned, rule)) => (assigned, Some(rule)),
                    None => (self.assign(&request), None),
                },
            };
            let mut response = self.answer(assigned, request).await?;
            if let Some(explanation) = &mut response.explanation {
                explanation.rule = rule;
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
#[path = "endpoint_service_tests.rs"]
mod tests;
