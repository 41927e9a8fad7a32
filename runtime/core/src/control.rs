//! The replicated core's contract: a command goes in, table writes and effects come out.
//!
//! Invariants:
//! 1. `apply` is a function of (tables, context, payload): no clock, no randomness, no I/O.
//! 2. A rejected command changes nothing; whoever calls `apply` discards its writes.
//! 3. Effects are hints to act; whatever must survive is in the tables, so that a new leader can
//!    rebuild every effect from them.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error::Rejection;
use crate::id::{ActorId, Incarnation, JobId, NodeId, SessionId};
use crate::order::Order;

/// Which replicated module owns a command or a table. Numbers are persisted and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModuleId(pub u8);

impl ModuleId {
    /// The heads themselves: who is a member, and where.
    pub const HEADS: ModuleId = ModuleId(0);
    /// Nodes, jobs, actors, groups, sessions, tokens.
    pub const SCHEDULER: ModuleId = ModuleId(1);
    /// Committed checkpoints of jobs.
    pub const CHECKPOINT: ModuleId = ModuleId(2);
    /// Models and their versions.
    pub const REGISTRY: ModuleId = ModuleId(3);
    /// Endpoints and their replicas.
    pub const SERVING: ModuleId = ModuleId(4);
    /// Monitors, drift events, retrain suggestions.
    pub const DRIFT: ModuleId = ModuleId(5);
    /// Objects that jobs keep.
    pub const KEPT: ModuleId = ModuleId(6);
}

/// One keyed table of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table {
    /// The module that owns it.
    pub module: ModuleId,
    /// Its number within the module; persisted, never reused.
    pub tag: u8,
}

/// One key and its value.
pub type Row = (Vec<u8>, Vec<u8>);

/// Reads of a consistent state of the tables. A storage fault is not an outcome here: it aborts
/// the process, because a replica that cannot read its state must not answer from it.
pub trait Reader {
    /// The value under `key`.
    fn get(&self, table: Table, key: &[u8]) -> Option<Vec<u8>>;

    /// Up to `limit` rows whose key starts with `prefix`, in key order, beginning after `after`.
    fn scan(&self, table: Table, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Vec<Row>;
}

/// Reads and writes of one command; reads see the writes before them.
pub trait Txn: Reader {
    /// Writes `value` under `key`.
    fn put(&mut self, table: Table, key: &[u8], value: Vec<u8>);

    /// Removes `key`, if it is there.
    fn delete(&mut self, table: Table, key: &[u8]);
}

/// A change on its way through the Raft log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The client's exactly-once context, or [`SessionId::INTERNAL`].
    pub session: SessionId,
    /// The command's number within its session.
    pub seq: u64,
    /// The leader's time when it proposed this, in milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// The module that applies it.
    pub module: ModuleId,
    /// The module's own encoding of the change.
    pub payload: Vec<u8>,
    /// Whose call it comes of; `None` for what the heads decide themselves.
    pub origin: Option<Origin>,
}

/// Whose call a command comes of, as the audit log tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// In whose name: a token's name, or a certificate's.
    pub principal: String,
    /// The method of the control API.
    pub call: String,
}

/// What a command is applied under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApplyContext {
    /// The entry's Raft index: unique, growing, and so the source of ids and incarnations.
    pub index: u64,
    /// The entry's Raft term.
    pub term: u64,
    /// Log time: the leader's stamp, made never to go back. Milliseconds since the Unix epoch.
    pub now_ms: u64,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Applied {
    /// The answer to whoever proposed it, in the module's own encoding.
    pub response: Vec<u8>,
    /// What the leader should now do.
    pub effects: Vec<Effect>,
}

impl Applied {
    /// `response`, and whoever watches `module` is woken.
    #[must_use]
    pub fn changed(module: ModuleId, response: Vec<u8>) -> Self {
        Applied {
            response,
            effects: vec![Effect::Changed(Subject::Module(module))],
        }
    }
}

/// Something for the leader to do after a command is applied. Followers drop it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Tell a worker.
    Order {
        /// The worker.
        node: NodeId,
        /// What it should do.
        order: Order,
    },
    /// Wake whoever waits for a change of this.
    Changed(Subject),
    /// Something became pending, or resources became free: run a placement pass.
    Place,
    /// A job is over: tell every worker. A hint only, which nothing rebuilds: a worker that misses
    /// it cleans up later.
    JobEnded(JobId),
}

