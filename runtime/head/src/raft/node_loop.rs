//! What the driver's thread does: take inputs in bulk, let raft-rs make a `ready`, write, send,
//! apply, answer. Many proposals share one fsync so.
//!
//! Invariants:
//! 1. A leader's messages may leave before the write; a follower's (votes, acknowledgements) only
//!    after it.
//! 2. Nothing is stepped or proposed between `ready` and `advance`; what comes up meanwhile is kept
//!    for after.
//! 3. Nothing here waits for another process or for a client.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use mobula_core::clock::Clock;
use mobula_core::codec;
use mobula_core::config::RaftConfig;
use mobula_core::control::Command;
use mobula_storage::engine::{Durability, RocksEngine};
use mobula_storage::raft_log::{LogPoint, LogWrite, RaftLog};
use raft::prelude::{ConfChange, ConfState, Entry, Message};
use raft::{RawNode, StateRole};
use tokio::sync::{oneshot, watch};

use super::apply::{AppliedEntry, AppliedRun, Applier};
use super::changes::Changes;
use super::inputs::{Input, InputReceiver};
use super::membership::{Configuration, GroupView};
use super::proposals::{Leadership, Outcome, ProposeError};
use super::reads::Reads;
use super::snapshots::Snapshots;
use super::transport::Peers;
use crate::dispatcher::EffectSender;

/// How many inputs are taken before one `ready`: together they are one write to the log.
const INPUTS_PER_READY_MAX: usize = 1024;

/// Ticks that are made up for after a pause, of the thread or of the whole machine: enough for a
/// slow fsync. After a longer one others may lead already, and all ticks at once would only make
/// this head stand against them.
const TICKS_MADE_UP_MAX: u32 = 4;

/// The largest command; with what is around it, it fits a frame of the Raft lane.
const COMMAND_BYTES_MAX: usize = 7 * 1024 * 1024;

pub(super) type Node = RawNode<RaftLog<RocksEngine>>;
type Reply = oneshot::Sender<Result<Outcome, ProposeError>>;

/// A proposal whose entry is in the log.
struct Waiting {
    term: u64,
    reply: Reply,
}

/// What the loop is made of.
pub(super) struct LoopParts {
    pub(super) node: Node,
    pub(super) log: RaftLog<RocksEngine>,
    pub(super) applier: Applier,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) effects: EffectSender,
    pub(super) peers: Box<dyn Peers>,
    pub(super) leadership: watch::Sender<Leadership>,
    pub(super) group: watch::Sender<Arc<GroupView>>,
    pub(super) config: RaftConfig,
}

pub(super) struct Loop {
    parts: LoopParts,
    /// Commands, by index of their entry.
    waiting: BTreeMap<u64, Waiting>,
    changes: Changes,
    reads: Reads,
    snapshots: Snapshots,
    /// The highest term of which an entry is applied.
    applied_term: u64,
    bytes_since_compaction: u64,
}

impl Loop {
    pub(super) fn new(mut parts: LoopParts) -> Self {
        let raft_id = parts.node.raft.id;
        parts.peers.set_group(&parts.group.borrow());
        let election_ticks = u32::try_from(parts.config.election_ticks).unwrap_or(u32::MAX);
        let silence_max = Duration::from_millis(parts.config.tick_ms) * election_ticks;
        Loop {
            parts,
            waiting: BTreeMap::new(),
            changes: Changes::new(silence_max),
            reads: Reads::new(raft_id),
            snapshots: Snapshots::default(),
            applied_term: 0,
            bytes_since_compaction: 0,
        }
    }

