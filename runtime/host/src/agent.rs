//! A host process from start to end: its bootstrap, its endpoint, and its link to the agent.
//!
//! Invariants:
//! 1. The bootstrap file holds a private key and is deleted as soon as it is read.
//! 2. When the agent's socket closes the process ends: an actor that nobody watches would be a
//!    second copy of one that was started elsewhere.
//! 3. Its certificate is short-lived. The agent brings the next one before it ends; connections
//!    made from then on use it.
//! 4. Reports reach the agent in the order in which things happened, and before the process ends.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mobula_core::exit::{AGENT_LOST_EXIT_CODE, ExitReason};
use mobula_core::id::{ActorId, Incarnation};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{Credentials, CurrentCredentials, PrivateKey};
use mobula_net::lane::{FramedReceiver, FramedSender};
use mobula_net::local::connect_local;
use mobula_net::threads::NetworkThreads;
use mobula_wire::hello::Lane;
use mobula_wire::host::{
    AgentMessage, BOOTSTRAP_ENV, HostAnswer, HostBootstrap, HostMessage, HostQuestion, HostRole,
};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::calls::serve_calls;
use crate::client::CallClient;
use crate::context::{HostInfo, HostRuntime, Notice};
use crate::objects::ObjectTable;
use crate::registry::{DuplicateTypeError, Registry};
use crate::shell::panic_text;
use crate::supervision::{ActorEvent, ActorTable, EVENTS_WAITING_MAX, SupervisorStartError};
use crate::{metrics, spans};

/// The largest bootstrap file: certificates and addresses.
const BOOTSTRAP_BYTES_MAX: u64 = 1024 * 1024;

