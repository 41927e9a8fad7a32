//! The driver: one thread that owns the Raft state machine, the log and the tables.
//!
//! Inputs are taken in bulk before each `ready`, so that many proposals share one fsync.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use mobula_core::clock::Clock;
use mobula_core::codec;
use mobula_core::config::RaftConfig;
use mobula_core::control::{Command, ModuleId, StateModule};
use mobula_storage::engine::{Durability, RocksEngine};
use mobula_storage::raft_log::{LogPoint, RaftLog};
use raft::prelude::Entry;
use raft::{RawNode, ReadOnlyOption, ReadState, StateRole};
use tokio::sync::{oneshot, watch};

use super::apply::{AppliedEntry, Applier};
use super::proposals::{
    INPUT_CAPACITY, Input, Leadership, Outcome, ProposeError, RaftHandle, TableView,
};
use crate::dispatcher::EffectSender;
use crate::error::HeadError;

/// How many inputs are taken before one `ready`: together they are one write to the log.
const INPUTS_PER_READY_MAX: usize = 1024;

/// How many reads may wait for their index.
const READS_MAX: usize = 4096;

/// How large messages of entries may become. At 256 messages in flight that is 64 MiB a follower.
const MESSAGE_BYTES_MAX: u64 = 256 * 1024;

/// Proposals that are in the log and not yet committed; past it they are refused as overload.
const UNCOMMITTED_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// How much is applied in one go, so that ticks are not held up.
const COMMITTED_BYTES_PER_READY_MAX: u64 = 4 * 1024 * 1024;

/// What the driver needs to start.
pub(crate) struct DriverOptions {
    pub(crate) raft_id: u64,
    pub(crate) raft: RaftConfig,
    pub(crate) modules: BTreeMap<ModuleId, Arc<dyn StateModule>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) effects: EffectSender,
}

/// The running driver.
pub(crate) struct Driver {
    inputs: SyncSender<Input>,
    thread: std::thread::JoinHandle<()>,
}

type Reply = oneshot::Sender<Result<Outcome, ProposeError>>;
type ReadReply = oneshot::Sender<Result<TableView, ProposeError>>;

/// A proposal whose entry is in the log.
struct Waiting {
    term: u64,
    reply: Reply,
}

struct Loop {
    node: RawNode<RaftLog<RocksEngine>>,
    log: RaftLog<RocksEngine>,
    applier: Applier,
    clock: Arc<dyn Clock>,
    effects: EffectSender,
    leadership: watch::Sender<Leadership>,
    config: RaftConfig,
    /// By index of their entry.
    waiting: BTreeMap<u64, Waiting>,
    /// By the context that was given to `read_index`.
    asked_reads: BTreeMap<u64, ReadReply>,
    /// Reads with a known index that is not applied yet.
    confirmed_reads: VecDeque<(u64, ReadReply)>,
    next_read: u64,
    /// Whether an entry of the present term is applied, so that the tables are complete.
    led_term_applied: u64,
    bytes_since_compaction: u64,
}

impl Driver {
    /// Opens the log of `engine` and starts the thread. A fresh log becomes a group of one.
    pub(crate) fn start(
        engine: RocksEngine,
        options: DriverOptions,
    ) -> Result<(Driver, RaftHandle), HeadError> {
        let log = RaftLog::open(engine).map_err(|error| HeadError::Log(error.to_string()))?;
        if log.is_empty() {
            log.bootstrap(&[options.raft_id])
                .map_err(|error| HeadError::Log(error.to_string()))?;
        }
        let config = raft::Config {
            id: options.raft_id,
            election_tick: options.raft.election_ticks,
            heartbeat_tick: options.raft.heartbeat_ticks,
            applied: log.applied().index,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: 256,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_PER_READY_MAX,
            ..raft::Config::default()
        };
        let logger = slog::Logger::root(SlogToTracing, slog::o!());
        let mut node = RawNode::new(&config, log.clone(), &logger)
            .map_err(|error| HeadError::Log(error.to_string()))?;
        // A group of one need not wait for an election timeout to learn that nobody else leads.
        if log.conf_state().voters == [options.raft_id] {
            node.campaign()
                .map_err(|error| HeadError::Log(error.to_string()))?;
        }
        let applier = Applier::new(log.engine().clone(), options.modules);
        let (inputs, receiver) = sync_channel(INPUT_CAPACITY);
        let (leadership, leadership_receiver) = watch::channel(Leadership::default());
        let state = Loop {
            node,
            log,
            applier,
            clock: options.clock,
            effects: options.effects,
            leadership,
            config: options.raft,
            waiting: BTreeMap::new(),
            asked_reads: BTreeMap::new(),
            confirmed_reads: VecDeque::new(),
            next_read: 0,
            led_term_applied: 0,
            bytes_since_compaction: 0,
        };
        let thread = std::thread::Builder::new()
            .name("raft".into())
            .spawn(move || state.run(receiver))
            .map_err(|error| HeadError::Log(error.to_string()))?;
        let handle = RaftHandle {
            inputs: inputs.clone(),
            leadership: leadership_receiver,
        };
        Ok((Driver { inputs, thread }, handle))
    }