    /// Works until it is told to stop, or nobody is left to tell it anything.
    pub(super) fn run(mut self, inputs: &InputReceiver) {
        let tick = Duration::from_millis(self.parts.config.tick_ms);
        let mut next_tick = Instant::now() + tick;
        while self.take_inputs(inputs, next_tick) {
            let oldest = Instant::now().checked_sub(tick * TICKS_MADE_UP_MAX);
            next_tick = oldest.map_or(next_tick, |oldest| next_tick.max(oldest));
            while next_tick <= Instant::now() {
                self.parts.node.tick();
                next_tick += tick;
            }
            self.handle_readies();
            self.snapshots
                .prepare(&mut self.parts.node, &self.parts.log);
            self.publish_leadership();
            self.compact_if_due();
        }
    }

    /// Waits for the first input until `until`, then takes what else is there. False: stop.
    fn take_inputs(&mut self, inputs: &InputReceiver, until: Instant) -> bool {
        let wait = until.saturating_duration_since(Instant::now());
        let mut next = match inputs.queue.recv_timeout(wait) {
            Ok(input) => Some(input),
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        };
        for _ in 0..INPUTS_PER_READY_MAX {
            let Some(input) = next.take() else { break };
            inputs.taken(&input);
            if matches!(input, Input::Stop) {
                return false;
            }
            self.take(input);
            next = inputs.queue.try_recv().ok();
        }
        // One more than the bound was taken out of the queue.
        if let Some(input) = next {
            inputs.taken(&input);
            if matches!(input, Input::Stop) {
                return false;
            }
            self.take(input);
        }
        true
    }

    fn take(&mut self, input: Input) {
        let node = &mut self.parts.node;
        match input {
            Input::Propose { command, reply } => self.propose(command, reply),
            Input::Read { reply } => {
                if let Some(context) = self.reads.ask(reply) {
                    node.read_index(context);
                }
            }
            Input::LocalView { reply } => {
                // Whoever asked may have given up, here and below.
                let _ = reply.send(self.parts.applier.reader());
            }
            Input::Change { change, reply } => self.changes.propose(node, change, reply),
            Input::Transfer { to, reply } => {
                let _ = reply.send(self.changes.transfer(node, to));
            }
            Input::Progress { reply } => {
                let _ = reply.send(self.changes.progress(node));
            }
            Input::Step(message) => self.step(*message),
            Input::Unreachable(peer) => node.report_unreachable(peer),
            Input::SnapshotSent { to, arrived } => self.snapshots.sent(node, to, arrived),
            Input::SnapshotArrived {
                message,
                install,
                reply,
            } => {
                self.snapshots.arrived(install, reply);
                self.step(*message);
                // Before anything else, so that raft's answer is about this one.
                self.handle_readies();
                self.snapshots.settle();
            }
            Input::Stop => unreachable!("the caller ends at a stop"),
        }
    }

    fn step(&mut self, message: Message) {
        let (from, kind) = (message.from, message.get_msg_type());
        self.changes.heard(&self.parts.node, from);
        if let Err(error) = self.parts.node.step(message) {
            // Those of heads that are members no more, for instance.
            tracing::debug!(from, ?kind, %error, "raft has no use for a message");
        }
    }

    fn propose(&mut self, mut command: Command, reply: Reply) {
        let node = &mut self.parts.node;
        // raft-rs forwards a follower's proposals and loses the reply, so this is checked first.
        if node.raft.state != StateRole::Leader {
            let _ = reply.send(Err(not_leader(node)));
            return;
        }
        command.now_ms = self.parts.clock.now_ms();
        let data = codec::encode_plain(&command);
        let size_bytes = data.len();
        if size_bytes > COMMAND_BYTES_MAX {
            let _ = reply.send(Err(ProposeError::TooLarge {
                size_bytes,
                limit_bytes: COMMAND_BYTES_MAX,
            }));
            return;
        }
        match node.propose(Vec::new(), data) {
            Ok(()) => {
                self.bytes_since_compaction += size_bytes as u64;
                let index = node.raft.raft_log.last_index();
                let term = node.raft.term;
                self.waiting.insert(index, Waiting { term, reply });
            }
            Err(raft::Error::ProposalDropped) => {
                let _ = reply.send(Err(dropped(node)));
            }
            Err(error) => {
                tracing::warn!(%error, "proposal refused by raft");
                let _ = reply.send(Err(not_leader(node)));
            }
        }
    }

