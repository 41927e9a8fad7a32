//! Answering calls from other processes: the host's side of the call lane.
//!
//! Invariants:
//! 1. Messages of one stream are handled in the order in which they arrive; answers go back as
//!    they are ready.
//! 2. A stream has at most [`CALLS_IN_FLIGHT_MAX`](mobula_wire::call::CALLS_IN_FLIGHT_MAX)
//!    unanswered calls: a caller that makes more breaks the protocol and is cut off. Requests are
//!    always read, so that a cancellation never waits behind the call that it is for.
//! 3. A caller of this machine may change over to a Unix socket; what it may do there is what its
//!    certificate on the QUIC connection says, and the socket's stream ends with that connection.
//! 4. A process may call actors of its own job only, unless one of the two belongs to the system;
//!    client certificates may call any.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::CallError;
use mobula_core::id::JobId;
use mobula_net::endpoint::{Connection, Endpoint};
use mobula_net::identity::{Identity, Role};
use mobula_net::lane::{FramedReceiver, FramedSender, FramedStream};
use mobula_net::same_machine::SameMachineListener;
use mobula_wire::call::{CallMessageError, CallRequest, CallerMessage};
use mobula_wire::frame::{Frame, FrameKind};
use mobula_wire::frame_queue::FrameQueue;
use mobula_wire::hello::Lane;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::caller_stream::{CallerStream, ProtocolError};
use crate::mailbox::{Deadline, IncomingCall};
use crate::reply::{CancelLevel, Reply};
use crate::supervision::ActorTable;

/// Connections served at once: every host of a large job may call one actor.
pub const CONNECTIONS_MAX: usize = 4096;

/// Call streams on one connection; an SDK process opens one.
const STREAMS_PER_CONNECTION_MAX: usize = 16;

/// Answers calls until the endpoint is closed.
pub async fn serve_calls(endpoint: Endpoint, table: Arc<ActorTable>, job: JobId) {
    let neighbours = match SameMachineListener::bind() {
        Ok(listener) => Some(Arc::new(listener)),
        Err(error) => {
            tracing::warn!(%error, "callers of this machine have to use QUIC");
            None
        }
    };
    let letting_in = async {
        match &neighbours {
            Some(listener) => listener.run().await,
            None => std::future::pending().await,
        }
    };
    let serving = async {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = endpoint.accept() => {
                    let Some(connection) = accepted else { break };
                    if connections.len() >= CONNECTIONS_MAX {
                        tracing::warn!(peer = %connection.peer(), limit = CONNECTIONS_MAX, "too many callers");
                        connection.close("this host serves as many connections as it may; call later");
                        continue;
                    }
                    let served = Served {
                        table: Arc::clone(&table),
                        permission: may_call(connection.peer(), job),
                        neighbours: neighbours.clone(),
                    };
                    connections.spawn(served.serve_connection(connection));
                }
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
            }
        }
        connections.shutdown().await;
    };
    tokio::select! {
        () = serving => {}
        () = letting_in => {}
    }
}

/// What one connection's streams share.
#[derive(Clone)]
struct Served {
    table: Arc<ActorTable>,
    /// Whether the peer may call; the text says why not.
    permission: Result<(), String>,
    neighbours: Option<Arc<SameMachineListener>>,
}

impl Served {
    async fn serve_connection(self, connection: Connection) {
        let mut streams = JoinSet::new();
        loop {
            tokio::select! {
                accepted = connection.accept() => match accepted {
                    Ok((Lane::Call, stream)) if streams.len() < STREAMS_PER_CONNECTION_MAX => {
                        streams.spawn(self.clone().serve_stream(stream));
                    }
                    Ok((Lane::SameMachine, question))
                        if streams.len() < STREAMS_PER_CONNECTION_MAX =>
                    {
                        streams.spawn(self.clone().serve_neighbour(question));
                    }
                    // Dropping the stream resets it, and so refuses it.
                    Ok((lane, _stream)) => tracing::warn!(%lane, "refused a stream"),
                    Err(lost) => {
                        tracing::debug!(%lost, "a caller's connection ended");
                        break;
                    }
                },
                Some(_) = streams.join_next(), if !streams.is_empty() => {}
            }
        }
        streams.shutdown().await;
    }

    async fn serve_neighbour(self, question: FramedStream) {
        // Without a socket the question is dropped, and the caller stays where it is.
        let Some(listener) = &self.neighbours else {
            return;
        };
        match listener.offer(question, Lane::Call).await {
            Ok(stream) => self.serve_stream(stream).await,
            Err(error) => tracing::debug!(%error, "a caller of this machine did not change over"),
        }
    }

