//! The driver: one thread that owns the Raft state machine, the log and the tables. This file
//! opens the log, and starts, paces and ends the thread; `node_loop` is what it does.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use mobula_core::clock::Clock;
use mobula_core::config::RaftConfig;
use mobula_core::control::{ModuleId, StateModule};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_storage::engine::{Engine, RocksEngine, RocksSnapshot};
use mobula_storage::raft_log::{CommittedConflict, LostEntries, RaftLog};
use raft::{RawNode, ReadOnlyOption};
use tokio::sync::watch;

use super::agreement::PeerState;
use super::apply::Applier;
use super::chance::Chance;
use super::inputs::{Input, InputReceiver, InputSender};
use super::log_clock::LogClock;
use super::membership::{GroupView, HeadsModule};
use super::node_loop::{Fault, Loop, LoopParts};
use super::proposals::{Leadership, RaftHandle};
use super::transport::Peers;
use crate::dispatcher::EffectSender;
use crate::error::HeadError;

/// How large messages of entries may become. At 256 messages in flight that is 64 MiB a follower.
const MESSAGE_BYTES_MAX: u64 = 256 * 1024;

/// Messages of entries on their way to one follower.
const MESSAGES_IN_FLIGHT_MAX: usize = 256;

/// Proposals that are in the log and not yet committed; past it they are refused as overload.
const UNCOMMITTED_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// How much is applied in one go, so that ticks are not held up.
const COMMITTED_BYTES_PER_READY_MAX: u64 = 4 * 1024 * 1024;

/// How many inputs are taken before one `ready`: together they are one write to the log.
const INPUTS_PER_READY_MAX: usize = 1024;

/// Ticks that are made up for after a pause, of the thread or of the whole machine: enough for a
/// slow fsync. After a longer one others may lead already, and all ticks at once would only make
/// this head stand against them.
const TICKS_MADE_UP_MAX: u32 = 4;

/// How long a head whose state is wrong lives on, so that what it has told of itself gets away.
const LAST_WORD: Duration = Duration::from_secs(1);

/// What an empty log becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EmptyLog {
    /// A new group, of which this head is the only member.
    BecomesGroup,
    /// That of a new member: it stays empty until the leader sends a snapshot.
    Waits,
}

/// What the driver needs to start.
pub(crate) struct DriverOptions<S = RocksSnapshot> {
    pub(crate) raft_id: u64,
    pub(crate) empty_log: EmptyLog,
    pub(crate) raft: RaftConfig,
    pub(crate) modules: BTreeMap<ModuleId, Arc<dyn StateModule>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) effects: EffectSender,
    pub(crate) peers: Box<dyn Peers<S>>,
    pub(crate) chance: Chance,
}

/// A log that was opened, and how to follow what becomes of it.
pub(crate) struct Opened<E: Engine> {
    pub(crate) state: Loop<E>,
    pub(crate) leadership: watch::Receiver<Leadership>,
    pub(crate) group: watch::Receiver<Arc<GroupView>>,
    pub(crate) peer_states: watch::Receiver<Vec<PeerState>>,
    pub(crate) clock: Arc<LogClock>,
}

/// Whether the log in `engine` is nobody's: a member that had one before must not begin anew under
/// its id, for it could vote twice.
pub(crate) fn is_log_lost<E: Engine + Clone>(engine: &E) -> Result<bool, HeadError> {
    let log = RaftLog::open(engine.clone()).map_err(|error| HeadError::Log(error.to_string()))?;
    let member = log.member();
    let member = member.map_err(|error| HeadError::Log(error.to_string()))?;
    Ok(member.is_none() && !is_planted(Mutant::WipedDiskRejoins))
}

