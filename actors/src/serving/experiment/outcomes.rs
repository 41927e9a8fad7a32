//! What callers report of a key after it was answered: `POST /v2/models/{endpoint}/outcomes` at the endpoint's
//! own address, with its token.
//!
//! 1. The token is checked before anything else of a request is read.
//! 2. A body is bounded in size and time.
//! 3. Every answer that is not a success has a JSON body `{"error": "<text>"}`, as those of the protocol.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;

use super::tally::{NotCounted, Variant};
use crate::serving::arm::{Routes, lock};
use crate::serving::auth::{Gate, Subject};
use crate::serving::fleet::Backend;
use crate::serving::oip::OipError;

/// The largest body: a key is no longer than a header may be.
const BODY_BYTES_MAX: usize = 16 * 1024;

/// How long a body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long [`report`] waits for an answer: the router looks only at its own memory.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// A value of a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reported {
    /// The key that a request was sent with.
    pub key: String,
    /// What came of it.
    pub value: f64,
    /// The outcome's name, if the experiment has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
}

/// What a reported value was counted for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// `control` or `treatment`.
    pub variant: String,
    /// The version that the key met.
    pub version: u64,
}

/// Why a value was not counted.
#[derive(Debug, thiserror::Error)]
pub enum NotReported {
    /// The router refuses it.
    #[error("{endpoint} does not count this ({status}): {reason}")]
    Refused {
        /// The endpoint.
        endpoint: String,
        /// The HTTP status.
        status: u16,
        /// The router's words.
        reason: String,
    },
    /// The router cannot be asked.
    #[error("the router of {endpoint} at {address} does not answer: {source}")]
    Unreachable {
        /// The endpoint.
        endpoint: String,
        /// Where it should answer.
        address: SocketAddr,
        /// What went wrong.
        source: reqwest::Error,
    },
}

struct Front<B> {
    endpoint: String,
    routes: watch::Receiver<Arc<Routes<B>>>,
    gate: Box<dyn Gate>,
}

/// The route of an endpoint, beside those of the protocol.
pub fn outcome_routes<B: Backend>(
    endpoint: &str,
    routes: watch::Receiver<Arc<Routes<B>>>,
    gate: impl Gate,
) -> Router {
    let front = Front {
        endpoint: endpoint.to_owned(),
        routes,
        gate: Box::new(gate),
    };
    Router::new()
        .route(
            "/v2/models/{model}/outcomes",
            post(take::<B>).fallback(wrong_method),
        )
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(Arc::new(front))
}

async fn wrong_method(method: Method, uri: Uri) -> OipError {
    OipError::MethodNotAllowed {
        method: method.to_string(),
        path: uri.path().to_owned(),
    }
}

async fn take<B: Backend>(
    State(front): State<Arc<Front<B>>>,
    Path(model): Path<String>,
    request: Request,
) -> Result<Response, OipError> {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let subject = Subject::Model(&model);
    let authorization = authorization.map(HeaderValue::as_bytes);
    front.gate.admit(authorization, subject)?;
    if model != front.endpoint {
        return Err(OipError::UnknownModel { model });
    }
    let reading = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, &())).await;
    let body = match reading {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return Ok(refused(error.status(), &error.body_text())),
        Err(_) => {
            return Err(OipError::BodyTimeout {
                limit_ms: u64::try_from(BODY_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
            });
        }
    };
    let reported: Reported = match serde_json::from_slice(&body) {
        Ok(reported) => reported,
        Err(error) => {
            let reason = format!(
                "the body is no outcome: {error}; send {{\"key\": \"…\", \"value\": 1}}, and \"metric\" if the \
                 experiment has several"
            );
            return Ok(refused(StatusCode::BAD_REQUEST, &reason));
        }
    };
    Ok(count(&front, &reported))
}

fn count<B: Backend>(front: &Front<B>, reported: &Reported) -> Response {
    let routes = Arc::clone(&front.routes.borrow());
    let Some(compared) = &routes.compared else {
        let reason = format!(
            "no experiment is under way at {}: see `mobula experiment status {0}`",
            front.endpoint
        );
        return refused(StatusCode::NOT_FOUND, &reason);
    };
    let name = reported.metric.as_deref();
    let counted = lock(&compared.tally).report(&reported.key, name, reported.value);
    match counted {
        Ok(variant) => {
            let (variant, version) = match variant {
                Variant::Control => ("control", compared.plan.control.version),
                Variant::Treatment => ("treatment", compared.plan.treatment.version),
            };
            Json(Counted {
                variant: variant.to_owned(),
                version,
            })
            .into_response()
        }
        Err(error) => {
            let status = match error {
                NotCounted::NotExposed => StatusCode::NOT_FOUND,
                NotCounted::Twice { .. } => StatusCode::CONFLICT,
                NotCounted::NotMeasured { .. }
                | NotCounted::NotNamed { .. }
                | NotCounted::NoNumber { .. } => StatusCode::BAD_REQUEST,
            };
            refused(status, &error.to_string())
        }
    }
}

fn refused(status: StatusCode, reason: &str) -> Response {
    (status, Json(json!({"error": reason}))).into_response()
}

/// Reports a value to the router of `endpoint` at `address`.
pub async fn report(
    endpoint: &str,
    address: SocketAddr,
    token: &str,
    reported: &Reported,
) -> Result<Counted, NotReported> {
    let unreachable = |source| NotReported::Unreachable {
        endpoint: endpoint.to_owned(),
        address,
        source,
    };
    let url = format!("http://{address}/v2/models/{endpoint}/outcomes");
    let request = reqwest::Client::new()
        .post(url)
        .timeout(REPORT_TIMEOUT)
        .bearer_auth(token)
        .header(header::CONTENT_TYPE.as_str(), "application/json")
        .body(json!(reported).to_string());
    let response = request.send().await.map_err(unreachable)?;
    let status = response.status().as_u16();
    let body = response.bytes().await.map_err(unreachable)?;
    let refused = |reason: String| NotReported::Refused {
        endpoint: endpoint.to_owned(),
        status,
        reason,
    };
    if status != 200 {
        let said: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
        let said = said.and_then(|said| said["error"].as_str().map(str::to_owned));
        return Err(refused(said.unwrap_or_default()));
    }
    serde_json::from_slice(&body).map_err(|error| refused(format!("its answer: {error}")))
}

#[cfg(test)]
#[path = "outcomes_tests.rs"]
mod tests;