    async fn serve_stream(self, stream: FramedStream) {
        let (sender, receiver) = stream.split();
        let calls = Arc::new(CallerStream::default());
        let _end = EndOnDrop(&calls);
        let reading = async {
            match read_messages(receiver, &calls, &self.table, &self.permission).await {
                // The last answers still go out.
                Ok(()) => calls.finish(),
                Err(reason) => {
                    tracing::debug!(%reason, "a call stream ended");
                    calls.end();
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            () = write_answers(sender, &calls) => {}
            () = reading => {}
        }
    }
}

/// Whether `peer` may call actors of `job`; the text says why not.
fn may_call(peer: &Identity, job: JobId) -> Result<(), String> {
    match (peer.role, peer.job.map(JobId)) {
        (Role::Client, _) => Ok(()),
        (Role::Host, Some(caller)) if caller == job || caller == JobId::SYSTEM => Ok(()),
        (Role::Host, Some(caller)) => Err(format!(
            "a process of {caller} may not call actors of {job}, nor read its objects: use a client \
             token to reach into other jobs"
        )),
        (role, _) => Err(format!(
            "a certificate of role `{role}` may not call actors: use a host's or a client's"
        )),
    }
}

/// Also when the connection's task is dropped.
struct EndOnDrop<'a>(&'a CallerStream);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Why a caller's stream is read no further.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Receive(#[from] mobula_net::lane::ReceiveError),
    #[error(transparent)]
    Message(#[from] CallMessageError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("a frame of kind {0:?} has no place on the call lane")]
    Kind(FrameKind),
}

async fn read_messages(
    mut receiver: FramedReceiver,
    calls: &Arc<CallerStream>,
    table: &ActorTable,
    permission: &Result<(), String>,
) -> Result<(), StreamError> {
    while let Some(first) = receiver.receive_soon().await? {
        let mut next = Some(first);
        // What arrived together is handled together.
        while let Some(Frame { kind, payload }) = next {
            if kind != FrameKind::Message {
                return Err(StreamError::Kind(kind));
            }
            match CallerMessage::decode(payload)? {
                CallerMessage::Request(request) => {
                    handle_request(request, calls, table, permission)?;
                }
                CallerMessage::Cancel { call, forced } => {
                    let level = if forced {
                        CancelLevel::Forced
                    } else {
                        CancelLevel::Requested
                    };
                    calls.cancel(call, level);
                }
                CallerMessage::Credit { call, items } => calls.grant(call, items)?,
            }
            next = receiver.receive_buffered()?;
        }
        calls.has_room().await;
    }
    Ok(())
}

fn handle_request(
    request: CallRequest,
    calls: &Arc<CallerStream>,
    table: &ActorTable,
    permission: &Result<(), String>,
) -> Result<(), ProtocolError> {
    let CallRequest {
        call,
        actor,
        incarnation,
        method,
        timeout_ms,
        key,
        window,
        arguments,
    } = request;
    let (reply, control) = Reply::on_stream(actor, window, Arc::clone(calls), call);
    calls.enter(call, control)?;
    if let Err(reason) = permission {
        reply.send(Err(CallError::NotPermitted(reason.clone())));
        return Ok(());
    }
    let deadline = timeout_ms.and_then(|limit_ms| {
        let at = Instant::now().checked_add(Duration::from_millis(limit_ms))?;
        Some(Deadline { at, limit_ms })
    });
    table.admit(
        actor,
        incarnation,
        IncomingCall {
            method,
            arguments,
            deadline,
            key,
            reply,
        },
    );
    Ok(())
}

async fn write_answers(mut sender: FramedSender, calls: &CallerStream) {
    let limits = sender.limits();
    let mut frames = FrameQueue::new();
    let mut batch = Vec::new();
    while poll_fn(|context| calls.poll_outgoing(context, &mut batch)).await {
        for message in batch.drain(..) {
            if let Err(error) = frames.push_message(limits, |head| message.encode_head(head)) {
                tracing::error!(%error, "an answer could not be sent");
                return;
            }
        }
        if let Err(error) = sender.send_frames(&mut frames).await {
            tracing::debug!(%error, "a caller takes no more answers");
            return;
        }
    }
    let _ = sender.finish().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_kept_apart() {
        let host = |job| Identity::new("c", Role::Host, "h", 1).with_job(job);
        let cases = [
            (host(3), JobId(3), true),
            (host(4), JobId(3), false),
            (host(0), JobId(3), true),
            (host(4), JobId::SYSTEM, false),
            (Identity::new("c", Role::Client, "me", 1), JobId(3), true),
            (Identity::new("c", Role::Host, "h", 1), JobId(3), false),
            (Identity::new("c", Role::Node, "n", 1), JobId(3), false),
            (Identity::new("c", Role::Head, "n", 1), JobId(3), false),
        ];
        for (peer, job, allowed) in cases {
            assert_eq!(may_call(&peer, job).is_ok(), allowed, "{peer} to {job}");
        }
    }
}
