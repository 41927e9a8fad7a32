//! The Open Inference Protocol over HTTP, for any [`InferenceService`].
//!
//! 1. Every answer that is not a success has a JSON body `{"error": "<text>"}`, whatever went wrong and wherever. What has no head
//!    that can be read does not come here: see [`server`](super::server).
//! 2. The token is checked before anything else of a request is read, the model before its body.
//! 3. A body is bounded in size and time, and so is what it inflates to. Large bodies are decoded off the async threads.
//! 4. A service sees only requests that fit the metadata it gave.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody};
use axum::extract::{DefaultBodyLimit, Extension, FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::auth::{Caller, Gate, Subject};
use super::compression::{self, ContentEncoding};
use super::failure_log;
use super::fleet::affinity::AFFINITY;
pub use super::inference_service::{BodyLimits, InferenceService, RepositoryChange, ServiceFuture};
use super::oip::{
    DecodeError, EXPLAIN, IndexRequest, InferRequest, InferResponse, OipError, RepositoryEntry,
    ServerMetadata, classify, decode_raw_request, decode_request, encode_response, is_asked,
    validate_request,
};
use super::server::AskAgainAfter;

/// Bodies from this size on are decoded on the blocking pool: below, the hand-over costs more than the work.
const OFFLOAD_MIN_BYTES: usize = 256 << 10;

const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// Who asks: requests with the same key go to the same version while a new one is tried.
pub(super) const ROUTING_KEY: HeaderName = HeaderName::from_static("x-mobula-key");

/// How urgent a request is, as its header says: one that says [`LOW_PRIORITY`] is refused where others wait.
pub const PRIORITY: &str = "x-mobula-priority";

/// The value of [`PRIORITY`] of requests that may wait.
pub const LOW_PRIORITY: &str = "low";

#[derive(Clone)]
struct Front {
    service: Arc<dyn InferenceService>,
    gate: Arc<dyn Gate>,
    body: BodyLimits,
}

/// The protocol's routes.
pub fn oip_router(
    service: Arc<dyn InferenceService>,
    gate: Arc<dyn Gate>,
    body: BodyLimits,
) -> Router {
    let front = Front {
        service,
        gate,
        body,
    };
    let mut router = Router::new()
        .route("/v2", get(server_metadata))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(server_ready))
        .route("/v2/repository/index", post(repository_index))
        .route("/v2/repository/models/{model}/load", post(load))
        .route("/v2/repository/models/{model}/unload", post(unload));
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
        .route("/v2/models/{model}/requests/{id}", get(fetch))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        // Outermost, so that it also guards the addresses that do not exist.
        .layer(from_fn_with_state(front.clone(), authenticate))
        .with_state(front)
}

