//! Answering calls from other processes: the host's side of the call lane.
//!
//! Invariants:
//! 1. Requests of one stream are admitted in the order in which they arrive; answers go back as
//!    they are ready.
//! 2. A stream has at most [`CALLS_IN_FLIGHT_MAX`] unanswered calls: beyond that it is not read,
//!    so that QUIC's flow control holds the caller back.
//! 3. A process may call actors of its own job only, unless one of the two belongs to the system;
//!    client certificates may call any.

use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::CallError;
use mobula_core::id::JobId;
use mobula_net::endpoint::{Connection, Endpoint};
use mobula_net::identity::{Identity, Role};
use mobula_net::lane::{FramedReceiver, FramedSender, FramedStream};
use mobula_wire::call::{CallReply, CallRequest};
use mobula_wire::hello::Lane;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::mailbox::{Deadline, IncomingCall, Reply};
use crate::supervision::ActorTable;

/// Unanswered calls on one stream, which is one calling process: as many as an actor's mailbox
/// holds by default, so that one caller alone can fill it and be told `Overloaded`.
pub const CALLS_IN_FLIGHT_MAX: usize = 2048;

/// Connections served at once: every host of a large job may call one actor.
pub const CONNECTIONS_MAX: usize = 4096;

/// Call streams on one connection; an SDK process opens one.
const STREAMS_PER_CONNECTION_MAX: usize = 16;

/// Answers calls until the endpoint is closed.
pub async fn serve_calls(endpoint: Endpoint, table: Arc<ActorTable>, job: JobId) {
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
                connections.spawn(serve_connection(connection, Arc::clone(&table), job));
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
    connections.shutdown().await;
}

async fn serve_connection(connection: Connection, table: Arc<ActorTable>, job: JobId) {
    let permission = may_call(connection.peer(), job);
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Ok((Lane::Call, stream)) if streams.len() < STREAMS_PER_CONNECTION_MAX => {
                    streams.spawn(serve_stream(stream, Arc::clone(&table), permission.clone()));
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

/// Whether `peer` may call actors of `job`; the text says why not.
fn may_call(peer: &Identity, job: JobId) -> Result<(), String> {
    match (peer.role, peer.job.map(JobId)) {
        (Role::Client, _) => Ok(()),
        (Role::Host, Some(caller)) if caller == job || caller == JobId::SYSTEM => Ok(()),
        (Role::Host, Some(caller)) => Err(format!(
            "a process of {caller} may not call actors of {job}"
        )),
        (role, _) => Err(format!(
            "a certificate of role `{role}` may not call actors: use a host's or a client's"
        )),
    }
}

async fn serve_stream(
    stream: FramedStream,
    table: Arc<ActorTable>,
    permission: Result<(), String>,
) {
    let (sender, receiver) = stream.split();
    let (replies, waiting) = mpsc::channel(CALLS_IN_FLIGHT_MAX);
    // Whichever side ends first ends the stream: without answers reading on would be pointless,
    // and when the caller has finished its side the last answers still go out.
    let (_, ()) = tokio::join!(
        write_replies(sender, waiting),
        read_requests(receiver, replies, &table, permission),
    );
}

async fn read_requests(
    mut receiver: FramedReceiver,
    replies: mpsc::Sender<CallReply>,
    table: &ActorTable,
    permission: Result<(), String>,
) {
    loop {
        // A slot for the answer first: it bounds what is in flight, and answering never waits.
        let Ok(slot) = replies.clone().reserve_owned().await else {
            return;
        };
        let request = match receiver.receive_message::<CallRequest>().await {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "a call stream ended");
                return;
            }
        };
        let CallRequest {
            call,
            actor,
            incarnation,
            method,
            timeout_ms,
            arguments,
        } = request;
        let reply = Reply::on_stream(actor, call, slot);
        if let Err(reason) = &permission {
            reply.send(Err(CallError::BadCall(reason.clone())));
            continue;
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
                reply,
            },
        );
    }
}

async fn write_replies(mut sender: FramedSender, mut waiting: mpsc::Receiver<CallReply>) {
    while let Some(first) = waiting.recv().await {
        let mut next = Some(first);
        // What is ready together goes out together.
        while let Some(reply) = next.take() {
            if let Err(error) = sender.queue_message(&reply) {
                tracing::debug!(%error, "a reply could not be sent");
                return;
            }
            if sender.queued_bytes() < COALESCED_BYTES {
                next = waiting.try_recv().ok();
            }
        }
        if sender.flush().await.is_err() {
            return;
        }
    }
    let _ = sender.finish().await;
}

/// Messages are gathered up to this size before they are handed to QUIC: about as much as one
/// round of its sending takes up.
pub(crate) const COALESCED_BYTES: usize = 64 * 1024;

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
