//! The Open Inference Protocol over HTTP, for any [`InferenceService`].
//!
//! 1. Every answer that is not a success has a JSON body `{"error": "<text>"}`, whatever went wrong and wherever.
//! 2. The token is checked before anything else of a request is read, the model before its body.
//! 3. A body is bounded in size and time, and so is what it inflates to. Large bodies are decoded off the async threads.
//! 4. A service sees only requests that fit the metadata it gave.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody};
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::auth::BearerAuth;
use super::compression::{self, ContentEncoding};
use super::oip::{
    DecodeError, InferRequest, InferResponse, ModelMetadata, OipError, ServerMetadata,
    decode_raw_request, decode_request, encode_response, validate_request,
};
use super::statistics::ModelStatistics;

/// What a request's body may take. Every connection may be made to hold as much, so the model decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyLimits {
    /// Bytes, before and after inflating; above them a request is answered with 413.
    pub max_bytes: usize,
    /// From the request's head to the body's last byte; past it a request is answered with 408. A client that stalls
    /// would keep one of the server's connections for ever.
    pub timeout: Duration,
}

/// Bodies from this size on are decoded on the blocking pool: below, the hand-over costs more than the work.
const OFFLOAD_MIN_BYTES: usize = 256 << 10;

const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Who asks: requests with the same key go to the same version while a new one is tried.
pub(super) const ROUTING_KEY: HeaderName = HeaderName::from_static("x-mobula-key");

/// A future a service returns; boxed, so that services can be trait objects.
pub type ServiceFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, OipError>> + Send + 'a>>;

/// What answers the protocol's calls. A version of `None` leaves the choice to the service.
pub trait InferenceService: Send + Sync + 'static {
    /// The server's name, version and the extensions that exist.
    fn server_metadata(&self) -> ServerMetadata;

    /// Succeeds when requests can be served; otherwise says what is awaited.
    fn server_ready(&self) -> ServiceFuture<'_, ()>;

    /// Describes a model. This is on the path of every inference.
    fn model_metadata<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, ModelMetadata>;

    /// Succeeds when the model can answer; otherwise says what is awaited.
    fn model_ready<'a>(&'a self, model: &'a str, version: Option<&'a str>)
    -> ServiceFuture<'a, ()>;

    /// Counts of a model, with the version they belong to.
    fn model_statistics<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
    ) -> ServiceFuture<'a, (String, ModelStatistics)>;

    /// Answers a request that fits the model's metadata. The response may hold more outputs than were asked for.
    fn infer<'a>(
        &'a self,
        model: &'a str,
        version: Option<&'a str>,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse>;
}

#[derive(Clone)]
struct Front {
    service: Arc<dyn InferenceService>,
    auth: BearerAuth,
    body: BodyLimits,
}

/// The protocol's routes.
pub fn oip_router(
    service: Arc<dyn InferenceService>,
    auth: BearerAuth,
    body: BodyLimits,
) -> Router {
    let front = Front {
        service,
        auth,
        body,
    };
    let mut router = Router::new()
        .route("/v2", get(server_metadata))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(server_ready));
    for model in [
        "/v2/models/{model}",
        "/v2/models/{model}/versions/{version}",
    ] {
        router = router
            .route(model, get(model_metadata))
            .route(&format!("{model}/ready"), get(model_ready))
            .route(&format!("{model}/config"), get(model_config))
            .route(&format!("{model}/stats"), get(model_statistics))
            .route(&format!("{model}/infer"), post(infer));
    }
    router
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(body.max_bytes))
        // Outermost, so that it also guards the addresses that do not exist.
        .layer(from_fn_with_state(front.clone(), authenticate))
        .with_state(front)
}

async fn authenticate(
    State(front): State<Front>,
    request: Request,
    next: Next,
) -> Result<Response, OipError> {
    let authorization = request.headers().get(header::AUTHORIZATION);
    front.auth.check(authorization.map(HeaderValue::as_bytes))?;
    Ok(next.run(request).await)
}

async fn unknown_path(uri: Uri) -> OipError {
    OipError::UnknownPath {
        path: uri.path().to_owned(),
    }
}

async fn wrong_method(method: Method, uri: Uri) -> OipError {
    OipError::MethodNotAllowed {
        method: method.to_string(),
        path: uri.path().to_owned(),
    }
}