/// Opens the log of `engine` as the one of member `options.raft_id`.
pub(crate) fn open<E: Engine + Clone>(
    engine: E,
    options: DriverOptions<E::Snapshot>,
    now: Instant,
) -> Result<Opened<E>, HeadError> {
    let failed = |error: &dyn std::fmt::Display| HeadError::Log(error.to_string());
    let log = RaftLog::open(engine).map_err(|error| failed(&error))?;
    log.bind_member(options.raft_id)
        .map_err(|error| failed(&error))?;
    if let Some(index) = log.diverged_at().map_err(|error| failed(&error))? {
        let raft_id = options.raft_id;
        return Err(HeadError::Diverged { raft_id, index });
    }
    if let Some(lost) = log.lost_entries().map_err(|error| failed(&error))? {
        let raft_id = options.raft_id;
        return Err(HeadError::LostEntries { raft_id, lost });
    }
    if log.is_empty() && options.empty_log == EmptyLog::BecomesGroup {
        log.bootstrap(&[options.raft_id])
            .map_err(|error| failed(&error))?;
    }
    let logger = slog::Logger::root(SlogToTracing, slog::o!());
    let config = raft_config(options.raft_id, &options.raft, log.applied().index);
    let mut node = RawNode::new(&config, log.clone(), &logger).map_err(|error| failed(&error))?;
    // A group of one need not wait for an election timeout to learn that nobody else leads.
    if log.conf_state().voters == [options.raft_id] {
        node.campaign().map_err(|error| failed(&error))?;
    }
    let mut modules = options.modules;
    modules.insert(ModuleId::HEADS, Arc::new(HeadsModule));
    let applier = Applier::new(log.engine().clone(), modules);
    let (leadership, leadership_receiver) = watch::channel(Leadership::default());
    let group = GroupView::of(&applier.reader(), &log.conf_state());
    let (group, group_receiver) = watch::channel(group);
    let (peer_states, peer_states_receiver) = watch::channel(Vec::new());
    let clock = Arc::new(LogClock::new(options.clock));
    let parts = LoopParts {
        node,
        log,
        applier,
        clock: clock.clone(),
        effects: options.effects,
        peers: options.peers,
        leadership,
        group,
        peer_states,
        config: options.raft,
        life: options.chance.life,
        elections: options.chance.elections,
    };
    Ok(Opened {
        state: Loop::new(parts, now),
        leadership: leadership_receiver,
        group: group_receiver,
        peer_states: peer_states_receiver,
        clock,
    })
}

/// The running driver.
pub(crate) struct Driver {
    inputs: InputSender,
    /// Gives why it has ended, where that was not for being told to.
    thread: std::thread::JoinHandle<Option<DriverEnd>>,
}

/// Why the thread has ended by itself. All else of a head ends with it, and knows less.
#[derive(Debug)]
pub(crate) enum DriverEnd {
    /// The log lacks what this head has acknowledged.
    LostEntries(LostEntries),
    /// The leader's log is another one than what is committed here.
    CommittedConflict(CommittedConflict),
    /// It panicked, with this message.
    Panicked(String),
}

impl Driver {
    /// Opens the log of `engine` and starts the thread, which takes what comes through `inputs`.
    pub(crate) fn start(
        engine: RocksEngine,
        inputs: (InputSender, InputReceiver),
        options: DriverOptions,
    ) -> Result<(Driver, RaftHandle), HeadError> {
        let tick = Duration::from_millis(options.raft.tick_ms);
        let opened = open(engine, options, Instant::now())?;
        let (inputs, receiver) = inputs;
        let state = opened.state;
        let thread = std::thread::Builder::new()
            .name("raft".into())
            .spawn(move || {
                let ended = run(state, &receiver, tick);
                ended.err().map(|fault| take_end(&fault))
            })
            .map_err(|error| HeadError::Log(error.to_string()))?;
        let handle = RaftHandle {
            inputs: inputs.clone(),
            leadership: opened.leadership,
            group: opened.group,
            peer_states: opened.peer_states,
            clock: opened.clock,
        };
        Ok((Driver { inputs, thread }, handle))
    }

