//! Worker agent and host process: one Unix socket, in both directions.
//!
//! Invariants:
//! 1. Secrets go through a file that only the owner can read, never through the environment or
//!    the command line, which other users of the machine can see.
//! 2. The agent believes pidfd rather than messages: a host that is gone is gone.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId};
use mobula_core::order::StartActor;
use mobula_core::span::Span;

use crate::session::StorageLocation;

/// The environment variable that names the file with the [`HostBootstrap`]; where it is set, a
/// program that uses the SDK is a host or a driver of a cluster.
pub const BOOTSTRAP_ENV: &str = "MOBULA_BOOTSTRAP";

/// Everything that a new process must know to take part; JSON, mode 0600, deleted once read.
#[derive(Clone, Serialize, Deserialize)]
pub struct HostBootstrap {
    /// The cluster.
    pub cluster_id: String,
    /// Whose code it runs.
    pub job: JobId,
    /// The node it runs on.
    pub node: NodeId,
    /// That node's name.
    pub node_name: String,
    /// This process.
    pub host: HostId,
    /// What it is there for.
    pub role: HostRole,
    /// The agent's Unix socket.
    pub agent_socket: String,
    /// The address to take calls at: an IP of this machine.
    pub listen_ip: String,
    /// The control API's addresses.
    pub api_addresses: Vec<String>,
    /// The cluster's CA certificate, PEM.
    pub ca_pem: String,
    /// This process's certificate, PEM.
    pub certificate_pem: String,
    /// Its private key, PEM.
    pub key_pem: String,
    /// Where bytes at rest are.
    pub storage: StorageLocation,
    /// The node's shared memory for objects; absent: large values stay in their processes.
    pub object_store: Option<ObjectStoreAccess>,
}

/// How a process reaches its node's object store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectStoreAccess {
    /// The Unix socket that carries descriptors.
    pub socket: String,
    /// The secret that says which host the process is.
    pub key: String,
}

/// What a process is there for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostRole {
    /// It runs actors that the agent starts in it.
    Actors,
    /// It runs the job's `main`.
    Driver {
        /// The driver's actor id.
        actor: ActorId,
        /// This start's fencing token.
        incarnation: Incarnation,
        /// Its arguments.
        args: Vec<String>,
    },
}

/// From the agent to a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentMessage {
    /// Run an actor.
    Start(Box<StartActor>),
    /// End an actor.
    Stop {
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
        /// How long it may take, in milliseconds.
        grace_ms: u64,
    },
    /// The machine will be gone at this time.
    Notice {
        /// Milliseconds since the Unix epoch.
        deadline_ms: u64,
    },
    /// It will not.
    NoticeWithdrawn,
    /// End the process.
    Shutdown {
        /// How long it may take, in milliseconds.
        grace_ms: u64,
    },
    /// The next certificate for the process's key; the one before ends soon.
    Certificate {
        /// It, PEM.
        certificate_pem: String,
    },
    /// Other heads than before make up the group now.
    Heads {
        /// The control API's addresses, the leader's first.
        api_addresses: Vec<String>,
    },
    /// Tell what is known here.
    Ask {
        /// The answer repeats it.
        request: u64,
        /// What.
        question: HostQuestion,
    },
    /// The cloud says that it may take the machine away, without saying when; or says so no more.
    Advice {
        /// Whether it says so now.
        stands: bool,
    },
}

/// What an agent asks a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostQuestion {
    /// What it counted.
    Metrics,
    /// What took how long.
    Spans,
}

/// What a host says to that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostAnswer {
    /// What it counted.
    Metrics(HostMetrics),
    /// Its latest spans, oldest first.
    Spans(Vec<Span>),
}

/// What may become of a call, in the order in which [`HostMetrics::calls`] counts them.
pub const CALL_OUTCOMES: [&str; 7] = [
    "ok",
    "user_error",
    "panicked",
    "overloaded",
    "deadline_exceeded",
    "bad_call",
    "other",
];

/// Buckets of durations of calls: from 4 µs, each twice as wide as the one before, to 2 s and more.
pub const CALL_BUCKETS: usize = 21;

/// The upper bound of a bucket, in microseconds; the last one has none.
#[must_use]
pub fn call_bucket_bound_us(bucket: usize) -> u64 {
    4 << bucket.min(CALL_BUCKETS)
}

/// What a host process has counted since its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMetrics {
    /// Actors that live in it.
    pub actors: u64,
    /// Calls that it has taken and not answered.
    pub calls_in_flight: u64,
    /// Calls that it has answered, by [`CALL_OUTCOMES`].
    pub calls: Vec<u64>,
    /// How many of them took how long, by [`call_bucket_bound_us`].
    pub call_buckets: Vec<u64>,
    /// How long they took together, in microseconds.
    pub call_total_us: u64,
    /// Spans that were forgotten for want of room.
    pub spans_dropped: u64,
    /// What its actors measure themselves.
    pub own: Vec<OwnSeries>,
}

/// Something that actors measure, under a name and labels of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnSeries {
    /// The metric's name, as Prometheus allows it.
    pub name: String,
    /// Its labels, in the order of their names.
    pub labels: Vec<(String, String)>,
    /// Whether it only grows.
    pub is_counter: bool,
    /// The bits of its value, an `f64`.
    pub value_bits: u64,
}

impl HostMetrics {
    /// Whether it has as many counters as it should: a host may be of another release.
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        self.calls.len() == CALL_OUTCOMES.len() && self.call_buckets.len() == CALL_BUCKETS
    }
}

/// From a host to its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// The first message: ready.
    Hello {
        /// Which host this is.
        host: HostId,
        /// Where it takes calls (`ip:port`).
        call_address: String,
        /// The actor types that its program registers.
        actor_types: Vec<String>,
    },
    /// An actor runs.
    Started {
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// An actor (or the driver) ended.
    Exited {
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
        /// Why.
        reason: ExitReason,
    },
    /// The answer to a question.
    Answer {
        /// That of the question.
        request: u64,
        /// What is known.
        answer: HostAnswer,
    },
}

impl std::fmt::Debug for HostBootstrap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostBootstrap")
            .field("cluster_id", &self.cluster_id)
            .field("job", &self.job)
            .field("node", &self.node)
            .field("host", &self.host)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// Environment for the host process beyond the job's own.
#[must_use]
pub fn host_environment(bootstrap_path: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(BOOTSTRAP_ENV.to_owned(), bootstrap_path.to_owned())])
}
