//! Raft's messages between heads, over the cluster's QUIC endpoint.
//!
//! ```text
//! driver ─send─► bounded queues, two for each peer ─► one task a peer ─► two streams ─► peer
//! driver ◄─────────────── inbox ◄───────── one task a stream ◄────────────────────── peer
//! ```
//!
//! Each head connects to each other one and sends on its own connection only. Heartbeats, votes and
//! their answers have a stream of their own, so that a batch of entries delays no heartbeat.
//!
//! Invariants:
//! 1. The driver never waits here: what a queue does not take is dropped, and raft sends again.
//! 2. A message counts only if its sender's certificate, the stream's hello and the message itself
//!    name one and the same member, and the message is for this head.
//! 3. A head that was removed is told so, and nothing that it says is passed on.
//! 4. Of two processes that run as one member the one that said hello first is told to end as soon as
//!    it says anything more. Both may have voted until then: a disk must not be copied.
//! 5. Snapshots come with their bytes (see `snapshot_stream`) or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mobula_core::codec;
use mobula_net::endpoint::{Connection, Endpoint};
use mobula_net::lane::{FramedSender, FramedStream};
use mobula_net::{FrameKind, Lane};
use mobula_storage::engine::RocksSnapshot;
use mobula_storage::raft_log::{decode_raft, encode_raft};
use mobula_wire::raft::{RaftHello, RaftRefusal, StateClaim};
use parking_lot::Mutex;
use raft::prelude::{Message, MessageType};
use rand::RngCore;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::inputs::{Input, InputSender};
use super::membership::GroupView;
use super::peer::{Outgoing, Peer, Queue};
use super::snapshot_stream;
use super::snapshots::PinnedTables;

/// Messages that may wait for one peer in one of its queues; raft itself has at most 256 batches of
/// entries under way.
const QUEUE_MAX: usize = 512;

/// Bytes that may wait for one peer: half of what raft would have under way at the most.
const QUEUE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// A peer that takes nothing for so long is as good as gone; raft keeps no lead without it anyway.
pub(super) const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// A peer's hello comes with its stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// What a stream of the Raft lane carries behind its hello.
const CARRIED: [FrameKind; 2] = [FrameKind::Message, FrameKind::Aside];

/// Streams of one connection that are read at one time: two for messages, one for a snapshot, and
/// as many again while a peer's old ones end.
const STREAMS_MAX: usize = 6;

/// The way to the other heads, as the driver sees it.
pub(crate) trait Peers<S = RocksSnapshot>: Send {
    /// Sends towards `message.to`, or drops it.
    fn send(&mut self, message: Message);

    /// Sends a snapshot with the tables that belong to it. Its end is reported as
    /// [`Input::SnapshotSent`], whatever it is.
    fn send_snapshot(&mut self, message: Message, tables: PinnedTables<S>);

    /// Says to every other head what this one's state is, or drops that.
    fn send_claim(&mut self, claim: &StateClaim);

    /// Takes in who is in the group, and where.
    fn set_group(&mut self, group: &GroupView);
}

/// Why another head says that this one must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It was removed from the group.
    Removed,
    /// Another process runs under its id.
    Replaced,
}

/// The transport; clones are the same one.
#[derive(Clone)]
pub(crate) struct PeerNetwork(Arc<Shared>);

pub(super) struct Shared {
    pub(super) raft_id: u64,
    pub(super) cluster_address: String,
    pub(super) endpoint: Endpoint,
    pub(super) inputs: InputSender,
    runtime: tokio::runtime::Handle,
    routes: Mutex<BTreeMap<u64, Route>>,
    /// The addresses in the members table when it was last looked at.
    rows: Mutex<BTreeMap<u64, String>>,
    removed: Mutex<BTreeSet<u64>>,
    /// This process, as it says in its hellos.
    pub(super) life: u64,
    /// The process of each peer that said hello last.
    lives: Mutex<BTreeMap<u64, u64>>,
    /// Set when another head says that this one must end.
    pub(super) told_to_end: watch::Sender<Option<End>>,
    /// Owned here, so that they end with the transport.
    tasks: Mutex<JoinSet<()>>,
}

/// The way to one peer.
struct Route {
    address: watch::Sender<Option<SocketAddr>>,
    /// Heartbeats, votes, reads, answers.
    urgent: mpsc::Sender<Outgoing>,
    entries: mpsc::Sender<Outgoing>,
    queued_bytes: Arc<AtomicUsize>,
    /// The peer was just heard of: an attempt to connect may succeed now.
    heard: Arc<Notify>,
    task: AbortHandle,
}

