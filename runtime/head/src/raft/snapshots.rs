//! Snapshots as the driver sees them: one is prepared when raft asks, and what becomes of those that
//! are sent and received.
//!
//! A snapshot is a view of the store that RocksDB pins for us: taking it costs nothing, so it is
//! taken on the driver's thread, at exactly the applied index. Reading it, which takes long, is the
//! transport's, on other threads ([`super::snapshot_stream`]).
//!
//! Invariants:
//! 1. One view is pinned at a time, and given back when nobody needs it: a pinned view keeps old
//!    versions on the disk.
//! 2. raft hears of the end of every snapshot that it sent; otherwise the follower stays paused.
//! 3. What is installed was verified whole before raft heard of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use mobula_core::mutant::{Mutant, is_planted};
use mobula_storage::engine::{Engine, Read, RocksSnapshot};
use mobula_storage::raft_log::{LogWrite, RaftLog};
use mobula_storage::snapshot::{SnapshotExport, SnapshotInstall, SnapshotPlace};
use raft::prelude::{Message, Snapshot};
use raft::{SnapshotStatus, StateRole};
use tokio::sync::oneshot;

use super::node_loop::{Fault, Node};
use super::transport::Peers;

/// The tables at one entry, for whoever is to be sent them.
pub(crate) struct PinnedTables<S = RocksSnapshot> {
    view: Arc<S>,
    place: SnapshotPlace,
}

impl<S> Clone for PinnedTables<S> {
    fn clone(&self) -> Self {
        PinnedTables {
            view: self.view.clone(),
            place: self.place.clone(),
        }
    }
}

impl<S: Read> PinnedTables<S> {
    /// Reads all of it.
    pub(crate) fn export(&self) -> SnapshotExport<Arc<S>> {
        SnapshotExport::new(self.view.clone(), self.place.clone())
    }
}

/// A snapshot that was received and verified.
struct Arrived {
    install: Box<SnapshotInstall>,
    reply: oneshot::Sender<Result<(), String>>,
}

/// The driver's snapshots.
pub(super) struct Snapshots<S> {
    prepared: Option<PinnedTables<S>>,
    /// Snapshots under way: their index, by receiver.
    sending: BTreeMap<u64, u64>,
    /// Failures that raft is to be told when it may be told something.
    failed: Vec<u64>,
    arrived: Option<Arrived>,
}

impl<S> Default for Snapshots<S> {
    fn default() -> Self {
        Snapshots {
            prepared: None,
            sending: BTreeMap::new(),
            failed: Vec::new(),
            arrived: None,
        }
    }
}

impl<S> Snapshots<S> {
    /// Pins the tables if a follower needs them, and gives them back when none does.
    pub(super) fn prepare<E: Engine<Snapshot = S>>(
        &mut self,
        node: &mut Node<E>,
        log: &RaftLog<E>,
    ) {
        if node.raft.state != StateRole::Leader {
            self.release(log);
            // Only a leader asks.
            let _ = log.take_snapshot_request();
            return;
        }
        if let Some(request) = log.take_snapshot_request() {
            let place = SnapshotPlace {
                applied: if is_planted(Mutant::SnapshotTooNew) {
                    log.last()
                } else {
                    log.applied()
                },
                conf_state: log.conf_state(),
            };
            tracing::info!(
                follower = request.follower,
                index = place.applied.index,
                "a follower needs a snapshot"
            );
            let mut snapshot = Snapshot::default();
            let metadata = snapshot.mut_metadata();
            metadata.index = place.applied.index;
            metadata.term = place.applied.term;
            metadata.set_conf_state(place.conf_state.clone());
            self.prepared = Some(PinnedTables {
                view: Arc::new(log.engine().snapshot()),
                place,
            });
            log.set_prepared_snapshot(snapshot);
        } else if self.prepared.is_some() && self.sending.is_empty() && !is_needed(node, log) {
            self.release(log);
        }
    }