    /// Ends the thread and waits for it.
    pub(crate) async fn stop(self) {
        let joined = tokio::task::spawn_blocking(move || {
            // An error means that the thread has ended already.
            let _ = self.inputs.send(Input::Stop);
            self.thread.join()
        })
        .await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the raft thread panicked");
        }
    }
}

impl Loop {
    fn run(mut self, inputs: Receiver<Input>) {
        let tick = Duration::from_millis(self.config.tick_ms);
        let mut next_tick = Instant::now() + tick;
        loop {
            if !self.take_inputs(&inputs, next_tick) {
                return;
            }
            let now = Instant::now();
            while next_tick <= now {
                self.node.tick();
                next_tick += tick;
            }
            while self.node.has_ready() {
                self.handle_ready();
            }
            self.publish_leadership();
            self.compact_if_due();
        }
    }

    /// Waits for the first input until `until`, then takes what else is there. False: stop.
    fn take_inputs(&mut self, inputs: &Receiver<Input>, until: Instant) -> bool {
        let first = match receive_until(inputs, until) {
            Received::Input(input) => input,
            Received::Timeout => return true,
            Received::Closed => return false,
        };
        let mut next = Some(first);
        let mut count = 0;
        while let Some(input) = next {
            match input {
                Input::Propose { command, reply } => self.propose(command, reply),
                Input::Read { reply } => self.read(reply),
                Input::Stop => return false,
            }
            count += 1;
            next = if count < INPUTS_PER_READY_MAX {
                inputs.try_recv().ok()
            } else {
                None
            };
        }
        true
    }

    fn propose(&mut self, mut command: Command, reply: Reply) {
        // raft-rs forwards a follower's proposals and loses the reply, so this is checked first.
        if self.node.raft.state != StateRole::Leader {
            let _ = reply.send(Err(self.not_leader()));
            return;
        }
        command.now_ms = self.clock.now_ms();
        let data = codec::encode_plain(&command);
        self.bytes_since_compaction += data.len() as u64;
        match self.node.propose(Vec::new(), data) {
            Ok(()) => {
                let index = self.node.raft.raft_log.last_index();
                self.waiting.insert(
                    index,
                    Waiting {
                        term: self.node.raft.term,
                        reply,
                    },
                );
            }
            Err(raft::Error::ProposalDropped) => {
                let why = "8 MiB of commands are not committed yet";
                let _ = reply.send(Err(ProposeError::Overloaded(why)));
            }
            Err(error) => {
                tracing::warn!(%error, "proposal refused by raft");
                let _ = reply.send(Err(self.not_leader()));
            }
        }
    }

    fn read(&mut self, reply: ReadReply) {
        // Contexts of earlier reads whose askers gave up are dropped here, so that the map is
        // bounded by those who really wait.
        self.asked_reads.retain(|_, waiting| !waiting.is_closed());
        if self.asked_reads.len() >= READS_MAX {
            let _ = reply.send(Err(ProposeError::Overloaded("4096 reads are waiting")));
            return;
        }
        self.next_read += 1;
        self.asked_reads.insert(self.next_read, reply);
        self.node.read_index(self.next_read.to_le_bytes().to_vec());
    }

    fn not_leader(&self) -> ProposeError {
        let leader = self.node.raft.leader_id;
        ProposeError::NotLeader {
            leader: (leader != raft::INVALID_ID).then_some(leader),
        }
    }

