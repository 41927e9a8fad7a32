//! Worker agent and leader: one ordered stream in each direction on the control lane.
//!
//! Invariants:
//! 1. Every message of the leader names its term; the worker drops what is older than the newest
//!    term that it has seen.
//! 2. An event is repeated until it is acknowledged, and is acknowledged only once it is applied.
//! 3. Orders are not acknowledged: what they lead to is an event, and a new session sends all
//!    orders that still stand.

use serde::{Deserialize, Serialize};

use mobula_core::id::{HostId, Incarnation, JobId, NodeId, Term};
use mobula_core::label::Labels;
use mobula_core::order::{Order, WorkerEvent};
use mobula_core::resource::Resources;
use mobula_core::span::Span;

pub use mobula_core::storage::StorageLocation;

/// From a worker's agent to the leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerMessage {
    /// The first message.
    Hello(WorkerHello),
    /// The worker lives and holds on to its lease.
    Renew {
        /// Counts up; the answer repeats it.
        sequence: u64,
    },
    /// Something happened.
    Event {
        /// Counts up; the acknowledgement repeats it.
        sequence: u64,
        /// What happened.
        event: WorkerEvent,
    },
    /// A new host process needs a certificate.
    SignHost {
        /// The answer repeats it.
        request: u64,
        /// The host's certificate request, PEM.
        csr_pem: String,
        /// The job whose code it will run.
        job: JobId,
        /// The host.
        host: HostId,
    },
    /// A piece of a log that was asked for.
    Log {
        /// Repeats that of the question.
        request: u64,
        /// Bytes from the offset that was asked for; empty at the end.
        bytes: Vec<u8>,
        /// Whether a process may still write to it.
        is_open: bool,
    },
    /// The last message of a worker that ended all its hosts and goes: what it ran can be started
    /// elsewhere at once, without waiting for its lease.
    Leaving,
    /// The answer to `Ask`.
    Answer {
        /// That of the question.
        request: u64,
        /// What is known, in the question's own encoding; or why nothing is.
        result: Result<Vec<u8>, String>,
    },
}

/// The largest answer to a question: a control frame, with room for its head.
pub const ANSWER_BYTES_MAX: usize = 960 * 1024;

/// What the leader asks a worker, for somebody who looks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// What it and its hosts count: text, as Prometheus reads it.
    Metrics,
    /// What took how long for a job: a list of [`HostSpans`].
    Spans {
        /// The job.
        job: JobId,
    },
    /// Which logs of a job's processes there are: a list of [`LogFile`].
    Logs {
        /// The job.
        job: JobId,
    },
    /// A piece of one of them: its bytes, empty at the end.
    LogPiece {
        /// The job.
        job: JobId,
        /// The log's name, from the list.
        name: String,
        /// Where to begin, in bytes.
        offset: u64,
        /// How much at most, in bytes.
        limit_bytes: u32,
    },
}

/// The output of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogFile {
    /// Its name, unique among the job's on this worker.
    pub name: String,
    /// How long it is, in bytes, with what was given up at its beginning.
    pub size_bytes: u64,
    /// Whether a process may still write to it.
    pub is_open: bool,
}

/// What one process recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSpans {
    /// The host process; `None` for the agent itself.
    pub host: Option<HostId>,
    /// Its spans.
    pub spans: Vec<Span>,
}

/// Who the worker is and what it offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerHello {
    /// The node's name, as its certificate says.
    pub name: String,
    /// New at each start of the agent: without its hosts an agent is a new incarnation.
    pub boot_id: String,
    /// The version of its binary.
    pub version: String,
    /// What it offers.
    pub capacity: Resources,
    /// Its labels.
    pub labels: Labels,
}

/// Incarnations in one [`HeadMessage::OrdersComplete`]: at 20 bytes each well below what a frame holds.
pub const STANDING_PIECE_MAX: usize = 16_384;

/// From the leader to a worker's agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HeadMessage {
    /// The answer to `Hello`.
    Welcome(Welcome),
    /// The answer to `Renew`.
    Renewed {
        /// The leader's term.
        term: Term,
        /// That of the question.
        sequence: u64,
    },
    /// Do this.
    Order {
        /// The leader's term.
        term: Term,
        /// What to do.
        order: Order,
    },
    /// An event is applied: stop repeating it.
    EventAcknowledged {
        /// That of the event.
        sequence: u64,
    },
    /// The answer to `SignHost`.
    HostSigned {
        /// That of the question.
        request: u64,
        /// The certificate, PEM; or why there is none.
        result: Result<String, String>,
    },
    /// Send a piece of a log.
    ReadLog {
        /// The answer repeats it.
        request: u64,
        /// The actor (or driver) whose host's output is wanted.
        actor: mobula_core::id::ActorId,
        /// Which incarnation of it.
        incarnation: Incarnation,
        /// Where to begin, in bytes.
        offset: u64,
        /// How much at most, in bytes.
        limit_bytes: u32,
    },
    /// The session ends; the reason is for people.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// All standing orders were sent: whatever else the worker runs is to be ended. It comes in as
    /// many messages as it takes, one after the other.
    OrdersComplete {
        /// The leader's term.
        term: Term,
        /// Incarnations that the worker should be running or ending, at most
        /// [`STANDING_PIECE_MAX`] of them.
        standing: Vec<(mobula_core::id::ActorId, Incarnation)>,
        /// Whether there are no more.
        is_last: bool,
    },
    /// Other heads than before make up the group now.
    Heads {
        /// The control API's addresses, the leader's first.
        api_addresses: Vec<String>,
    },
    /// Somebody wants to know something.
    Ask {
        /// The answer repeats it.
        request: u64,
        /// What.
        question: Question,
    },
}

/// What a worker must know to take part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The leader's term.
    pub term: Term,
    /// The node's id.
    pub node: NodeId,
    /// This registration's fencing token.
    pub incarnation: Incarnation,
    /// How long the lease runs without being renewed, in milliseconds.
    pub lease_ms: u64,
    /// How often to renew, in milliseconds.
    pub renew_ms: u64,
    /// Where bytes at rest are.
    pub storage: StorageLocation,
    /// The control API's addresses, for the hosts.
    pub api_addresses: Vec<String>,
}
