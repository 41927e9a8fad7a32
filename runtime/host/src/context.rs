//! What an actor knows about itself, and what its host process shares between all actors.

use std::any::Any;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId};
use mobula_net::identity::{Credentials, CurrentCredentials};
use mobula_storage::blob::{BlobError, BlobStore};
use mobula_wire::host::{HostBootstrap, HostRole};
use mobula_wire::session::StorageLocation;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::client::CallClient;
use crate::objects::ObjectTable;
use crate::state::ActorState;

/// The node will be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// When, in milliseconds since the Unix epoch.
    pub deadline_ms: u64,
}

/// Who a host process is.
#[derive(Debug, Clone)]
pub struct HostInfo {
    /// The cluster.
    pub cluster_id: String,
    /// The job whose code runs here.
    pub job: JobId,
    /// The node.
    pub node: NodeId,
    /// The node's name.
    pub node_name: String,
    /// This process.
    pub host: HostId,
    /// What this process is there for.
    pub role: HostRole,
    /// The control API's addresses when the process was started; see
    /// [`HostRuntime::api_addresses`].
    pub api_addresses: Vec<String>,
    /// Where bytes at rest are.
    pub storage: StorageLocation,
}

impl From<&HostBootstrap> for HostInfo {
    fn from(bootstrap: &HostBootstrap) -> Self {
        HostInfo {
            cluster_id: bootstrap.cluster_id.clone(),
            job: bootstrap.job,
            node: bootstrap.node,
            node_name: bootstrap.node_name.clone(),
            host: bootstrap.host,
            role: bootstrap.role.clone(),
            api_addresses: bootstrap.api_addresses.clone(),
            storage: bootstrap.storage.clone(),
        }
    }
}

/// What all actors of one host process share.
pub struct HostRuntime {
    info: HostInfo,
    api_addresses: watch::Sender<Vec<String>>,
    notices: watch::Sender<Option<Notice>>,
    advice: watch::Sender<bool>,
    stop_requested: watch::Sender<bool>,
    credentials: OnceLock<CurrentCredentials>,
    calls: OnceLock<CallClient>,
    objects: OnceLock<Arc<ObjectTable>>,
    extension: OnceLock<Arc<dyn Any + Send + Sync>>,
    /// Opened when the first durable actor starts.
    blobs: Mutex<Option<BlobStore>>,
}

static CURRENT: OnceLock<Arc<HostRuntime>> = OnceLock::new();

impl HostRuntime {
    /// A runtime for `info`; it makes calls once it is given a client.
    #[must_use]
    pub fn new(info: HostInfo) -> Arc<Self> {
        Arc::new(HostRuntime {
            api_addresses: watch::Sender::new(info.api_addresses.clone()),
            info,
            notices: watch::Sender::new(None),
            advice: watch::Sender::new(false),
            stop_requested: watch::Sender::new(false),
            credentials: OnceLock::new(),
            calls: OnceLock::new(),
            objects: OnceLock::new(),
            extension: OnceLock::new(),
            blobs: Mutex::new(None),
        })
    }

    /// The runtime of this process, if an agent started it.
    #[must_use]
    pub fn current() -> Option<Arc<HostRuntime>> {
        CURRENT.get().cloned()
    }

    /// Makes this the runtime of the process. A process is a host once in its life, so a second
    /// attempt is refused.
    pub fn make_current(self: &Arc<Self>) -> bool {
        CURRENT.set(Arc::clone(self)).is_ok()
    }

    /// Who this process is.
    #[must_use]
    pub fn info(&self) -> &HostInfo {
        &self.info
    }

    /// The control API's addresses, as the agent last heard them.
    #[must_use]
    pub fn api_addresses(&self) -> watch::Receiver<Vec<String>> {
        self.api_addresses.subscribe()
    }

    /// Takes in where the heads are now.
    pub fn set_api_addresses(&self, addresses: Vec<String>) {
        self.api_addresses.send_replace(addresses);
    }

    /// The process's certificate and key, once it has them.
    #[must_use]
    pub fn credentials(&self) -> Option<&CurrentCredentials> {
        self.credentials.get()
    }

    /// Gives the runtime its certificate and key, or the next ones.
    pub fn set_credentials(&self, credentials: Credentials) {
        self.credentials
            .get_or_init(|| CurrentCredentials::new(credentials.clone()))
            .replace(credentials);
    }

    /// Calls to other actors; absent until the process has its endpoint.
    #[must_use]
    pub fn calls(&self) -> Option<&CallClient> {
        self.calls.get()
    }

    /// Gives the runtime its way to call others. Only the first one counts.
    pub fn set_calls(&self, client: CallClient) {
        // A second client would be a second ordered stream to the same hosts.
        let _ = self.calls.set(client);
    }

    /// The process's objects; absent until it has its endpoint.
    #[must_use]
    pub fn objects(&self) -> Option<&Arc<ObjectTable>> {
        self.objects.get()
    }

    /// Gives the runtime its objects. Only the first ones count.
    pub fn set_objects(&self, objects: Arc<ObjectTable>) {
        let _ = self.objects.set(objects);
    }

    /// The notice that stands, and every change of it.
    #[must_use]
    pub fn notices(&self) -> watch::Receiver<Option<Notice>> {
        self.notices.subscribe()
    }

    /// Announces a notice, or withdraws it.
    pub fn set_notice(&self, notice: Option<Notice>) {
        self.notices.send_replace(notice);
    }

    /// Whether the cloud says that it may take the node away, and every change of it: there is no deadline yet,
    /// and there may never be one.
    #[must_use]
    pub fn advice(&self) -> watch::Receiver<bool> {
        self.advice.subscribe()
    }