    fn handle_ready(&mut self) {
        let mut ready = self.node.ready();
        self.refuse_messages(&ready.take_messages());
        let mut write = self.log.begin();
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
            self.log
                .commit(write, durability)
                .unwrap_or_else(|error| abort("write the log", &error));
        }
        self.refuse_messages(&ready.take_persisted_messages());
        self.confirm_reads(ready.take_read_states());
        let committed = ready.take_committed_entries();
        self.apply(&committed);
        let mut light = self.node.advance(ready);
        self.refuse_messages(&light.take_messages());
        let committed = light.take_committed_entries();
        self.apply(&committed);
        self.node.advance_apply();
        self.answer_reads();
    }

    /// A group of one has nobody to write to; membership (and with it a transport) is checked when
    /// the head starts.
    fn refuse_messages(&self, messages: &[raft::prelude::Message]) {
        if let Some(message) = messages.first() {
            tracing::error!(to = message.to, "a raft message has no way to its receiver");
        }
    }

    fn apply(&mut self, entries: &[Entry]) {
        let Some(last) = entries.last() else { return };
        let mut write = self.log.begin();
        let run = self.applier.apply(entries, write.batch_mut());
        write.set_applied(LogPoint {
            index: last.index,
            term: last.term,
        });
        self.log
            .commit(write, Durability::Buffered)
            .unwrap_or_else(|error| abort("write the tables", &error));
        self.led_term_applied = self.led_term_applied.max(last.term);
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
                Err(self.not_leader())
            };
            // Whoever asked may have given up.
            let _ = waiting.reply.send(answer);
        }
        self.effects.send(run.effects);
    }

    fn confirm_reads(&mut self, states: Vec<ReadState>) {
        for state in states {
            let Ok(context) = <[u8; 8]>::try_from(state.request_ctx.as_slice()) else {
                continue;
            };
            if let Some(reply) = self.asked_reads.remove(&u64::from_le_bytes(context)) {
                self.confirmed_reads.push_back((state.index, reply));
            }
        }
    }

    fn answer_reads(&mut self) {
        let applied = self.log.applied().index;
        while self
            .confirmed_reads
            .front()
            .is_some_and(|(index, _)| *index <= applied)
        {
            let Some((_, reply)) = self.confirmed_reads.pop_front() else {
                return;
            };
            if !reply.is_closed() {
                let _ = reply.send(Ok(self.applier.reader()));
            }
        }
    }

    fn publish_leadership(&mut self) {
        let raft = &self.node.raft;
        let is_leader = raft.state == StateRole::Leader && self.led_term_applied == raft.term;
        let next = Leadership {
            is_leader,
            term: raft.term,
            leader: (raft.leader_id != raft::INVALID_ID).then_some(raft.leader_id),
            applied_index: self.log.applied().index,
            first_log_index: self.log.truncated().index + 1,
        };
        self.leadership.send_if_modified(|now| {
            // Indexes alone wake nobody.
            let changed =
                (now.is_leader, now.term, now.leader) != (next.is_leader, next.term, next.leader);
            *now = next;
            changed
        });
        if raft.state != StateRole::Leader && !self.waiting.is_empty() {
            for (_, waiting) in std::mem::take(&mut self.waiting) {
                let _ = waiting
                    .reply
                    .send(Err(ProposeError::Unknown("leadership was lost")));
            }
        }
    }

    fn compact_if_due(&mut self) {
        let applied = self.log.applied().index;
        let first = self.log.truncated().index;
        let entries = applied.saturating_sub(first);
        let due = entries >= self.config.compact_entries + self.config.keep_entries
            || self.bytes_since_compaction >= self.config.compact_bytes;
        let target = applied.saturating_sub(self.config.keep_entries);
        if !due || target <= first {
            return;
        }
        let mut write = self.log.begin();
        self.log
            .compact_to(&mut write, target)
            .and_then(|()| self.log.commit(write, Durability::Buffered))
            .unwrap_or_else(|error| abort("compact the log", &error));
        self.bytes_since_compaction = 0;
        tracing::info!(from = first, to = target, "log compacted");
    }
}

enum Received {
    Input(Input),
    Timeout,
    Closed,
}

fn receive_until(inputs: &Receiver<Input>, until: Instant) -> Received {
    match inputs.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(input) => Received::Input(input),
        Err(RecvTimeoutError::Timeout) => Received::Timeout,
        Err(RecvTimeoutError::Disconnected) => Received::Closed,
    }
}

/// Ends the process: after a failed write nobody knows what is on disk.
fn abort(what: &str, error: &dyn std::fmt::Display) -> ! {
    tracing::error!(%error, "cannot {what}; ending the process, for what is on disk is unknown");
    eprintln!("mobula head: cannot {what}: {error}");
    std::process::exit(70);
}

/// raft-rs logs through slog; this hands its lines on.
struct SlogToTracing;

impl slog::Drain for SlogToTracing {
    type Ok = ();
    type Err = slog::Never;

    fn log(
        &self,
        record: &slog::Record<'_>,
        _values: &slog::OwnedKVList,
    ) -> Result<(), slog::Never> {
        match record.level() {
            slog::Level::Critical | slog::Level::Error => {
                tracing::error!(target: "raft", "{}", record.msg());
            }
            slog::Level::Warning => tracing::warn!(target: "raft", "{}", record.msg()),
            _ => tracing::debug!(target: "raft", "{}", record.msg()),
        }
        Ok(())
    }
}
