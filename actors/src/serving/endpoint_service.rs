//! An endpoint as the Open Inference Protocol sees it: a model, answered by the fleet of its active version
//! and, while one is tried, by that of a candidate.
//!
//! Invariants:
//! 1. The endpoint's name is the model's name in every answer; the version is the one that answered.
//! 2. A request's rows reach the monitor's feed after they were answered, and never delay anybody.
//! 3. What a candidate does not answer, the active version does: a trial costs no caller an answer. The
//!    candidate's failure is counted all the same.
//! 4. A number that is none is no answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::arm::{Arm, Assigned, Routes};
use super::batcher::BatchAnswer;
use super::feed::{Observation, ObservedRequest};
use super::fleet::{BATCH_ROWS_MAX, Backend, Prediction};
use super::http::{BodyLimits, InferenceService, RepositoryChange, ServiceFuture};
use super::oip::{
    Datatype, DecodeError, Explanation, InferRequest, InferResponse, ModelMetadata, ModelState,
    OipError, Parameter, Parameters, RepositoryEntry, ServerMetadata, Tensor, TensorData,
    TensorMetadata,
};
use super::rollout::trial::Outcome;
use super::statistics::{ModelStatistics, RequestTimes};

/// The input: pixels scaled to 0..=1, row by row.
pub const INPUT: &str = "image";
/// The output with the probability of each class.
pub const PROBABILITIES: &str = "probabilities";
/// The output with the most probable class.
pub const CLASS: &str = "class";

/// The parameter that says how long a request waits, in microseconds.
pub const TIMEOUT: &str = "timeout";

/// What a value takes in a JSON body: a number of 17 digits with sign and exponent, and the white space of a printer that
/// puts each on a line of its own.
const VALUE_TEXT_BYTES: usize = 64;

/// Values of a row, at most: a full batch of them then takes half of what a call may hold.
pub const ROW_VALUES_MAX: usize = 8192;

/// The bodies that an endpoint reads whose rows have so many values: a full batch as JSON, and what is around it. For
/// rows of 64 values, a thousand connections can so be made to hold a gigabyte.
#[must_use]
pub fn body_limits(row_values: usize) -> BodyLimits {
    BodyLimits {
        max_bytes: BATCH_ROWS_MAX * row_values * VALUE_TEXT_BYTES + 64 * 1024,
        timeout: Duration::from_secs(20),
    }
}

/// What all versions of an endpoint take and give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// Values of a row.
    pub row_values: usize,
    /// Classes that are told apart.
    pub classes: usize,
    /// The names of the classes, in their order.
    pub labels: Vec<String>,
}

