//! The head's core for a simulator: the Raft loop, the tables and the modules of a real head, over
//! an engine in memory, without a thread, and with time, chance and the network given from outside.
//!
//! It is the loop that a head's own thread drives (`raft/node_loop.rs`), and not a second one. What
//! stands around it in a process (connections, tasks of the leader, the API) is not here; whoever
//! simulates plays that part.
//!
//! How to drive it: give it what happened ([`HeadCore::propose`], [`HeadCore::step`],
//! [`HeadCore::tick`] …), call [`HeadCore::settle`], look at the replies. After a [`DiskFault`](mobula_storage::engine::DiskFault) the
//! core is to be dropped, as a process ends; what the engine kept is where the next one begins.
//!
//! Not part of the crate's interface for users.

mod reference;

use std::sync::Arc;
use std::time::Instant;

use mobula_core::clock::Clock;
use mobula_core::config::RaftConfig;
use mobula_core::control::{Command, Effect, ModuleId, StateModule, Subject};
use mobula_core::id::SessionId;
use mobula_storage::engine::{Engine, MemoryEngine, MemorySnapshot};
use mobula_storage::raft_log::RaftLog;
use mobula_storage::snapshot::SnapshotInstall;
use mobula_storage::tables::TablesReader;
use mobula_wire::raft::StateClaim;
use raft::prelude::Message;
use tokio::sync::oneshot::{self, Receiver};
use tokio::sync::watch;

use crate::dispatcher::{EffectReceiver, effect_queue};
use crate::raft::simulation::{
    Chance, DriverOptions, ElectionTimeouts, Fault, GroupChange, HeadCommand, Input, LogClock,
    Loop, Peers, PinnedTables, open,
};
use crate::raft::{
    ChangeError, EmptyLog, GroupView, Leadership, Member, Outcome, PeerState, ProposeError,
    allocated_id, module_revisions,
};
use crate::watch::Changes;

pub use reference::{Reference, rows_sum};

/// The tables as one head had them at one moment.
pub type View = TablesReader<MemorySnapshot>;

/// The rows that a simulated head can receive in a snapshot.
const ROWS_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// What a core starts with.
pub struct CoreOptions {
    /// Its id in Raft.
    pub raft_id: u64,
    /// Whether an empty log becomes a group of one; otherwise it waits for a snapshot.
    pub founds_group: bool,
    /// Whether this member had a log before: then an empty one is refused.
    pub had_log: bool,
    /// Raft's settings.
    pub raft: RaftConfig,
    /// Time, as this head's machine tells it.
    pub clock: Arc<dyn Clock>,
    /// Replicated modules, the scheduler among them.
    pub modules: Vec<Arc<dyn StateModule>>,
    /// From what election timeouts are drawn, with member and term.
    pub seed: u64,
    /// Told by no other life of any head.
    pub life: u64,
}

/// The network, as a core sees it. It is called at the moment that the head sends.
pub trait Wire: Send {
    /// Takes a message of Raft.
    fn send(&mut self, message: Message);

    /// Takes what the head says of its state, which is for every other member.
    fn send_claim(&mut self, claim: &StateClaim);

    /// Takes a snapshot: the message that announces it, and its frames. Its end must be reported
    /// with [`HeadCore::snapshot_sent`].
    fn send_snapshot(&mut self, message: Message, frames: Vec<Vec<u8>>);
}

/// The store failed, or what it holds is wrong; the core is of no use any more.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct CoreFault(#[from] Fault);

impl CoreFault {
    /// Whether this head was found not to hold what a majority holds, or what it has itself
    /// acknowledged, or its leader not to hold what is committed here. Otherwise it is about its disk.
    #[must_use]
    pub fn is_divergence(&self) -> bool {
        matches!(
            self.0,
            Fault::Diverged(_) | Fault::LostEntries(_) | Fault::CommittedConflict(_)
        )
    }
}

/// A change of the group of heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A new head follows.
    AddLearner(Member),
    /// A learner votes.
    Promote(u64),
    /// A head is a member no more.
    Remove(u64),
}

/// What a head is in Raft, and how far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaftStatus {
    /// The term.
    pub term: u64,
    /// Whether it leads in that term.
    pub leads: bool,
    /// The last committed entry.
    pub committed: u64,
    /// The last applied entry.
    pub applied: u64,
    /// The last entry that is compacted away.
    pub truncated: u64,
}

struct WirePeers(Box<dyn Wire>);

impl Peers<MemorySnapshot> for WirePeers {
    fn send(&mut self, message: Message) {
        self.0.send(message);
    }