/// What watchers wait for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A job.
    Job(JobId),
    /// An actor.
    Actor(ActorId),
    /// A node.
    Node(NodeId),
    /// Anything in a domain module.
    Module(ModuleId),
}

/// A part of the replicated state: pure, and plugged into the head.
pub trait StateModule: Send + Sync {
    /// Which commands and tables are its own.
    fn id(&self) -> ModuleId;

    /// Its name in logs and errors.
    fn name(&self) -> &'static str;

    /// Applies one command.
    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection>;

    /// The same for a command whose origin is known, which is how a head applies commands. Only modules
    /// whose rules ask in whose name a command comes implement it.
    fn apply_from(
        &self,
        context: &ApplyContext,
        origin: Option<&Origin>,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let _ = origin;
        self.apply(context, txn, payload)
    }

    /// What a command was about, in a few words of ids and names, for the audit log: never anything of
    /// its contents that could be a secret. `response` is the answer of [`StateModule::apply`], where it
    /// was not refused.
    fn subject(&self, payload: &[u8], response: Option<&[u8]>) -> String {
        let _ = (payload, response);
        self.name().to_owned()
    }

    /// Answers a question from the tables. `now_ms` is for showing ages only.
    fn query(&self, reader: &dyn Reader, now_ms: u64, payload: &[u8])
    -> Result<Vec<u8>, Rejection>;

    /// Whether `caller` may send this command; asked at the API, before anything is proposed.
    fn authorize(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection>;

    /// Whether `caller` may ask this question. A module whose rows belong to jobs refuses hosts of
    /// other jobs; one whose rows are for all, which is the default, refuses nobody.
    fn authorize_query(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let _ = (caller, payload);
        Ok(())
    }

    /// What its tables hold, in numbers for the head's metrics; read whenever somebody asks for them.
    fn gauges(&self, reader: &dyn Reader) -> Vec<TableGauge> {
        let _ = reader;
        Vec::new()
    }
}

/// A number that a module's tables hold. All of one name have the same label, of few values or of those that a table has room
/// for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableGauge {
    /// Its whole name.
    pub name: &'static str,
    /// What it is, for people.
    pub help: &'static str,
    /// A label and its value, if it has one.
    pub label: Option<(&'static str, Cow<'static, str>)>,
    /// The number.
    pub value: u64,
}

/// Who sends a command, as their certificate or token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A person or program with a client token.
    Client,
    /// A worker's agent.
    Node(NodeId),
    /// A host process, acting for one job.
    Host {
        /// The job whose code it runs.
        job: JobId,
        /// The node it runs on.
        node: NodeId,
    },
    /// A head.
    Head,
}

/// A module's leader-only loop: reads the tables, proposes what is missing. It is called again
/// after every change and once in a while, so each call may do a little and must be idempotent.
pub trait Controller: Send {
    /// Its name in logs.
    fn name(&self) -> &'static str;

    /// What to propose now, in order.
    fn reconcile(&mut self, reader: &dyn Reader, now_ms: u64) -> Vec<Proposal>;
}

/// What the tables say about checkpoints in the object store, for the leader's sweep of it. Only
/// who knows the tables may say that bytes are needed no more.
pub trait Retention: Send + Sync {
    /// What to propose before a sweep, so that fewer are kept.
    fn tidy(&self, reader: &dyn Reader, now_ms: u64) -> Vec<Proposal>;

    /// Every checkpoint that is visible.
    fn committed(&self, reader: &dyn Reader) -> Vec<StoredCheckpoint>;

    /// Whether a checkpoint that is not visible may become so. Once the answer was no it stays no.
    fn may_be_committed(
        &self,
        reader: &dyn Reader,
        job: JobId,
        step: u64,
        incarnation: Incarnation,
    ) -> bool;
}

/// Where a checkpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCheckpoint {
    /// Its manifest in the object store.
    pub manifest_path: String,
    /// BLAKE3 of the manifest, in hex.
    pub manifest_digest: String,
}

/// A command that a controller wants applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The module that applies it.
    pub module: ModuleId,
    /// The module's own encoding.
    pub payload: Vec<u8>,
}
