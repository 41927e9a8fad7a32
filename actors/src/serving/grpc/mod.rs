//! The Open Inference Protocol over gRPC, for any [`InferenceService`].
//!
//! 1. The token is checked before anything of a call is read, and again for the model that its message names, before the
//!    tensors; on a stream for each request.
//! 2. A service sees only requests that fit the metadata it gave: what HTTP refuses is refused here, in the same words.
//! 3. Outputs are always raw: so clients read them, and no element is copied into a message of its own.
//! 4. A stream stays open when one of its requests fails: the failure is that request's answer.
//! 5. A message is bounded in size; that of a call which is no stream in time too, as a body of HTTP is. An answer has a bound
//!    of its own: a few numbers may be asked for many.

mod asker;
mod convert;
mod entrance;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::middleware::from_fn_with_state;
use futures::{Stream, StreamExt};
use tonic::codec::CompressionEncoding;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status, Streaming};

use self::asker::Asker;
use self::entrance::{Entrance, enter};
use self::proto::grpc_inference_service_server::{
    GrpcInferenceService, GrpcInferenceServiceServer,
};
use super::about::TIMEOUT;
use super::auth::{Caller, Gate, Subject};
use super::failure_log;
use super::http::{BodyLimits, InferenceService, RepositoryChange, oip_router};
use super::oip::{
    IndexRequest, InferRequest, ModelMetadata, OipError, Parameter, classify, validate_request,
};
use super::signature::BODY_LIMITS_MAX;

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

/// Bytes of an answer, whatever its request may have: as many as the largest request. What an endpoint gives has at most 4 MiB of
/// elements, so that the 16 of a graph fit as well; only as classes, which are texts, does it grow.
const ANSWER_BYTES_MAX: usize = BODY_LIMITS_MAX.max_bytes;

/// Requests of one stream that are answered at once. Their answers keep the requests' order.
const STREAM_AT_ONCE: usize = 16;

/// Of a response on a stream: none follows for the same request.
const FINAL_RESPONSE: &str = "triton_final_response";

#[derive(Clone)]
struct GrpcFront {
    service: Arc<dyn InferenceService>,
    gate: Arc<dyn Gate>,
}

/// Both forms of the protocol, for one port: a gRPC call is an HTTP/2 request to a path of its own.
pub fn oip_routes(service: Arc<dyn InferenceService>, gate: impl Gate, body: BodyLimits) -> Router {
    let gate: Arc<dyn Gate> = Arc::new(gate);
    let front = GrpcFront {
        service: Arc::clone(&service),
        gate: Arc::clone(&gate),
    };
    let grpc = GrpcInferenceServiceServer::new(front)
        .max_decoding_message_size(body.max_bytes)
        .max_encoding_message_size(ANSWER_BYTES_MAX)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate)
        .send_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Deflate);
    let entrance = Entrance::new(Arc::clone(&gate), body.timeout);
    let calls: Router = Router::new()
        .route_service(ROUTE, grpc)
        .route_layer(from_fn_with_state(entrance, enter));
    oip_router(service, gate, body).merge(calls)
}

type Answers = Pin<Box<dyn Stream<Item = Result<proto::ModelStreamInferResponse, Status>> + Send>>;

impl GrpcFront {
    /// Who it is that sends these metadata, if that one may ask about this.
    fn admit(&self, metadata: &MetadataMap, subject: Subject<'_>) -> Result<Caller, OipError> {
        let authorization = metadata.get("authorization");
        let value = authorization.map(|value| value.as_bytes());
        self.gate.admit(value, subject)
    }

    /// The message of a request whose token is right for the server.
    fn admitted<T>(&self, request: Request<T>) -> Result<T, Status> {
        self.admit(request.metadata(), Subject::Server)
            .map_err(status_of)?;
        Ok(request.into_inner())
    }

    /// The message of a request whose token is right for the model that it names.
    fn admitted_to<T>(&self, request: Request<T>, model: impl Fn(&T) -> &str) -> Result<T, Status> {
        let subject = Subject::Model(model(request.get_ref()));
        self.admit(request.metadata(), subject).map_err(status_of)?;
        Ok(request.into_inner())
    }