/// Answers the protocol for one endpoint.
pub struct EndpointService<B> {
    row_values: usize,
    classes: usize,
    /// Without its versions, which change.
    metadata: ModelMetadata,
    routes: watch::Receiver<Arc<Routes<B>>>,
    /// Counts requests without a key.
    keyless: AtomicU64,
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

impl<B: Backend> EndpointService<B> {
    /// The service of the endpoint `name`.
    #[must_use]
    pub fn new(name: &str, signature: Signature, routes: watch::Receiver<Arc<Routes<B>>>) -> Self {
        let Signature {
            row_values,
            classes,
            labels,
        } = signature;
        let tensor = |name: &str, datatype, shape: &[i64]| TensorMetadata {
            name: name.to_owned(),
            datatype,
            shape: shape.to_vec(),
            labels: Vec::new(),
        };
        let metadata = ModelMetadata {
            name: name.to_owned(),
            versions: Vec::new(),
            platform: "mobula_candle".to_owned(),
            max_batch_size: BATCH_ROWS_MAX as u32,
            inputs: vec![tensor(INPUT, Datatype::Fp32, &[-1, row_values as i64])],
            outputs: vec![
                TensorMetadata {
                    labels,
                    ..tensor(PROBABILITIES, Datatype::Fp32, &[-1, classes as i64])
                },
                tensor(CLASS, Datatype::Int64, &[-1]),
            ],
        };
        EndpointService {
            row_values,
            classes,
            metadata,
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
            observed: ObservedRequest::of(&request),
        };
        // A request that no version could answer says nothing about one.
        let rows = match rows_of(request, self.row_values) {
            Ok(rows) => rows,
            Err(error) => {
                assigned.arm.statistics().record_failure(started.elapsed());
                return Err(error);
            }
        };
        let input = started.elapsed();
        let error = match self
            .infer_rows(&assigned.arm, rows.clone(), input, asked.clone())
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
        rows: Vec<Vec<f32>>,
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
        rows: Vec<Vec<f32>>,
        compute_input: Duration,
        asked: Asked,
    ) -> Result<InferResponse, OipError> {
        let answered = arm
            .fleet()
            .infer_within(&self.metadata.name, rows.clone(), asked.limit);
        let answer = answered.await?;
        let splitting = Instant::now();
        let mut response = self.response(arm.version(), &answer.outputs)?;
        let times = RequestTimes {
            queue: answer.queued,
            compute_input,
            compute_infer: answer.computed,
            compute_output: splitting.elapsed(),
        };
        record(arm, &answer, times);
        response.explanation = asked.explain.then(|| {
            let origin = arm.origin();
            Explanation {
                digest: origin.digest,
                signers: origin.signers,
                assemble: times.compute_input,
                queue: times.queue,
                compute: times.compute_infer,
                split: times.compute_output,
            }
        });
        // A monitor compares with what its own version was trained on, and only the active one has one.
        if self.routes.borrow().active.version() == arm.version() {
            let observed = Observation::of(asked.observed, &rows, &answer.outputs);
            arm.feed().offer(observed);
        }
        Ok(response)
    }

    fn response(
        &self,
        version: u64,
        predictions: &[Prediction],
    ) -> Result<InferResponse, OipError> {
        let count = predictions.len() as u64;
        let probabilities: Vec<f32> = predictions
            .iter()
            .flat_map(|p| p.probabilities.iter().copied())
            .collect();
        if let Some(index) = probabilities.iter().position(|value| !value.is_finite()) {
            return Err(OipError::Failed {
                reason: format!(
                    "version {version} answered {} at index {index} of {PROBABILITIES:?}, which is no \
                     number",
                    probabilities[index]
                ),
            });
        }
        let classes = predictions.iter().map(|p| i64::from(p.class)).collect();
        let misfit = |error: DecodeError| OipError::Failed {
            reason: error.to_string(),
        };
        let probabilities = Tensor::new(
            PROBABILITIES,
            vec![count, self.classes as u64],
            TensorData::Fp32(probabilities),
        );
        let class = Tensor::new(CLASS, vec![count], TensorData::Int64(classes));
        Ok(InferResponse {
            model_name: self.metadata.name.clone(),
            model_version: version.to_string(),
            id: None,
            parameters: Parameters::new(),
            outputs: vec![probabilities.map_err(misfit)?, class.map_err(misfit)?],
            explanation: None,
        })
    }
}

fn record<B: Backend>(arm: &Arm<B>, answer: &BatchAnswer<Prediction>, times: RequestTimes) {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    let now_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
    let mut statistics = arm.statistics();
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

/// The rows of a request that fits the metadata.
fn rows_of(request: InferRequest, row_values: usize) -> Result<Vec<Vec<f32>>, OipError> {
    let input = request.inputs.into_iter().next().map(Tensor::into_data);
    let Some(TensorData::Fp32(values)) = input else {
        return Err(OipError::Failed {
            reason: format!("the input {INPUT:?} is not FP32"),
        });
    };
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        // Only binary data can hold such values; the answer would be no number either.
        return Err(OipError::Decode(DecodeError::Element {
            tensor: INPUT.to_owned(),
            index: index as u64,
            got: values[index].to_string(),
            datatype: Datatype::Fp32,
        }));
    }
    Ok(values
        .chunks_exact(row_values)
        .map(<[f32]>::to_vec)
        .collect())
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
