//! The Open Inference Protocol over gRPC, for any [`InferenceService`].
//!
//! 1. The token is checked before anything else, the model before the tensors.
//! 2. A service sees only requests that fit the metadata it gave: what HTTP refuses is refused here, in the same words.
//! 3. Outputs are always raw: so clients read them, and no element is copied into a message of its own.
//! 4. A stream stays open when one of its requests fails: the failure is that request's answer.

mod convert;

use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use futures::{Stream, StreamExt};
use tonic::codec::CompressionEncoding;
use tonic::{Code, Request, Response, Status, Streaming};

use self::proto::grpc_inference_service_server::{
    GrpcInferenceService, GrpcInferenceServiceServer,
};
use super::auth::BearerAuth;
use super::endpoint_service::TIMEOUT;
use super::http::{BodyLimits, InferenceService, ROUTING_KEY, oip_router};
use super::oip::{ModelMetadata, OipError, validate_request};

/// The messages, as `proto/inference.proto` has them.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    reason = "generated from the protocol"
)]
pub mod proto {
    tonic::include_proto!("inference");
}

/// Where the service's calls are.
const ROUTE: &str = "/inference.GRPCInferenceService/{method}";

/// Requests of one stream that are answered at once. Their answers keep the requests' order.
const STREAM_AT_ONCE: usize = 16;

/// Of a response on a stream: none follows for the same request.
const FINAL_RESPONSE: &str = "triton_final_response";

#[derive(Clone)]
struct GrpcFront {
    service: Arc<dyn InferenceService>,
    auth: BearerAuth,
}

/// Both forms of the protocol, for one port: a gRPC call is an HTTP/2 request to a path of its own.
pub fn oip_routes(
    service: Arc<dyn InferenceService>,
    auth: BearerAuth,
    body: BodyLimits,
) -> Router {
    let front = GrpcFront {
        service: Arc::clone(&service),
        auth: auth.clone(),
    };
    let grpc = GrpcInferenceServiceServer::new(front)
        .max_decoding_message_size(body.max_bytes)
        .max_encoding_message_size(body.max_bytes)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate)
        .send_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Deflate);
    oip_router(service, auth, body).route_service(ROUTE, grpc)
}

type Answers = Pin<Box<dyn Stream<Item = Result<proto::ModelStreamInferResponse, Status>> + Send>>;

impl GrpcFront {
    /// The message of a request whose token is right.
    fn admitted<T>(&self, request: Request<T>) -> Result<T, Status> {
        let authorization = request.metadata().get("authorization");
        let value = authorization.map(|value| value.as_bytes());
        self.auth.check(value).map_err(status_of)?;
        Ok(request.into_inner())
    }

    async fn metadata_of(&self, model: &str, version: &str) -> Result<ModelMetadata, Status> {
        let metadata = self.service.model_metadata(model, named(version)).await;
        metadata.map_err(status_of)
    }

    async fn answer(
        &self,
        request: proto::ModelInferRequest,
        routing_key: Option<String>,
    ) -> Result<proto::ModelInferResponse, OipError> {
        let model = request.model_name.clone();
        let version = named(&request.model_version).map(str::to_owned);
        let version = version.as_deref();
        let metadata = self.service.model_metadata(&model, version).await?;
        let wanted: Vec<String> = request
            .outputs
            .iter()
            .map(|output| output.name.clone())
            .collect();
        let id = request.id.clone();
        let mut request = convert::request(request)?;
        request.routing_key = routing_key;
        validate_request(&request, &metadata)?;
        let response = self.service.infer(&model, version, request).await?;
        Ok(convert::response(response, id, &wanted)?)
    }
}

