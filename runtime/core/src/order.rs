//! What the leader tells a worker, and what a worker reports. Both are repeated until they are
//! acknowledged, so both are idempotent: an incarnation is started or ended once.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::exit::ExitReason;
use crate::id::{ActorId, HostId, Incarnation, JobId, NodeId};
use crate::secret::Secret;
use crate::spec::{ActorSpec, JobFile, Program};

/// An instruction to a worker. Carried in a message that names the leader's term.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Run this incarnation of an actor.
    Start(Box<StartActor>),
    /// End this incarnation of an actor; kill it when the grace is over.
    Stop {
        /// The actor.
        actor: ActorId,
        /// Which incarnation; another one is left alone.
        incarnation: Incarnation,
        /// How long it may take to end by itself, in milliseconds.
        grace_ms: u64,
    },
    /// The node is about to go: tell the hosts.
    Notice {
        /// When it will be gone, in milliseconds since the Unix epoch.
        deadline_ms: u64,
    },
    /// The notice is withdrawn.
    NoticeWithdrawn,
    /// A job is over, on all nodes: what it left behind is not needed any more. Sent once, to every
    /// worker that is connected; one that is not finds out by the job's silence.
    JobEnded {
        /// The job.
        job: JobId,
    },
}

impl Order {
    /// A short stable word for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Order::Start(_) => "start",
            Order::Stop { .. } => "stop",
            Order::Notice { .. } => "notice",
            Order::NoticeWithdrawn => "notice_withdrawn",
            Order::JobEnded { .. } => "job_ended",
        }
    }
}

/// Everything a worker needs to run one incarnation of an actor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartActor {
    /// The actor.
    pub actor: ActorId,
    /// This start's fencing token.
    pub incarnation: Incarnation,
    /// The job it belongs to.
    pub job: JobId,
    /// The program that knows its type.
    pub program: Program,
    /// What it is.
    pub spec: ActorSpec,
    /// Arguments, for a driver.
    pub args: Vec<String>,
    /// Environment of the host process.
    pub env: BTreeMap<String, String>,
    /// Files of the job, for the working directory.
    pub files: Vec<JobFile>,
    /// Secrets of the job, for the environment of the host process: sealed in an order that comes
    /// from the tables, opened in the one that a worker is sent.
    pub secrets: BTreeMap<String, Secret>,
}

/// Something that happened on a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerEvent {
    /// An actor runs, and takes calls at this address.
    ActorStarted {
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
        /// The host process that runs it.
        host: HostId,
        /// Where the host takes calls: `ip:port` of its QUIC endpoint.
        call_address: String,
        /// The host's process id, for people.
        pid: u32,
    },
    /// An actor ended.
    ActorExited {
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
        /// Why.
        reason: ExitReason,
    },
    /// The machine will be taken away.
    Notice {
        /// When, in milliseconds since the Unix epoch.
        deadline_ms: u64,
        /// Who says so: `file`, `sigterm`, `command`, `aws` …
        source: String,
    },
    /// The notice is withdrawn.
    NoticeWithdrawn,
}

impl WorkerEvent {
    /// A short stable word for metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            WorkerEvent::ActorStarted { .. } => "actor_started",
            WorkerEvent::ActorExited { .. } => "actor_exited",
            WorkerEvent::Notice { .. } => "notice",
            WorkerEvent::NoticeWithdrawn => "notice_withdrawn",
        }
    }
}

/// Where an actor can be called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActorAddress {
    /// The actor.
    pub actor: ActorId,
    /// Which incarnation lives there.
    pub incarnation: Incarnation,
    /// The node it runs on.
    pub node: NodeId,
    /// `ip:port` of its host's QUIC endpoint.
    pub call_address: String,
}
