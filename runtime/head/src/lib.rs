//! The head: it orders every change through Raft, applies it to the tables, and sees to it that
//! workers do what the tables say.
//!
//! The way of a command: `api` → [`raft::RaftHandle`] → the driver's thread (log, fsync, apply) →
//! effects → `dispatcher` → `session` → worker. What only a leader does is in `leadership`.
//!
//! Invariants:
//! 1. Nothing is acknowledged before it is on disk.
//! 2. Orders are level-triggered: each can be rebuilt from the tables at any time.
//! 3. Every listener is TLS 1.3; QUIC requires a certificate of the cluster.

mod api;
pub mod audit;
pub mod backup;
mod bootstrap;
mod context;
mod dispatcher;
mod error;
mod group;
mod health;
mod join;
mod leader_client;
mod leadership;
mod metrics;
mod origin;
pub mod raft;
mod secrets;
mod session;
mod sessions;
#[doc(hidden)]
pub mod simulation;
mod store_health;
mod sweep;
mod timeline;
mod tokens;
mod watch;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mobula_core::clock::Clock;
use mobula_core::config::{Config, LimitsConfig, RaftConfig, TokensConfig};
use mobula_core::control::{Controller, ModuleId, StateModule};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{Credentials, Role};
use mobula_net::tcp::ApiListener;
use mobula_scheduler::{KeptObjects, Scheduler};
use mobula_storage::artifact::ArtifactStore;
use mobula_storage::blob::BlobStore;
use mobula_storage::engine::{RocksEngine, RocksOptions};
use mobula_wire::control::control_server::ControlServer;
use mobula_wire::session::StorageLocation;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch as tokio_watch};
use tokio::task::JoinSet;

pub use bootstrap::{CLIENT_TOKEN_FILE, WORKER_TOKEN_FILE};
pub use error::HeadError;
pub use join::JoinOptions;
pub use sweep::SweepOptions;

use crate::bootstrap::HeadIdentity;
use crate::context::HeadContext;
use crate::raft::{Chance, Driver, DriverOptions, EmptyLog, End, PeerNetwork, input_queue};

/// How long a head that is to stop waits until another one leads: some round trips, unless that one
/// stops as well.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(1);

/// Connections of workers and other heads that are served at the same time: one each, ten thousand
/// nodes at the most.
const CONNECTIONS_MAX: usize = 10_000;

/// How often it is checked whether the certificate is due for renewal.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(60);

/// When a client of the control API that says nothing is asked whether it is there, and how long it may take to answer:
/// longer than a process is paused as a rule.
const API_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(60);
const API_KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(60);

/// How a head is started.
pub struct HeadOptions {
    /// Where its state is kept.
    pub data_dir: PathBuf,
    /// Its name, at its first start; left out, one is made up.
    pub name: Option<String>,
    /// The group to join at its first start; without, it begins a cluster of its own.
    pub join: Option<JoinOptions>,
    /// Whether it asks to vote once it has caught up, instead of staying a learner until somebody
    /// promotes it.
    pub wants_to_vote: bool,
    /// Where the control API listens; port 0 takes a free one.
    pub api_listen: SocketAddr,
    /// Where the cluster's QUIC endpoint listens; port 0 takes a free one.
    pub cluster_listen: SocketAddr,
    /// Where bytes at rest are.
    pub storage: StorageLocation,
    /// Raft's settings.
    pub raft: RaftConfig,
    /// Leases.
    pub limits: LimitsConfig,
    /// How long the first tokens and the hosts' certificates live.
    pub tokens: TokensConfig,
    /// Replicated modules beside the scheduler.
    pub modules: Vec<Arc<dyn StateModule>>,
    /// The modules' leader-only loops.
    pub controllers: Vec<Box<dyn Controller>>,
    /// Whether and when the object store is swept; needs a module that knows what must stay.
    pub sweep: Option<SweepOptions>,
    /// Time.
    pub clock: Arc<dyn Clock>,
}