    async fn metadata_of(&self, model: &str, version: &str) -> Result<ModelMetadata, Status> {
        let metadata = self.service.model_metadata(model, named(version)).await;
        metadata.map_err(status_of)
    }

    async fn answer(
        &self,
        mut request: proto::ModelInferRequest,
        asker: &Asker,
    ) -> Result<(proto::ModelInferResponse, Explained), OipError> {
        let model = request.model_name.clone();
        let caller = self.admit(&asker.metadata, Subject::Model(&model))?;
        if let Some(limit) = asker.time_left()? {
            let asked = request.parameters.entry(TIMEOUT.to_owned());
            asked.or_insert(limit);
        }
        let version = named(&request.model_version).map(str::to_owned);
        let version = version.as_deref();
        let metadata = self.service.infer_metadata(&model, version).await?;
        let id = request.id.clone();
        let started = Instant::now();
        let mut request = convert::request(request)?;
        request.routing_key.clone_from(&asker.routing_key);
        request.explain = asker.explain;
        request.token = caller.token.as_deref().map(str::to_owned);
        request.headers = asker.headers(self.service.routing_headers(&model));
        request.low_priority = asker.low_priority;
        validate_request(&request, &metadata)?;
        let read = started.elapsed();
        let wanted = InferRequest {
            outputs: request.outputs.clone(),
            ..InferRequest::default()
        };
        let mut response = self.service.infer(&model, version, request).await?;
        classify(&mut response, &wanted, &metadata)?;
        let explanation = response.explanation.take().map(|mut explanation| {
            explanation.assemble += read;
            explanation
        });
        let started = Instant::now();
        let message = convert::response(response, id, &wanted.outputs)?;
        let explained = explanation
            .map(|explanation| explanation.headers(&message.model_version, started.elapsed()));
        Ok((message, explained.unwrap_or_default()))
    }
}

