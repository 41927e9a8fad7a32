//! The inference protocol for models of your own, without a cluster: a server whose models answer what they were asked.
//!
//! `cargo run --example identity_server` prints its address and the token that its callers show, and serves until it is
//! killed. The models are those of the probes that compare this protocol with a tritonserver's
//! (`docs/oip-conformance.md`): `identity` (FP32 of 16), `pair` (two inputs, two outputs), `labelled` (classes with names),
//! and one for each datatype.

use std::collections::BTreeMap;
use std::future::{pending, ready};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mobula_actors::serving::auth::{BearerAuth, Caller};
use mobula_actors::serving::grpc::oip_routes;
use mobula_actors::serving::http::{BodyLimits, InferenceService, RepositoryChange, ServiceFuture};
use mobula_actors::serving::oip::{
    Datatype, InferRequest, InferResponse, ModelMetadata, ModelState, OipError, RepositoryEntry,
    ServerMetadata, Tensor, TensorMetadata,
};
use mobula_actors::serving::server::serve;
use mobula_actors::serving::statistics::{ModelStatistics, RequestTimes};
use tokio::net::TcpListener;

/// The only version of each model.
const VERSION: &str = "1";

/// What callers show. The server listens for this machine alone.
const TOKEN: &str = "identity";

const LIMITS: BodyLimits = BodyLimits {
    max_bytes: 1 << 20,
    timeout: Duration::from_secs(20),
};

struct Identity {
    models: BTreeMap<String, ModelMetadata>,
    statistics: Mutex<BTreeMap<String, ModelStatistics>>,
}

impl Identity {
    fn new() -> Self {
        let typed = Datatype::ALL
            .into_iter()
            .filter(|datatype| *datatype != Datatype::Fp32)
            .map(|datatype| {
                let name = format!("typed_{}", datatype.name().to_lowercase());
                model(&name, 0, &[(datatype, -1)], &[])
            });
        let models = [
            model("identity", 8, &[(Datatype::Fp32, 16)], &[]),
            model("pair", 4, &[(Datatype::Fp32, 4), (Datatype::Int32, 4)], &[]),
            model(
                "labelled",
                4,
                &[(Datatype::Fp32, 4)],
                &["zero", "one", "two", "three"],
            ),
        ];
        let by_name = |model: ModelMetadata| (model.name.clone(), model);
        Identity {
            models: models.into_iter().chain(typed).map(by_name).collect(),
            statistics: Mutex::default(),
        }
    }

    fn model(&self, model: &str, version: Option<&str>) -> Result<&ModelMetadata, OipError> {
        let found = self
            .models
            .get(model)
            .ok_or_else(|| OipError::UnknownModel {
                model: model.to_owned(),
            })?;
        match version {
            Some(version) if version != VERSION => Err(OipError::UnknownVersion {
                model: model.to_owned(),
                version: version.to_owned(),
                served: found.versions.clone(),
            }),
            _ => Ok(found),
        }
    }

    fn answer(&self, model: &ModelMetadata, request: InferRequest) -> InferResponse {
        let started = Instant::now();
        // The service is asked only what fits the metadata that it gave.
        let copied = model.inputs.iter().zip(&model.outputs);
        let outputs = copied.map(|(input, output)| {
            let input = request.input(&input.name).expect("a checked request");
            Tensor::new(&output.name, input.shape().to_vec(), input.data().clone())
                .expect("the shape of the same data")
        });
        let response = InferResponse {
            model_name: model.name.clone(),
            model_version: VERSION.to_owned(),
            outputs: outputs.collect(),
            ..InferResponse::default()
        };
        let rows = match model.max_batch_size {
            0 => 1,
            _ => request.inputs[0].shape()[0],
        };
        let times = RequestTimes {
            queue: Duration::ZERO,
            compute_input: Duration::ZERO,
            compute_infer: started.elapsed(),
            compute_output: Duration::ZERO,
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now_ms = u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
        let mut all = self
            .statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let statistics = all.entry(model.name.clone()).or_default();
        statistics.record_success(rows, times, now_ms);
        statistics.record_execution(rows, times);
        response
    }
}

/// A model whose outputs are like its inputs.
fn model(
    name: &str,
    max_batch_size: u32,
    tensors: &[(Datatype, i64)],
    labels: &[&str],
) -> ModelMetadata {
    let described = |side: &str, labels: &[&str]| -> Vec<TensorMetadata> {
        let numbered = tensors.iter().enumerate();
        let tensor = |(number, (datatype, size)): (usize, &(Datatype, i64))| TensorMetadata {
            name: format!("{side}{number}"),
            datatype: *datatype,
            shape: match max_batch_size {
                0 => vec![*size],
                _ => vec![-1, *size],
            },
            labels: labels.iter().copied().map(str::to_owned).collect(),
        };
        numbered.map(tensor).collect()
    };
    ModelMetadata {
        name: name.to_owned(),
        versions: vec![VERSION.to_owned()],
        platform: "identity".to_owned(),
        max_batch_size,
        inputs: described("INPUT", &[]),
        outputs: described("OUTPUT", labels),
    }
}

impl InferenceService for Identity {
    fn server_metadata(&self) -> ServerMetadata {
        let extensions = [
            "binary_tensor_data",
            "classification",
            "model_configuration",
            "model_repository",
            "statistics",
        ];
        ServerMetadata {
            name: "identity".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: extensions.map(str::to_owned).to_vec(),
        }
    }

    fn server_ready(&self) -> ServiceFuture<'_, ()> {
        Box::pin(ready(Ok(())))
    }

    fn model_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ModelMetadata> {
        Box::pin(ready(self.model(model, version).cloned()))
    }

    fn model_ready<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ()> {
        Box::pin(ready(self.model(model, version).map(|_| ())))
    }

    fn model_statistics<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, (String, ModelStatistics)> {
        Box::pin(async move {
            self.model(model, version)?;
            let all = self
                .statistics
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let statistics = all.get(model).cloned().unwrap_or_default();
            Ok((VERSION.to_owned(), statistics))
        })
    }

    fn infer<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move {
            let model = self.model(model, version)?;
            Ok(self.answer(model, request))
        })
    }

    fn repository_index<'a>(
        &'a self,
        _caller: &'a Caller,
    ) -> ServiceFuture<'a, Vec<RepositoryEntry>> {
        let entry = |name: &String| RepositoryEntry {
            name: name.clone(),
            version: VERSION.to_owned(),
            state: ModelState::Ready,
            reason: String::new(),
        };
        Box::pin(ready(Ok(self.models.keys().map(entry).collect())))
    }

    fn change_repository<'a>(
        &'a self,
        _model: &'a str,
        _change: RepositoryChange,
    ) -> ServiceFuture<'a, ()> {
        let instead = "the models of this server are fixed".to_owned();
        Box::pin(ready(Err(OipError::RepositoryFixed { instead })))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let routes = oip_routes(
        Arc::new(Identity::new()),
        BearerAuth::with_token(TOKEN),
        LIMITS,
    );
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{} {TOKEN}", listener.local_addr()?);
    serve(listener, routes, pending()).await?;
    Ok(())
}