/// How long the agent may take to let a process into the node's object store.
const STORE_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a process cannot take part as its agent asked.
#[derive(Debug, thiserror::Error)]
pub enum HostStartError {
    /// The bootstrap file cannot be read.
    #[error("bootstrap file {} (named by {BOOTSTRAP_ENV}): {source}", path.display())]
    BootstrapUnreadable {
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bootstrap file is not what an agent writes.
    #[error(
        "bootstrap file {} is not of this release: {reason}; is the program's SDK as old as the \
         cluster?", path.display()
    )]
    BootstrapMalformed {
        /// Where it was.
        path: PathBuf,
        /// What was wrong.
        reason: String,
    },
    /// Two actor types have one name.
    #[error(transparent)]
    DuplicateType(#[from] DuplicateTypeError),
    /// Certificate, endpoint or socket do not work.
    #[error("{what}: {reason}")]
    Setup {
        /// Which step.
        what: &'static str,
        /// What it said.
        reason: String,
    },
    /// The actors' supervisor does not start.
    #[error(transparent)]
    Supervisor(#[from] SupervisorStartError),
}

impl HostStartError {
    fn setup(what: &'static str, reason: impl std::fmt::Display) -> Self {
        HostStartError::Setup {
            what,
            reason: reason.to_string(),
        }
    }
}

/// What the agent left for this process; `None` where no agent started it.
pub fn take_bootstrap() -> Result<Option<HostBootstrap>, HostStartError> {
    match std::env::var_os(BOOTSTRAP_ENV) {
        Some(path) => read_bootstrap(Path::new(&path)).map(Some),
        None => Ok(None),
    }
}

/// Reads a bootstrap file and deletes it.
pub fn read_bootstrap(path: &Path) -> Result<HostBootstrap, HostStartError> {
    use std::io::Read;
    let unreadable = |source| HostStartError::BootstrapUnreadable {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(BOOTSTRAP_BYTES_MAX).read_to_string(&mut text))
        .map_err(unreadable)?;
    std::fs::remove_file(path).map_err(unreadable)?;
    serde_json::from_str(&text).map_err(|error| HostStartError::BootstrapMalformed {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// Why a host of actors ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostEnd {
    /// The agent asked for it.
    Shutdown,
    /// The agent is gone.
    AgentLost(String),
}

/// A process that takes part in a cluster.
pub struct HostProcess {
    runtime: Arc<HostRuntime>,
    table: Arc<ActorTable>,
    endpoint: Endpoint,
    from_agent: FramedReceiver,
    to_agent: mpsc::Sender<HostMessage>,
    closing: CancellationToken,
    writer: JoinHandle<()>,
    server: JoinHandle<()>,
    /// The endpoint's. Last, because it must outlive it.
    _network: NetworkThreads,
}

impl HostProcess {
    /// Takes part as `bootstrap` says, with the actor types of `registry`.
    pub async fn start(
        bootstrap: HostBootstrap,
        registry: Registry,
    ) -> Result<Self, HostStartError> {
        let key = PrivateKey::from_pem(&bootstrap.key_pem)
            .map_err(|error| HostStartError::setup("private key", error))?;
        let credentials = Credentials::new(&bootstrap.certificate_pem, key, &bootstrap.ca_pem)
            .map_err(|error| HostStartError::setup("certificate", error))?;
        let listen: SocketAddr = bootstrap
            .listen_ip
            .parse()
            .map(|ip: std::net::IpAddr| SocketAddr::new(ip, 0))
            .map_err(|error| HostStartError::setup("listen address", error))?;
        let network = NetworkThreads::start()
            .map_err(|error| HostStartError::setup("threads for the network", error))?;
        let endpoint = Endpoint::bind_on(&network, listen, &credentials)
            .map_err(|error| HostStartError::setup("endpoint for calls", error))?;
        let call_address = endpoint.local_address();

        let runtime = HostRuntime::new(HostInfo::from(&bootstrap));
        runtime.set_credentials(credentials);
        let (table, events) = ActorTable::start(Arc::clone(&runtime), registry).await?;
        let local = (call_address, Arc::downgrade(&table));
        runtime.set_calls(CallClient::new(endpoint.clone(), Some(local)));
        let calls = runtime.calls().expect("it was set above").clone();
        let objects = ObjectTable::start(call_address.to_string(), calls);
        if let Some(access) = &bootstrap.object_store {
            let socket = Path::new(&access.socket);
            let connecting = objects.connect_store(socket, &access.key, bootstrap.node);
            let connected = tokio::time::timeout(STORE_CONNECT_TIMEOUT, connecting).await;
            // Without it the process goes on, with values of a size that a message carries.
            if let Err(error) = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                tracing::error!(%error, "no shared memory for objects");
            }
        }
        runtime.set_objects(objects);
        let server = tokio::spawn(serve_calls(endpoint.clone(), Arc::clone(&table)));

        let socket = Path::new(&bootstrap.agent_socket);
        let link = connect_local(socket, &bootstrap.cluster_id, Lane::Control)
            .await
            .map_err(|error| HostStartError::setup("agent's socket", error))?;
        let (mut sender, from_agent) = link.split();
        let hello = HostMessage::Hello {
            host: bootstrap.host,
            call_address: call_address.to_string(),
            actor_types: table.registry().names(),
        };
        sender
            .send_message(&hello)
            .await
            .map_err(|error| HostStartError::setup("agent's socket", error))?;
        let (to_agent, reports) = mpsc::channel(EVENTS_WAITING_MAX);
        let closing = CancellationToken::new();
        let writer = tokio::spawn(write_reports(sender, events, reports, closing.clone()));
        Ok(HostProcess {
            runtime,
            table,
            endpoint,
            from_agent,
            to_agent,
            closing,
            writer,
            server,
            _network: network,
        })
    }

    /// What its actors share.
    #[must_use]
    pub fn runtime(&self) -> &Arc<HostRuntime> {
        &self.runtime
    }

    /// Its actors.
    #[must_use]
    pub fn table(&self) -> &Arc<ActorTable> {
        &self.table
    }

    /// Runs actors until the agent ends this process or is gone.
    pub async fn run_actors(mut self) -> HostEnd {
        let end = loop {
            match next_message(&mut self.from_agent).await {
                Ok(AgentMessage::Start(order)) => self.table.start_actor(*order).await,
                Ok(AgentMessage::Stop {
                    actor,
                    incarnation,
                    grace_ms,
                }) => {
                    self.table
                        .stop_actor(actor, incarnation, Duration::from_millis(grace_ms))
                        .await;
                }
                Ok(AgentMessage::Notice { deadline_ms }) => {
                    self.table.notify(Some(Notice { deadline_ms }));
                }
                Ok(AgentMessage::NoticeWithdrawn) => self.table.notify(None),
                Ok(AgentMessage::Advice { stands }) => self.runtime.set_advice(stands),
                Ok(AgentMessage::Certificate { certificate_pem }) => self.renew(&certificate_pem),
                Ok(AgentMessage::Heads { api_addresses }) => {
                    self.runtime.set_api_addresses(api_addresses);
                }
                Ok(AgentMessage::Ask { request, question }) => self.answer(request, question),
                Ok(AgentMessage::Shutdown { grace_ms }) => {
                    self.table.stop_all(Duration::from_millis(grace_ms)).await;
                    break HostEnd::Shutdown;
                }
                Err(reason) => break HostEnd::AgentLost(reason),
            }
        };
        self.close().await;
        end
    }

    fn answer(&self, request: u64, question: HostQuestion) {
        let answer = match question {
            HostQuestion::Metrics => HostAnswer::Metrics(metrics::snapshot(self.table.count())),
            HostQuestion::Spans => HostAnswer::Spans(spans::of_job(self.runtime.info().job)),
        };
        // Whoever looks can look again; reports of ends go first.
        let _ = self
            .to_agent
            .try_send(HostMessage::Answer { request, answer });
    }

    /// Runs a job's `main`, which says how it ended, and reports that; answers the same.
    pub async fn run_driver<F>(mut self, main: F) -> ExitReason
    where
        F: Future<Output = ExitReason> + Send + 'static,
    {
        let HostRole::Driver {
            actor, incarnation, ..
        } = self.runtime.info().role
        else {
            return ExitReason::StartFailed("the agent wants a host of actors".to_owned());
        };
        // A closed channel means that the agent is gone, which `supervise` sees as well.
        let _ = self
            .to_agent
            .send(HostMessage::Started { actor, incarnation })
            .await;
        let reason = self.supervise(actor, incarnation, main).await;
        let exited = HostMessage::Exited {
            actor,
            incarnation,
            reason: reason.clone(),
        };
        let _ = self.to_agent.send(exited).await;
        self.close().await;
        reason
    }

    async fn supervise<F>(
        &mut self,
        actor: ActorId,
        incarnation: Incarnation,
        main: F,
    ) -> ExitReason
    where
        F: Future<Output = ExitReason> + Send + 'static,
    {
        let mut main = tokio::spawn(main);
        let grace_ms = loop {
            tokio::select! {
                outcome = &mut main => return driver_exit(outcome),
                message = next_message(&mut self.from_agent) => match message {
                    Ok(AgentMessage::Notice { deadline_ms }) => {
                        self.table.notify(Some(Notice { deadline_ms }));
                    }
                    Ok(AgentMessage::NoticeWithdrawn) => self.table.notify(None),
                    Ok(AgentMessage::Advice { stands }) => self.runtime.set_advice(stands),
                    Ok(AgentMessage::Certificate { certificate_pem }) => {
                        self.renew(&certificate_pem);
                    }
                    Ok(AgentMessage::Heads { api_addresses }) => {
                        self.runtime.set_api_addresses(api_addresses);
                    }
                    Ok(AgentMessage::Ask { request, question }) => self.answer(request, question),
                    Ok(AgentMessage::Stop { actor: named, incarnation: start, grace_ms })
                        if named == actor && start == incarnation =>
                    {
                        break grace_ms;
                    }
                    Ok(AgentMessage::Shutdown { grace_ms }) => break grace_ms,
                    Ok(AgentMessage::Stop { .. } | AgentMessage::Start(_)) => {
                        tracing::warn!("the agent sent a driver an order for an actor; ignored");
                    }
                    Err(reason) => {
                        tracing::error!(%reason, "the agent is gone, the driver ends");
                        main.abort();
                        // Nobody asked for that: an agent that lives after all must not take it for success.
                        return ExitReason::HostExited(AGENT_LOST_EXIT_CODE);
                    }
                },
            }
        };
        // Waiting helps only if the driver looks at the request.
        if self.runtime.request_stop() {
            let _ = tokio::time::timeout(Duration::from_millis(grace_ms), &mut main).await;
        }
        main.abort();
        ExitReason::Stopped
    }

    /// Uses the next certificate. One that cannot be used changes nothing: the agent tries again.
    fn renew(&self, certificate_pem: &str) {
        let Some(current) = self.runtime.credentials().map(CurrentCredentials::get) else {
            return;
        };
        let replaced = current
            .renewed(certificate_pem)
            .map_err(|error| error.to_string())
            .and_then(|next| {
                self.endpoint
                    .replace_credentials(&next)
                    .map_err(|error| error.to_string())?;
                self.runtime.set_credentials(next);
                Ok(())
            });
        if let Err(reason) = replaced {
            tracing::warn!(reason, "the next certificate cannot be used");
        }
    }

    async fn close(self) {
        if let Some(objects) = self.runtime.objects() {
            objects.close();
        }
        self.closing.cancel();
        let _ = self.writer.await;
        self.server.abort();
        let _ = self.server.await;
        self.endpoint.close("the host ends").await;
    }
}

fn driver_exit(outcome: Result<ExitReason, JoinError>) -> ExitReason {
    match outcome {
        Ok(reason) => reason,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => ExitReason::Panicked(panic_text(panic.as_ref())),
            Err(_) => ExitReason::Stopped,
        },
    }
}

async fn next_message(receiver: &mut FramedReceiver) -> Result<AgentMessage, String> {
    match receiver.receive_message::<AgentMessage>().await {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err("the agent closed the socket".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

async fn write_reports(
    mut sender: FramedSender,
    mut events: mpsc::Receiver<ActorEvent>,
    mut reports: mpsc::Receiver<HostMessage>,
    closing: CancellationToken,
) {
    loop {
        let message = tokio::select! {
            biased;
            Some(event) = events.recv() => HostMessage::from(event),
            Some(report) = reports.recv() => report,
            // Last, so that what waits is still sent.
            () = closing.cancelled() => break,
        };
        if let Err(error) = sender.send_message(&message).await {
            tracing::error!(%error, ?message, "a report did not reach the agent");
            return;
        }
    }
    let _ = sender.finish().await;
}

impl From<ActorEvent> for HostMessage {
    fn from(event: ActorEvent) -> Self {
        match event {
            ActorEvent::Started { actor, incarnation } => {
                HostMessage::Started { actor, incarnation }
            }
            ActorEvent::Exited {
                actor,
                incarnation,
                reason,
            } => HostMessage::Exited {
                actor,
                incarnation,
                reason,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bootstrap_is_read_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bootstrap.json");
        std::fs::write(&path, "{\"cluster_id\": 3}").unwrap();
        let error = read_bootstrap(&path).unwrap_err();
        assert!(
            error.to_string().contains("is not of this release"),
            "{error}"
        );
        assert!(!path.exists(), "a private key must not stay on the disk");
        assert!(matches!(
            read_bootstrap(&path),
            Err(HostStartError::BootstrapUnreadable { .. })
        ));
    }

    #[tokio::test]
    async fn the_end_of_main_becomes_an_exit_reason() {
        async fn exit(main: impl Future<Output = ExitReason> + Send + 'static) -> ExitReason {
            driver_exit(tokio::spawn(main).await)
        }
        assert_eq!(
            exit(async { ExitReason::Completed }).await,
            ExitReason::Completed
        );
        assert_eq!(
            exit(async { panic!("oh {}", 1) }).await,
            ExitReason::Panicked("oh 1".into())
        );
    }
}