impl HeadOptions {
    /// The options that a configuration file asks for.
    pub fn from_config(config: &Config, clock: Arc<dyn Clock>) -> Result<Self, HeadError> {
        let head = &config.head;
        let address = |what, text: &str| {
            text.parse::<SocketAddr>()
                .map_err(|error| HeadError::Address {
                    what,
                    text: text.to_owned(),
                    reason: error.to_string(),
                })
        };
        let s3 = &config.storage.s3;
        Ok(HeadOptions {
            data_dir: PathBuf::from(&head.data_dir),
            name: head.name.clone(),
            join: None,
            wants_to_vote: true,
            api_listen: address("head.api_listen", &head.api_listen)?,
            cluster_listen: address("head.cluster_listen", &head.cluster_listen)?,
            storage: StorageLocation {
                url: config.storage.url.clone(),
                endpoint: s3.endpoint.clone(),
                region: s3.region.clone(),
                allow_http: s3.allow_http,
                access_key_env: s3.access_key_env.clone(),
                secret_key_env: s3.secret_key_env.clone(),
            },
            raft: config.raft.clone(),
            limits: config.limits.clone(),
            tokens: config.tokens.clone(),
            modules: Vec::new(),
            controllers: Vec::new(),
            sweep: None,
            clock,
        })
    }
}

/// A running head.
pub struct Head {
    context: Arc<HeadContext>,
    driver: Driver,
    network: PeerNetwork,
    endpoint: Endpoint,
    data_dir: PathBuf,
    shutdown: tokio_watch::Sender<bool>,
    tasks: JoinSet<&'static str>,
}

