//! A worker from start to end: puts the parts together, in order, and takes them apart again.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use mobula_core::id::{Incarnation, NodeId};
use mobula_gpu::Monitor;
use mobula_net::endpoint::Endpoint;
use mobula_net::local::LocalListener;
use mobula_wire::session::WorkerHello;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::agent::{Agent, INPUTS, Input};
use crate::discover::Machine;
use crate::error::WorkerError;
use crate::hosts::connection;
use crate::hosts::devices::Devices;
use crate::hosts::files::JobDirs;
use crate::hosts::launcher::Launcher;
use crate::hosts::limits::{Limits, MEMORY_LIMITS_LABEL};
use crate::hosts::process::Spawner;
use crate::hosts::program::Programs;
use crate::hosts::stopped::StoppedProcesses;
use crate::join::{Joiner, Membership};
use crate::logs::Logs;
use crate::notices::{NoticeSource, sigterm, watch_cloud, watch_file, watch_sigterm};
use crate::objects::{Keys, ObjectStoreMetrics, Service, ServiceParts};
use crate::options::{OBJECT_STORE_BYTES_MIN, WorkerOptions};
use crate::paths::Paths;
use crate::session::{Session, new_boot_id};
use crate::spans::Spans;

/// How often to look whether the certificate is due; its life is a day.
const RENEWAL_CHECK: Duration = Duration::from_secs(60);

/// The share of the node's memory that objects may take, where nothing else is said: what other
/// systems of this kind do, and what leaves most of it to the programs.
const OBJECT_STORE_PERCENT: u64 = 30;

/// Why a worker ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerExit {
    /// It was asked to stop.
    Stopped,
    /// A notice's deadline came.
    Preempted {
        /// Who gave the notice.
        source: NoticeSource,
    },
    /// SIGTERM came, and all actors have left.
    Drained,
}

impl fmt::Display for WorkerExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WorkerExit::Stopped => f.write_str("stopped"),
            WorkerExit::Preempted { source } => write!(f, "preempted ({})", source.as_str()),
            WorkerExit::Drained => f.write_str("drained"),
        }
    }
}

/// How a worker does, for whoever holds its [`Handle`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkerStatus {
    /// Whether there is a session with the leader.
    pub connected: bool,
    /// The node's id, once the leader has said it.
    pub node: Option<NodeId>,
    /// The fencing token of the registration.
    pub incarnation: Option<Incarnation>,
    /// How many actors live here.
    pub actors: usize,
    /// How many messages of replaced leaders were dropped.
    pub stale_messages: u64,
    /// Why there is no session, if there is none.
    pub problem: Option<String>,
}

/// A worker agent.
#[derive(Debug)]
pub struct Worker;

/// A running worker. Dropping it stops the worker.
#[derive(Debug)]
pub struct Handle {
    stop: Option<oneshot::Sender<()>>,
    status: watch::Receiver<WorkerStatus>,
    object_store: watch::Receiver<ObjectStoreMetrics>,
    task: JoinHandle<WorkerExit>,
}

impl Handle {
    /// How the worker does; changes can be waited for.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<WorkerStatus> {
        self.status.clone()
    }

    /// How its object store does.
    #[must_use]
    pub fn object_store(&self) -> ObjectStoreMetrics {
        *self.object_store.borrow()
    }

    /// Asks the worker to stop: its hosts are killed. [`Handle::wait`] says when that is done.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended already.
            let _ = stop.send(());
        }
    }

    /// Waits until the worker has ended and none of its hosts is left.
    pub async fn wait(&mut self) -> Result<WorkerExit, WorkerError> {
        (&mut self.task).await.map_err(|error| WorkerError::Setup {
            action: "go on",
            reason: format!("the agent's task ended early: {error}"),
        })
    }
}

