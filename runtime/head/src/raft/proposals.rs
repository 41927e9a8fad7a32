//! The async side of the Raft driver: propose a command, read the tables, watch leadership.
//!
//! Invariants:
//! 1. A proposal ends in exactly one of: its outcome, not executed, or unknown.
//! 2. Waiting work is bounded by the input queue; past it callers get `Overloaded`.

use std::sync::Arc;
use std::time::Duration;

use mobula_core::control::{Command, ModuleId};
use mobula_core::error::{ErrorCode, Executed, Rejection};
use mobula_core::id::SessionId;
use mobula_storage::engine::RocksSnapshot;
use mobula_storage::tables::TablesReader;
use tokio::sync::{oneshot, watch};

use super::agreement::PeerState;
use super::inputs::{Input, InputSender, NotTaken};
use super::log_clock::LogClock;
use super::membership::{GroupChange, GroupView};

/// How long to wait for one answer of the driver before saying that nothing is known. Far above
/// an fsync, far below a user's patience.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long one `read_index` may take: it can be dropped silently (a new leader that has not yet
/// committed in its term, a change of role), and then must be asked again. Well above a round trip,
/// and little beside an election.
const READ_ATTEMPT_TIMEOUT: Duration = Duration::from_millis(100);

/// The tables at one moment.
pub(crate) type TableView<S = RocksSnapshot> = TablesReader<S>;

/// What became of an applied command.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its place in the log.
    pub index: u64,
    /// The module's answer.
    pub result: Result<Vec<u8>, Rejection>,
}

/// Why a proposal has no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another head leads, or none does.
    #[error("this head does not lead{}; ask the leader, or try again", leader_hint(*leader))]
    NotLeader {
        /// The Raft id of the leader, where one is known.
        leader: Option<u64>,
    },
    /// The command is larger than what is replicated.
    #[error(
        "a command of {size_bytes} bytes is over the limit of {limit_bytes}: keep bytes in the \
         object store, and only their names in commands"
    )]
    TooLarge {
        /// Its size.
        size_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// The log or the queue before it is full.
    #[error("the head is overloaded: {0}; try again later")]
    Overloaded(&'static str),
    /// Leadership changed, or time ran out, before the outcome was known.
    #[error("the outcome is unknown: {0}; try again with the same stamp")]
    Unknown(&'static str),
    /// The head is shutting down.
    #[error("the head is shutting down")]
    Stopped,
}

fn leader_hint(leader: Option<u64>) -> String {
    leader.map_or_else(String::new, |id| format!(" (member {id} does)"))
}

impl ProposeError {
    /// Whether the command took effect.
    #[must_use]
    pub fn executed(&self) -> Executed {
        match self {
            ProposeError::NotLeader { .. }
            | ProposeError::Overloaded(_)
            | ProposeError::TooLarge { .. } => Executed::No,
            ProposeError::Unknown(_) | ProposeError::Stopped => Executed::Unknown,
        }
    }

    /// The kind of refusal for the API.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            ProposeError::Overloaded(_) => ErrorCode::Overloaded,
            ProposeError::TooLarge { .. } => ErrorCode::InvalidArgument,
            _ => ErrorCode::Unavailable,
        }
    }
}

/// Why the group was not changed, or leadership not handed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// It was not proposed, or nobody knows what became of it.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// It would do harm, or means nobody.
    #[error(transparent)]
    Refused(#[from] Rejection),
    /// The head that leads is to be removed: it hands leadership over first.
    #[error("head {0} leads: leadership is handed over before it is removed")]
    IsLeader(u64),
}

/// How far one member is, as the leader knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberProgress {
    /// Which one.
    pub raft_id: u64,
    /// Whether it was heard of within an election timeout.
    pub active: bool,
    /// `probe`, `replicate` or `snapshot`: how entries get to it.
    pub replication: &'static str,
    /// The last entry that it is known to hold.
    pub matched_index: u64,
}

/// How far the group is, as one head knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupProgress {
    /// The term.
    pub term: u64,
    /// The last committed entry.
    pub committed_index: u64,
    /// By Raft id; empty unless this head leads.
    pub members: Vec<MemberProgress>,
}

