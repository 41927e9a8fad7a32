//! What the driver does, step by step: take inputs in bulk, let raft-rs make a `ready`, write, send,
//! apply, answer. Many proposals share one fsync so.
//!
//! What raft hands out is carried out in `ready`; the rest is here: inputs, proposals, what others are
//! told, and the length of the log.
//!
//! Whoever drives it ([`super::driver`] a thread, the simulator one event after the other) calls
//! [`Loop::take`] and [`Loop::tick`] any number of times and then [`Loop::settle`]. Time, the store
//! and what is drawn by lot come from there; nothing here waits, blocks but in the store, or knows
//! which of the two it is.
//!
//! Invariants:
//! 1. A leader's messages may leave before the write; a follower's (votes, acknowledgements) only
//!    after it.
//! 2. Nothing is stepped or proposed between `ready` and `advance`; what comes up meanwhile is kept
//!    for after.
//! 3. Nothing here waits for another process or for a client.
//! 4. After a [`Fault`] nothing of this may be used any more: what is on disk is unknown.
//! 5. Who tells that a change of the group is committed still knows it after a crash. (Raft itself does not
//!    ask for that: a commit index is found again by asking a majority. But whose majority is what the
//!    change is about, see [`super::changes`].)

mod ready;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mobula_core::codec;
use mobula_core::config::RaftConfig;
use mobula_core::control::Command;
use mobula_core::mutant::{Mutant, is_planted};
use mobula_storage::engine::{Durability, Engine};
use mobula_storage::raft_log::{CommittedConflict, LogWrite, LostEntries, RaftLog};
use raft::prelude::{Message, MessageType};
use raft::{RawNode, StateRole};
use tokio::sync::{oneshot, watch};

use super::agreement::{Agreement, Diverged, PeerState};
use super::apply::{Applier, StateAt, log_time_ms, state_chain};
use super::chance::ElectionTimeouts;
use super::changes::Changes;
use super::committed_conflict;
use super::inputs::Input;
use super::log_clock::LogClock;
use super::lost_entries;
use super::membership::GroupView;
use super::proposals::{Leadership, Outcome, ProposeError};
use super::reads::Reads;
use super::snapshots::Snapshots;
use super::transport::Peers;
use crate::dispatcher::EffectSender;

/// The largest command; with what is around it, it fits a frame of the Raft lane.
const COMMAND_BYTES_MAX: usize = 7 * 1024 * 1024;

/// How often a head says what its state is: often enough that a wrong one answers for a few seconds
/// only, and nothing beside the heartbeats.
const CLAIM_INTERVAL_MS: u64 = 1_000;

pub(super) type Node<E> = RawNode<RaftLog<E>>;
type Reply = oneshot::Sender<Result<Outcome, ProposeError>>;

/// A proposal whose entry is in the log.
struct Waiting {
    term: u64,
    reply: Reply,
}

/// What the loop is made of.
pub(super) struct LoopParts<E: Engine> {
    pub(super) node: Node<E>,
    pub(super) log: RaftLog<E>,
    pub(super) applier: Applier<E>,
    pub(super) clock: Arc<LogClock>,
    pub(super) effects: EffectSender,
    pub(super) peers: Box<dyn Peers<E::Snapshot>>,
    pub(super) leadership: watch::Sender<Leadership>,
    pub(super) group: watch::Sender<Arc<GroupView>>,
    pub(super) peer_states: watch::Sender<Vec<PeerState>>,
    pub(super) config: RaftConfig,
    pub(super) life: u64,
    pub(super) elections: ElectionTimeouts,
}

pub(crate) struct Loop<E: Engine> {
    parts: LoopParts<E>,
    /// Commands, by index of their entry.
    waiting: BTreeMap<u64, Waiting>,
    changes: Changes,
    reads: Reads<E::Snapshot>,
    snapshots: Snapshots<E::Snapshot>,
    agreement: Agreement,
    ticks_since_claim: u64,
    /// The highest term of which an entry is applied.
    applied_term: u64,
    bytes_since_compaction: u64,
}

impl<E: Engine> Loop<E> {
    pub(super) fn new(mut parts: LoopParts<E>, now: Instant) -> Self {
        let raft_id = parts.node.raft.id;
        parts.peers.set_group(&parts.group.borrow());
        let election_ticks = u32::try_from(parts.config.election_ticks).unwrap_or(u32::MAX);
        let silence_max = Duration::from_millis(parts.config.tick_ms) * election_ticks;
        let life = parts.life;
        let start = StateAt {
            index: parts.log.applied().index,
            hash: state_chain(&parts.applier.reader()),
        };
        let mut state = Loop {
            parts,
            waiting: BTreeMap::new(),
            changes: Changes::new(silence_max, now),
            reads: Reads::new(raft_id, life),
            snapshots: Snapshots::default(),
            agreement: Agreement::new(raft_id, start),
            ticks_since_claim: 0,
            applied_term: 0,
            bytes_since_compaction: 0,
        };
        state.pin_election_timeout();
        state
    }