/// Who asks, as while a new version is tried: the same header as HTTP's.
fn routing_key<T>(request: &Request<T>) -> Option<String> {
    let value = request.metadata().get(ROUTING_KEY.as_str())?;
    Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// What gRPC's own deadline leaves, as the protocol's parameter. It has at most eight digits and a unit.
fn time_limit<T>(request: &Request<T>) -> Option<proto::InferParameter> {
    let value = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let count: i64 = digits.parse().ok().filter(|count| *count > 0)?;
    let micros = match unit {
        "H" => count.checked_mul(3_600_000_000)?,
        "M" => count.checked_mul(60_000_000)?,
        "S" => count.checked_mul(1_000_000)?,
        "m" => count.checked_mul(1_000)?,
        "u" => count,
        "n" => (count / 1_000).max(1),
        _ => return None,
    };
    let choice = proto::infer_parameter::ParameterChoice::Int64Param(micros);
    Some(proto::InferParameter {
        parameter_choice: Some(choice),
    })
}

/// A version that was asked for; the protocol's empty string is none.
fn named(version: &str) -> Option<&str> {
    (!version.is_empty()).then_some(version)
}

/// The status of a failure: the codes that Triton uses, and the words of HTTP's answers.
fn status_of(error: OipError) -> Status {
    let code = match error.status() {
        401 => Code::Unauthenticated,
        404 => Code::NotFound,
        408 | 504 => Code::DeadlineExceeded,
        413 | 429 => Code::ResourceExhausted,
        503 => Code::Unavailable,
        500..=599 => Code::Internal,
        _ => Code::InvalidArgument,
    };
    if matches!(code, Code::Internal | Code::Unavailable) {
        tracing::warn!(?code, %error, "inference call failed");
    }
    Status::new(code, error.to_string())
}

#[tonic::async_trait]
impl GrpcInferenceService for GrpcFront {
    async fn server_live(
        &self,
        request: Request<proto::ServerLiveRequest>,
    ) -> Result<Response<proto::ServerLiveResponse>, Status> {
        self.admitted(request)?;
        Ok(Response::new(proto::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        request: Request<proto::ServerReadyRequest>,
    ) -> Result<Response<proto::ServerReadyResponse>, Status> {
        self.admitted(request)?;
        let ready = self.service.server_ready().await.is_ok();
        Ok(Response::new(proto::ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<proto::ModelReadyRequest>,
    ) -> Result<Response<proto::ModelReadyResponse>, Status> {
        let asked = self.admitted(request)?;
        let answer = self
            .service
            .model_ready(&asked.name, named(&asked.version))
            .await;
        let ready = match answer {
            Ok(()) => true,
            Err(error) if error.is_retryable() => false,
            Err(error) => return Err(status_of(error)),
        };
        Ok(Response::new(proto::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        request: Request<proto::ServerMetadataRequest>,
    ) -> Result<Response<proto::ServerMetadataResponse>, Status> {
        self.admitted(request)?;
        let about = self.service.server_metadata();
        Ok(Response::new(proto::ServerMetadataResponse {
            name: about.name,
            version: about.version,
            extensions: about.extensions,
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<proto::ModelMetadataRequest>,
    ) -> Result<Response<proto::ModelMetadataResponse>, Status> {
        let asked = self.admitted(request)?;
        let metadata = self.metadata_of(&asked.name, &asked.version).await?;
        Ok(Response::new(convert::metadata(metadata)))
    }

    async fn model_config(
        &self,
        request: Request<proto::ModelConfigRequest>,
    ) -> Result<Response<proto::ModelConfigResponse>, Status> {
        let asked = self.admitted(request)?;
        let metadata = self.metadata_of(&asked.name, &asked.version).await?;
        Ok(Response::new(proto::ModelConfigResponse {
            config: Some(convert::config(&metadata)),
        }))
    }

    async fn model_statistics(
        &self,
        request: Request<proto::ModelStatisticsRequest>,
    ) -> Result<Response<proto::ModelStatisticsResponse>, Status> {
        let asked = self.admitted(request)?;
        let (version, statistics) = self
            .service
            .model_statistics(&asked.name, named(&asked.version))
            .await
            .map_err(status_of)?;
        Ok(Response::new(proto::ModelStatisticsResponse {
            model_stats: vec![statistics.to_proto(asked.name, version)],
        }))
    }

    async fn model_infer(
        &self,
        request: Request<proto::ModelInferRequest>,
    ) -> Result<Response<proto::ModelInferResponse>, Status> {
        let key = routing_key(&request);
        let limit = time_limit(&request);
        let mut request = self.admitted(request)?;
        if let Some(limit) = limit {
            let asked = request.parameters.entry(TIMEOUT.to_owned());
            asked.or_insert(limit);
        }
        let response = self.answer(request, key).await.map_err(status_of)?;
        Ok(Response::new(response))
    }

    type ModelStreamInferStream = Answers;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<proto::ModelInferRequest>>,
    ) -> Result<Response<Answers>, Status> {
        // One for all requests of the stream.
        let key = routing_key(&request);
        let requests = self.admitted(request)?;
        let front = self.clone();
        let answers = requests.map(move |request| {
            let (front, key) = (front.clone(), key.clone());
            async move { front.answer_in_band(request?, key).await }
        });
        Ok(Response::new(Box::pin(answers.buffered(STREAM_AT_ONCE))))
    }
}

impl GrpcFront {
    async fn answer_in_band(
        &self,
        request: proto::ModelInferRequest,
        routing_key: Option<String>,
    ) -> Result<proto::ModelStreamInferResponse, Status> {
        let id = request.id.clone();
        let (mut response, error_message) = match self.answer(request, routing_key).await {
            Ok(response) => (response, String::new()),
            // Who sent it finds out by its id which of the requests failed.
            Err(error) => {
                let response = proto::ModelInferResponse {
                    id,
                    ..Default::default()
                };
                (response, error.to_string())
            }
        };
        let parameter = proto::infer_parameter::ParameterChoice::BoolParam(true);
        let parameter = proto::InferParameter {
            parameter_choice: Some(parameter),
        };
        response
            .parameters
            .insert(FINAL_RESPONSE.to_owned(), parameter);
        Ok(proto::ModelStreamInferResponse {
            error_message,
            infer_response: Some(response),
        })
    }
}

#[cfg(test)]
mod tests;
