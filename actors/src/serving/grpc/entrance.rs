//! What a call passes before anything of its message is read: the token, a bound on how long the message may take, and whether
//! its answer may be compressed.

use std::sync::Arc;
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response as HttpResponse;
use futures::StreamExt;

use super::status_of;
use crate::serving::auth::{Gate, Subject};
use crate::serving::oip::OipError;

/// The call that is a stream: open for as long as its caller likes.
const STREAM: &str = "ModelStreamInfer";

/// A message without content, as it travels: not compressed, and of no bytes.
const EMPTY_MESSAGE: &[u8] = &[0; 5];

/// The encoding of a call's messages, and those that its caller reads.
const ENCODING: &str = "grpc-encoding";
const ACCEPT_ENCODING: &str = "grpc-accept-encoding";

/// What a call passes before its message is read.
#[derive(Clone)]
pub(super) struct Entrance {
    gate: Arc<dyn Gate>,
    body_timeout: Duration,
}

impl Entrance {
    /// One with this gate, where nobody waits for a message beyond `body_timeout`.
    pub(super) fn new(gate: Arc<dyn Gate>, body_timeout: Duration) -> Self {
        Entrance { gate, body_timeout }
    }
}

/// Lets a call in whose token is right for anything here. Which model it is about only its message says, so
/// [`GrpcFront`](super::GrpcFront) asks the gate again then.
pub(super) async fn enter(
    State(entrance): State<Entrance>,
    mut request: HttpRequest,
    next: Next,
) -> HttpResponse {
    let method = request.uri().path().rsplit('/').next();
    let is_stream = method == Some(STREAM);
    let is_health = matches!(method, Some("ServerLive" | "ServerReady"));
    let subject = if is_health {
        Subject::Health
    } else {
        Subject::Server
    };
    let authorization = request.headers().get(header::AUTHORIZATION);
    let authorization = authorization.map(HeaderValue::as_bytes);
    if let Err(error) = entrance.gate.admit(authorization, subject) {
        return status_of(error).into_http();
    }
    if !is_compressed(request.headers()) {
        // Every library of gRPC says what it could read, whether its caller wants that or not, and to compress an answer takes
        // longer than all else that is done for a small one.
        request.headers_mut().remove(ACCEPT_ENCODING);
    }
    if is_health {
        // Their messages have no fields, and a gate may let anybody ask: what was sent is not read.
        *request.body_mut() = Body::from(EMPTY_MESSAGE);
    } else if !is_stream {
        let body = std::mem::take(request.body_mut());
        *request.body_mut() = within(body, entrance.body_timeout);
    }
    next.run(request).await
}

/// Whether the messages of a call are compressed, as those are of a caller who wants that.
fn is_compressed(headers: &HeaderMap) -> bool {
    headers
        .get(ENCODING)
        .is_some_and(|encoding| encoding != "identity")
}

/// The same body, for which nobody waits beyond the limit. Its trailers are dropped: no caller sends any.
fn within(body: Body, limit: Duration) -> Body {
    let until = tokio::time::Instant::now() + limit;
    let next_frame = move |frames: Option<BodyDataStream>| async move {
        let mut frames = frames?;
        match tokio::time::timeout_at(until, frames.next()).await {
            Ok(None) => None,
            Ok(Some(frame)) => Some((frame.map_err(BoxError::from), Some(frames))),
            Err(_) => {
                let late = OipError::BodyTimeout {
                    limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
                };
                Some((Err(BoxError::from(status_of(late))), None))
            }
        }
    };
    let frames = futures::stream::unfold(Some(body.into_data_stream()), next_frame);
    Body::from_stream(frames.fuse())
}

#[cfg(test)]
#[path = "entrance_tests.rs"]
mod tests;