/// The model and version of a path.
struct ModelPath {
    model: String,
    version: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for ModelPath {
    type Rejection = OipError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, OipError> {
        let path = Path::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        // Only a path that is not UTF-8 is refused here, and no model can have such a name.
        let unknown = |_| OipError::UnknownPath {
            path: parts.uri.path().to_owned(),
        };
        let Path(segments) = path.map_err(unknown)?;
        let mut found = Self {
            model: String::new(),
            version: None,
        };
        for (name, value) in segments {
            if name == "model" {
                found.model = value;
            } else {
                found.version = Some(value);
            }
        }
        Ok(found)
    }
}

async fn live() -> StatusCode {
    StatusCode::OK
}

async fn server_metadata(State(front): State<Front>) -> Response {
    let ServerMetadata {
        name,
        version,
        extensions,
    } = front.service.server_metadata();
    json_response(&json!({"name": name, "version": version, "extensions": extensions}))
}

async fn server_ready(State(front): State<Front>) -> Result<StatusCode, OipError> {
    front.service.server_ready().await.map(|()| StatusCode::OK)
}

async fn model_ready(State(front): State<Front>, at: ModelPath) -> Result<StatusCode, OipError> {
    front
        .service
        .model_ready(&at.model, at.version.as_deref())
        .await
        .map(|()| StatusCode::OK)
}

async fn model_metadata(State(front): State<Front>, at: ModelPath) -> Result<Response, OipError> {
    let metadata = front
        .service
        .model_metadata(&at.model, at.version.as_deref())
        .await?;
    Ok(json_response(&metadata.to_metadata_json()))
}

async fn model_config(State(front): State<Front>, at: ModelPath) -> Result<Response, OipError> {
    let metadata = front
        .service
        .model_metadata(&at.model, at.version.as_deref())
        .await?;
    Ok(json_response(&metadata.to_config_json()))
}

async fn model_statistics(State(front): State<Front>, at: ModelPath) -> Result<Response, OipError> {
    let statistics = front
        .service
        .model_statistics(&at.model, at.version.as_deref())
        .await;
    let (version, statistics) = statistics?;
    Ok(json_response(&statistics.to_json(&at.model, &version)))
}

/// A request without a Content-Type is as good as any: the most used client sends none.
async fn infer(
    State(front): State<Front>,
    at: ModelPath,
    request: Request,
) -> Result<Response, OipError> {
    let version = at.version.as_deref();
    let metadata = front.service.model_metadata(&at.model, version).await?;
    let answer_encoding = compression::accepted(request.headers());
    let (body, headers) = read_body(request, front.body).await?;
    let max_body_bytes = front.body.max_bytes;
    let routing_key = headers
        .get(ROUTING_KEY)
        .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let mut request = off_async_threads(body.len(), move || {
        let body = compression::inflate(&headers, body, max_body_bytes)?;
        let request = match json_length(&headers, body.len())? {
            Some(0) => decode_raw_request(&body, &metadata)?,
            length => decode_request(&body, length)?,
        };
        validate_request(&request, &metadata)?;
        Ok(request)
    })
    .await?;
    request.routing_key = routing_key;

    // The response is written as the request wanted it, but its inputs are the service's to keep or drop.
    let wanted = InferRequest {
        id: request.id.clone(),
        outputs: request.outputs.clone(),
        binary_data_output: request.binary_data_output,
        ..InferRequest::default()
    };
    let mut response = front.service.infer(&at.model, version, request).await?;
    response.id = wanted.id.clone();
    let elements = response
        .outputs
        .iter()
        .map(|output| output.data().len())
        .sum();
    off_async_threads(elements, move || {
        encode(&response, &wanted, answer_encoding)
    })
    .await
}

async fn read_body(request: Request, limits: BodyLimits) -> Result<(Bytes, HeaderMap), OipError> {
    use axum::extract::FromRequest;
    let headers = request.headers().clone();
    let reading = tokio::time::timeout(limits.timeout, Bytes::from_request(request, &()));
    let read = reading.await.map_err(|_| OipError::BodyTimeout {
        limit_ms: u64::try_from(limits.timeout.as_millis()).unwrap_or(u64::MAX),
    })?;
    let body = read.map_err(|rejection| match rejection {
        BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => {
            OipError::BodyTooLarge {
                limit_bytes: limits.max_bytes as u64,
            }
        }
        other => OipError::BodyUnreadable {
            reason: other.to_string(),
        },
    })?;
    Ok((body, headers))
}

fn json_length(headers: &HeaderMap, body_bytes: usize) -> Result<Option<usize>, OipError> {
    let Some(value) = headers.get(JSON_LENGTH) else {
        return Ok(None);
    };
    let length = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let refuse = || DecodeError::HeaderLength {
        got: String::from_utf8_lossy(value.as_bytes()).into_owned(),
        body_bytes: body_bytes as u64,
    };
    Ok(Some(length.ok_or_else(refuse)?))
}

/// Runs work in place if it is small, else where it delays nobody.
async fn off_async_threads<T: Send + 'static>(
    size: usize,
    work: impl FnOnce() -> Result<T, OipError> + Send + 'static,
) -> Result<T, OipError> {
    if size < OFFLOAD_MIN_BYTES {
        return work();
    }
    let result = tokio::task::spawn_blocking(work).await;
    result.unwrap_or_else(|error| {
        Err(OipError::Failed {
            reason: error.to_string(),
        })
    })
}

fn encode(
    response: &InferResponse,
    wanted: &InferRequest,
    encoding: ContentEncoding,
) -> Result<Response, OipError> {
    let body = encode_response(response, wanted)?;
    let content_type = if body.json_length.is_some() {
        "application/octet-stream"
    } else {
        "application/json"
    };
    let (bytes, encoding) = compression::deflate(encoding, body.bytes);
    let mut response = Response::new(bytes.into());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(length) = body.json_length {
        headers.insert(JSON_LENGTH, HeaderValue::from(length));
    }
    if let Some(encoding) = encoding {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding));
    }
    Ok(response)
}

fn json_response(value: &Value) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (headers, value.to_string()).into_response()
}

impl IntoResponse for OipError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status()).expect("every status is a valid one");
        if status.is_server_error() {
            tracing::warn!(status = status.as_u16(), error = %self, "inference call failed");
        }
        let mut response = json_response(&json!({"error": self.to_string()}));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        match self {
            Self::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::UnsupportedEncoding { .. } => {
                let known = HeaderValue::from_static(compression::SUPPORTED);
                headers.insert(header::ACCEPT_ENCODING, known);
            }
            retryable if retryable.is_retryable() => {
                let seconds = HeaderValue::from(retryable.retry_after_s());
                headers.insert(header::RETRY_AFTER, seconds);
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
#[path = "http_fixture.rs"]
pub(super) mod fixture;
#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
