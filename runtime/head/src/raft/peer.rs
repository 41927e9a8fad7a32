//! The sending side to one other head: connects again and again, and sends what waits.
//!
//! Invariant: what waits while the peer cannot be reached is thrown away, and raft told so; it is
//! stale by the time that the peer is back.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mobula_net::endpoint::{Connection, LaneClass};
use mobula_net::identity::Role;
use mobula_net::lane::{FramedReceiver, FramedSender};
use mobula_net::{FrameKind, Lane};
use mobula_wire::raft::{RaftHello, RaftRefusal};
use tokio::sync::{Notify, mpsc, watch};

use super::inputs::Input;
use super::transport::{End, SEND_TIMEOUT, Shared};

/// Bytes that are written together before it is looked whether they leave.
const FLUSH_BYTES: usize = 256 * 1024;

const BACKOFF_INITIAL: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// A frame that waits for a peer.
pub(super) struct Outgoing {
    pub(super) kind: FrameKind,
    pub(super) payload: Vec<u8>,
}

/// Frames that wait for a peer.
pub(super) struct Queue {
    pub(super) messages: mpsc::Receiver<Outgoing>,
    pub(super) bytes: Arc<AtomicUsize>,
}

impl Queue {
    fn count(&self, message: &Outgoing) {
        self.bytes
            .fetch_sub(message.payload.len(), Ordering::Relaxed);
    }

    async fn next(&mut self) -> Option<Outgoing> {
        let message = self.messages.recv().await?;
        self.count(&message);
        Some(message)
    }

    fn try_next(&mut self) -> Option<Outgoing> {
        let message = self.messages.try_recv().ok()?;
        self.count(&message);
        Some(message)
    }
}

/// The sending side to one peer.
pub(super) struct Peer {
    pub(super) raft_id: u64,
    pub(super) address: watch::Receiver<Option<SocketAddr>>,
    /// It was just heard of.
    pub(super) heard: Arc<Notify>,
    pub(super) urgent: Queue,
    pub(super) entries: Queue,
}

/// Why a conversation with a peer ended.
#[derive(Debug, thiserror::Error)]
enum PeerLost {
    #[error("{0}")]
    Connect(String),
    #[error("head {found} is at this address")]
    OtherMember { found: u64 },
    #[error("it says that this head was removed from the group")]
    Removed,
    #[error("it says that another process runs as this head")]
    Replaced,
    #[error("it refuses this head's certificate")]
    OtherCertificate,
    #[error("{0}")]
    Broken(String),
    #[error("it takes nothing")]
    Stuck,
    #[error("this head ends")]
    Ended,
}

fn broken(error: &dyn std::fmt::Display) -> PeerLost {
    PeerLost::Broken(error.to_string())
}

