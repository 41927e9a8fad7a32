//! The router: an endpoint's front door. It listens for HTTP and gRPC at one port, keeps track of the endpoint's
//! replicas, and feeds its monitor.
//!
//! Invariants:
//! 1. It listens before it says where, and says where before anybody is told to ask it.
//! 2. It finds its replicas and its monitor by name; it serves without a monitor, and without the
//!    head once it knows its replicas.
//! 3. Its tasks end with it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mobula::{ActorContext, ActorRef, CallFailure, Cluster, ContextExt};
use mobula_core::codec;
use mobula_core::control::ModuleId;
use mobula_core::error::ErrorCode;
use mobula_core::id::{ActorId, Incarnation};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::auth::BearerAuth;
use super::controller::{monitor_name, replica_name};
use super::endpoint_service::{EndpointService, ROW_VALUES_MAX, body_limits};
use super::feed::{FeedReader, feed};
use super::fleet::{BATCH_TIMEOUT, Backend, BackendFailure, Berth, Fleet};
use super::grpc::oip_routes;
use super::replica::{Inference, Replica, ReplicaCalls};
use super::server;
use super::state::{Command, Endpoint};
use crate::drift::monitor::{Monitor, MonitorCalls};
use crate::registry::version_file::{VersionFile, VersionFileError};
use crate::serving::client;
use crate::storage::open_blobs;
use crate::training::data::SampleShape;

/// How long a probe of a replica waits; it includes waiting for a replica that is being started.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long one question to the head waits for news of a replica.
const WATCH_WAIT: Duration = Duration::from_secs(30);

/// The pause after something that could not be done now.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// How long a router that leaves its node waits for the requests that it has: they take
/// milliseconds, and meanwhile nobody listens.
const LEAVE_DRAIN: Duration = Duration::from_secs(1);

/// How long the monitor may take for a call, its start included.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a router cannot serve.
#[derive(Debug, thiserror::Error)]
enum RouterError {
    #[error("this process has no address that others can reach")]
    NoAddress,
    #[error("cannot listen on {ip}: {source}; give the worker another `listen` address")]
    Bind { ip: IpAddr, source: std::io::Error },
    #[error("the version's file: {0}")]
    Version(#[from] VersionFileError),
    #[error(
        "version {version} of {model} is trained on {samples}: an endpoint answers for numbers \
         with classes, at most {ROW_VALUES_MAX} numbers a row"
    )]
    Samples {
        model: String,
        version: u64,
        samples: String,
    },
}

/// Answers an endpoint's requests.
pub struct Router {
    endpoint: Endpoint,
    running: Option<Running>,
}

struct Running {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    server: JoinSet<()>,
    /// Aborted when dropped.
    _tasks: JoinSet<()>,
}

#[mobula::actor(name = "mobula.router")]
impl Router {
    /// A router of `endpoint`; it listens once it has started.
    pub fn new(endpoint: Endpoint) -> Self {
        Router {
            endpoint,
            running: None,
        }
    }

    /// Where it answers, `ip:port`.
    pub fn http_address(&self) -> Option<String> {
        self.running
            .as_ref()
            .map(|running| running.address.to_string())
    }

    #[mobula(started)]
    async fn listen(&mut self, ctx: &ActorContext) {
        match Running::start(ctx, &self.endpoint).await {
            Ok(running) => self.running = Some(running),
            Err(error) => ctx.fail(error.to_string()),
        }
    }

    /// Leaves a node that will be taken away, once the requests that it has are answered; another
    /// router takes new ones elsewhere.
    #[mobula(notice)]
    async fn leave(&mut self, ctx: &ActorContext, deadline_ms: u64) {
        if tokio::time::timeout(LEAVE_DRAIN, self.drain())
            .await
            .is_err()
        {
            tracing::warn!("a router leaves its node with requests unanswered");
        }
        if let Err(error) = ctx.yield_now().await {
            tracing::warn!(%error, deadline_ms, "a router could not leave its node early");
            // It does not listen any more, so it must not live on: its policy starts it again.
            ctx.fail(format!(
                "stopped listening for a notice and could not leave: {error}"
            ));
        }
    }