impl Head {
    /// Opens the state in the data directory and starts serving.
    pub async fn start(options: HeadOptions) -> Result<Head, HeadError> {
        let mut identity = load_or_join(&options).await?;
        let upload_dir = options.data_dir.join("uploads");
        bootstrap::create_private_dir(&upload_dir)?;
        let engine = RocksEngine::open(options.data_dir.join("raft"), &RocksOptions::small())?;
        if identity.record.has_log && raft::is_log_lost(&engine)? {
            return Err(HeadError::LostLog {
                raft_id: identity.record.raft_id,
                data_dir: options.data_dir,
            });
        }
        let blobs = BlobStore::at(&options.storage)
            .map_err(|error| HeadError::Storage(error.to_string()))?;

        let api_listener = ApiListener::bind(options.api_listen, &identity.credentials)
            .await
            .map_err(|error| HeadError::Listen {
                what: "the control API",
                address: options.api_listen,
                reason: error.to_string(),
            })?;
        let endpoint =
            Endpoint::bind(options.cluster_listen, &identity.credentials).map_err(|error| {
                HeadError::Listen {
                    what: "the cluster endpoint",
                    address: options.cluster_listen,
                    reason: error.to_string(),
                }
            })?;

        let modules = collect_modules(options.modules);
        let (effect_sender, effect_receiver) = dispatcher::effect_queue();
        let record = identity.record.clone();
        let inputs = input_queue();
        let network = PeerNetwork::new(record.raft_id, endpoint.clone(), inputs.0.clone());
        let seeds = record.heads.iter();
        network.seed(seeds.map(|head| (head.raft_id, head.cluster_address.clone())));
        let (driver, raft) = Driver::start(
            engine,
            inputs,
            DriverOptions {
                raft_id: record.raft_id,
                empty_log: if record.joined {
                    EmptyLog::Waits
                } else {
                    EmptyLog::BecomesGroup
                },
                raft: options.raft,
                modules: modules.clone(),
                clock: options.clock.clone(),
                effects: effect_sender,
                peers: Box::new(network.clone()),
                chance: Chance::drawn(),
            },
        )?;
        identity.note_log()?;
        let api_address = api_listener.local_address();
        let cluster_address = endpoint.local_address();
        let context = Arc::new(HeadContext {
            cluster_id: identity.cluster_id.clone(),
            raft_id: record.raft_id,
            name: record.name.clone(),
            ca: identity.ca.clone(),
            at_rest: identity.ca.at_rest(),
            raft,
            modules,
            sessions: sessions::Sessions::default(),
            metrics: metrics::HeadMetrics::default(),
            lives: timeline::Lives::default(),
            changes: watch::Changes::default(),
            store_health: store_health::StoreHealth::new(blobs.clone()),
            artifacts: ArtifactStore::new(blobs.clone(), api::ARTIFACT_BYTES_MAX),
            blobs,
            storage_location: options.storage,
            limits: options.limits,
            api_address,
            api_connections: api_listener.connections(),
            cluster_address,
            started_ms: options.clock.now_ms(),
            clock: options.clock,
            host_certificate_ttl: Duration::from_secs(
                options.tokens.host_certificate_ttl_hours * 3600,
            ),
            sweeps: sweep::SweepReports::default(),
            log_streams: Arc::new(Semaphore::new(api::LOG_STREAMS_MAX)),
            backups: Arc::new(Semaphore::new(api::BACKUPS_MAX)),
            upload_dir,
        });

        let (shutdown, shutdown_receiver) = tokio_watch::channel(false);
        let nudges = Arc::new(dispatcher::Nudges::default());
        let mut tasks = JoinSet::new();
        let dispatch = dispatcher::run(context.clone(), effect_receiver, nudges.clone());
        tasks.spawn(named("the dispatcher", dispatch));
        let duties = leadership::LeaderDuties {
            context: context.clone(),
            nudges,
            controllers: Arc::new(Mutex::new(options.controllers)),
            data_dir: options.data_dir.clone(),
            tokens: options.tokens,
            sweep: options.sweep,
        };
        tasks.spawn(named("the leader's duties", leadership::run(duties)));
        tasks.spawn(named(
            "the cluster endpoint",
            serve_cluster(context.clone(), endpoint.clone(), network.clone()),
        ));
        let credentials = tokio_watch::Sender::new(identity.credentials.clone());
        let place = group::Place {
            context: context.clone(),
            own: context.own(),
            seeds: record.heads,
            wants_to_vote: options.wants_to_vote,
            credentials: credentials.subscribe(),
        };
        let peers = network.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = group::run(place) => REMOVED,
                told = peers.told_to_end() => match told {
                    End::Removed => REMOVED,
                    End::Replaced => REPLACED,
                },
            }
        });
        let renewal = renew_certificate(
            identity,
            endpoint.clone(),
            api_listener.credentials(),
            credentials,
        );
        tasks.spawn(named("certificate renewal", renewal));
        let serve = serve_api(context.clone(), api_listener, shutdown_receiver);
        tasks.spawn(named("the control API", serve));

        tracing::info!(raft_id = context.raft_id, api = %api_address, cluster = %cluster_address, id = context.cluster_id, "head started");
        Ok(Head {
            context,
            driver,
            network,
            endpoint,
            data_dir: options.data_dir,
            shutdown,
            tasks,
        })
    }

    /// Where the control API listens.
    #[must_use]
    pub fn api_address(&self) -> SocketAddr {
        self.context.api_address
    }

    /// Where the cluster's QUIC endpoint listens.
    #[must_use]
    pub fn cluster_address(&self) -> SocketAddr {
        self.context.cluster_address
    }

    /// Its id in Raft.
    #[must_use]
    pub fn raft_id(&self) -> u64 {
        self.context.raft_id
    }

    /// The cluster's id.
    #[must_use]
    pub fn cluster_id(&self) -> &str {
        &self.context.cluster_id
    }

    /// A handle on the replicated log.
    #[must_use]
    pub fn raft(&self) -> raft::RaftHandle {
        self.context.raft.clone()
    }

    /// Hands leadership over, if this head leads: those who write then wait for a message instead of
    /// an election. Where there is nobody to take it, the head just stops.
    async fn hand_over(&self) {
        let mut leadership = self.context.raft.leadership();
        if !leadership.borrow().is_leader {
            return;
        }
        let Ok(to) = self.context.raft.transfer_leadership(None).await else {
            return;
        };
        let taken = leadership.wait_for(|now| now.leader == Some(to));
        match tokio::time::timeout(HAND_OVER_LIMIT, taken).await {
            Ok(_) => tracing::info!(to, "handed leadership over"),
            Err(_) => tracing::info!(
                to,
                "leadership was not taken in time; stopping all the same"
            ),
        }
    }

    /// Serves until `stop` completes, or a part of the head fails; then stops in order.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), HeadError> {
        let failed = tokio::select! {
            () = stop => None,
            ended = self.tasks.join_next() => Some(match ended {
                Some(Ok(name)) => name,
                _ => "a task",
            }),
        };
        if failed.is_none() {
            self.hand_over().await;
        }
        // Receivers may be gone already, if the API is what failed.
        let _ = self.shutdown.send(true);
        self.endpoint.close("the head stops").await;
        self.tasks.shutdown().await;
        self.network.stop().await;
        self.driver.stop().await;
        match failed {
            None => Ok(()),
            Some(REMOVED) => Err(HeadError::Removed {
                raft_id: self.context.raft_id,
                data_dir: self.data_dir,
            }),
            Some(REPLACED) => Err(HeadError::Replaced {
                raft_id: self.context.raft_id,
                data_dir: self.data_dir,
            }),
            Some(name) => Err(HeadError::Ended(name)),
        }
    }
}

