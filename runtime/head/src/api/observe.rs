//! What is there to see of a running cluster: metrics as text, and the timeline of a job.
//!
//! Metrics are also served over plain HTTP for Prometheus, on the same port and under the same
//! authentication as the API: `/metrics` for this head, `/metrics/<node>` for a worker, which the
//! head asks through its session. So no other port is opened anywhere.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use mobula_core::codec;
use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{JobId, NodeId};
use mobula_scheduler::{Query, QueryResponse};
use mobula_wire::control as api;
use mobula_wire::session::{ANSWER_BYTES_MAX, HostSpans, Question};
use tonic::Status;

use super::access::{may_read, not_for_jobs};
use super::{auth, nodes, rejected, views};
use crate::context::HeadContext;
use crate::metrics;

/// What Prometheus wants to hear about the format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Actors of a job whose lives are shown; a timeline of more is not looked at by anyone.
const ACTORS_SHOWN_MAX: usize = 2_000;

/// Workers that are asked for spans of one job.
const NODES_ASKED_MAX: usize = 128;

pub(super) async fn metrics(
    context: &Arc<HeadContext>,
    caller: &Caller,
    request: api::MetricsRequest,
) -> Result<api::MetricsReply, Status> {
    not_for_jobs(caller, "the cluster's metrics")?;
    let text = match request.node.as_str() {
        "" => metrics::text(context).await?,
        name => of_node(context, name).await?,
    };
    Ok(api::MetricsReply { text })
}

async fn of_node(context: &HeadContext, name: &str) -> Result<String, Status> {
    let (id, name) = match name.parse::<NodeId>() {
        Ok(id) => (id.0, ""),
        Err(_) => (0, name),
    };
    let node = nodes::find(context, id, name).await?;
    let bytes = context
        .sessions
        .ask(node, Question::Metrics)
        .await
        .map_err(|reason| unavailable(node, &reason))?;
    String::from_utf8(bytes).map_err(|error| Status::internal(error.to_string()))
}

fn unavailable(node: NodeId, reason: &str) -> Status {
    rejected(&Rejection::new(
        ErrorCode::Unavailable,
        format!("{node} cannot be asked: {reason}"),
    ))
}

pub(super) async fn timeline(
    context: &Arc<HeadContext>,
    caller: &Caller,
    request: api::TimelineRequest,
) -> Result<api::TimelineReply, Status> {
    let job = JobId(request.job);
    may_read(caller, job)?;
    // Refused here, so that a wrong id is an error and not an empty timeline.
    let QueryResponse::Job(view) = context.ask(Query::Job { job }).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    let ended_us = view.ended_ms.map(|ms| ms * 1000);
    let mut spans = vec![api::Span {
        name: view.name.clone(),
        category: "job".into(),
        start_us: view.submitted_ms * 1000,
        end_us: ended_us,
        ..Default::default()
    }];
    let query = Query::ListActors {
        job: Some(job),
        after: None,
        limit: u32::try_from(ACTORS_SHOWN_MAX).unwrap_or(u32::MAX),
    };
    let QueryResponse::Actors(actors) = context.ask(query).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    let names = node_names(context).await?;
    let mut asked = std::collections::BTreeSet::new();
    for actor in &actors {
        asked.extend(actor.starts.iter().map(|start| start.node));
        let lives = context.lives.spans(actor);
        spans.extend(lives.into_iter().map(|span| views::span(span, "", None)));
    }
    for node in asked.into_iter().take(NODES_ASKED_MAX) {
        let name = names.get(&node).map_or("", String::as_str);
        // What a worker that is gone had recorded is gone with it.
        let Ok(bytes) = context.sessions.ask(node, Question::Spans { job }).await else {
            continue;
        };
        let hosts: Vec<HostSpans> = codec::decode(&bytes, ANSWER_BYTES_MAX)
            .map_err(|error| Status::internal(format!("spans of {node}: {error}")))?;
        for host in hosts {
            let found = host.spans.into_iter();
            spans.extend(found.map(|span| views::span(span, name, host.host)));
        }
    }
    // In order of their beginnings, the enclosing before the enclosed.
    spans.sort_by_key(|span| {
        (
            span.start_us,
            std::cmp::Reverse(span.end_us.unwrap_or(u64::MAX)),
        )
    });
    Ok(api::TimelineReply {
        job: job.0,
        now_us: crate::timeline::now_us(),
        spans,
    })
}