    fn release<E: Engine>(&mut self, log: &RaftLog<E>) {
        if self.prepared.take().is_some() {
            log.clear_prepared_snapshot();
        }
    }

    /// The entry behind which a receiver of a snapshot will go on.
    pub(super) fn needed_from(&self) -> Option<u64> {
        let prepared = self
            .prepared
            .iter()
            .map(|tables| tables.place.applied.index);
        prepared.chain(self.sending.values().copied()).min()
    }

    /// Hands a snapshot that raft wants sent to the transport.
    pub(super) fn send(&mut self, message: Message, peers: &mut dyn Peers<S>) {
        let (to, index) = (message.to, message.get_snapshot().get_metadata().index);
        let tables = self
            .prepared
            .as_ref()
            .filter(|tables| tables.place.applied.index == index);
        // One at a time for each receiver: raft pauses it, so this is for the case that it forgot.
        match tables {
            Some(tables) if !self.sending.contains_key(&to) => {
                self.sending.insert(to, index);
                peers.send_snapshot(message, tables.clone());
            }
            _ => self.failed.push(to),
        }
    }

    /// Takes what became of a snapshot.
    pub(super) fn sent<E: Engine>(&mut self, node: &mut Node<E>, to: u64, arrived: bool) {
        self.sending.remove(&to);
        let status = if arrived {
            SnapshotStatus::Finish
        } else {
            SnapshotStatus::Failure
        };
        tracing::info!(follower = to, arrived, "a snapshot's sending has ended");
        if !is_planted(Mutant::SnapshotEndUnreported) {
            node.report_snapshot(to, status);
        }
    }

    /// Reports what failed at once. To be called when nothing is between `ready` and `advance`.
    pub(super) fn report<E: Engine>(&mut self, node: &mut Node<E>) {
        for to in std::mem::take(&mut self.failed) {
            node.report_snapshot(to, SnapshotStatus::Failure);
        }
    }

    /// Keeps a verified snapshot for the moment that raft accepts it.
    pub(super) fn arrived(
        &mut self,
        install: Box<SnapshotInstall>,
        reply: oneshot::Sender<Result<(), String>>,
    ) {
        self.arrived = Some(Arrived { install, reply });
    }

    /// The batch that makes the snapshot that raft accepted the state of this head.
    pub(super) fn stage<E: Engine>(
        &mut self,
        snapshot: &Snapshot,
        log: &RaftLog<E>,
    ) -> Result<LogWrite, Fault> {
        let metadata = snapshot.get_metadata();
        let Arrived { install, reply } = self
            .arrived
            .take()
            .expect("raft hears of a snapshot together with its verified bytes");
        let place = install.place().cloned();
        if place.as_ref().map(|place| place.applied.index) != Some(metadata.index) {
            return Err(Fault::new(
                "install a snapshot",
                &"its bytes are of another entry than its announcement",
            ));
        }
        let (write, place) = install
            .stage(log)
            .map_err(|error| Fault::new("install a snapshot", &error))?;
        tracing::info!(index = place.applied.index, "installing a snapshot");
        // Whoever sent it may have given up. What it hears is confirmed by raft's own answer.
        let _ = reply.send(Ok(()));
        Ok(write)
    }

    /// Answers for a snapshot that raft had no use for.
    pub(super) fn settle(&mut self) {
        if let Some(Arrived { reply, .. }) = self.arrived.take() {
            tracing::debug!("raft had no use for a snapshot");
            let _ = reply.send(Ok(()));
        }
    }
}

/// Whether a follower is behind the log's start.
fn is_needed<E: Engine>(node: &Node<E>, log: &RaftLog<E>) -> bool {
    let first = log.truncated().index + 1;
    node.raft.prs().iter().any(|(id, progress)| {
        *id != node.raft.id
            && progress.recent_active
            && (progress.matched + 1 < first || progress.state == raft::ProgressState::Snapshot)
    })
}