/// Who leads, as this head knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leadership {
    /// Whether it is this head, and everything before its term is applied.
    pub is_leader: bool,
    /// The present term.
    pub term: u64,
    /// The Raft id of the leader, where one is known.
    pub leader: Option<u64>,
    /// The last applied index when this was published.
    pub applied_index: u64,
    /// The first index that the log still holds.
    pub first_log_index: u64,
}

/// A handle on the Raft driver; cheap to clone.
#[derive(Clone)]
pub struct RaftHandle {
    pub(super) inputs: InputSender,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) group: watch::Receiver<Arc<GroupView>>,
    pub(super) peer_states: watch::Receiver<Vec<PeerState>>,
    pub(super) clock: Arc<LogClock>,
}

impl RaftHandle {
    /// Puts a command into the log and waits until it is applied. One that is proposed while a call of
    /// the API is served comes of that call.
    pub async fn propose(
        &self,
        session: SessionId,
        seq: u64,
        module: ModuleId,
        payload: Vec<u8>,
    ) -> Result<Outcome, ProposeError> {
        // The driver stamps the time when it takes the command into the log.
        let command = Command {
            session,
            seq,
            now_ms: 0,
            module,
            payload,
            origin: crate::origin::current(),
        };
        let (reply, answer) = oneshot::channel();
        self.send(Input::Propose { command, reply })?;
        wait_for(answer).await?
    }

    /// A consistent view of the tables that holds everything acknowledged before this call.
    pub async fn read(&self) -> Result<TableView, ProposeError> {
        let deadline = tokio::time::Instant::now() + ANSWER_TIMEOUT;
        loop {
            let (reply, answer) = oneshot::channel();
            self.send(Input::Read { reply })?;
            match tokio::time::timeout(READ_ATTEMPT_TIMEOUT, answer).await {
                Ok(Ok(outcome)) => return outcome,
                Ok(Err(_)) => return Err(ProposeError::Stopped),
                Err(_) if tokio::time::Instant::now() < deadline => {}
                Err(_) => return Err(ProposeError::Unknown("no leader confirmed a read in 10 s")),
            }
        }
    }

    /// The tables as this head has them now, whatever the others may have decided since.
    pub(crate) async fn local_view(&self) -> Result<TableView, ProposeError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::LocalView { reply })?;
        wait_for(answer).await
    }

    /// Changes the group, and waits until the change is applied.
    pub(crate) async fn change_group(&self, change: GroupChange) -> Result<(), ChangeError> {
        let (reply, answer) = oneshot::channel();
        let origin = crate::origin::current();
        self.send(Input::Change {
            change,
            origin,
            reply,
        })?;
        wait_for(answer).await?
    }

    /// Begins to hand leadership over; to whom.
    pub(crate) async fn transfer_leadership(&self, to: Option<u64>) -> Result<u64, ChangeError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Transfer { to, reply })?;
        wait_for(answer).await?
    }

    /// How far the group is.
    pub async fn progress(&self) -> Result<GroupProgress, ProposeError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Progress { reply })?;
        wait_for(answer).await
    }

    fn send(&self, input: Input) -> Result<(), ProposeError> {
        self.inputs.send(input).map_err(|error| match error {
            NotTaken::Full => ProposeError::Overloaded("4096 requests are waiting for the log"),
            NotTaken::Stopped => ProposeError::Stopped,
        })
    }

    /// Follows who is in the group.
    #[must_use]
    pub fn group(&self) -> watch::Receiver<Arc<GroupView>> {
        self.group.clone()
    }

    /// How the states of the other heads compared with this one's when they were last compared, by
    /// Raft id.
    #[must_use]
    pub fn peer_states(&self) -> Vec<PeerState> {
        self.peer_states.borrow().clone()
    }

    /// The time by which a leader decides what is due: its own clock's, but never behind the log's.
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Follows who leads.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }
}

async fn wait_for<T>(answer: oneshot::Receiver<T>) -> Result<T, ProposeError> {
    match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(ProposeError::Stopped),
        Err(_) => Err(ProposeError::Unknown("no answer within 10 s")),
    }
}