async fn node_names(context: &HeadContext) -> Result<BTreeMap<NodeId, String>, Status> {
    match context.ask(Query::ListNodes).await? {
        QueryResponse::Nodes(nodes) => Ok(nodes.into_iter().map(|n| (n.node, n.name)).collect()),
        _ => Err(Status::internal("the scheduler answered another question")),
    }
}

/// `GET /metrics` and `GET /metrics/<node>`, for whoever shows a client or a metrics token.
pub(crate) async fn scrape(State(context): State<Arc<HeadContext>>, request: Request) -> Response {
    let node = request
        .uri()
        .path()
        .strip_prefix("/metrics")
        .unwrap_or_default()
        .trim_matches('/')
        .to_owned();
    let found = async {
        let (parts, _) = request.into_parts();
        auth::may_scrape(&context, &parts.headers, parts.extensions).await?;
        match node.as_str() {
            "" => metrics::text(&context).await,
            name => of_node(&context, name).await,
        }
    };
    match found.await {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(status) => (http_code(&status), status.message().to_owned()).into_response(),
    }
}

fn http_code(status: &Status) -> StatusCode {
    match status.code() {
        tonic::Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        tonic::Code::PermissionDenied => StatusCode::FORBIDDEN,
        tonic::Code::NotFound => StatusCode::NOT_FOUND,
        tonic::Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The method that a request is for; [`measure`] notes it, for a method's own code does not see it.
#[derive(Debug, Clone)]
struct Called(String);

/// The method that `request` is for.
pub(super) fn called<T>(request: &tonic::Request<T>) -> String {
    let noted = request.extensions().get::<Called>();
    noted.map_or_else(String::new, |called| called.0.clone())
}

/// Counts and times each request of the API.
pub(crate) async fn measure(
    State(context): State<Arc<HeadContext>>,
    mut request: Request,
    next: Next,
) -> Response {
    const SERVICE: &str = "/mobula.v1.Control/";
    let _in_flight = context.metrics.requesting();
    let began = Instant::now();
    let method = match request.uri().path() {
        path if path.starts_with(SERVICE) => path[SERVICE.len()..].to_owned(),
        path if path.starts_with("/metrics") => "metrics".to_owned(),
        // Made up by the caller, so that it must not become a label.
        _ => "unknown".to_owned(),
    };
    request.extensions_mut().insert(Called(method.clone()));
    let response = next.run(request).await;
    let code = counted_code(&response);
    let known = code != tonic::Code::Unimplemented;
    let method = if known { method.as_str() } else { "unknown" };
    let code = format!("{code:?}");
    context.metrics.requested(method, &code, began.elapsed());
    response
}

/// The code as which an answer is counted: gRPC's own, or what stands for the status of plain HTTP.
fn counted_code(response: &Response) -> tonic::Code {
    let told = response.headers().get("grpc-status");
    let told = told.and_then(|value| value.to_str().ok()?.parse::<i32>().ok());
    match (told, response.status()) {
        (Some(code), _) => tonic::Code::from(code),
        // An answer without a status in its head went well as far as anyone knows then.
        (None, status) if status.is_success() => tonic::Code::Ok,
        (None, StatusCode::UNAUTHORIZED) => tonic::Code::Unauthenticated,
        (None, StatusCode::FORBIDDEN) => tonic::Code::PermissionDenied,
        (None, StatusCode::NOT_FOUND) => tonic::Code::NotFound,
        (None, StatusCode::SERVICE_UNAVAILABLE) => tonic::Code::Unavailable,
        (None, StatusCode::INTERNAL_SERVER_ERROR) => tonic::Code::Internal,
        (None, _) => tonic::Code::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_plain_http_are_counted_as_what_they_say() {
        let refused = |status: Status| (http_code(&status), "refused").into_response();
        for status in [
            Status::unauthenticated("no token"),
            Status::permission_denied("a worker's token"),
            Status::not_found("no such worker"),
            Status::unavailable("the worker has no session"),
            Status::internal("no text"),
        ] {
            let code = status.code();
            assert_eq!(counted_code(&refused(status)), code);
        }
        assert_eq!(counted_code(&"text".into_response()), tonic::Code::Ok);
        let teapot = StatusCode::IM_A_TEAPOT.into_response();
        assert_eq!(counted_code(&teapot), tonic::Code::Unknown);
    }

    #[test]
    fn an_answer_of_grpc_is_counted_by_its_own_status() {
        let denied = ([("grpc-status", "7")], "").into_response();
        assert_eq!(counted_code(&denied), tonic::Code::PermissionDenied);
    }
}