    /// Finishes the requests that it has.
    #[mobula(stop)]
    async fn drain(&mut self) {
        if let Some(running) = &mut self.running {
            running.stop.send_replace(true);
            while running.server.join_next().await.is_some() {}
        }
    }
}

impl Running {
    async fn start(ctx: &ActorContext, endpoint: &Endpoint) -> Result<Self, RouterError> {
        let cluster = ctx.cluster();
        let widths = row_widths(ctx, endpoint).await?;
        let ip = ctx
            .runtime()
            .call_address()
            .ok_or(RouterError::NoAddress)?
            .ip();
        let listener = bind(ip, last_port(&cluster, endpoint, ip).await).await?;
        let address = listener
            .local_addr()
            .map_err(|source| RouterError::Bind { ip, source })?;

        let mut tasks = JoinSet::new();
        let fleet: Arc<Fleet<ActorRef<Replica>>> = Arc::new(Fleet::new(endpoint.replicas));
        for (number, berth) in fleet.berths() {
            let name = replica_name(&endpoint.name, number);
            tasks.spawn(keep_open(cluster.clone(), name, berth));
        }
        let (feed, reader) = feed();
        tasks.spawn(feed_monitor(
            cluster.clone(),
            monitor_name(&endpoint.name),
            reader,
        ));
        tasks.spawn(announce(
            ctx.clone(),
            endpoint.name.clone(),
            ctx.incarnation(),
            address,
        ));

        let service = Arc::new(EndpointService::new(endpoint, widths, fleet, feed));
        let auth = BearerAuth::with_token_hashes(vec![endpoint.token_hash])
            .expect("one token is at least one and not too many");
        let routes = oip_routes(service, auth, body_limits(widths.0));
        let (stop, mut stopping) = watch::channel(false);
        let shutdown = async move {
            // A router that is gone stops as one that was asked to.
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        let mut server = JoinSet::new();
        let context = ctx.clone();
        server.spawn(async move {
            if let Err(error) = server::serve(listener, routes, shutdown).await {
                context.fail(error.to_string());
            }
        });
        Ok(Running {
            address,
            stop,
            server,
            _tasks: tasks,
        })
    }
}

/// How many values a row of this endpoint has, and how many classes it knows.
async fn row_widths(
    ctx: &ActorContext,
    endpoint: &Endpoint,
) -> Result<(usize, usize), RouterError> {
    let blobs = open_blobs(ctx.storage()).map_err(VersionFileError::from)?;
    let file = VersionFile::load(&blobs, &endpoint.digest, endpoint.size_bytes).await?;
    let samples = &file.samples;
    match samples {
        SampleShape::Classified { classes, .. } if samples.feature_count() <= ROW_VALUES_MAX => {
            Ok((samples.feature_count(), *classes))
        }
        _ => Err(RouterError::Samples {
            model: endpoint.model.clone(),
            version: endpoint.version,
            samples: samples.to_string(),
        }),
    }
}

/// The port that this endpoint had at this address, so that a router that is started again is
/// found where it was.
async fn last_port(cluster: &Cluster, endpoint: &Endpoint, ip: IpAddr) -> Option<u16> {
    let known = client::find(cluster, &endpoint.name).await.ok()?;
    let address: SocketAddr = known.http_address?.parse().ok()?;
    (address.ip() == ip).then(|| address.port())
}

async fn bind(ip: IpAddr, last_port: Option<u16>) -> Result<TcpListener, RouterError> {
    if let Some(port) = last_port
        && let Ok(listener) = TcpListener::bind((ip, port)).await
    {
        return Ok(listener);
    }
    TcpListener::bind((ip, 0))
        .await
        .map_err(|source| RouterError::Bind { ip, source })
}

/// Tells the head where the endpoint answers, until it knows.
async fn announce(
    ctx: ActorContext,
    endpoint: String,
    incarnation: Incarnation,
    address: SocketAddr,
) {
    let cluster = ctx.cluster();
    let command = Command::RouterReady {
        endpoint,
        incarnation,
        http_address: address.to_string(),
    };
    let payload = codec::encode_plain(&command);
    loop {
        let Err(error) = cluster.apply(ModuleId::SERVING, payload.clone()).await else {
            return;
        };
        match error.code() {
            // A newer router has taken over, or the endpoint is gone: this one is not needed.
            Some(ErrorCode::Fenced | ErrorCode::NotFound) => {
                return ctx.fail(format!("the router is not needed any more: {error}"));
            }
            _ => tracing::warn!(%error, "the head does not yet know where the endpoint answers"),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// Finds a replica and opens its berth; again whenever it has failed or was started again.
async fn keep_open(cluster: Cluster, name: String, berth: Arc<Berth<ActorRef<Replica>>>) {
    let mut known: Option<ActorId> = None;
    loop {
        match probe(&cluster, &name, known).await {
            Ok((replica, incarnation)) => {
                let id = replica.actor_id();
                known = Some(id);
                berth.open(replica);
                tokio::select! {
                    () = berth.failed() => {}
                    () = ended(&cluster, id, incarnation) => berth.close(),
                }
            }
            Err(error) => {
                tracing::debug!(name, %error, "a replica does not answer yet");
                if error.actor_has_ended() {
                    known = None;
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

/// A replica that answers, by a new reference: an old one remembers where it was.
async fn probe(
    cluster: &Cluster,
    name: &str,
    known: Option<ActorId>,
) -> mobula::Result<(ActorRef<Replica>, Incarnation)> {
    let replica = match known {
        Some(id) => ActorRef::from_id(cluster, id),
        None => cluster.get_actor::<Replica>(name).await?,
    };
    let incarnation = replica.ping().timeout(PROBE_TIMEOUT).await?;
    Ok((replica, incarnation))
}

/// Waits until the head knows that this start of a replica is over: it learns of a lost process
/// long before a caller does.
async fn ended(cluster: &Cluster, id: ActorId, incarnation: Incarnation) {
    loop {
        match cluster.resolve_actor(id, incarnation, WATCH_WAIT).await {
            Ok(actor) => {
                let is_newer = actor
                    .incarnation
                    .is_some_and(|newest| newest > incarnation.0);
                if is_newer || actor.state == "ended" {
                    return;
                }
            }
            // Without a head the replica is judged by its answers alone.
            Err(error) => {
                tracing::debug!(%id, %error, "a replica cannot be watched now");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

impl Backend for ActorRef<Replica> {
    async fn infer(&self, rows: Vec<f32>) -> Result<Inference, BackendFailure> {
        let call = ReplicaCalls::infer(self, rows).timeout(BATCH_TIMEOUT);
        call.await.map_err(|failure| match failure {
            CallFailure::User(error) => BackendFailure::Refused(error.to_string()),
            CallFailure::System(error) => BackendFailure::Lost(error.to_string()),
        })
    }
}

/// Sends what was answered to the monitor. Whatever does not arrive is dropped and counted.
async fn feed_monitor(cluster: Cluster, name: String, mut reader: FeedReader) {
    let mut known: Option<ActorRef<Monitor>> = None;
    while let Some(observation) = reader.next().await {
        let rows = observation.classes.len() as u64;
        let dropped = reader.take_dropped();
        let sending = async {
            let monitor = match known.take() {
                Some(monitor) => monitor,
                None => cluster.get_actor::<Monitor>(&name).await?,
            };
            monitor
                .observe(observation.rows, observation.classes, dropped)
                .timeout(MONITOR_TIMEOUT)
                .await?;
            Ok::<_, mobula::Error>(monitor)
        };
        match sending.await {
            Ok(monitor) => known = Some(monitor),
            Err(error) => {
                tracing::warn!(name, rows, %error, "the monitor misses rows");
                reader.count_dropped(rows + dropped);
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_port_is_taken_again_if_it_is_free() {
        let ip: IpAddr = [127, 0, 0, 1].into();
        let first = bind(ip, None).await.unwrap();
        let port = first.local_addr().unwrap().port();
        let other = bind(ip, Some(port)).await.unwrap();
        assert_ne!(other.local_addr().unwrap().port(), port);
        drop(first);
        let again = bind(ip, Some(port)).await.unwrap();
        assert_eq!(again.local_addr().unwrap().port(), port);
    }
}