/// What an answer says about itself, as names and values.
type Explained = Vec<(&'static str, String)>;

/// A version that was asked for; the protocol's empty string is none.
fn named(version: &str) -> Option<&str> {
    (!version.is_empty()).then_some(version)
}

/// The status of a failure: the codes that Triton uses, and the words of HTTP's answers.
fn status_of(error: OipError) -> Status {
    let code = match error.status() {
        _ if matches!(error, OipError::RepositoryFixed { .. }) => Code::FailedPrecondition,
        401 => Code::Unauthenticated,
        404 => Code::NotFound,
        408 | 504 => Code::DeadlineExceeded,
        413 | 429 => Code::ResourceExhausted,
        503 => Code::Unavailable,
        500..=599 => Code::Internal,
        _ => Code::InvalidArgument,
    };
    if matches!(code, Code::Internal | Code::Unavailable) {
        failure_log::tell(&error);
    }
    Status::new(code, error.to_string())
}

#[tonic::async_trait]
impl GrpcInferenceService for GrpcFront {
    async fn server_live(
        &self,
        request: Request<proto::ServerLiveRequest>,
    ) -> Result<Response<proto::ServerLiveResponse>, Status> {
        self.admit(request.metadata(), Subject::Health)
            .map_err(status_of)?;
        Ok(Response::new(proto::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        request: Request<proto::ServerReadyRequest>,
    ) -> Result<Response<proto::ServerReadyResponse>, Status> {
        self.admit(request.metadata(), Subject::Health)
            .map_err(status_of)?;
        let ready = self.service.server_ready().await.is_ok();
        Ok(Response::new(proto::ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<proto::ModelReadyRequest>,
    ) -> Result<Response<proto::ModelReadyResponse>, Status> {
        let asked = self.admitted_to(request, |asked| &asked.name)?;
        let answer = self
            .service
            .model_ready(&asked.name, named(&asked.version))
            .await;
        let ready = match answer {
            Ok(()) => true,
            // What is not there is not ready either; a client that waits for a model asks before there is one.
            Err(error) if error.is_retryable() || error.status() == 404 => false,
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
        let asked = self.admitted_to(request, |asked| &asked.name)?;
        let metadata = self.metadata_of(&asked.name, &asked.version).await?;
        Ok(Response::new(convert::metadata(metadata)))
    }

    async fn model_config(
        &self,
        request: Request<proto::ModelConfigRequest>,
    ) -> Result<Response<proto::ModelConfigResponse>, Status> {
        let asked = self.admitted_to(request, |asked| &asked.name)?;
        let metadata = self.metadata_of(&asked.name, &asked.version).await?;
        Ok(Response::new(proto::ModelConfigResponse {
            config: Some(convert::config(&metadata)),
        }))
    }

    async fn model_statistics(
        &self,
        request: Request<proto::ModelStatisticsRequest>,
    ) -> Result<Response<proto::ModelStatisticsResponse>, Status> {
        let asked = self.admitted_to(request, |asked| &asked.name)?;
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
        let asker = Asker::of(&request);
        let answered = self.answer(request.into_inner(), &asker).await;
        let (message, explained) = answered.map_err(status_of)?;
        let mut response = Response::new(message);
        for (name, value) in explained {
            // Names of keys may hold what metadata may not; the others are known without it.
            if let Ok(value) = value.parse() {
                response.metadata_mut().insert(name, value);
            }
        }
        Ok(response)
    }

    async fn repository_index(
        &self,
        request: Request<proto::RepositoryIndexRequest>,
    ) -> Result<Response<proto::RepositoryIndexResponse>, Status> {
        let admitted = self.admit(request.metadata(), Subject::Server);
        let caller = admitted.map_err(status_of)?;
        let asked = IndexRequest {
            ready: request.into_inner().ready,
        };
        let entries = self.service.repository_index(&caller).await;
        let entries = entries.map_err(status_of)?;
        let wanted = entries.into_iter().filter(|entry| asked.wants(entry));
        Ok(Response::new(proto::RepositoryIndexResponse {
            models: wanted.map(convert::entry).collect(),
        }))
    }

    async fn repository_model_load(
        &self,
        request: Request<proto::RepositoryModelLoadRequest>,
    ) -> Result<Response<proto::RepositoryModelLoadResponse>, Status> {
        let asked = self.admitted_to(request, |asked| &asked.model_name)?;
        self.change(&asked.model_name, RepositoryChange::Load)
            .await?;
        Ok(Response::new(proto::RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<proto::RepositoryModelUnloadRequest>,
    ) -> Result<Response<proto::RepositoryModelUnloadResponse>, Status> {
        let asked = self.admitted_to(request, |asked| &asked.model_name)?;
        self.change(&asked.model_name, RepositoryChange::Unload)
            .await?;
        Ok(Response::new(proto::RepositoryModelUnloadResponse {}))
    }

    type ModelStreamInferStream = Answers;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<proto::ModelInferRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let asker = Arc::new(Asker::of(&request));
        let requests = self.admitted(request)?;
        let front = self.clone();
        let answers = requests.map(move |request| {
            let (front, asker) = (front.clone(), Arc::clone(&asker));
            async move { front.answer_in_band(request?, &asker).await }
        });
        Ok(Response::new(Box::pin(answers.buffered(STREAM_AT_ONCE))))
    }
}

impl GrpcFront {
    async fn change(&self, model: &str, change: RepositoryChange) -> Result<(), Status> {
        let changed = self.service.change_repository(model, change).await;
        changed.map_err(status_of)
    }

    async fn answer_in_band(
        &self,
        request: proto::ModelInferRequest,
        asker: &Asker,
    ) -> Result<proto::ModelStreamInferResponse, Status> {
        let id = request.id.clone();
        let (mut response, explained) = match self.answer(request, asker).await {
            Ok(answered) => answered,
            // Who sent it finds out by its id which of the requests failed.
            Err(error) => {
                let response = proto::ModelInferResponse {
                    id,
                    ..Default::default()
                };
                return Ok(proto::ModelStreamInferResponse {
                    error_message: error.to_string(),
                    infer_response: Some(response),
                });
            }
        };
        // A stream has metadata once, so each answer explains itself.
        let explained = explained
            .into_iter()
            .map(|(name, value)| (name.to_owned(), Parameter::String(value)));
        let last = (FINAL_RESPONSE.to_owned(), Parameter::Bool(true));
        let parameters = explained.chain([last]).map(convert::parameter);
        response.parameters.extend(parameters);
        Ok(proto::ModelStreamInferResponse {
            error_message: String::new(),
            infer_response: Some(response),
        })
    }
}

#[cfg(test)]
pub(super) mod fixture;
#[cfg(test)]
mod tests;
