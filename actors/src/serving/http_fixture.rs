//! A server of the protocol on a loopback socket, for tests.

use std::sync::Mutex;
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use super::super::auth::BearerAuth;
use super::super::grpc::oip_routes;
use super::super::oip::{
    Datatype, Explanation, ModelMetadata, ModelState, Tensor, TensorData, TensorMetadata,
    decode_response, encode_request,
};
use super::super::server::{ServeSummary, serve};
use super::super::statistics::{ModelStatistics, RequestTimes};
use super::*;

/// A model `double` that doubles `x` FP32[-1,2] into `y` and greets with `text`; a model `slow` that waits to be told;
/// `full` and `down` that are always so.
#[derive(Default)]
pub(super) struct Doubler {
    statistics: Mutex<ModelStatistics>,
    pub(super) slow_started: Notify,
    pub(super) slow_may_finish: Notify,
}

impl Doubler {
    fn metadata(&self, model: &str, version: Option<&str>) -> Result<ModelMetadata, OipError> {
        if !["double", "slow", "full", "down"].contains(&model) {
            return Err(OipError::UnknownModel {
                model: model.to_owned(),
            });
        }
        if let Some(version) = version.filter(|version| *version != "1") {
            let (model, version) = (model.to_owned(), version.to_owned());
            return Err(OipError::UnknownVersion {
                model,
                version,
                served: vec!["1".to_owned()],
            });
        }
        let tensor = |name: &str, datatype, shape: &[i64]| TensorMetadata {
            name: name.to_owned(),
            datatype,
            shape: shape.to_vec(),
            labels: Vec::new(),
        };
        Ok(ModelMetadata {
            name: model.to_owned(),
            versions: vec!["1".to_owned()],
            platform: "test".to_owned(),
            max_batch_size: 4_096,
            inputs: vec![tensor("x", Datatype::Fp32, &[-1, 2])],
            outputs: vec![
                tensor("y", Datatype::Fp32, &[-1, 2]),
                tensor("text", Datatype::Bytes, &[-1]),
            ],
        })
    }

    fn double(&self, model: &str, request: &InferRequest) -> InferResponse {
        let x = request.input("x").unwrap();
        let TensorData::Fp32(values) = x.data() else {
            unreachable!("validated")
        };
        let rows = x.shape()[0];
        let doubled = TensorData::Fp32(values.iter().map(|value| value * 2.0).collect());
        let text = TensorData::Bytes(vec!["grüezi".into(); rows as usize]);
        let zero = std::time::Duration::ZERO;
        let times = RequestTimes {
            queue: zero,
            compute_input: zero,
            compute_infer: zero,
            compute_output: zero,
        };
        self.statistics
            .lock()
            .unwrap()
            .record_success(rows, times, 1);
        InferResponse {
            model_name: model.to_owned(),
            // Says what key came with the request, if one did.
            model_version: request.routing_key.clone().unwrap_or("1".to_owned()),
            outputs: vec![
                Tensor::new("y", x.shape().to_vec(), doubled).unwrap(),
                Tensor::new("text", vec![rows], text).unwrap(),
            ],
            explanation: request.explain.then(|| Explanation {
                digest: Some("d1".to_owned()),
                signers: vec!["ann".to_owned()],
                ..Explanation::default()
            }),
            ..InferResponse::default()
        }
    }
}

impl InferenceService for Doubler {
    fn server_metadata(&self) -> ServerMetadata {
        ServerMetadata {
            name: "mobula".to_owned(),
            version: "0".to_owned(),
            extensions: vec!["binary_tensor_data".to_owned()],
        }
    }

