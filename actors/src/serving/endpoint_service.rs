//! An endpoint as the Open Inference Protocol sees it: one model version, answered by a fleet.
//!
//! Invariants:
//! 1. The endpoint's name is the model's name in every answer; the version is that of the model.
//! 2. A request's rows reach the monitor's feed after they were answered, and never delay anybody.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::batcher::BatchAnswer;
use super::feed::{Feed, Observation};
use super::fleet::{BATCH_ROWS_MAX, Backend, Fleet, Prediction};
use super::http::{BodyLimits, InferenceService, ServiceFuture};
use super::oip::{
    Datatype, DecodeError, InferRequest, InferResponse, ModelMetadata, OipError, Parameters,
    ServerMetadata, Tensor, TensorData, TensorMetadata,
};
use super::state::Endpoint;
use super::statistics::{ModelStatistics, RequestTimes};

/// The input: pixels scaled to 0..=1, row by row.
pub const INPUT: &str = "image";
/// The output with the probability of each class.
pub const PROBABILITIES: &str = "probabilities";
/// The output with the most probable class.
pub const CLASS: &str = "class";

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

/// Answers the protocol for one endpoint.
pub struct EndpointService<B> {
    row_values: usize,
    classes: usize,
    metadata: ModelMetadata,
    fleet: Arc<Fleet<B>>,
    feed: Feed,
    statistics: Mutex<ModelStatistics>,
}

impl<B: Backend> EndpointService<B> {
    /// The service of `endpoint`, whose rows have so many values and which knows so many classes.
    #[must_use]
    pub fn new(
        endpoint: &Endpoint,
        (row_values, classes): (usize, usize),
        fleet: Arc<Fleet<B>>,
        feed: Feed,
    ) -> Self {
        let tensor = |name: &str, datatype, shape: &[i64]| TensorMetadata {
            name: name.to_owned(),
            datatype,
            shape: shape.to_vec(),
        };
        let metadata = ModelMetadata {
            name: endpoint.name.clone(),
            versions: vec![endpoint.version.to_string()],
            platform: "mobula_candle".to_owned(),
            max_batch_size: BATCH_ROWS_MAX as u32,
            inputs: vec![tensor(INPUT, Datatype::Fp32, &[-1, row_values as i64])],
            outputs: vec![
                tensor(PROBABILITIES, Datatype::Fp32, &[-1, classes as i64]),
                tensor(CLASS, Datatype::Int64, &[-1]),
            ],
        };
        EndpointService {
            row_values,
            classes,
            metadata,
            fleet,
            feed,
            statistics: Mutex::default(),
        }
    }

    fn check(&self, model: &str, version: Option<&str>) -> Result<(), OipError> {
        if model != self.metadata.name {
            return Err(OipError::UnknownModel {
                model: model.to_owned(),
            });
        }
        match version {
            Some(version)
                if !self
                    .metadata
                    .versions
                    .iter()
                    .any(|served| served == version) =>
            {
                Err(OipError::UnknownVersion {
                    model: model.to_owned(),
                    version: version.to_owned(),
                    served: self.metadata.versions.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    fn ready(&self) -> Result<(), OipError> {
        if self.fleet.open_count() > 0 {
            return Ok(());
        }
        let reason = format!(
            "none of its {} replicas answers yet",
            self.fleet.replica_count()
        );
        Err(OipError::NotReady {
            model: self.metadata.name.clone(),
            reason,
        })
    }

    async fn answer(&self, request: InferRequest) -> Result<InferResponse, OipError> {
        let started = Instant::now();
        let result = self.infer_rows(request, started).await;
        if result.is_err() {
            self.statistics().record_failure(started.elapsed());
        }
        result
    }

    async fn infer_rows(
        &self,
        request: InferRequest,
        started: Instant,
    ) -> Result<InferResponse, OipError> {
        let rows = rows_of(request, self.row_values)?;
        let compute_input = started.elapsed();
        let answer = self.fleet.infer(&self.metadata.name, rows.clone()).await?;
        let splitting = Instant::now();
        let response = self.response(&answer.outputs)?;
        let times = RequestTimes {
            queue: answer.queued,
            compute_input,
            compute_infer: answer.computed,
            compute_output: splitting.elapsed(),
        };
        self.record(&answer, times);
        self.feed.offer(Observation {
            rows: rows.concat(),
            classes: answer
                .outputs
                .iter()
                .map(|prediction| prediction.class)
                .collect(),
        });
        Ok(response)
    }

    fn response(&self, predictions: &[Prediction]) -> Result<InferResponse, OipError> {
        let count = predictions.len() as u64;
        let probabilities: Vec<f32> = predictions
            .iter()
            .flat_map(|p| p.probabilities.iter().copied())
            .collect();
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
            model_version: self.metadata.versions[0].clone(),
            id: None,
            parameters: Parameters::new(),
            outputs: vec![probabilities.map_err(misfit)?, class.map_err(misfit)?],
        })
    }

    fn record(&self, answer: &BatchAnswer<Prediction>, times: RequestTimes) {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        let now_ms = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        let mut statistics = self.statistics();
        statistics.record_success(answer.outputs.len() as u64, times, now_ms);
        if answer.is_first_in_batch {
            statistics.record_execution(answer.batch_rows as u64, times);
        }
    }

    fn statistics(&self) -> MutexGuard<'_, ModelStatistics> {
        // Counters are whole after every single update, so a panic elsewhere does not spoil them.
        self.statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
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
        let extensions = ["binary_tensor_data", "model_configuration", "statistics"];
        ServerMetadata {
            name: "mobula".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: extensions.map(str::to_owned).to_vec(),
        }
    }

    fn server_ready(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {
            self.ready().map_err(|error| OipError::ServerNotReady {
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
            self.check(model, version)?;
            Ok(self.metadata.clone())
        })
    }

    fn model_ready<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ()> {
        Box::pin(async move {
            self.check(model, version)?;
            self.ready()
        })
    }

    fn model_statistics<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, (String, ModelStatistics)> {
        Box::pin(async move {
            self.check(model, version)?;
            Ok((self.metadata.versions[0].clone(), self.statistics().clone()))
        })
    }

    fn infer<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move {
            self.check(model, version)?;
            self.answer(request).await
        })
    }
}

#[cfg(test)]
#[path = "endpoint_service_tests.rs"]
mod tests;