async fn authenticate(
    State(front): State<Front>,
    mut request: Request,
    next: Next,
) -> Result<Response, OipError> {
    let subject = Subject::of_path(request.uri().path());
    let authorization = request.headers().get(header::AUTHORIZATION);
    let authorization = authorization.map(HeaderValue::as_bytes);
    let caller = front.gate.admit(authorization, subject)?;
    request.extensions_mut().insert(caller);
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
            } else if name == "version" {
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

async fn repository_index(
    State(front): State<Front>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, OipError> {
    let (body, headers) = read_body(request, front.body).await?;
    let max_bytes = front.body.max_bytes;
    let asked = off_async_threads(work_bytes(&headers, body.len(), max_bytes), move || {
        let body = compression::inflate(&headers, body, max_bytes)?;
        Ok(IndexRequest::decode(&body)?)
    })
    .await?;
    let entries = front.service.repository_index(&caller).await?;
    let wanted = entries.iter().filter(|entry| asked.wants(entry));
    Ok(json_response(
        &wanted.map(RepositoryEntry::to_json).collect(),
    ))
}

async fn load(State(front): State<Front>, at: ModelPath) -> Result<StatusCode, OipError> {
    change(&front, &at.model, RepositoryChange::Load).await
}

async fn unload(State(front): State<Front>, at: ModelPath) -> Result<StatusCode, OipError> {
    change(&front, &at.model, RepositoryChange::Unload).await
}

async fn change(
    front: &Front,
    model: &str,
    change: RepositoryChange,
) -> Result<StatusCode, OipError> {
    front.service.change_repository(model, change).await?;
    Ok(StatusCode::OK)
}

/// A request without a Content-Type is as good as any: the most used client sends none.
async fn infer(
    State(front): State<Front>,
    at: ModelPath,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, OipError> {
    let version = at.version.as_deref();
    let metadata = front.service.infer_metadata(&at.model, version).await?;
    let answer_encoding = compression::accepted(request.headers());
    let own_max_bytes = front.service.body_bytes_max(&at.model);
    let max_body_bytes =
        own_max_bytes.map_or(front.body.max_bytes, |own| own.min(front.body.max_bytes));
    let limits = BodyLimits {
        max_bytes: max_body_bytes,
        ..front.body
    };
    let (body, headers) = read_body(request, limits).await?;
    let routing_headers = read_headers(&headers, front.service.routing_headers(&at.model));
    let model = Arc::clone(&metadata);
    let routing_key = headers
        .get(ROUTING_KEY)
        .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let explain = is_asked(headers.get(EXPLAIN).map(HeaderValue::as_bytes));
    let is_async = prefers_async(&headers);
    let low_priority = headers
        .get(PRIORITY)
        .is_some_and(|value| value == LOW_PRIORITY);
    let started = Instant::now();
    let work = work_bytes(&headers, body.len(), max_body_bytes);
    let mut request = off_async_threads(work, move || {
        let body = compression::inflate(&headers, body, max_body_bytes)?;
        let request = match json_length(&headers, body.len())? {
            Some(0) => decode_raw_request(&body, &model)?,
            length => decode_request(&body, length)?,
        };
        validate_request(&request, &model)?;
        Ok(request)
    })
    .await?;
    request.routing_key = routing_key;
    request.explain = explain;
    request.token = caller.token.as_deref().map(str::to_owned);
    request.headers = routing_headers;
    request.low_priority = low_priority;
    let read = started.elapsed();
    if is_async {
        let id = front.service.submit(&at.model, version, request).await?;
        return Ok(accepted(&at.model, &id));
    }

    // The response is written as the request wanted it, but its inputs are the service's to keep or drop.
    let wanted = InferRequest {
        id: request.id.clone(),
        outputs: request.outputs.clone(),
        binary_data_output: request.binary_data_output,
        ..InferRequest::default()
    };
    let mut response = front.service.infer(&at.model, version, request).await?;
    response.id = wanted.id.clone();
    if let Some(explanation) = &mut response.explanation {
        explanation.assemble += read;
    }
    classify(&mut response, &wanted, &metadata)?;
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

/// Whether the caller comes back for the answer (RFC 7240).
fn prefers_async(headers: &HeaderMap) -> bool {
    let values = headers.get_all("prefer").iter();
    let mut preferences = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    preferences.any(|preference| preference.trim().eq_ignore_ascii_case("respond-async"))
}

/// The answer to a request that is under way, and where its own answer will be.
fn accepted(model: &str, id: &str) -> Response {
    let mut response = json_response(&json!({"id": id, "state": "pending"}));
    *response.status_mut() = StatusCode::ACCEPTED;
    let location = HeaderValue::try_from(format!("/v2/models/{model}/requests/{id}"));
    if let Ok(location) = location {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

async fn fetch(
    State(front): State<Front>,
    Path((model, id)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, OipError> {
    let Some(fetched) = front.service.fetch(&model, &id).await? else {
        return Ok(accepted(&model, &id));
    };
    let encoding = compression::accepted(&headers);
    let outputs = fetched.response.outputs.iter();
    let elements = outputs.map(|output| output.data().len()).sum();
    off_async_threads(elements, move || {
        encode(&fetched.response, &fetched.wanted, encoding)
    })
    .await
}

async fn read_body(
    mut request: Request,
    limits: BodyLimits,
) -> Result<(Bytes, HeaderMap), OipError> {
    use axum::extract::FromRequest;
    let headers = request.headers().clone();
    DefaultBodyLimit::max(limits.max_bytes).apply(&mut request);
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

/// The headers that decide where a request goes, as far as it has them. Of one that comes several times, the first.
fn read_headers(headers: &HeaderMap, wanted: Vec<String>) -> BTreeMap<String, String> {
    let read = |name: String| {
        let value = headers.get(&name)?.to_str().ok()?.to_owned();
        Some((name, value))
    };
    let wanted = wanted.into_iter().chain([AFFINITY.to_owned()]);
    wanted.filter_map(read).collect()
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

/// How much there is to decode: of an encoded body nobody knows before, so it may be all that is allowed.
fn work_bytes(headers: &HeaderMap, body_bytes: usize, max_bytes: usize) -> usize {
    if compression::is_encoded(headers) {
        max_bytes
    } else {
        body_bytes
    }
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
    let started = Instant::now();
    let body = encode_response(response, wanted)?;
    let content_type = if body.json_length.is_some() {
        "application/octet-stream"
    } else {
        "application/json"
    };
    let (bytes, encoding) = compression::deflate(encoding, body.bytes);
    let explained = response
        .explanation
        .as_ref()
        .map(|explanation| explanation.headers(&response.model_version, started.elapsed()));
    let mut response = Response::new(bytes.into());
    let headers = response.headers_mut();
    for (name, value) in explained.into_iter().flatten() {
        // Names of keys may hold what a header may not; the others are known without it.
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    }
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
            failure_log::tell(&self);
        }
        let mut response = json_response(&json!({"error": self.to_string()}));
        *response.status_mut() = status;
        if let Some(pause) = self.want_of_room() {
            response.extensions_mut().insert(AskAgainAfter(pause));
        }
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