    fn handle_readies(&mut self) {
        while self.parts.node.has_ready() {
            self.handle_ready();
            self.snapshots.report(&mut self.parts.node);
            self.changes.propose_again(&mut self.parts.node);
        }
    }

    fn handle_ready(&mut self) {
        let mut ready = self.parts.node.ready();
        self.send(ready.take_messages());
        let mut write = if ready.snapshot().is_empty() {
            self.parts.log.begin()
        } else {
            self.snapshots.stage(ready.snapshot(), &self.parts.log)
        };
        write
            .append(ready.entries())
            .unwrap_or_else(|error| abort("append to the log", &error));
        if let Some(hard_state) = ready.hs() {
            write.set_hard_state(hard_state);
        }
        if !write.is_empty() {
            let durability = if ready.must_sync() {
                Durability::Synced
            } else {
                Durability::Buffered
            };
            self.commit(write, durability, "write the log");
        }
        if !ready.snapshot().is_empty() {
            self.after_install(ready.snapshot().get_metadata().term);
        }
        self.send(ready.take_persisted_messages());
        self.reads.confirm(ready.take_read_states());
        let committed = ready.take_committed_entries();
        self.apply(&committed);
        let mut light = self.parts.node.advance(ready);
        self.send(light.take_messages());
        let committed = light.take_committed_entries();
        self.apply(&committed);
        self.parts.node.advance_apply();
        let applier = &self.parts.applier;
        self.reads
            .answer(self.parts.log.applied().index, || applier.reader());
    }

    fn commit(&self, write: LogWrite, durability: Durability, what: &str) {
        self.parts
            .log
            .commit(write, durability)
            .unwrap_or_else(|error| abort(what, &error));
    }

    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            if message.get_msg_type() == raft::prelude::MessageType::MsgSnapshot {
                self.snapshots.send(message, &mut *self.parts.peers);
            } else {
                self.parts.peers.send(message);
            }
        }
    }

    /// The tables were replaced: everything that was read from them is to be read again.
    fn after_install(&mut self, term: u64) {
        self.applied_term = self.applied_term.max(term);
        self.publish_group();
        self.parts.effects.everything_changed();
    }

    fn apply(&mut self, entries: &[Entry]) {
        let Some(last) = entries.last() else { return };
        let mut write = self.parts.log.begin();
        let mut configuration = NodeConfiguration {
            node: &mut self.parts.node,
            changed: None,
        };
        let run = self
            .parts
            .applier
            .apply(entries, &mut configuration, write.batch_mut());
        if let Some(state) = configuration.changed {
            write.set_conf_state(&state);
        }
        write.set_applied(LogPoint {
            index: last.index,
            term: last.term,
        });
        self.commit(write, Durability::Buffered, "write the tables");
        self.applied_term = self.applied_term.max(last.term);
        self.answer(run);
    }

    fn answer(&mut self, run: AppliedRun) {
        if run.touches_group {
            self.publish_group();
        }
        for AppliedEntry {
            index,
            term,
            result,
        } in run.outcomes
        {
            let Some(waiting) = self.waiting.remove(&index) else {
                continue;
            };
            let answer = if waiting.term == term {
                Ok(Outcome { index, result })
            } else {
                // Another leader's entry stands where this one's was.
                Err(not_leader(&self.parts.node))
            };
            // Whoever asked may have given up.
            let _ = waiting.reply.send(answer);
        }
        for change in run.changes {
            self.changes.applied(change);
        }
        self.parts.effects.send(run.effects);
    }

    fn publish_group(&mut self) {
        let view = GroupView::of(&self.parts.applier.reader(), &self.parts.log.conf_state());
        self.parts.peers.set_group(&view);
        // Receivers may all be gone while the process ends.
        self.parts.group.send_replace(view);
    }

    fn publish_leadership(&mut self) {
        let raft = &self.parts.node.raft;
        let is_leader = raft.state == StateRole::Leader && self.applied_term == raft.term;
        let next = Leadership {
            is_leader,
            term: raft.term,
            leader: known_leader(&self.parts.node),
            applied_index: self.parts.log.applied().index,
            first_log_index: self.parts.log.truncated().index + 1,
        };
        self.parts.leadership.send_if_modified(|now| {
            // Indexes alone wake nobody.
            let changed =
                (now.is_leader, now.term, now.leader) != (next.is_leader, next.term, next.leader);
            *now = next;
            changed
        });
        if raft.state != StateRole::Leader {
            for (_, waiting) in std::mem::take(&mut self.waiting) {
                let _ = waiting
                    .reply
                    .send(Err(ProposeError::Unknown("leadership was lost")));
            }
            self.changes.leadership_lost();
        }
    }

    fn compact_if_due(&mut self) {
        let config = &self.parts.config;
        let applied = self.parts.log.applied().index;
        let first = self.parts.log.truncated().index;
        let entries = applied.saturating_sub(first);
        let due = entries >= config.compact_entries + config.keep_entries
            || self.bytes_since_compaction >= config.compact_bytes;
        if !due {
            return;
        }
        // A follower goes on behind the snapshot that is on its way to it, unless that takes so
        // long that it must begin anew.
        let entries_max = 4 * (config.compact_entries + config.keep_entries);
        let mut target = applied.saturating_sub(config.keep_entries);
        if let Some(needed) = self.snapshots.needed_from()
            && entries < entries_max
        {
            target = target.min(needed);
        }
        if target <= first {
            return;
        }
        let mut write = self.parts.log.begin();
        self.parts
            .log
            .compact_to(&mut write, target)
            .unwrap_or_else(|error| abort("compact the log", &error));
        self.commit(write, Durability::Buffered, "compact the log");
        self.bytes_since_compaction = 0;
        tracing::info!(from = first, to = target, "log compacted");
    }
}