    /// Says that the cloud may take the node away, or that it says so no more.
    pub fn set_advice(&self, stands: bool) {
        self.advice
            .send_if_modified(|known| std::mem::replace(known, stands) != stands);
    }

    /// Becomes true when a driver is asked to end.
    #[must_use]
    pub fn stop_requested(&self) -> watch::Receiver<bool> {
        self.stop_requested.subscribe()
    }

    /// Asks the driver to end; answers whether anybody listens.
    pub fn request_stop(&self) -> bool {
        self.stop_requested.send_replace(true);
        self.stop_requested.receiver_count() > 0
    }

    /// What a higher layer keeps here, made at first use: the SDK's own view of the cluster.
    pub fn extension(
        &self,
        make: impl FnOnce() -> Arc<dyn Any + Send + Sync>,
    ) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(self.extension.get_or_init(make))
    }

    /// The store of bytes at rest; its connections are shared.
    pub(crate) fn blobs(&self) -> Result<BlobStore, BlobError> {
        let mut blobs = self.blobs.lock();
        if let Some(store) = &*blobs {
            return Ok(store.clone());
        }
        let store = BlobStore::at(&self.info.storage)?;
        Ok(blobs.insert(store).clone())
    }

    /// Where this process takes calls, once it does.
    #[must_use]
    pub fn call_address(&self) -> Option<SocketAddr> {
        self.calls.get().and_then(CallClient::own_address)
    }
}

impl std::fmt::Debug for HostRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostRuntime")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// What an actor knows about itself.
#[derive(Clone)]
pub struct ActorContext(Arc<ContextInner>);

struct ContextInner {
    actor: ActorId,
    incarnation: Incarnation,
    name: Option<String>,
    runtime: Arc<HostRuntime>,
    /// Why the actor ends, once somebody decided so; the first reason stays.
    ending: Mutex<Option<ExitReason>>,
    cell: OnceLock<ractor::ActorCell>,
    state: ActorState,
}

impl ActorContext {
    /// The context of one incarnation of an actor that keeps nothing.
    #[must_use]
    pub fn new(
        actor: ActorId,
        incarnation: Incarnation,
        name: Option<String>,
        runtime: Arc<HostRuntime>,
    ) -> Self {
        ActorContext::with_state(actor, incarnation, name, runtime, ActorState::default())
    }

    /// The context of one incarnation of an actor that keeps `state`.
    #[must_use]
    pub fn with_state(
        actor: ActorId,
        incarnation: Incarnation,
        name: Option<String>,
        runtime: Arc<HostRuntime>,
        state: ActorState,
    ) -> Self {
        ActorContext(Arc::new(ContextInner {
            actor,
            incarnation,
            name,
            runtime,
            ending: Mutex::new(None),
            cell: OnceLock::new(),
            state,
        }))
    }

    /// This actor.
    #[must_use]
    pub fn actor(&self) -> ActorId {
        self.0.actor
    }

    /// This start of it: the fencing token of its side effects.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.0.incarnation
    }

    /// The name it was created with.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    /// Its job.
    #[must_use]
    pub fn job(&self) -> JobId {
        self.0.runtime.info.job
    }

    /// The node it runs on.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.0.runtime.info.node
    }

    /// That node's name.
    #[must_use]
    pub fn node_name(&self) -> &str {
        &self.0.runtime.info.node_name
    }

    /// Where bytes at rest are.
    #[must_use]
    pub fn storage(&self) -> &StorageLocation {
        &self.0.runtime.info.storage
    }

    /// The notice that the node was given, if one stands.
    #[must_use]
    pub fn notice(&self) -> Option<Notice> {
        *self.0.runtime.notices.borrow()
    }

    /// The notice that stands, and every change of it.
    #[must_use]
    pub fn notices(&self) -> watch::Receiver<Option<Notice>> {
        self.0.runtime.notices()
    }

    /// Ends this actor once the present method is over; it counts as completed, so that it is not
    /// started again.
    pub fn complete(&self) {
        self.end(ExitReason::Completed);
    }

    /// Ends this actor once the present method is over, as failed: its restart policy decides.
    pub fn fail(&self, reason: impl Into<String>) {
        self.end(ExitReason::Failed(reason.into()));
    }

    /// What it keeps beyond its own life, if its type is declared `durable`; otherwise everything
    /// that is asked of this fails.
    #[must_use]
    pub fn state(&self) -> &ActorState {
        &self.0.state
    }

    /// The process that it shares with other actors.
    #[must_use]
    pub fn runtime(&self) -> &Arc<HostRuntime> {
        &self.0.runtime
    }

    pub(crate) fn end(&self, reason: ExitReason) {
        self.0.ending.lock().get_or_insert(reason);
        if let Some(cell) = self.0.cell.get() {
            cell.stop(None);
        }
    }

    pub(crate) fn ending(&self) -> Option<ExitReason> {
        self.0.ending.lock().clone()
    }

    /// Called once the constructor is over; one that already ended itself stops here.
    pub(crate) fn attach(&self, cell: ractor::ActorCell) {
        // Published first: whoever ends it from here on finds the cell, and whoever did before is
        // seen. It is set once only, so there is nothing to lose in the result.
        let _ = self.0.cell.set(cell.clone());
        if self.ending().is_some() {
            cell.stop(None);
        }
    }
}

impl std::fmt::Debug for ActorContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActorContext")
            .field("actor", &self.0.actor)
            .field("incarnation", &self.0.incarnation)
            .finish_non_exhaustive()
    }
}
