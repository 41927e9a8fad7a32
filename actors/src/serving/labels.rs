//! Where clients report the truth about earlier requests: `POST /v2/models/<endpoint>/labels`, with the endpoint's token.
//!
//! 1. The token is checked before anything else of a request is read.
//! 2. Either all lines of a body are labels, or none of them is taken.
//! 3. The monitor of the version that is active now decides: what an earlier version answered is joined no more.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use mobula::Cluster;
use serde_json::json;
use tokio::sync::watch;

use super::arm::Routes;
use super::auth::{Gate, Subject};
use super::controller::monitor_name;
use super::fleet::Backend;
use super::oip::OipError;
use crate::drift::labels::{LABELS_BYTES_MAX, parse};
use crate::drift::monitor::{Monitor, MonitorCalls};
use crate::drift::vitals::{LABELS_PER_CALL_MAX, Label, LabelReply};

/// From a request's head to its last byte.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the monitor may take for a call, its start included.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(10);

/// Takes the labels of one endpoint.
pub(super) struct LabelDesk<B> {
    pub(super) cluster: Cluster,
    pub(super) endpoint: String,
    pub(super) routes: watch::Receiver<Arc<Routes<B>>>,
    pub(super) gate: Box<dyn Gate>,
}

/// Why labels were not taken. None of them was, unless the monitor was lost on the way.
#[derive(Debug, thiserror::Error)]
enum LabelsRefused {
    #[error(transparent)]
    Request(#[from] OipError),
    #[error("{0}")]
    Body(String),
    #[error("the body has more than {LABELS_BYTES_MAX} bytes: send the labels in parts")]
    TooLarge,
    #[error("the monitor of version {version} does not answer: {reason}; send the labels again")]
    Monitor { version: u64, reason: String },
}

/// The route.
pub(super) fn label_routes<B: Backend>(desk: LabelDesk<B>) -> Router {
    Router::new()
        .route("/v2/models/{model}/labels", post(report::<B>))
        .with_state(Arc::new(desk))
}

async fn report<B: Backend>(
    State(desk): State<Arc<LabelDesk<B>>>,
    Path(model): Path<String>,
    request: Request,
) -> Result<Response, LabelsRefused> {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let authorization = authorization.map(HeaderValue::as_bytes);
    desk.gate.admit(authorization, Subject::Model(&model))?;
    if model != desk.endpoint {
        return Err(OipError::UnknownModel { model }.into());
    }
    let labels = read(request.into_body()).await?;
    let reply = desk.send(&labels).await?;
    let reply = serde_json::to_string(&reply).expect("numbers and a text have a JSON form");
    Ok(([(header::CONTENT_TYPE, "application/json")], reply).into_response())
}

async fn read(body: Body) -> Result<Vec<Label>, LabelsRefused> {
    let reading = tokio::time::timeout(BODY_TIMEOUT, to_bytes(body, LABELS_BYTES_MAX));
    let body = reading
        .await
        .map_err(|_| OipError::BodyTimeout {
            limit_ms: BODY_TIMEOUT.as_millis() as u64,
        })?
        .map_err(|_| LabelsRefused::TooLarge)?;
    let parsed = tokio::task::spawn_blocking(move || parse(&body)).await;
    parsed
        .map_err(|error| LabelsRefused::Body(error.to_string()))?
        .map_err(|error| LabelsRefused::Body(error.to_string()))
}

impl<B: Backend> LabelDesk<B> {
    async fn send(&self, labels: &[Label]) -> Result<LabelReply, LabelsRefused> {
        let version = self.routes.borrow().active.version();
        let lost = |error: mobula::Error| LabelsRefused::Monitor {
            version,
            reason: error.to_string(),
        };
        let name = monitor_name(&self.endpoint, version);
        let monitor = self
            .cluster
            .get_actor::<Monitor>(&name)
            .await
            .map_err(lost)?;
        let mut reply = LabelReply::default();
        for labels in labels.chunks(LABELS_PER_CALL_MAX) {
            let call = monitor.label(labels.to_vec()).timeout(MONITOR_TIMEOUT);
            reply.add(call.await.map_err(lost)?);
        }
        Ok(reply)
    }
}

impl IntoResponse for LabelsRefused {
    fn into_response(self) -> Response {
        let status = match self {
            LabelsRefused::Request(error) => return error.into_response(),
            LabelsRefused::Body(_) => StatusCode::BAD_REQUEST,
            LabelsRefused::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            LabelsRefused::Monitor { .. } => StatusCode::SERVICE_UNAVAILABLE,
        };
        let body = json!({"error": self.to_string()}).to_string();
        (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
    }
}