    /// The log.
    pub(crate) fn log(&self) -> &RaftLog<E> {
        &self.parts.log
    }

    /// The term, whether this head leads in it, and the last committed index.
    pub(crate) fn standing(&self) -> (u64, bool, u64) {
        let raft = &self.parts.node.raft;
        (
            raft.term,
            raft.state == StateRole::Leader,
            raft.raft_log.committed,
        )
    }

    /// One tick has passed.
    pub(crate) fn tick(&mut self) {
        self.parts.node.tick();
        self.ticks_since_claim += 1;
        self.pin_election_timeout();
    }

    /// Carries out what follows from the ticks and inputs since the last time.
    pub(crate) fn settle(&mut self) -> Result<(), Fault> {
        self.handle_readies()?;
        self.changes.answer_known(&self.parts.node);
        self.compare_states()?;
        self.snapshots
            .prepare(&mut self.parts.node, &self.parts.log);
        self.publish_leadership();
        Ok(())
    }

    /// Says what the state here is when that is due, and compares it with what others have said.
    fn compare_states(&mut self) -> Result<(), Fault> {
        if self.ticks_since_claim * self.parts.config.tick_ms >= CLAIM_INTERVAL_MS {
            self.ticks_since_claim = 0;
            self.tell_state();
        }
        if !self.agreement.is_waiting() {
            return Ok(());
        }
        let judged = self.agreement.judge(&self.parts.log.conf_state().voters);
        if let Some(news) = self.agreement.news() {
            // Receivers may all be gone while the process ends.
            self.parts.peer_states.send_replace(news);
        }
        judged.or_else(|wrong| {
            let noted = self.parts.log.note_divergence(wrong.index);
            noted.map_err(|error| Fault::new("note a divergence", &error))?;
            // The others may not have heard of the entry at which it is wrong, and are to name it.
            self.tell_state();
            Err(wrong.into())
        })
    }

    fn tell_state(&mut self) {
        if let Some(claim) = self.agreement.claim() {
            self.parts.peers.send_claim(&claim);
        }
    }

    /// Takes one input, at `now`.
    pub(crate) fn take(&mut self, input: Input<E::Snapshot>, now: Instant) -> Result<(), Fault> {
        self.changes.advance_to(now);
        self.take_at_last(input)?;
        self.pin_election_timeout();
        Ok(())
    }

    fn take_at_last(&mut self, input: Input<E::Snapshot>) -> Result<(), Fault> {
        let node = &mut self.parts.node;
        match input {
            Input::Propose { command, reply } => self.propose(command, reply),
            Input::Read { reply }
                if is_planted(Mutant::ReadWithoutQuorum)
                    && node.raft.state == StateRole::Leader =>
            {
                let _ = reply.send(Ok(self.parts.applier.reader()));
            }
            Input::Read { reply } => {
                if let Some(context) = self.reads.ask(reply) {
                    node.read_index(context);
                }
            }
            Input::LocalView { reply } => {
                // Whoever asked may have given up, here and below.
                let _ = reply.send(self.parts.applier.reader());
            }
            Input::Change {
                change,
                origin,
                reply,
            } => self.changes.propose(node, change, origin, reply),
            Input::Transfer { to, reply } => {
                let _ = reply.send(self.changes.transfer(node, to));
            }
            Input::Progress { reply } => {
                let _ = reply.send(self.changes.progress(node));
            }
            Input::Step(message) => self.step(*message)?,
            Input::Claim { from, claim } => self.agreement.heard(from, claim),
            Input::Unreachable(peer) => node.report_unreachable(peer),
            Input::SnapshotSent { to, arrived } => self.snapshots.sent(node, to, arrived),
            Input::SnapshotArrived {
                message,
                install,
                reply,
            } => {
                self.snapshots.arrived(install, reply);
                self.step(*message)?;
                // Before anything else, so that raft's answer is about this one.
                self.handle_readies()?;
                self.snapshots.settle();
            }
            Input::Stop => unreachable!("the caller ends at a stop"),
        }
        Ok(())
    }

    /// raft draws a timeout whenever its role or term changes; a simulation replaces it at once.
    fn pin_election_timeout(&mut self) {
        let raft = &mut self.parts.node.raft;
        let election_ticks = self.parts.config.election_ticks;
        if let Some(ticks) = self
            .parts
            .elections
            .ticks(raft.id, raft.term, election_ticks)
        {
            raft.set_randomized_election_timeout(ticks);
        }
    }

