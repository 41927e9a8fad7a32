//! The agent's end of the Unix socket: one stream from each host, both ways.
//!
//! Invariants:
//! 1. A stream speaks for one host. Its first message says which, and the agent accepts that only
//!    from the very process that it started for it (or a descendant in the same session).
//! 2. Nothing of a stream is read between its hello and its acceptance.

use std::time::Duration;

use mobula_core::id::HostId;
use mobula_net::lane::{FramedReceiver, FramedSender, FramedStream};
use mobula_net::local::{LocalListener, LocalPeer};
use mobula_wire::host::{AgentMessage, HostMessage};
use rustix::process::Pid;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::agent::Input;
use crate::hosts::pool::SHARED_ACTORS_MAX;

/// Messages that wait for one host to read them: a start and a stop for every actor that it can
/// have, and a few more. A host that leaves as many unread has hung.
pub(crate) const HOST_QUEUE: usize = 2 * SHARED_ACTORS_MAX + 16;

/// Streams at a time: more hosts than any machine has memory for.
const STREAMS_MAX: usize = 4_096;

/// A process that connects has its hello ready.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// After a failed `accept` (no file descriptors left): long enough not to spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A host that said hello and waits to be accepted.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) host: HostId,
    /// The process that connected and the leader of its session, as far as they are known; one of
    /// them must be the host's.
    pub(crate) pids: Vec<u32>,
    pub(crate) call_address: String,
    /// To the host. Dropping it closes the stream.
    pub(crate) messages: mpsc::Sender<AgentMessage>,
    /// Answered when the agent accepts; dropping it refuses.
    pub(crate) accept: oneshot::Sender<()>,
}

/// Serves hosts until the agent ends.
pub(crate) async fn serve(listener: LocalListener, inputs: mpsc::Sender<Input>) {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = streams.join_next() => {}
            accepted = listener.accept(), if streams.len() < STREAMS_MAX => match accepted {
                Ok((_, stream, peer)) => {
                    streams.spawn(serve_host(stream, peer, inputs.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept hosts");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

async fn serve_host(stream: FramedStream, peer: LocalPeer, inputs: mpsc::Sender<Input>) {
    let (mut sender, mut receiver) = stream.split();
    let hello = tokio::time::timeout(HELLO_TIMEOUT, receiver.receive_message()).await;
    let Ok(Ok(Some(HostMessage::Hello {
        host,
        call_address,
        actor_types,
    }))) = hello
    else {
        tracing::warn!(
            pid = peer.pid,
            "a local process connected without a host's hello"
        );
        return;
    };
    tracing::debug!(%host, pid = peer.pid, ?actor_types, "host said hello");
    let (messages, queue) = mpsc::channel(HOST_QUEUE);
    let (accept, accepted) = oneshot::channel();
    // The session cannot be asked for any more when the process has ended already.
    let pids = peer.pid.into_iter().chain(peer.pid.and_then(session_of));
    let pids = pids.filter_map(|pid| u32::try_from(pid).ok()).collect();
    let connected = Connected {
        host,
        pids,
        call_address,
        messages,
        accept,
    };
    if inputs.send(Input::HostConnected(connected)).await.is_err() || accepted.await.is_err() {
        return;
    }
    if let Err(error) = pump(host, &mut sender, &mut receiver, queue, &inputs).await {
        tracing::debug!(%host, %error, "host's stream ended");
    }
    // Nobody is left to tell when the agent is ending.
    let _ = inputs.send(Input::HostDisconnected(host)).await;
}

/// Carries messages both ways until one side ends. Reading goes on when writing fails: a host's
/// last words arrive after it has stopped reading.
async fn pump(
    host: HostId,
    sender: &mut FramedSender,
    receiver: &mut FramedReceiver,
    mut queue: mpsc::Receiver<AgentMessage>,
    inputs: &mpsc::Sender<Input>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let read = async {
        while let Some(message) = receiver.receive_message::<HostMessage>().await? {
            if inputs
                .send(Input::HostMessage(host, message))
                .await
                .is_err()
            {
                break;
            }
        }
        Ok(())
    };
    let write = async {
        while let Some(message) = queue.recv().await {
            if let Err(error) = sender.send_message(&message).await {
                tracing::debug!(%host, %error, "cannot write to the host");
                break;
            }
        }
        // Reading decides when the stream is over.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = read => result,
        () = write => Ok(()),
    }
}

fn session_of(pid: i32) -> Option<i32> {
    let session = rustix::process::getsid(Pid::from_raw(pid)).ok()?;
    Some(session.as_raw_nonzero().get())
}
