//! The protocol against a real server on a loopback socket.

use std::io::Write;
use std::sync::Mutex;

use reqwest::{Client, Method, RequestBuilder, StatusCode};
use tokio::net::TcpListener;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use super::super::oip::{
    Datatype, Parameters, RequestedOutput, Tensor, TensorData, TensorMetadata, decode_response,
    encode_request,
};
use super::super::server::{ServeSummary, serve};
use super::super::statistics::RequestTimes;
use super::*;

/// A model `double` that doubles `x` FP32[-1,2] into `y` and greets with `text`; a model `slow` that waits to be told;
/// `full` and `down` that are always so.
#[derive(Default)]
struct Doubler {
    statistics: Mutex<ModelStatistics>,
    slow_started: Notify,
    slow_may_finish: Notify,
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
            model_version: "1".to_owned(),
            outputs: vec![
                Tensor::new("y", x.shape().to_vec(), doubled).unwrap(),
                Tensor::new("text", vec![rows], text).unwrap(),
            ],
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

struct Server {
    service: Arc<Doubler>,
    client: Client,
    base: String,
    stop: oneshot::Sender<()>,
    task: JoinHandle<ServeSummary>,
}

const BODY_LIMIT: usize = 100_000;

async fn start() -> Server {
    let service = Arc::new(Doubler::default());
    let auth = BearerAuth::with_token("secret");
    let as_service: Arc<dyn InferenceService> = Arc::<Doubler>::clone(&service);
    let router = oip_router_with_body_limit(as_service, auth, BODY_LIMIT);
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
    fn call(&self, method: Method, path: &str) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.base))
            .bearer_auth("secret")
    }

    async fn get_json(&self, path: &str) -> Value {
        let response = self.call(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        assert_eq!(response.headers()["content-type"], "application/json");
        response.json().await.unwrap()
    }

    /// The error text of a call; every failure has a JSON body.
    async fn error_of(&self, call: RequestBuilder, status: u16) -> String {
        let response = call.send().await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        let body: Value = response.json().await.expect("a JSON body");
        body["error"].as_str().expect("an error text").to_owned()
    }

    fn infer(&self, model: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
        // No Content-Type, as tritonclient does it.
        self.call(Method::POST, &format!("/v2/models/{model}/infer"))
            .body(body)
    }
}

fn request(rows: u64) -> InferRequest {
    let values = (0..rows * 2).map(|value| value as f32).collect();
    let x = Tensor::new("x", vec![rows, 2], TensorData::Fp32(values)).unwrap();
    InferRequest {
        id: Some("r1".to_owned()),
        inputs: vec![x],
        ..InferRequest::default()
    }
}

fn json_body(rows: u64) -> Vec<u8> {
    encode_request(&request(rows), false).unwrap().bytes
}

async fn decode(response: reqwest::Response) -> InferResponse {
    assert_eq!(response.status(), StatusCode::OK);
    let header = response.headers().get("inference-header-content-length");
    let length = header.map(|value| value.to_str().unwrap().parse().unwrap());
    let is_binary = response.headers()["content-type"] == "application/octet-stream";
    assert_eq!(is_binary, length.is_some());
    decode_response(&response.bytes().await.unwrap(), length).unwrap()
}

#[tokio::test]
async fn metadata_health_and_statistics() {
    let server = start().await;
    let metadata = json!({"name": "mobula", "version": "0", "extensions": ["binary_tensor_data"]});
    assert_eq!(server.get_json("/v2").await, metadata);
    for path in [
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/double/ready",
    ] {
        let response = server.call(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        assert!(response.bytes().await.unwrap().is_empty());
    }
    let model = server.get_json("/v2/models/double").await;
    assert_eq!(
        model["inputs"][0],
        json!({"name": "x", "datatype": "FP32", "shape": [-1, 2]})
    );
    assert_eq!(server.get_json("/v2/models/double/versions/1").await, model);
    let config = server.get_json("/v2/models/double/config").await;
    assert_eq!(
        (&config["max_batch_size"], &config["input"][0]["dims"]),
        (&json!(4096), &json!([2]))
    );
    server.infer("double", json_body(3)).send().await.unwrap();
    let stats = server.get_json("/v2/models/double/versions/1/stats").await;
    assert_eq!(stats["model_stats"][0]["inference_count"], 3);
    assert_eq!(
        stats["model_stats"][0]["inference_stats"]["success"]["count"],
        1
    );
}

#[tokio::test]
async fn json_inference_without_content_type() {
    let server = start().await;
    let response = server.infer("double", json_body(2)).send().await.unwrap();
    let response = decode(response).await;
    assert_eq!(
        (response.model_name.as_str(), response.id.as_deref()),
        ("double", Some("r1"))
    );
    assert_eq!(
        response.outputs[0].data(),
        &TensorData::Fp32(vec![0.0, 2.0, 4.0, 6.0])
    );
    assert_eq!(
        response.outputs[1].data(),
        &TensorData::Bytes(vec!["grüezi".into(); 2])
    );
}

#[tokio::test]
async fn binary_inference_both_ways_and_raw() {
    let server = start().await;
    let mut request = request(2);
    let output = |name: &str, binary_data| RequestedOutput {
        name: name.to_owned(),
        binary_data: Some(binary_data),
        parameters: Parameters::new(),
    };
    request.outputs = vec![output("text", true), output("y", false)];
    let body = encode_request(&request, true).unwrap();
    let call = server
        .infer("double", body.bytes)
        .header("Inference-Header-Content-Length", body.json_length.unwrap());
    let response = decode(call.send().await.unwrap()).await;
    assert_eq!(
        response.outputs[0].data(),
        &TensorData::Bytes(vec!["grüezi".into(); 2])
    );
    assert_eq!(
        response.outputs[1].data(),
        &TensorData::Fp32(vec![0.0, 2.0, 4.0, 6.0])
    );

    let raw: Vec<u8> = [1.0f32, 2.0]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let call = server
        .infer("double", raw)
        .header("Inference-Header-Content-Length", 0);
    let response = decode(call.send().await.unwrap()).await;
    assert_eq!(
        response.outputs[0].data(),
        &TensorData::Fp32(vec![2.0, 4.0])
    );
    assert_eq!(response.id, None);
}

#[tokio::test]
async fn compressed_bodies_both_ways() {
    let server = start().await;
    let body = json_body(500);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&body).unwrap();
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    zlib.write_all(&body).unwrap();
    for (name, compressed) in [
        ("gzip", gzip.finish().unwrap()),
        ("deflate", zlib.finish().unwrap()),
    ] {
        let call = server
            .infer("double", compressed)
            .header("content-encoding", name);
        let plain = decode(call.send().await.unwrap()).await;
        assert_eq!(plain.outputs[0].shape(), [500, 2]);
        let call = server
            .infer("double", body.clone())
            .header("accept-encoding", name);
        let response = call.send().await.unwrap();
        assert_eq!(response.headers()["content-encoding"], name);
        assert!(response.bytes().await.unwrap().len() < 6_000);
    }
    // What inflates beyond the limit is refused without being held.
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    bomb.write_all(&vec![b' '; BODY_LIMIT * 50]).unwrap();
    let call = server
        .infer("double", bomb.finish().unwrap())
        .header("content-encoding", "gzip");
    assert!(server.error_of(call, 413).await.contains("100000 bytes"));
    let call = server
        .infer("double", "x")
        .header("content-encoding", "gzip");
    assert!(
        server
            .error_of(call, 400)
            .await
            .contains("could not be read")
    );
    let call = server
        .infer("double", "x")
        .header("content-encoding", "zstd");
    assert!(
        server
            .error_of(call, 415)
            .await
            .contains("\"zstd\" is not supported")
    );
}