    fn step(&mut self, message: Message) -> Result<(), Fault> {
        if let Some(lost) = lost_entries::shown_by(&self.parts.node, &message) {
            let noted = self.parts.log.note_lost_entries(lost);
            noted.map_err(|error| Fault::new("note lost entries", &error))?;
            return Err(lost.into());
        }
        committed_conflict::check(&self.parts.node, &self.parts.log, &message)?;
        let (from, kind) = (message.from, message.get_msg_type());
        self.changes.heard(&self.parts.node, from);
        // A follower would pass them on to whom it takes for the leader, and he perhaps back: whoever
        // asks, asks again.
        let is_for_leader = matches!(kind, MessageType::MsgReadIndex | MessageType::MsgPropose);
        let leads = self.parts.node.raft.state == StateRole::Leader;
        if is_for_leader && !(leads && self.reads.is_new(&message)) {
            return Ok(());
        }
        if let Err(error) = self.parts.node.step(message) {
            // Those of heads that are members no more, for instance.
            tracing::debug!(from, ?kind, %error, "raft has no use for a message");
        }
        Ok(())
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

    fn commit(
        &self,
        write: LogWrite,
        durability: Durability,
        what: &'static str,
    ) -> Result<(), Fault> {
        let written = self.parts.log.commit(write, durability);
        written.map_err(|error| Fault::new(what, &error))
    }

    fn publish_group(&mut self) {
        let view = GroupView::of(&self.parts.applier.reader(), &self.parts.log.conf_state());
        self.parts.peers.set_group(&view);
        self.agreement.keep_only(|raft_id| view.contains(raft_id));
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
        if is_leader && !self.parts.leadership.borrow().is_leader {
            self.parts
                .clock
                .observe(log_time_ms(&self.parts.applier.reader()));
        }
        self.parts.leadership.send_if_modified(|now| {
            // Indexes alone wake nobody.
            let changed =
                (now.is_leader, now.term, now.leader) != (next.is_leader, next.term, next.leader);
            *now = next;
            changed
        });
        if raft.state != StateRole::Leader && !is_planted(Mutant::AnswerOfOtherTerm) {
            for (_, waiting) in std::mem::take(&mut self.waiting) {
                let _ = waiting
                    .reply
                    .send(Err(ProposeError::Unknown("leadership was lost")));
            }
            self.changes.leadership_lost();
        }
    }

    /// Shortens the log when it has become long. To be called after [`Loop::settle`].
    pub(crate) fn compact_if_due(&mut self) -> Result<(), Fault> {
        let config = &self.parts.config;
        let applied = self.parts.log.applied().index;
        let first = self.parts.log.truncated().index;
        let entries = applied.saturating_sub(first);
        let is_large = self.bytes_since_compaction >= config.compact_bytes;
        if entries < config.compact_entries + config.keep_entries && !is_large {
            return Ok(());
        }
        // Few large entries are as long a log as many small ones.
        let keep_entries = match is_large {
            true => config.keep_entries.min(entries / 2),
            false => config.keep_entries,
        };
        // A follower goes on behind the snapshot that is on its way to it, unless that takes so
        // long that it must begin anew.
        let entries_max = 4 * (config.compact_entries + config.keep_entries);
        let mut target = applied.saturating_sub(keep_entries);
        if let Some(needed) = self.snapshots.needed_from()
            && entries < entries_max
        {
            target = target.min(needed);
        }
        if target <= first {
            return Ok(());
        }
        let mut write = self.parts.log.begin();
        self.parts
            .log
            .compact_to(&mut write, target)
            .map_err(|error| Fault::new("compact the log", &error))?;
        self.commit(write, Durability::Buffered, "compact the log")?;
        self.bytes_since_compaction = 0;
        tracing::info!(from = first, to = target, "log compacted");
        Ok(())
    }
}

fn known_leader<E: Engine>(node: &Node<E>) -> Option<u64> {
    let leader = node.raft.leader_id;
    (leader != raft::INVALID_ID).then_some(leader)
}

pub(super) fn not_leader<E: Engine>(node: &Node<E>) -> ProposeError {
    ProposeError::NotLeader {
        leader: known_leader(node),
    }
}

/// Why raft has dropped a leader's proposal.
pub(super) fn dropped<E: Engine>(node: &Node<E>) -> ProposeError {
    match node.raft.lead_transferee {
        Some(next) => ProposeError::NotLeader { leader: Some(next) },
        None => ProposeError::Overloaded("8 MiB of commands are not committed yet"),
    }
}

/// Why this head must end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The store failed: nobody knows what is on disk.
    #[error("cannot {what}: {reason}")]
    Store {
        /// What was tried.
        what: &'static str,
        /// What the store said.
        reason: String,
    },
    /// What is here is not what a majority holds.
    #[error(transparent)]
    Diverged(#[from] Diverged),
    /// What is here is less than this head has acknowledged. Noted on the disk.
    #[error(transparent)]
    LostEntries(#[from] LostEntries),
    /// The leader's log is another one than what is committed here. Noted on the disk.
    #[error(transparent)]
    CommittedConflict(#[from] CommittedConflict),
}

impl Fault {
    pub(super) fn new(what: &'static str, error: &dyn std::fmt::Display) -> Self {
        Fault::Store {
            what,
            reason: error.to_string(),
        }
    }
}
