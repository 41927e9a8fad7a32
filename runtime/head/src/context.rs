//! What every part of a running head shares.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::clock::Clock;
use mobula_core::config::LimitsConfig;
use mobula_core::control::{Caller, ModuleId, Reader, StateModule};
use mobula_core::error::{ErrorCode, Executed, Rejection};
use mobula_core::id::{NodeId, SessionId};
use mobula_core::order::Order;
use mobula_net::identity::{AtRest, ClusterCa};
use mobula_net::tcp::ApiConnections;
use mobula_scheduler::{Command, Query, QueryResponse, Response, Scheduler};
use mobula_storage::artifact::ArtifactStore;
use mobula_storage::blob::BlobStore;
use mobula_wire::control::{Empty, Stamp};
use mobula_wire::session::StorageLocation;
use tokio::sync::Semaphore;
use tonic::Status;

use crate::api::{rejected, stamp};
use crate::metrics::HeadMetrics;
use crate::raft::{HeadCommand, Member, ProposeError, RaftHandle};
use crate::sessions::Sessions;
use crate::store_health::StoreHealth;
use crate::sweep::SweepReports;
use crate::timeline::Lives;
use crate::watch::Changes;

/// What every part of a running head shares.
pub(crate) struct HeadContext {
    pub(crate) cluster_id: String,
    pub(crate) raft_id: u64,
    pub(crate) name: String,
    pub(crate) ca: Arc<ClusterCa>,
    /// What seals the secrets of jobs.
    pub(crate) at_rest: AtRest,
    pub(crate) raft: RaftHandle,
    pub(crate) modules: BTreeMap<ModuleId, Arc<dyn StateModule>>,
    pub(crate) sessions: Sessions,
    pub(crate) metrics: HeadMetrics,
    pub(crate) lives: Lives,
    pub(crate) changes: Changes,
    pub(crate) artifacts: ArtifactStore,
    pub(crate) blobs: BlobStore,
    pub(crate) store_health: StoreHealth,
    pub(crate) storage_location: StorageLocation,
    pub(crate) limits: LimitsConfig,
    pub(crate) api_address: SocketAddr,
    /// Who is connected to the control API, in numbers.
    pub(crate) api_connections: ApiConnections,
    pub(crate) cluster_address: SocketAddr,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) started_ms: u64,
    /// How long a host's certificate lives; its agent renews it at half of that.
    pub(crate) host_certificate_ttl: Duration,
    /// What sweeping the object store did.
    pub(crate) sweeps: SweepReports,
    /// One for each job's log that is being read.
    pub(crate) log_streams: Arc<Semaphore>,
    /// One for each backup that is being sent.
    pub(crate) backups: Arc<Semaphore>,
    /// Where a client uploads to before the digest is verified.
    pub(crate) upload_dir: std::path::PathBuf,
}

/// Why a command brought no answer of its module.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum CommandError {
    /// It was not applied, or nobody knows.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// The module refused it; nothing changed.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The module's answer is not what this version expects.
    #[error("the answer of module {module} cannot be read: {reason}")]
    Answer {
        module: &'static str,
        reason: String,
    },
}

impl CommandError {
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            CommandError::Propose(error) => error.code(),
            CommandError::Rejected(rejection) => rejection.code,
            CommandError::Answer { .. } => ErrorCode::Internal,
        }
    }

    pub(crate) fn executed(&self) -> Executed {
        match self {
            CommandError::Propose(error) => error.executed(),
            CommandError::Rejected(_) => Executed::No,
            CommandError::Answer { .. } => Executed::Yes,
        }
    }
}

impl HeadContext {
    /// Proposes a command of any module and gives its raw answer.
    pub(crate) async fn propose(
        &self,
        session: SessionId,
        seq: u64,
        module: ModuleId,
        payload: Vec<u8>,
    ) -> Result<(u64, Vec<u8>), CommandError> {
        let _in_flight = self.metrics.proposing(payload.len());
        let name = self.modules.get(&module).map_or("unknown", |m| m.name());
        let began = std::time::Instant::now();
        let proposed = self.raft.propose(session, seq, module, payload).await;
        let outcome = match &proposed {
            Ok(outcome) if outcome.result.is_ok() => "applied",
            Ok(_) => "refused",
            Err(ProposeError::NotLeader { .. }) => "not_leader",
            Err(ProposeError::Overloaded(_)) => "overloaded",
            Err(_) => "unknown",
        };
        self.metrics.proposed(name, outcome, began.elapsed());
        let outcome = proposed?;
        Ok((outcome.index, outcome.result?))
    }