#[tokio::test]
async fn every_failure_is_json_with_its_status() {
    let server = start().await;
    let get = |path: &str| server.call(Method::GET, path);
    assert!(
        server
            .error_of(get("/v2/models/nothing"), 404)
            .await
            .contains("unknown model \"nothing\"")
    );
    assert!(
        server
            .error_of(get("/v2/models/double/versions/9"), 404)
            .await
            .contains("serves [\"1\"]")
    );
    assert!(
        server
            .error_of(get("/nowhere"), 404)
            .await
            .contains("nothing is served at /nowhere")
    );
    assert!(
        server
            .error_of(get("/v2/models/%ff"), 404)
            .await
            .contains("nothing is served")
    );
    assert!(
        server
            .error_of(get("/v2/models/double/infer"), 405)
            .await
            .contains("GET is not allowed")
    );
    assert!(
        server
            .error_of(server.call(Method::POST, "/v2"), 405)
            .await
            .contains("POST is not allowed")
    );
    assert!(
        server
            .error_of(get("/v2/models/down/ready"), 503)
            .await
            .contains("no replica runs")
    );
    assert!(
        server
            .error_of(server.infer("nothing", json_body(1)), 404)
            .await
            .contains("unknown model")
    );
    assert!(
        server
            .error_of(server.infer("double", "{"), 400)
            .await
            .contains("malformed inference JSON")
    );
    assert!(
        server
            .error_of(server.infer("double", ""), 400)
            .await
            .contains("malformed")
    );
    assert!(
        server
            .error_of(server.infer("double", vec![b' '; BODY_LIMIT + 1]), 413)
            .await
            .contains("100000")
    );
    let overloaded = server.infer("full", json_body(1)).send().await.unwrap();
    assert_eq!(
        (
            overloaded.status().as_u16(),
            &overloaded.headers()["retry-after"]
        ),
        (503, &"1".parse().unwrap())
    );
    let wrong_name =
        r#"{"inputs": [{"name": "z", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}"#;
    assert!(
        server
            .error_of(server.infer("double", wrong_name), 400)
            .await
            .contains("unexpected input \"z\"")
    );
    let call = server
        .infer("double", json_body(1))
        .header("inference-header-content-length", "x");
    assert!(
        server
            .error_of(call, 400)
            .await
            .contains("Inference-Header-Content-Length \"x\"")
    );
}

#[tokio::test]
async fn nothing_is_answered_without_the_token() {
    let server = start().await;
    for path in ["/v2", "/v2/health/live", "/v2/models/double", "/nowhere"] {
        let call = || server.client.get(format!("{}{path}", server.base));
        let error = server.error_of(call(), 401).await;
        assert!(error.contains("Authorization: Bearer <token>"), "{error}");
        let response = call().bearer_auth("wrong").send().await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
    }
    let call = server
        .client
        .post(format!("{}/v2/models/double/infer", server.base));
    server.error_of(call.body(json_body(1)), 401).await;
}

#[tokio::test]
async fn shutdown_finishes_what_is_in_flight_and_refuses_the_rest() {
    let server = start().await;
    let call = server.infer("slow", json_body(1));
    let in_flight = tokio::spawn(async move { call.send().await.unwrap().status() });
    server.service.slow_started.notified().await;
    server.stop.send(()).unwrap();
    let refused =
        |client: Client, url: String| async move { client.get(url).send().await.is_err() };
    // The listener closes at once; a fresh client opens a new connection each time.
    while !refused(Client::new(), server.base.clone()).await {
        tokio::task::yield_now().await;
    }
    server.service.slow_may_finish.notify_one();
    assert_eq!(in_flight.await.unwrap(), StatusCode::OK);
    assert_eq!(
        server.task.await.unwrap(),
        ServeSummary {
            aborted_connections: 0
        }
    );
}