    fn send_snapshot(&mut self, message: Message, tables: PinnedTables<MemorySnapshot>) {
        let mut export = tables.export();
        let next = || export.next_frame().expect("memory can be read");
        self.0
            .send_snapshot(message, std::iter::from_fn(next).collect());
    }

    fn send_claim(&mut self, claim: &StateClaim) {
        self.0.send_claim(claim);
    }

    fn set_group(&mut self, _: &GroupView) {}
}

/// The core of one life of a head.
pub struct HeadCore {
    state: Loop<MemoryEngine>,
    leadership: watch::Receiver<Leadership>,
    group: watch::Receiver<Arc<GroupView>>,
    peer_states: watch::Receiver<Vec<PeerState>>,
    effects: EffectReceiver,
    changes: Changes,
    now: Arc<LogClock>,
}

impl HeadCore {
    /// Starts on what `engine` holds. The error is what the process would end with.
    pub fn start(
        engine: MemoryEngine,
        options: CoreOptions,
        wire: Box<dyn Wire>,
        now: Instant,
    ) -> Result<HeadCore, String> {
        let is_lost = || crate::raft::is_log_lost(&engine).map_err(|error| error.to_string());
        if options.had_log && is_lost()? {
            return Err("its log is gone: under the old id it could vote twice".to_owned());
        }
        let (effect_sender, effects) = effect_queue();
        let modules = options.modules.into_iter();
        let options = DriverOptions {
            raft_id: options.raft_id,
            empty_log: if options.founds_group {
                EmptyLog::BecomesGroup
            } else {
                EmptyLog::Waits
            },
            raft: options.raft,
            modules: modules.map(|module| (module.id(), module)).collect(),
            clock: options.clock,
            effects: effect_sender,
            peers: Box::new(WirePeers(wire)) as Box<dyn Peers<MemorySnapshot>>,
            chance: Chance {
                life: options.life,
                elections: ElectionTimeouts::Pinned { seed: options.seed },
            },
        };
        let tables = TablesReader::new(engine.snapshot());
        let opened = open(engine, options, now).map_err(|error| error.to_string())?;
        let changes = Changes::default();
        changes.note_all(&module_revisions(&tables));
        Ok(HeadCore {
            state: opened.state,
            leadership: opened.leadership,
            group: opened.group,
            peer_states: opened.peer_states,
            effects,
            changes,
            now: opened.clock,
        })
    }

    fn take(&mut self, input: Input<MemorySnapshot>, now: Instant) -> Result<(), CoreFault> {
        Ok(self.state.take(input, now)?)
    }

    /// How the states of the other heads compared with this one's, each time that this changes.
    #[must_use]
    pub fn peer_states(&mut self) -> Option<Vec<PeerState>> {
        let is_news = self.peer_states.has_changed().unwrap_or(false);
        is_news.then(|| self.peer_states.borrow_and_update().clone())
    }

    /// Proposes a command; its time is stamped here.
    pub fn propose(
        &mut self,
        session: SessionId,
        seq: u64,
        module: ModuleId,
        payload: Vec<u8>,
        now: Instant,
    ) -> Result<Receiver<Result<Outcome, ProposeError>>, CoreFault> {
        let (reply, answer) = oneshot::channel();
        let command = Command {
            session,
            seq,
            now_ms: 0,
            module,
            payload,
            origin: None,
        };
        self.take(Input::Propose { command, reply }, now)?;
        Ok(answer)
    }

    /// Asks for the tables with everything in them that was acknowledged before.
    pub fn read(
        &mut self,
        now: Instant,
    ) -> Result<Receiver<Result<View, ProposeError>>, CoreFault> {
        let (reply, answer) = oneshot::channel();
        self.take(Input::Read { reply }, now)?;
        Ok(answer)
    }

    /// Asks for a change of the group.
    pub fn change(
        &mut self,
        change: Change,
        now: Instant,
    ) -> Result<Receiver<Result<(), ChangeError>>, CoreFault> {
        let (reply, answer) = oneshot::channel();
        let change = match change {
            Change::AddLearner(member) => GroupChange::AddLearner(member),
            Change::Promote(raft_id) => GroupChange::Promote(raft_id),
            Change::Remove(raft_id) => GroupChange::Remove(raft_id),
        };
        let input = Input::Change {
            change,
            origin: None,
            reply,
        };
        self.take(input, now)?;
        Ok(answer)
    }

    /// Asks to hand leadership over.
    pub fn transfer(
        &mut self,
        to: Option<u64>,
        now: Instant,
    ) -> Result<Receiver<Result<u64, ChangeError>>, CoreFault> {
        let (reply, answer) = oneshot::channel();
        self.take(Input::Transfer { to, reply }, now)?;
        Ok(answer)
    }