impl Peer {
    /// Talks to the peer, connecting again and again, until the transport is gone.
    pub(super) async fn run(mut self, shared: std::sync::Weak<Shared>) {
        let mut backoff = BACKOFF_INITIAL;
        loop {
            let Ok(address) = self.address.wait_for(Option::is_some).await.map(|a| *a) else {
                return;
            };
            let (Some(address), Some(transport)) = (address, shared.upgrade()) else {
                return;
            };
            let began = tokio::time::Instant::now();
            let mut moved = self.address.clone();
            let lost = tokio::select! {
                ended = self.converse(address, &transport) => match ended {
                    Ok(never) => match never {},
                    Err(lost) => lost,
                },
                _ = moved.changed() => continue,
            };
            match lost {
                PeerLost::Ended => return,
                PeerLost::Removed => {
                    tracing::error!(peer = self.raft_id, "this head was removed from the group");
                    transport.told_to_end.send_replace(Some(End::Removed));
                }
                PeerLost::Replaced => {
                    tracing::error!(peer = self.raft_id, "another process runs as this head");
                    transport.told_to_end.send_replace(Some(End::Replaced));
                }
                lost => tracing::debug!(peer = self.raft_id, %address, %lost, "no way to a head"),
            }
            // What waits is stale by the time that the peer can be reached again.
            while self.urgent.try_next().is_some() || self.entries.try_next().is_some() {}
            // Full means that there is enough to do already.
            let _ = transport.inputs.send(Input::Unreachable(self.raft_id));
            drop(transport);
            if began.elapsed() > BACKOFF_MAX * 2 {
                backoff = BACKOFF_INITIAL;
            }
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = self.heard.notified() => {}
                _ = moved.changed() => {}
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn converse(
        &mut self,
        address: SocketAddr,
        transport: &Arc<Shared>,
    ) -> Result<Infallible, PeerLost> {
        let connecting = transport
            .endpoint
            .connect(address, LaneClass::Control, Role::Head);
        let connection = tokio::select! {
            connected = connecting => connected.map_err(|e| PeerLost::Connect(e.to_string()))?,
            // It was started meanwhile: a fresh attempt finds it at once.
            () = self.heard.notified() => {
                return Err(PeerLost::Connect("it was heard of; connecting anew".into()));
            }
        };
        let found = connection.peer().incarnation;
        if found != self.raft_id {
            return Err(PeerLost::OtherMember { found });
        }
        let hello = RaftHello {
            from: transport.raft_id,
            to: self.raft_id,
            cluster_address: transport.cluster_address.clone(),
            life: transport.life,
        };
        let (urgent, urgent_back) = open(&connection, &hello).await?;
        let (entries, entries_back) = open(&connection, &hello).await?;
        tracing::info!(peer = self.raft_id, %address, "connected to a head");
        tokio::select! {
            ended = pump(&mut self.urgent, urgent) => ended,
            ended = pump(&mut self.entries, entries) => ended,
            refused = listen(urgent_back) => refused,
            refused = listen(entries_back) => refused,
            lost = connection.closed() => Err(broken(&lost)),
        }
    }
}

async fn open(
    connection: &Connection,
    hello: &RaftHello,
) -> Result<(FramedSender, FramedReceiver), PeerLost> {
    let mut stream = connection
        .open(Lane::Raft)
        .await
        .map_err(|error| broken(&error))?;
    let sent = tokio::time::timeout(SEND_TIMEOUT, stream.sender.send_message(hello));
    sent.await
        .map_err(|_| PeerLost::Stuck)?
        .map_err(|error| broken(&error))?;
    Ok(stream.split())
}

/// Sends what comes, together what comes together.
async fn pump(queue: &mut Queue, mut sender: FramedSender) -> Result<Infallible, PeerLost> {
    loop {
        let mut next = Some(queue.next().await.ok_or(PeerLost::Ended)?);
        while let Some(message) = next.take() {
            sender
                .queue(message.kind, &message.payload)
                .map_err(|error| broken(&error))?;
            if sender.queued_bytes() < FLUSH_BYTES {
                next = queue.try_next();
            }
        }
        tokio::time::timeout(SEND_TIMEOUT, sender.flush())
            .await
            .map_err(|_| PeerLost::Stuck)?
            .map_err(|error| broken(&error))?;
    }
}

/// Waits for a refusal: nothing else comes back on a stream of messages.
async fn listen(mut receiver: FramedReceiver) -> Result<Infallible, PeerLost> {
    match receiver.receive_message::<RaftRefusal>().await {
        Ok(Some(RaftRefusal::Removed)) => Err(PeerLost::Removed),
        Ok(Some(RaftRefusal::OtherMember { found })) => Err(PeerLost::OtherMember { found }),
        Ok(Some(RaftRefusal::Replaced)) => Err(PeerLost::Replaced),
        Ok(Some(RaftRefusal::OtherCertificate)) => Err(PeerLost::OtherCertificate),
        Ok(None) => Err(PeerLost::Broken("it ended the stream".into())),
        Err(error) => Err(broken(&error)),
    }
}