    /// Ends the thread and waits for it. Says why it had ended before, if it had.
    pub(crate) async fn stop(self) -> Option<DriverEnd> {
        let joined = tokio::task::spawn_blocking(move || {
            self.inputs.stop();
            self.thread.join()
        })
        .await;
        match joined {
            Ok(Ok(ended)) => ended,
            Ok(Err(panic)) => Some(DriverEnd::Panicked(text_of(&*panic))),
            Err(error) => Some(DriverEnd::Panicked(error.to_string())),
        }
    }
}

/// The message of a panic.
fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "its message is no text".to_owned())
}

/// Works until it is told to stop, or nobody is left to tell it anything.
fn run<E: Engine>(
    mut state: Loop<E>,
    inputs: &InputReceiver<E::Snapshot>,
    tick: Duration,
) -> Result<(), Fault> {
    let mut next_tick = Instant::now() + tick;
    while take_inputs(&mut state, inputs, next_tick)? {
        let oldest = Instant::now().checked_sub(tick * TICKS_MADE_UP_MAX);
        next_tick = oldest.map_or(next_tick, |oldest| next_tick.max(oldest));
        while next_tick <= Instant::now() {
            state.tick();
            next_tick += tick;
        }
        state.settle()?;
        state.compact_if_due()?;
    }
    Ok(())
}

/// Waits for the first input until `until`, then takes what else is there. False: stop.
fn take_inputs<E: Engine>(
    state: &mut Loop<E>,
    inputs: &InputReceiver<E::Snapshot>,
    until: Instant,
) -> Result<bool, Fault> {
    let wait = until.saturating_duration_since(Instant::now());
    let mut next = match inputs.queue.recv_timeout(wait) {
        Ok(input) => Some(input),
        Err(RecvTimeoutError::Timeout) => return Ok(true),
        Err(RecvTimeoutError::Disconnected) => return Ok(false),
    };
    let now = Instant::now();
    // One more than the bound is taken out of the queue.
    for taken in 0..=INPUTS_PER_READY_MAX {
        let Some(input) = next.take() else { break };
        inputs.taken(&input);
        if matches!(input, Input::Stop) {
            return Ok(false);
        }
        state.take(input, now)?;
        if taken < INPUTS_PER_READY_MAX {
            next = inputs.queue.try_recv().ok();
        }
    }
    Ok(true)
}

/// Gives why this thread ends, where the fault is about entries that this log, or the leader's, lacks: the
/// head then ends in order, and without this thread it neither votes nor answers.
///
/// Any other fault ends the process here: after a failed write nobody knows what is on disk, and a state
/// that is not the majority's must answer nobody.
fn take_end(fault: &Fault) -> DriverEnd {
    // Whoever starts heads again may tell by the code that this one will not come up.
    let code = match fault {
        Fault::Store { .. } => {
            tracing::error!(%fault, "ending the process, for what is on disk is unknown");
            70
        }
        Fault::Diverged(_) => {
            tracing::error!(%fault, "ending the process, for its state is wrong");
            // Without this thread nothing is answered from that state any more.
            std::thread::sleep(LAST_WORD);
            65
        }
        Fault::LostEntries(lost) => {
            tracing::error!("this head ends, for its log lacks entries that it has acknowledged");
            return DriverEnd::LostEntries(*lost);
        }
        Fault::CommittedConflict(conflict) => {
            tracing::error!("this head ends, for its leader lacks entries that are committed here");
            return DriverEnd::CommittedConflict(*conflict);
        }
    };
    eprintln!("mobula head: {fault}");
    std::process::exit(code);
}

fn raft_config(raft_id: u64, config: &RaftConfig, applied: u64) -> raft::Config {
    raft::Config {
        id: raft_id,
        election_tick: config.election_ticks,
        heartbeat_tick: config.heartbeat_ticks,
        applied,
        max_size_per_msg: MESSAGE_BYTES_MAX,
        max_inflight_msgs: MESSAGES_IN_FLIGHT_MAX,
        check_quorum: true,
        pre_vote: true,
        read_only_option: ReadOnlyOption::Safe,
        max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
        max_committed_size_per_ready: COMMITTED_BYTES_PER_READY_MAX,
        ..raft::Config::default()
    }
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