impl Route {
    /// Puts a frame into one of the two queues, if the bounds allow.
    fn queue(&self, queue: &mpsc::Sender<Outgoing>, kind: FrameKind, payload: Vec<u8>) -> bool {
        let size_bytes = payload.len();
        let before = self.queued_bytes.fetch_add(size_bytes, Ordering::Relaxed);
        let outgoing = Outgoing { kind, payload };
        let taken = before + size_bytes <= QUEUE_BYTES_MAX && queue.try_send(outgoing).is_ok();
        if !taken {
            self.queued_bytes.fetch_sub(size_bytes, Ordering::Relaxed);
        }
        taken
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl PeerNetwork {
    /// The transport of the head `raft_id`; must be called within the runtime that it is to use.
    pub(crate) fn new(raft_id: u64, endpoint: Endpoint, inputs: InputSender) -> Self {
        PeerNetwork(Arc::new(Shared {
            raft_id,
            cluster_address: endpoint.local_address().to_string(),
            endpoint,
            inputs,
            runtime: tokio::runtime::Handle::current(),
            routes: Mutex::default(),
            rows: Mutex::default(),
            removed: Mutex::default(),
            life: rand::rng().next_u64(),
            lives: Mutex::default(),
            told_to_end: watch::Sender::new(None),
            tasks: Mutex::default(),
        }))
    }

    /// Learns where peers are before any table says so: a new head knows them from its join.
    pub(crate) fn seed(&self, members: impl IntoIterator<Item = (u64, String)>) {
        for (raft_id, address) in members {
            self.0.learn(raft_id, &address);
        }
    }

    /// Waits until another head says that this one must end.
    pub(crate) async fn told_to_end(&self) -> End {
        let mut told = self.0.told_to_end.subscribe();
        let found = told.wait_for(Option::is_some).await.map(|told| *told);
        match found {
            Ok(Some(end)) => end,
            _ => std::future::pending().await,
        }
    }

    /// Ends all tasks.
    pub(crate) async fn stop(&self) {
        self.0.routes.lock().clear();
        let mut tasks = std::mem::take(&mut *self.0.tasks.lock());
        tasks.shutdown().await;
    }

    /// Serves a connection that another head has made, until it ends.
    pub(crate) async fn serve(&self, connection: Connection) {
        let peer = connection.peer().incarnation;
        let mut streams = JoinSet::new();
        loop {
            tokio::select! {
                accepted = connection.accept(), if streams.len() < STREAMS_MAX => {
                    let Ok((lane, stream)) = accepted else { break };
                    let shared = self.0.clone();
                    match lane {
                        Lane::Raft => streams.spawn(shared.receive_messages(peer, stream)),
                        Lane::Bulk => streams.spawn(async move {
                            let (raft_id, inputs) = (shared.raft_id, &shared.inputs);
                            snapshot_stream::receive(raft_id, peer, inputs, stream).await;
                        }),
                        lane => {
                            tracing::warn!(peer, %lane, "a head opened a lane that heads do not use");
                            continue;
                        }
                    };
                }
                Some(_) = streams.join_next(), if !streams.is_empty() => {}
            }
        }
        streams.shutdown().await;
    }
}

impl Peers for PeerNetwork {
    fn send(&mut self, message: Message) {
        let is_urgent = message.get_msg_type() != MessageType::MsgAppend;
        let to = message.to;
        let bytes = encode_raft(&message);
        let taken = {
            let routes = self.0.routes.lock();
            let Some(route) = routes.get(&to) else {
                return;
            };
            let queue = if is_urgent {
                &route.urgent
            } else {
                &route.entries
            };
            route.queue(queue, FrameKind::Message, bytes)
        };
        if !taken && !is_urgent {
            // Raft then probes the peer, instead of counting on what was dropped. Full means that
            // a report is waiting already.
            let _ = self.0.inputs.send(Input::Unreachable(to));
        }
    }

    fn send_snapshot(&mut self, message: Message, tables: PinnedTables) {
        let to = message.to;
        let address = {
            let routes = self.0.routes.lock();
            routes.get(&to).and_then(|route| *route.address.borrow())
        };
        let (endpoint, inputs) = (self.0.endpoint.clone(), self.0.inputs.clone());
        let mut tasks = self.0.tasks.lock();
        // Those that have ended.
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(
            snapshot_stream::send(endpoint, address, inputs, message, tables),
            &self.0.runtime,
        );
    }

    fn send_claim(&mut self, claim: &StateClaim) {
        let payload = codec::encode_plain(claim);
        for route in self.0.routes.lock().values() {
            // One that finds no place is followed by another in a second.
            let _ = route.queue(&route.urgent, FrameKind::Aside, payload.clone());
        }
    }

    fn set_group(&mut self, group: &GroupView) {
        *self.0.removed.lock() = group.removed.iter().copied().collect();
        for member in &group.members {
            // A row that is as before may be older than what the member itself has said since.
            let (raft_id, address) = (member.raft_id, &member.cluster_address);
            let row = self.0.rows.lock().insert(raft_id, address.clone());
            if row.as_ref() != Some(address) {
                self.0.learn(raft_id, address);
            }
        }
        // While this head's own tables are empty it knows the others from its join.
        if !group.voters.is_empty() {
            let mut routes = self.0.routes.lock();
            routes.retain(|raft_id, _| group.contains(*raft_id));
        }
    }
}

impl Shared {
    /// Notes where a peer is, and begins to talk to it if it is new.
    fn learn(self: &Arc<Self>, raft_id: u64, address: &str) {
        if raft_id == self.raft_id {
            return;
        }
        let Ok(address) = address.parse::<SocketAddr>() else {
            tracing::warn!(raft_id, address, "a head's address is none");
            return;
        };
        let mut routes = self.routes.lock();
        let route = routes.entry(raft_id).or_insert_with(|| self.route(raft_id));
        route.address.send_if_modified(|known| {
            let changed = *known != Some(address);
            *known = Some(address);
            changed
        });
    }

    fn route(self: &Arc<Self>, raft_id: u64) -> Route {
        let (urgent, urgent_receiver) = mpsc::channel(QUEUE_MAX);
        let (entries, entries_receiver) = mpsc::channel(QUEUE_MAX);
        let (address, address_receiver) = watch::channel(None);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let heard = Arc::new(Notify::new());
        let peer = Peer {
            raft_id,
            address: address_receiver,
            heard: heard.clone(),
            urgent: Queue {
                messages: urgent_receiver,
                bytes: queued_bytes.clone(),
            },
            entries: Queue {
                messages: entries_receiver,
                bytes: queued_bytes.clone(),
            },
        };
        let task = self
            .tasks
            .lock()
            .spawn_on(peer.run(Arc::downgrade(self)), &self.runtime);
        Route {
            address,
            urgent,
            entries,
            queued_bytes,
            heard,
            task,
        }
    }

    async fn receive_messages(self: Arc<Self>, peer: u64, stream: FramedStream) {
        let FramedStream {
            sender,
            mut receiver,
        } = stream;
        let hello = tokio::time::timeout(HELLO_TIMEOUT, receiver.receive_message::<RaftHello>());
        let Ok(Ok(Some(hello))) = hello.await else {
            tracing::warn!(peer, "a raft stream did not begin with a hello");
            return;
        };
        if let Err(refusal) = self.judge(peer, &hello) {
            tracing::warn!(peer, ?refusal, "a raft stream is refused");
            refuse(sender, &refusal).await;
            return;
        }
        self.lives.lock().insert(peer, hello.life);
        self.learn(peer, &hello.cluster_address);
        if let Some(route) = self.routes.lock().get(&peer) {
            route.heard.notify_one();
        }
        loop {
            let (kind, payload) = match receiver.receive().await {
                Ok(Some(frame)) if CARRIED.contains(&frame.kind) => (frame.kind, frame.payload),
                Ok(None) => return,
                Ok(Some(_)) => {
                    tracing::warn!(peer, "a raft stream carries something else");
                    return;
                }
                Err(error) => {
                    tracing::debug!(peer, %error, "a raft stream broke");
                    return;
                }
            };
            if self.removed.lock().contains(&peer) {
                refuse(sender, &RaftRefusal::Removed).await;
                return;
            }
            if self.lives.lock().get(&peer) != Some(&hello.life) {
                // It speaks on though another one has come in its place: both are alive.
                tracing::error!(
                    peer,
                    "two processes run as this head; the older one is refused"
                );
                refuse(sender, &RaftRefusal::Replaced).await;
                return;
            }
            if kind == FrameKind::Aside {
                match codec::decode::<StateClaim>(&payload, StateClaim::BYTES_MAX) {
                    // Full means that the driver has more urgent things to do.
                    Ok(claim) => {
                        let _ = self.inputs.send(Input::Claim { from: peer, claim });
                    }
                    Err(error) => {
                        tracing::warn!(peer, %error, "not what a head says of its state");
                        return;
                    }
                }
                continue;
            }
            match decode_raft::<Message>(&payload) {
                Ok(message)
                    if message.from == peer
                        && message.to == self.raft_id
                        && message.get_msg_type() != MessageType::MsgSnapshot =>
                {
                    // One that finds no place is lost as on a bad network.
                    let _ = self.inputs.send(Input::Step(Box::new(message)));
                }
                Ok(message) => {
                    tracing::warn!(
                        peer,
                        from = message.from,
                        to = message.to,
                        "a raft message in another's name"
                    );
                    return;
                }
                Err(error) => {
                    tracing::warn!(peer, %error, "not a raft message");
                    return;
                }
            }
        }
    }

    fn judge(&self, peer: u64, hello: &RaftHello) -> Result<(), RaftRefusal> {
        if hello.from != peer {
            return Err(RaftRefusal::OtherCertificate);
        }
        if hello.to != self.raft_id {
            return Err(RaftRefusal::OtherMember {
                found: self.raft_id,
            });
        }
        if self.removed.lock().contains(&peer) {
            return Err(RaftRefusal::Removed);
        }
        Ok(())
    }
}

async fn refuse(mut sender: FramedSender, refusal: &RaftRefusal) {
    // A courtesy: the peer may be gone, and must not hold us up.
    let answer = async {
        sender.send_message(refusal).await?;
        sender.finish().await
    };
    let _ = tokio::time::timeout(SEND_TIMEOUT, answer).await;
}