/// Raft's configuration while entries are applied.
struct NodeConfiguration<'a> {
    node: &'a mut Node,
    changed: Option<ConfState>,
}

impl Configuration for NodeConfiguration<'_> {
    fn state(&self) -> ConfState {
        self.node.raft.prs().conf().to_conf_state()
    }

    fn change(&mut self, change: &ConfChange) -> Result<(), String> {
        let mut state = self
            .node
            .apply_conf_change(change)
            .map_err(|error| error.to_string())?;
        // raft keeps them in hash sets; what is stored and sent has one form.
        state.voters.sort_unstable();
        state.learners.sort_unstable();
        tracing::info!(voters = ?state.voters, learners = ?state.learners, "the group has changed");
        self.changed = Some(state);
        Ok(())
    }
}

fn known_leader(node: &Node) -> Option<u64> {
    let leader = node.raft.leader_id;
    (leader != raft::INVALID_ID).then_some(leader)
}

pub(super) fn not_leader(node: &Node) -> ProposeError {
    ProposeError::NotLeader {
        leader: known_leader(node),
    }
}

/// Why raft has dropped a leader's proposal.
pub(super) fn dropped(node: &Node) -> ProposeError {
    match node.raft.lead_transferee {
        Some(next) => ProposeError::NotLeader { leader: Some(next) },
        None => ProposeError::Overloaded("8 MiB of commands are not committed yet"),
    }
}

/// Ends the process: after a failed write nobody knows what is on disk.
pub(super) fn abort(what: &str, error: &dyn std::fmt::Display) -> ! {
    tracing::error!(%error, "cannot {what}; ending the process, for what is on disk is unknown");
    eprintln!("mobula head: cannot {what}: {error}");
    std::process::exit(70);
}
