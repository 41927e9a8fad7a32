//! The driver: one thread that owns the Raft state machine, the log and the tables. This file
//! starts and ends it; `node_loop` is what it does.

use std::collections::BTreeMap;
use std::sync::Arc;

use mobula_core::clock::Clock;
use mobula_core::config::RaftConfig;
use mobula_core::control::{ModuleId, StateModule};
use mobula_storage::engine::RocksEngine;
use mobula_storage::raft_log::RaftLog;
use raft::{RawNode, ReadOnlyOption};
use tokio::sync::watch;

use super::apply::Applier;
use super::inputs::{InputReceiver, InputSender};
use super::membership::{GroupView, HeadsModule};
use super::node_loop::{Loop, LoopParts};
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

/// What an empty log becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EmptyLog {
    /// A new group, of which this head is the only member.
    BecomesGroup,
    /// That of a new member: it stays empty until the leader sends a snapshot.
    Waits,
}

/// What the driver needs to start.
pub(crate) struct DriverOptions {
    pub(crate) raft_id: u64,
    pub(crate) empty_log: EmptyLog,
    pub(crate) raft: RaftConfig,
    pub(crate) modules: BTreeMap<ModuleId, Arc<dyn StateModule>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) effects: EffectSender,
    pub(crate) inputs: (InputSender, InputReceiver),
    pub(crate) peers: Box<dyn Peers>,
}

/// The running driver.
pub(crate) struct Driver {
    inputs: InputSender,
    thread: std::thread::JoinHandle<()>,
}

impl Driver {
    /// Opens the log of `engine` and starts the thread.
    pub(crate) fn start(
        engine: RocksEngine,
        options: DriverOptions,
    ) -> Result<(Driver, RaftHandle), HeadError> {
        let failed = |error: &dyn std::fmt::Display| HeadError::Log(error.to_string());
        let log = RaftLog::open(engine).map_err(|error| failed(&error))?;
        log.bind_member(options.raft_id)
            .map_err(|error| failed(&error))?;
        if log.is_empty() && options.empty_log == EmptyLog::BecomesGroup {
            log.bootstrap(&[options.raft_id])
                .map_err(|error| failed(&error))?;
        }
        let logger = slog::Logger::root(SlogToTracing, slog::o!());
        let config = raft_config(options.raft_id, &options.raft, log.applied().index);
        let mut node =
            RawNode::new(&config, log.clone(), &logger).map_err(|error| failed(&error))?;
        // A group of one need not wait for an election timeout to learn that nobody else leads.
        if log.conf_state().voters == [options.raft_id] {
            node.campaign().map_err(|error| failed(&error))?;
        }
        let mut modules = options.modules;
        modules.insert(ModuleId::HEADS, Arc::new(HeadsModule));
        let applier = Applier::new(log.engine().clone(), modules);
        let (inputs, receiver) = options.inputs;
        let (leadership, leadership_receiver) = watch::channel(Leadership::default());
        let group = GroupView::of(&applier.reader(), &log.conf_state());
        let (group, group_receiver) = watch::channel(group);
        let state = Loop::new(LoopParts {
            node,
            log,
            applier,
            clock: options.clock,
            effects: options.effects,
            peers: options.peers,
            leadership,
            group,
            config: options.raft,
        });
        let thread = std::thread::Builder::new()
            .name("raft".into())
            .spawn(move || state.run(&receiver))
            .map_err(|error| failed(&error))?;
        let handle = RaftHandle {
            inputs: inputs.clone(),
            leadership: leadership_receiver,
            group: group_receiver,
        };
        Ok((Driver { inputs, thread }, handle))
    }

    /// Ends the thread and waits for it.
    pub(crate) async fn stop(self) {
        let joined = tokio::task::spawn_blocking(move || {
            self.inputs.stop();
            self.thread.join()
        })
        .await;
        if !matches!(joined, Ok(Ok(()))) {
            tracing::error!("the raft thread panicked");
        }
    }
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