    fn server_ready(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn model_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ModelMetadata> {
        Box::pin(async move { self.metadata(model, version) })
    }

    fn model_ready<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ()> {
        Box::pin(async move {
            self.metadata(model, version)?;
            if model == "down" {
                let reason = "no replica runs".to_owned();
                return Err(OipError::NotReady {
                    model: model.to_owned(),
                    reason,
                });
            }
            Ok(())
        })
    }

    fn model_statistics<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, (String, ModelStatistics)> {
        Box::pin(async move {
            self.metadata(model, version)?;
            Ok(("1".to_owned(), self.statistics.lock().unwrap().clone()))
        })
    }

    fn repository_index<'a>(
        &'a self,
        _caller: &'a Caller,
    ) -> ServiceFuture<'a, Vec<RepositoryEntry>> {
        Box::pin(async {
            let entry = |name: &str, state, reason: &str| RepositoryEntry {
                name: name.to_owned(),
                version: "1".to_owned(),
                state,
                reason: reason.to_owned(),
            };
            Ok(vec![
                entry("double", ModelState::Ready, ""),
                entry("down", ModelState::Unavailable, "no replica runs"),
            ])
        })
    }

    /// `double` may come and go, the others may not.
    fn change_repository<'a>(
        &'a self,
        model: &'a str,
        _change: RepositoryChange,
    ) -> ServiceFuture<'a, ()> {
        Box::pin(async move {
            self.metadata(model, None)?;
            if model == "double" {
                return Ok(());
            }
            let instead = "ask somebody else".to_owned();
            Err(OipError::RepositoryFixed { instead })
        })
    }

    fn infer<'a>(
        &'a self,
        model: &'a str,
        _version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move {
            if model == "full" {
                return Err(OipError::Overloaded {
                    queued: 8,
                    limit: 8,
                });
            }
            if model == "slow" {
                self.slow_started.notify_one();
                self.slow_may_finish.notified().await;
            }
            Ok(self.double(model, &request))
        })
    }
}

pub(in crate::serving) struct Server {
    pub(super) service: Arc<Doubler>,
    pub(super) client: Client,
    pub(in crate::serving) base: String,
    pub(super) stop: oneshot::Sender<()>,
    pub(super) task: JoinHandle<ServeSummary>,
}

pub(in crate::serving) const BODY_LIMIT: usize = 100_000;

/// The routes with a gate, without a server.
pub(in crate::serving) fn routes(gate: impl Gate, body_timeout: Duration) -> Router {
    let limits = BodyLimits {
        max_bytes: BODY_LIMIT,
        timeout: body_timeout,
    };
    oip_routes(Arc::new(Doubler::default()), gate, limits)
}

pub(in crate::serving) async fn start() -> Server {
    start_with_body_timeout(Duration::from_secs(60)).await
}

pub(super) async fn start_with_body_timeout(timeout: Duration) -> Server {
    let service = Arc::new(Doubler::default());
    let auth = BearerAuth::with_token("secret");
    let as_service: Arc<dyn InferenceService> = Arc::<Doubler>::clone(&service);
    let limits = BodyLimits {
        max_bytes: BODY_LIMIT,
        timeout,
    };
    let router = oip_routes(as_service, auth, limits);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        let _ = stopped.await;
    };
    let task = tokio::spawn(async { serve(listener, router, shutdown).await.unwrap() });
    Server {
        service,
        client: Client::new(),
        base,
        stop,
        task,
    }
}

impl Server {
    pub(super) fn call(&self, method: Method, path: &str) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.base))
            .bearer_auth("secret")
    }

    pub(super) async fn get_json(&self, path: &str) -> Value {
        let response = self.call(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        assert_eq!(response.headers()["content-type"], "application/json");
        response.json().await.unwrap()
    }

    /// The error text of a call; every failure has a JSON body.
    pub(super) async fn error_of(&self, call: RequestBuilder, status: u16) -> String {
        let response = call.send().await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        let body: Value = response.json().await.expect("a JSON body");
        body["error"].as_str().expect("an error text").to_owned()
    }

    pub(super) fn infer(&self, model: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
        // No Content-Type, as tritonclient does it.
        self.call(Method::POST, &format!("/v2/models/{model}/infer"))
            .body(body)
    }
}

pub(super) fn request(rows: u64) -> InferRequest {
    let values = (0..rows * 2).map(|value| value as f32).collect();
    let x = Tensor::new("x", vec![rows, 2], TensorData::Fp32(values)).unwrap();
    InferRequest {
        id: Some("r1".to_owned()),
        inputs: vec![x],
        ..InferRequest::default()
    }
}

pub(super) fn json_body(rows: u64) -> Vec<u8> {
    encode_request(&request(rows), false).unwrap().bytes
}

pub(super) async fn decode(response: reqwest::Response) -> InferResponse {
    assert_eq!(response.status(), StatusCode::OK);
    let header = response.headers().get("inference-header-content-length");
    let length = header.map(|value| value.to_str().unwrap().parse().unwrap());
    let is_binary = response.headers()["content-type"] == "application/octet-stream";
    assert_eq!(is_binary, length.is_some());
    decode_response(&response.bytes().await.unwrap(), length).unwrap()
}
