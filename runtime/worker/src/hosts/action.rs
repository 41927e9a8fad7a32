//! What the [`Pool`](super::pool::Pool) wants done.

use std::collections::BTreeMap;

use mobula_core::id::{ActorId, HostId, Incarnation, JobId};
use mobula_core::order::WorkerEvent;
use mobula_core::resource::Resources;
use mobula_core::secret::Secret;
use mobula_core::spec::{JobFile, Program};
use mobula_wire::host::{AgentMessage, HostRole};

/// An actor's incarnation.
pub(crate) type Key = (ActorId, Incarnation);

/// What the agent should do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start a host process.
    Launch(Box<Launch>),
    /// Send to a host that is connected.
    Send(HostId, AgentMessage),
    /// Kill a host's process.
    Kill(HostId),
    /// Tell the leader.
    Report(WorkerEvent),
    /// Call [`Pool::alarm`] later.
    Wake { after_ms: u64, alarm: Alarm },
    /// The output of this actor is in this host's log.
    Logs(Key, HostId),
}

/// A host to be launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) host: HostId,
    pub(crate) job: JobId,
    pub(crate) program: Program,
    pub(crate) role: HostRole,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) files: Vec<JobFile>,
    pub(crate) secrets: BTreeMap<String, Secret>,
    /// What its one actor asked for; `None` for a process that actors share.
    pub(crate) resources: Option<Resources>,
    /// For `CUDA_VISIBLE_DEVICES`; empty: no GPU.
    pub(crate) visible_devices: String,
    /// Whose own process it is, if one actor's.
    pub(crate) owner: Option<Key>,
}

/// Something that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alarm {
    /// The host should have said hello.
    Hello(HostId),
    /// The actor should have stopped.
    Stop(Key),
    /// The host should have ended.
    Shutdown(HostId),
    /// The dead host's last messages should have been read.
    LastWords(HostId),
}
