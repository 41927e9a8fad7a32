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
//! 4. A process may call actors of its own job, and of jobs in the same life of the same namespace;
//!    those of the system may call any, and so may client certificates. Certificates say who is where,
//!    so no head is asked. Objects are for their own job only: values travel by value.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::CallError;
use mobula_core::id::{ActorId, JobId};
use mobula_net::endpoint::{Connection, Endpoint};
use mobula_net::identity::{Identity, Role};
use mobula_net::lane::{FramedReceiver, FramedSender, FramedStream};
use mobula_net::same_machine::SameMachineListener;
use mobula_wire::call::{CallMessageError, CallRequest, CallerMessage};
use mobula_wire::frame::{Frame, FrameKind};
use mobula_wire::frame_queue::FrameQueue;
use mobula_wire::hello::Lane;
use mobula_wire::object::OBJECTS_ACTOR;
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

/// How long to look for the next call before sleeping: some round trips of one that does little. Nobody knows when a caller makes
/// its next.
const LOOK_FOR_REQUEST: Duration = Duration::from_micros(50);

/// Answers calls until the endpoint is closed. Whose they are is what the endpoint's certificate says.
pub async fn serve_calls(endpoint: Endpoint, table: Arc<ActorTable>) {
    // The next certificates are for the same name.
    let own = endpoint.identity();
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
                        permission: permission_of(connection.peer(), &own),
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
    permission: Permission,
    neighbours: Option<Arc<SameMachineListener>>,
}

impl Served {
    async fn serve_connection(self, connection: Connection) {
        let mut streams = JoinSet::new();
        loop {
            tokio::select! {
                accepted = connection.accept() => match accepted {
                    Ok((Lane::Call | Lane::LargeCall, stream))
                        if streams.len() < STREAMS_PER_CONNECTION_MAX =>
                    {
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

/// What a peer may call; texts say why not.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Permission {
    /// Actors and objects.
    All,
    /// Actors; it is of another job of the same namespace.
    ActorsOnly { objects_refused: String },
    /// Nothing.
    Nothing { refused: String },
}

impl Permission {
    /// Refuses a call that the peer may not make.
    fn check(&self, actor: ActorId) -> Result<(), &String> {
        match self {
            Permission::ActorsOnly { objects_refused } if actor == OBJECTS_ACTOR => {
                Err(objects_refused)
            }
            Permission::All | Permission::ActorsOnly { .. } => Ok(()),
            Permission::Nothing { refused } => Err(refused),
        }
    }
}

/// What `peer` may call here, by what both certificates say.
fn permission_of(peer: &Identity, own: &Identity) -> Permission {
    let job = |identity: &Identity| identity.job.map(JobId);
    let refused = match (peer.role, job(peer), job(own)) {
        (Role::Client, _, _) => return Permission::All,
        (Role::Host, Some(caller), own) if Some(caller) == own || caller == JobId::SYSTEM => {
            return Permission::All;
        }
        (Role::Host, Some(caller), Some(job)) => {
            if peer.namespace.is_some() && peer.namespace == own.namespace {
                return Permission::ActorsOnly {
                    objects_refused: format!(
                        "a process of {caller} may not read objects of {job}, though both are in one \
                         namespace: pass values by value between jobs"
                    ),
                };
            }
            format!(
                "a process of {caller} may not call actors of {job}, nor read its objects: submit both \
                 jobs with the same `--namespace`, or use a client token to reach into other jobs"
            )
        }
        (role, _, _) => {
            format!(
                "a certificate of role `{role}` may not call actors: use a host's or a client's"
            )
        }
    };
    Permission::Nothing { refused }
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
    permission: &Permission,
) -> Result<(), StreamError> {
    while let Some(first) = receiver.receive_soon(LOOK_FOR_REQUEST).await? {
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
    permission: &Permission,
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
    if let Err(reason) = permission.check(actor) {
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
    use mobula_core::id::Incarnation;
    use mobula_core::namespace::Namespace;

    use super::*;

    /// Who calls a host of job 3.
    #[derive(Debug, PartialEq, Eq)]
    enum May {
        All,
        Actors,
        Nothing,
    }

    #[test]
    fn jobs_are_kept_apart_and_namespaces_join_them() {
        let host = |job| Identity::new("c", Role::Host, "h", 1).with_job(job);
        let inside = |job, name: &str, life| {
            host(job).with_namespace(Some(Namespace {
                name: name.to_owned(),
                incarnation: Incarnation(life),
            }))
        };
        let client = Identity::new("c", Role::Client, "me", 1);
        let of_role = |role| Identity::new("c", role, "x", 1);
        let cases = [
            (host(3), host(3), May::All),
            (host(4), host(3), May::Nothing),
            (host(0), host(3), May::All),
            (host(4), host(0), May::Nothing),
            (client.clone(), host(3), May::All),
            (client, inside(3, "shop", 7), May::All),
            (of_role(Role::Host), host(3), May::Nothing),
            (of_role(Role::Host), of_role(Role::Host), May::Nothing),
            (of_role(Role::Node), host(3), May::Nothing),
            (of_role(Role::Head), host(3), May::Nothing),
            // One namespace, two jobs.
            (inside(4, "shop", 7), inside(3, "shop", 7), May::Actors),
            (inside(3, "shop", 7), inside(3, "shop", 7), May::All),
            // Another one, none, or the life before of the same name.
            (inside(4, "farm", 7), inside(3, "shop", 7), May::Nothing),
            (inside(4, "shop", 6), inside(3, "shop", 7), May::Nothing),
            (host(4), inside(3, "shop", 7), May::Nothing),
            (inside(4, "shop", 7), host(3), May::Nothing),
            (host(0), inside(3, "shop", 7), May::All),
        ];
        for (peer, own, expected) in cases {
            let permission = permission_of(&peer, &own);
            let found = match (
                permission.check(ActorId(5)).is_ok(),
                permission.check(OBJECTS_ACTOR).is_ok(),
            ) {
                (true, true) => May::All,
                (true, false) => May::Actors,
                (false, _) => May::Nothing,
            };
            assert_eq!(found, expected, "{peer:?} to {own:?}");
        }
    }
}
