//! What processes of the simulated cluster send to each other.

use std::fmt;
use std::rc::Rc;

use mobula_core::control::ModuleId;
use mobula_core::error::Rejection;
use mobula_core::id::{ActorId, Incarnation, NodeId, SessionId};
use mobula_core::order::{Order, WorkerEvent};
use mobula_core::resource::Resources;
use mobula_scheduler::Query;
use mobula_wire::raft::StateClaim;
use raft::prelude::Message;

/// Anything on its way.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    /// Head to head.
    Raft(Box<Message>),
    /// Head to head: a snapshot with its bytes.
    Snapshot {
        message: Box<Message>,
        frames: Rc<Vec<Vec<u8>>>,
        /// Which life of the sender sends it.
        life: u64,
    },
    /// Head to head: what its state is.
    Claim(StateClaim),
    /// A head's transport to the head itself: how the sending of a snapshot ended.
    SnapshotEnd { to: u64, arrived: bool, life: u64 },
    /// Client to head.
    Request(Request),
    /// Head to client.
    Reply(Reply),
    /// Worker to head, within a session.
    FromWorker {
        worker: usize,
        session: u64,
        said: WorkerSays,
    },
    /// Head to worker, within a session.
    FromHead { session: u64, said: HeadSays },
}

impl Packet {
    /// What it is, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Packet::Raft(_) => "messages of Raft",
            Packet::Claim(_) => "claims of states",
            Packet::Snapshot { .. } | Packet::SnapshotEnd { .. } => "snapshots",
            Packet::Request(_) => "requests",
            Packet::Reply(_) => "replies",
            Packet::FromWorker { .. } => "messages of workers",
            Packet::FromHead { .. } => "messages to workers",
        }
    }
}

/// What a client asks a head.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Who asks; `None` for a process that needs no answer.
    pub(crate) client: Option<usize>,
    /// Told back in the answer, with the number of the attempt.
    pub(crate) operation: u64,
    pub(crate) attempt: u32,
    pub(crate) ask: Ask,
}

#[derive(Debug, Clone)]
pub(crate) enum Ask {
    Change {
        session: SessionId,
        seq: u64,
        module: ModuleId,
        payload: Vec<u8>,
    },
    Look(Question),
    /// Answered when a module has changed behind this revision, or when it has taken long enough.
    Watch {
        module: ModuleId,
        seen: u64,
    },
}

/// What a client wants to see.
#[derive(Debug, Clone)]
pub(crate) enum Question {
    Scheduler(Query),
    Module(ModuleId, Vec<u8>),
}

/// What a head answers.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) operation: u64,
    pub(crate) attempt: u32,
    pub(crate) answer: Answer,
}

#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// A command was applied.
    Applied {
        index: u64,
        result: Result<Vec<u8>, Rejection>,
    },
    /// The tables, as they were at `applied`.
    Seen { applied: u64, found: Vec<u8> },
    /// The revision of the watched module.
    Watched { revision: u64 },
    /// It was not executed; who leads, where that is known.
    No(Option<u64>),
    /// Nobody knows whether it was or will be executed.
    Unknown,
}

#[derive(Debug, Clone)]
pub(crate) enum WorkerSays {
    Hello {
        name: String,
        boot: String,
        capacity: Resources,
    },
    Renew,
    Event {
        sequence: u64,
        event: WorkerEvent,
    },
}

#[derive(Debug, Clone)]
pub(crate) enum HeadSays {
    Welcome {
        term: u64,
        node: NodeId,
        incarnation: Incarnation,
    },
    /// This head does not serve the worker (any more); who does, where that is known.
    Refused {
        leader: Option<u64>,
    },
    Renewed {
        term: u64,
    },
    Order {
        term: u64,
        order: Order,
    },
    OrdersComplete {
        term: u64,
        standing: Vec<(ActorId, Incarnation)>,
    },
    Acknowledged {
        sequence: u64,
    },
}

/// For whoever reads what happened in a run: an order without what it starts.
impl fmt::Display for HeadSays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeadSays::Order { term, order } => match order {
                Order::Start(start) => {
                    write!(
                        f,
                        "start {} as {} (term {term})",
                        start.actor, start.incarnation
                    )
                }
                other => write!(f, "{other:?} (term {term})"),
            },
            other => write!(f, "{other:?}"),
        }
    }
}