    /// Takes a message of another head.
    pub fn step(&mut self, message: Message, now: Instant) -> Result<(), CoreFault> {
        self.take(Input::Step(Box::new(message)), now)
    }

    /// Takes what another head said of its state.
    pub fn claim_arrived(
        &mut self,
        from: u64,
        claim: StateClaim,
        now: Instant,
    ) -> Result<(), CoreFault> {
        self.take(Input::Claim { from, claim }, now)
    }

    /// Takes note that a head cannot be reached.
    pub fn unreachable(&mut self, peer: u64, now: Instant) -> Result<(), CoreFault> {
        self.take(Input::Unreachable(peer), now)
    }

    /// Takes note of how the sending of a snapshot ended.
    pub fn snapshot_sent(&mut self, to: u64, arrived: bool, now: Instant) -> Result<(), CoreFault> {
        self.take(Input::SnapshotSent { to, arrived }, now)
    }

    /// Takes a snapshot; says whether it was taken, as its sender is told. A damaged one is refused
    /// before the core hears of it.
    pub fn snapshot_arrived(
        &mut self,
        message: Message,
        frames: &[Vec<u8>],
        now: Instant,
    ) -> Result<bool, CoreFault> {
        let mut install = SnapshotInstall::new(ROWS_BYTES_MAX);
        let whole = frames.iter().all(|frame| install.push_frame(frame).is_ok());
        if !whole || !install.is_complete() {
            return Ok(false);
        }
        let (reply, mut answer) = oneshot::channel();
        let input = Input::SnapshotArrived {
            message: Box::new(message),
            install: Box::new(install),
            reply,
        };
        self.take(input, now)?;
        Ok(matches!(answer.try_recv(), Ok(Ok(()))))
    }

    /// One tick has passed.
    pub fn tick(&mut self) {
        self.state.tick();
    }

    /// Carries out what follows from everything since the last time.
    pub fn settle(&mut self) -> Result<(), CoreFault> {
        Ok(self.state.settle()?)
    }

    /// Shortens the log when it has become long. To be called after [`HeadCore::settle`].
    pub fn compact_if_due(&mut self) -> Result<(), CoreFault> {
        Ok(self.state.compact_if_due()?)
    }

    /// The time by which this head decides while it leads, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.now.now_ms()
    }

    /// Who leads, as this head knows it.
    #[must_use]
    pub fn leadership(&self) -> Leadership {
        *self.leadership.borrow()
    }

    /// The group as this head knows it.
    #[must_use]
    pub fn group(&self) -> Arc<GroupView> {
        self.group.borrow().clone()
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &RaftLog<MemoryEngine> {
        self.state.log()
    }

    /// Where it stands in Raft.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        let (term, leads, committed) = self.state.standing();
        let log = self.state.log();
        RaftStatus {
            term,
            leads,
            committed,
            applied: log.applied().index,
            truncated: log.truncated().index,
        }
    }

    /// The effects since the last time, and whether some were dropped. Whoever waits for a change is
    /// woken here, as the dispatcher does it.
    pub fn take_effects(&mut self) -> (Vec<Effect>, bool) {
        let mut effects = Vec::new();
        while let Ok(run) = self.effects.runs.try_recv() {
            for (index, effect) in run {
                if let Effect::Changed(subject) = &effect {
                    self.changes.note(subject, index);
                }
                effects.push(effect);
            }
        }
        let lost = &self.effects.lost;
        let are_lost = lost.swap(false, std::sync::atomic::Ordering::AcqRel);
        if are_lost {
            self.changes.note_all(&module_revisions(&self.tables()));
        }
        (effects, are_lost)
    }

    /// The tables as they are here, whatever the others may have decided since.
    #[must_use]
    pub fn tables(&self) -> View {
        TablesReader::new(self.state.log().engine().snapshot())
    }

    /// The index of the entry that changed a module last, as this head would tell a client.
    #[must_use]
    pub fn module_revision(&self, module: ModuleId) -> u64 {
        self.changes.module_revision(module)
    }

    /// A ticket that wakes at the next change of `subject` here.
    #[must_use]
    pub fn follow(&self, subject: Subject) -> watch::Receiver<u64> {
        self.changes.follow(subject)
    }
}

/// The command that gives out a Raft id, and how its answer is read.
#[must_use]
pub fn allocate_id() -> (ModuleId, Vec<u8>) {
    (ModuleId::HEADS, HeadCommand::Allocate.encode())
}

/// The id in the answer to [`allocate_id`].
#[must_use]
pub fn id_in(response: &[u8]) -> Option<u64> {
    allocated_id(response)
}
