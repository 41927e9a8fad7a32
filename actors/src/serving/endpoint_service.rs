//! An endpoint as the Open Inference Protocol sees it: a model, answered by the fleet of its active version
//! and, while one is tried, by that of a candidate.
//!
//! Invariants:
//! 1. The endpoint's name is the model's name in every answer; the version is the one that answered.
//! 2. A request's rows reach the monitor's feed after they were answered, and never delay anybody.
//! 3. What a candidate does not answer, the active version does: a trial costs no caller an answer. The
//!    candidate's failure is counted all the same.
//! 4. A number that is none is no answer of a version that was trained here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::arm::{Arm, Assigned, Routes};
use super::batcher::BatchAnswer;
use super::cache;
use super::fleet::Backend;
use super::http::{InferenceService, RepositoryChange, ServiceFuture};
use super::oip::{
    DecodeError, Explanation, InferRequest, InferResponse, ModelMetadata, ModelState, OipError,
    Parameter, Parameters, RepositoryEntry, ServerMetadata,
};
use super::rollout::trial::Outcome;
use super::rows::Row;
use super::signature::Signature;
use super::statistics::{Cached, ModelStatistics, RequestTimes};

/// The parameter that says how long a request waits, in microseconds.
pub const TIMEOUT: &str = "timeout";

/// Answers the protocol for one endpoint.
pub struct EndpointService<B> {
    signature: Signature,
    /// Without its versions, which change.
    metadata: ModelMetadata,
    routes: watch::Receiver<Arc<Routes<B>>>,
    /// Counts requests without a key.
    keyless: AtomicU64,
}

/// What a request wants beside its answer.
#[derive(Debug, Clone, Copy)]
struct Asked {
    /// What the answer says about itself.
    explain: bool,
    /// The answer within this time, or none.
    limit: Option<Duration>,
}

impl<B: Backend> EndpointService<B> {
    /// The service of the endpoint `name`.
    #[must_use]
    pub fn new(name: &str, signature: Signature, routes: watch::Receiver<Arc<Routes<B>>>) -> Self {
        EndpointService {
            metadata: signature.metadata(name),
            signature,
            routes,
            keyless: AtomicU64::new(0),
        }
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

    /// Where a request goes that names no version.
    fn assign(&self, request: &InferRequest) -> Assigned<B> {
        let key = request.routing_key.as_ref().or(request.id.as_ref());
        match key {
            Some(key) => self.routes().assign(key),
            None => {
                let number = self.keyless.fetch_add(1, Ordering::Relaxed);
                self.routes().assign(&number.to_string())
            }
        }
    }

    async fn answer(
        &self,
        assigned: Assigned<B>,
        request: InferRequest,
    ) -> Result<InferResponse, OipError> {
        assigned.arm.fleet().traffic().admit()?;
        let started = Instant::now();
        let asked = Asked {
            explain: request.explain,
            limit: time_limit(&request)?,
        };
        // A request that no version could answer says nothing about one.
        let rows = match self.signature.rows_of(request) {
            Ok(rows) => rows,
            Err(error) => {
                assigned.arm.statistics().record_failure(started.elapsed());
                return Err(error);
            }
        };
        let input = started.elapsed();
        let error = match self
            .infer_rows(&assigned.arm, rows.clone(), input, asked)
            .await
        {
            Ok(response) => {
                assigned.count(Outcome::Answered(started.elapsed()));
                return Ok(response);
            }
            Err(error) => error,
        };
        assigned.count(Outcome::Failed(&error.to_string()));
        let Some(second) = &assigned.second else {
            return Err(error);
        };
        tracing::debug!(
            version = assigned.arm.version(),
            %error,
            "the active version answers for the candidate"
        );
        self.infer_rows(second, rows, input, asked).await
    }

    async fn infer_rows(
        &self,
        arm: &Arm<B>,
        rows: Vec<Row>,
        compute_input: Duration,
        asked: Asked,
    ) -> Result<InferResponse, OipError> {
        let started = Instant::now();
        let result = self.infer_with(arm, rows, compute_input, asked).await;
        if result.is_err() {
            arm.statistics()
                .record_failure(compute_input + started.elapsed());
        }
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
        record(arm, &answer, times, cached);
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
            }
        });
        // A monitor compares with what its own version was trained on, and only the active one has one.
        if self.routes.borrow().active.version() == arm.version()
            && let Some(observation) = self.signature.observation(rows, &answer)
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

fn record<B: Backend>(
    arm: &Arm<B>,
    answer: &BatchAnswer<Row>,
    times: RequestTimes,
    cached: Option<Cached>,
) {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    let now_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
    let mut statistics = arm.statistics();
    match cached {
        Some(Cached::Hit(looked)) => return statistics.record_cache_hit(times, looked),
        Some(Cached::Miss(looked)) => statistics.record_cache_miss(looked),
        None => {}
    }
    statistics.record_success(answer.outputs.len() as u64, times, now_ms);
    if answer.is_first_in_batch {
        statistics.record_execution(answer.batch_rows as u64, times);
    }
}

/// How long the caller waits: the parameter `timeout`, in microseconds as Triton has it; 0 is for ever.
fn time_limit(request: &InferRequest) -> Result<Option<Duration>, OipError> {
    match request.parameters.get(TIMEOUT) {
        None | Some(Parameter::Int(0)) => Ok(None),
        Some(Parameter::Int(micros)) if *micros > 0 => {
            Ok(Some(Duration::from_micros(micros.unsigned_abs())))
        }
        Some(other) => Err(OipError::Decode(DecodeError::Parameter {
            name: TIMEOUT.to_owned(),
            got: other.to_json().to_string(),
            expected: "a number of microseconds".to_owned(),
        })),
    }
}

impl<B: Backend> InferenceService for EndpointService<B> {
    fn server_metadata(&self) -> ServerMetadata {
        let extensions = [
            "binary_tensor_data",
            "classification",
            "model_configuration",
            "model_repository",
            "statistics",
        ];
        ServerMetadata {
            name: "mobula".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: extensions.map(str::to_owned).to_vec(),
        }
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

    fn repository_index(&self) -> ServiceFuture<'_, Vec<RepositoryEntry>> {
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
        Box::pin(async move {
            // The endpoint's token is for asking it; what it answers with is the cluster's to decide.
            let instead = match change {
                RepositoryChange::Load if model == self.metadata.name => format!(
                    "`mobula rollout start {model}` takes another version into service, step by step"
                ),
                RepositoryChange::Load => {
                    format!("`mobula serve deploy {model}` makes an endpoint of a registered model")
                }
                RepositoryChange::Unload => {
                    format!("`mobula serve delete {model}` takes an endpoint down")
                }
            };
            Err(OipError::RepositoryFixed { instead })
        })
    }

    fn infer<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move {
            let arm = self.arm(model, version)?;
            let assigned = match version {
                // Who asks for a version gets it, or the error: such requests are no sample of all.
                Some(_) => Assigned {
                    arm,
                    second: None,
                    counted: None,
                },
                None => self.assign(&request),
            };
            self.answer(assigned, request).await
        })
    }
}

#[cfg(test)]
#[path = "endpoint_service_tests.rs"]
mod tests;