impl Worker {
    /// Joins if need be and starts the agent. Returns once the worker has an identity; whether the
    /// leader is there already, [`Handle::status`] says.
    pub async fn start(options: WorkerOptions) -> Result<Handle, WorkerError> {
        options.check()?;
        let paths = Paths::new(&options.data_dir)?;
        let lock = paths.lock()?;
        let joiner = Joiner::new(&options, paths.identity());
        let membership = joiner.membership().await?;
        let parts = assemble(&options, &paths, joiner, membership)?;
        let (stop, stopped) = oneshot::channel();
        let status = parts.status.clone();
        let object_store = parts.object_store.clone();
        let task = tokio::spawn(async move {
            let exit = parts.run(stopped).await;
            drop(lock);
            exit
        });
        Ok(Handle {
            stop: Some(stop),
            status,
            object_store,
            task,
        })
    }
}

/// Runs a worker until it ends by itself or `shutdown` resolves.
pub async fn run(
    options: WorkerOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<WorkerExit, WorkerError> {
    tokio::pin!(shutdown);
    let mut handle = tokio::select! {
        started = Worker::start(options) => started?,
        () = &mut shutdown => return Ok(WorkerExit::Stopped),
    };
    tokio::select! {
        exit = handle.wait() => return exit,
        () = &mut shutdown => handle.stop(),
    }
    handle.wait().await
}

/// What runs beside the agent, and the agent.
struct Parts {
    agent: Agent,
    beside: JoinSet<()>,
    endpoint: Endpoint,
    status: watch::Receiver<WorkerStatus>,
    object_store: watch::Receiver<ObjectStoreMetrics>,
}

impl Parts {
    async fn run(mut self, stop: oneshot::Receiver<()>) -> WorkerExit {
        let exit = self.agent.run(stop).await;
        self.beside.shutdown().await;
        self.endpoint.close(&format!("worker ended: {exit}")).await;
        exit
    }
}

fn assemble(
    options: &WorkerOptions,
    paths: &Paths,
    joiner: Joiner,
    membership: Membership,
) -> Result<Parts, WorkerError> {
    let machine = Machine::discover();
    let credentials = &membership.credentials;
    let address = SocketAddr::new(options.listen_ip, 0);
    // Other agents come to it for objects.
    let endpoint = Endpoint::bind(address, credentials)
        .map_err(|error| setup("open the quic endpoint", &error))?;
    let socket = paths.agent_socket()?;
    let listener = LocalListener::bind(&socket, membership.cluster_id.clone())
        .map_err(|error| setup("listen for hosts", &error))?;
    let builtin = match &options.builtin_program {
        Some(path) => path.clone(),
        None => std::env::current_exe().map_err(|error| setup("find the own program", &error))?,
    };
    let spawner = Spawner::start().map_err(|error| setup("start the spawner thread", &error))?;
    let logs = Logs::new(paths.logs());
    logs.prune();

    let capacity = options.resources.apply(machine.resources());
    let object_keys = Keys::default();
    let spans = Spans::default();
    let (objects, object_store, object_metrics) = Service::open(ServiceParts {
        spans: spans.clone(),
        node: options.name.clone(),
        socket: paths.object_socket()?,
        spill_dir: paths.objects(),
        memory_bytes: options.object_store_bytes.unwrap_or_else(|| {
            (capacity.memory_bytes / 100 * OBJECT_STORE_PERCENT).max(OBJECT_STORE_BYTES_MIN)
        }),
        spill_bytes: options.object_spill_bytes,
        endpoint: endpoint.clone(),
        keys: object_keys.clone(),
    })
    .map_err(|error| setup("open the object store", &error))?;
    let devices = Devices::new(device_ids(&machine, capacity.gpu_milli));
    let stopped = StoppedProcesses::new(options.stopped_process_limit_ms);
    let gpus = Monitor::start(machine.gpus.iter().map(|gpu| gpu.id.clone()));
    let mut labels = machine.labels();
    let limits = Limits::discover(&options.name);
    labels.insert(MEMORY_LIMITS_LABEL.to_owned(), limits.label().to_owned());
    labels.extend(options.labels.clone());
    let hello = WorkerHello {
        name: options.name.clone(),
        boot_id: new_boot_id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        capacity,
        labels,
    };
    tracing::info!(
        name = hello.name,
        boot_id = hello.boot_id,
        ?machine,
        "worker agent starts"
    );

    let (to_agent, inputs) = mpsc::channel(INPUTS);
    let (status, status_receiver) = watch::channel(WorkerStatus::default());
    let launcher_ca = credentials.ca_certificate_pem().to_owned();
    let cluster_id = membership.cluster_id.clone();
    let (renewed, membership) = watch::channel(membership);
    let (session, handle) = Session::new(
        endpoint.clone(),
        hello,
        joiner.clone(),
        membership,
        to_agent.clone(),
        status.clone(),
    );
    let launcher = Launcher {
        cluster_id,
        node_name: options.name.clone(),
        ca_pem: launcher_ca,
        listen_ip: options.listen_ip,
        agent_socket: socket,
        object_socket: paths.object_socket()?,
        object_keys: object_keys.clone(),
        run_dir: paths.run(),
        job_dirs: JobDirs::new(paths.work()),
        limits,
        programs: Programs::new(builtin, paths.artifacts()),
        spawner,
        session: handle.clone(),
    };
    let mut beside = JoinSet::new();
    beside.spawn(session.run());
    beside.spawn(objects.run());
    beside.spawn(connection::serve(listener, to_agent.clone()));
    beside.spawn(renew_certificates(joiner, renewed, endpoint.clone()));
    spawn_notices(options, &to_agent, &mut beside)?;
    let agent = Agent::new(
        (to_agent, inputs),
        launcher,
        object_store,
        handle,
        status,
        (devices, stopped),
        (logs, spans, gpus),
    );
    Ok(Parts {
        agent,
        beside,
        endpoint,
        status: status_receiver,
        object_store: object_metrics,
    })
}

fn spawn_notices(
    options: &WorkerOptions,
    inputs: &mpsc::Sender<Input>,
    beside: &mut JoinSet<()>,
) -> Result<(), WorkerError> {
    if let Some(path) = options.notice_file.clone() {
        let poll = Duration::from_millis(options.notice_poll_ms);
        beside.spawn(watch_file(
            path,
            poll,
            options.default_grace_ms,
            inputs.clone(),
        ));
    }
    if let Some((cloud, endpoint)) = options.cloud.clone() {
        let grace_ms = options.default_grace_ms;
        beside.spawn(watch_cloud(cloud, endpoint, grace_ms, inputs.clone()));
    }
    if options.sigterm_is_notice {
        let signals = sigterm().map_err(|error| setup("take over SIGTERM", &error))?;
        beside.spawn(watch_sigterm(
            signals,
            options.default_grace_ms,
            inputs.clone(),
        ));
    }
    Ok(())
}

/// Renews the certificate when it is due; the session takes it up by itself.
async fn renew_certificates(
    joiner: Joiner,
    membership: watch::Sender<Membership>,
    endpoint: Endpoint,
) {
    let mut ticks = tokio::time::interval(RENEWAL_CHECK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let current = membership.borrow().clone();
        if SystemTime::now() < current.credentials.renew_at() {
            continue;
        }
        let renewed = match joiner.renew(&current).await {
            Ok(renewed) => renewed,
            Err(error) => {
                let not_after = current.credentials.not_after();
                let left = not_after
                    .duration_since(SystemTime::now())
                    .unwrap_or_default();
                tracing::warn!(%error, left_s = left.as_secs(), "cannot renew the certificate yet");
                continue;
            }
        };
        if let Err(error) = endpoint.replace_credentials(&renewed.credentials) {
            tracing::error!(%error, "the renewed certificate cannot be used");
            continue;
        }
        tracing::info!("certificate renewed");
        // The session may have ended already, and everything else with it.
        let _ = membership.send(renewed);
    }
}

/// The devices to hand out: those that exist, and for an operator who offers more than can be found
/// (another vendor's, say) the numbers that come after.
fn device_ids(machine: &Machine, gpu_milli: u64) -> Vec<String> {
    let count = usize::try_from(gpu_milli / 1000).unwrap_or(0);
    (0..count)
        .map(|index| match machine.gpus.get(index) {
            Some(gpu) => gpu.id.clone(),
            None => index.to_string(),
        })
        .collect()
}

fn setup(action: &'static str, error: &dyn fmt::Display) -> WorkerError {
    WorkerError::Setup {
        action,
        reason: error.to_string(),
    }
}