/// The identity in the data directory, or one that the group gives.
async fn load_or_join(options: &HeadOptions) -> Result<HeadIdentity, HeadError> {
    if let Some(join) = &options.join
        && !HeadIdentity::exists(&options.data_dir)
    {
        let made_up = || format!("head-{:08x}", rand::random::<u32>());
        let name = options.name.clone().unwrap_or_else(made_up);
        join::join(&options.data_dir, &name, join).await?;
    }
    HeadIdentity::load_or_create(&options.data_dir, options.name.as_deref())
}

/// What ends when this head was removed from its group.
const REMOVED: &str = "this head's place in the group";

/// What ends when another process runs as this head.
const REPLACED: &str = "this head's sole claim to its id";

async fn named(name: &'static str, task: impl Future<Output = ()>) -> &'static str {
    task.await;
    name
}

fn collect_modules(modules: Vec<Arc<dyn StateModule>>) -> BTreeMap<ModuleId, Arc<dyn StateModule>> {
    let own: [Arc<dyn StateModule>; 2] = [Arc::new(Scheduler), Arc::new(KeptObjects)];
    modules
        .into_iter()
        .chain(own)
        .map(|module| (module.id(), module))
        .collect()
}

async fn serve_cluster(context: Arc<HeadContext>, endpoint: Endpoint, network: PeerNetwork) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            connection = endpoint.accept() => {
                let Some(connection) = connection else { return };
                if connections.len() >= CONNECTIONS_MAX {
                    tracing::warn!(peer = %connection.peer(), "too many connections");
                    connection.close("the head serves 10000 connections at the most");
                    continue;
                }
                match connection.peer().role {
                    Role::Node => {
                        connections.spawn(session::serve(context.clone(), connection));
                    }
                    Role::Head => {
                        let network = network.clone();
                        connections.spawn(async move { network.serve(connection).await });
                    }
                    Role::Host | Role::Client => {
                        tracing::warn!(peer = %connection.peer(), "only workers and heads connect to a head");
                        connection.close("only workers and heads connect to a head");
                    }
                }
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn serve_api(
    context: Arc<HeadContext>,
    listener: ApiListener,
    mut shutdown: tokio_watch::Receiver<bool>,
) {
    let service = ControlServer::new(api::ControlService {
        context: context.clone(),
    })
    .max_decoding_message_size(api::MESSAGE_BYTES_MAX)
    .max_encoding_message_size(api::MESSAGE_BYTES_MAX);
    let scrapes = axum::Router::new()
        .route("/metrics", axum::routing::get(api::scrape))
        .route("/metrics/{node}", axum::routing::get(api::scrape))
        .with_state(context.clone());
    let routes = tonic::service::Routes::new(service)
        .into_axum_router()
        .merge(scrapes)
        .layer(axum::middleware::from_fn_with_state(context, api::measure));
    let stop = async move {
        // An error means that the head is gone, which is a stop too.
        let _ = shutdown.wait_for(|stop| *stop).await;
    };
    let served = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        // Clients whose machines vanish say nothing any more, and each holds a file descriptor.
        .http2_keepalive_interval(Some(API_KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(API_KEEP_ALIVE_TIMEOUT))
        .add_routes(tonic::service::Routes::from(routes))
        .serve_with_incoming_shutdown(listener, stop)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the control API failed");
    }
}

async fn renew_certificate(
    mut identity: HeadIdentity,
    endpoint: Endpoint,
    api_credentials: mobula_net::tcp::ApiCredentials,
    renewed: tokio_watch::Sender<Credentials>,
) {
    loop {
        tokio::time::sleep(RENEWAL_INTERVAL).await;
        if SystemTime::now() < identity.credentials.renew_at() {
            continue;
        }
        match identity.renew() {
            Ok(credentials) => {
                if let Err(error) = endpoint.replace_credentials(&credentials) {
                    tracing::error!(%error, "the endpoint refuses the new certificate");
                }
                if let Err(error) = api_credentials.replace(&credentials) {
                    tracing::error!(%error, "the control API refuses the new certificate");
                }
                renewed.send_replace(credentials.clone());
                identity.credentials = credentials;
            }
            Err(error) => tracing::error!(%error, "the certificate cannot be renewed"),
        }
    }
}