    /// Has the call that is being served recorded in the audit log, though it changes no table.
    pub(crate) async fn note(&self, subject: &str) -> Result<(), CommandError> {
        let subject = subject.to_owned();
        let command = HeadCommand::Noted { subject }.encode();
        self.propose(SessionId::INTERNAL, 0, ModuleId::HEADS, command)
            .await?;
        Ok(())
    }

    /// Proposes a command of the scheduler.
    pub(crate) async fn propose_scheduler(
        &self,
        session: SessionId,
        seq: u64,
        command: &Command,
    ) -> Result<Response, CommandError> {
        let (_, bytes) = self
            .propose(session, seq, ModuleId::SCHEDULER, command.encode())
            .await?;
        Response::decode(&bytes).map_err(|error| CommandError::Answer {
            module: "scheduler",
            reason: error.to_string(),
        })
    }

    /// This head, as it would have the others know it.
    pub(crate) fn own(&self) -> Member {
        Member {
            raft_id: self.raft_id,
            name: self.name.clone(),
            api_address: self.api_address.to_string(),
            cluster_address: self.cluster_address.to_string(),
        }
    }

    /// The leader, where one is known, and where it is.
    pub(crate) fn leader(&self) -> Option<Member> {
        let leader = self.raft.leadership().borrow().leader?;
        if leader == self.raft_id {
            return Some(self.own());
        }
        self.raft.group().borrow().member(leader).cloned()
    }

    /// The leader, or this head while none is known.
    pub(crate) fn leading_or_own(&self) -> Member {
        self.leader().unwrap_or_else(|| self.own())
    }

    /// The control API of every head, the leader's first.
    pub(crate) fn api_addresses(&self) -> Vec<String> {
        let group = self.raft.group();
        let view = group.borrow();
        let mut addresses = vec![self.leading_or_own().api_address];
        let own = self.own();
        for member in view.members.iter().chain([&own]) {
            if !addresses.contains(&member.api_address) {
                addresses.push(member.api_address.clone());
            }
        }
        addresses
    }

    /// Everything that a node should be doing.
    pub(crate) async fn standing_orders(&self, node: NodeId) -> Result<Vec<Order>, ProposeError> {
        let reader = self.raft.read().await?;
        Ok(mobula_scheduler::orders_for_node(&reader, node))
    }
}

/// What the API's methods share.
impl HeadContext {
    /// Answers a question to the scheduler, linearizably.
    pub(crate) async fn ask(&self, query: Query) -> Result<QueryResponse, Status> {
        let reader = self.raft.read().await?;
        self.answer(&reader, query)
    }

    /// Answers a query of the scheduler from what was read.
    pub(crate) fn answer(
        &self,
        reader: &dyn Reader,
        query: Query,
    ) -> Result<QueryResponse, Status> {
        mobula_scheduler::answer(reader, self.clock.now_ms(), query)
            .map_err(|rejection| rejected(&rejection))
    }

    /// Refuses a scheduler command that `caller` may not send.
    pub(crate) fn authorize_scheduler(
        &self,
        caller: &Caller,
        command: &Command,
    ) -> Result<(), Status> {
        Scheduler
            .authorize(caller, &command.encode())
            .map_err(|rejection| rejected(&rejection))
    }

    /// Authorizes and proposes a scheduler command whose answer carries nothing.
    pub(crate) async fn change(
        &self,
        caller: &Caller,
        requested: Option<Stamp>,
        command: Command,
    ) -> Result<Empty, Status> {
        self.authorize_scheduler(caller, &command)?;
        let (session, seq) = stamp(self, caller, requested).await?;
        self.propose_scheduler(session, seq, &command).await?;
        Ok(Empty {})
    }
}
