//! A running head: opened in order, served until a part of it ends, stopped in order.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::control::{ModuleId, StateModule};
use mobula_net::endpoint::Endpoint;
use mobula_net::tcp::ApiListener;
use mobula_scheduler::{KeptObjects, Scheduler};
use mobula_storage::artifact::ArtifactStore;
use mobula_storage::blob::BlobStore;
use mobula_storage::engine::{RocksEngine, RocksOptions};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch as tokio_watch};
use tokio::task::JoinSet;

use crate::bootstrap::{self, HeadIdentity};
use crate::context::HeadContext;
use crate::error::HeadError;
use crate::listeners::{renew_certificate, serve_api, serve_cluster};
use crate::options::HeadOptions;
use crate::raft::{
    self, Chance, Driver, DriverEnd, DriverOptions, EmptyLog, End, PeerNetwork, input_queue,
};
use crate::{
    api, dispatcher, group, join, leadership, metrics, sessions, store_health, sweep, timeline,
    watch,
};

/// How long a head that is to stop waits until another one leads: some round trips, unless that one
/// stops as well.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(1);

/// A running head.
pub struct Head {
    context: Arc<HeadContext>,
    driver: Driver,
    network: PeerNetwork,
    endpoint: Endpoint,
    shutdown: tokio_watch::Sender<bool>,
    /// Each with what the head ends with, should it end.
    tasks: JoinSet<HeadError>,
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
        // Not before: what a head that may not serve says is the last thing that it says.
        let seeds = record.heads.iter();
        network.seed(seeds.map(|head| (head.raft_id, head.cluster_address.clone())));
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
        tasks.spawn(never_ending("the dispatcher", dispatch));
        let duties = leadership::LeaderDuties {
            context: context.clone(),
            nudges,
            controllers: Arc::new(Mutex::new(options.controllers)),
            data_dir: options.data_dir.clone(),
            tokens: options.tokens,
            sweep: options.sweep,
        };
        tasks.spawn(never_failing(
            "the leader's duties",
            leadership::run(duties),
        ));
        tasks.spawn(never_ending(
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
        let (raft_id, data_dir) = (record.raft_id, options.data_dir);
        tasks.spawn(async move {
            let told = tokio::select! {
                () = group::run(place) => End::Removed,
                told = peers.told_to_end() => told,
            };
            match told {
                End::Removed => HeadError::Removed { raft_id, data_dir },
                End::Replaced => HeadError::Replaced { raft_id, data_dir },
            }
        });
        let renewal = renew_certificate(
            identity,
            endpoint.clone(),
            api_listener.credentials(),
            credentials,
        );
        tasks.spawn(never_ending("certificate renewal", renewal));
        let serve = serve_api(context.clone(), api_listener, shutdown_receiver);
        tasks.spawn(never_failing("the control API", serve));

        tracing::info!(raft_id = context.raft_id, api = %api_address, cluster = %cluster_address, id = context.cluster_id, "head started");
        Ok(Head {
            context,
            driver,
            network,
            endpoint,
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
        let ended = tokio::select! {
            () = stop => None,
            ended = self.tasks.join_next() => Some(match ended {
                Some(Ok(error)) => error,
                Some(Err(panic)) => failed("a task", &panic),
                None => HeadError::Ended("every task"),
            }),
        };
        if ended.is_none() {
            self.hand_over().await;
        }
        // Receivers may be gone already, if the API is what failed.
        let _ = self.shutdown.send(true);
        self.endpoint.close("the head stops").await;
        self.tasks.shutdown().await;
        self.network.stop().await;
        // Where the driver has ended by itself, whatever else did only followed.
        match self.driver.stop().await {
            Some(DriverEnd::LostEntries(lost)) => Err(HeadError::LostEntries {
                raft_id: self.context.raft_id,
                lost,
            }),
            Some(DriverEnd::CommittedConflict(conflict)) => Err(HeadError::CommittedConflict {
                raft_id: self.context.raft_id,
                conflict,
            }),
            Some(DriverEnd::Panicked(message)) => Err(failed(
                "the raft thread",
                &format!("it panicked: {message}"),
            )),
            None => ended.map_or(Ok(()), Err),
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

fn failed(what: &'static str, reason: &dyn Display) -> HeadError {
    HeadError::Failed {
        what,
        reason: reason.to_string(),
    }
}

/// A task that must not end.
async fn never_ending(name: &'static str, task: impl Future<Output = ()>) -> HeadError {
    task.await;
    HeadError::Ended(name)
}

/// A task that must not end, and can say why it has.
async fn never_failing<E: Display>(
    name: &'static str,
    task: impl Future<Output = Result<(), E>>,
) -> HeadError {
    match task.await {
        Ok(()) => HeadError::Ended(name),
        Err(error) => failed(name, &error),
    }
}

fn collect_modules(modules: Vec<Arc<dyn StateModule>>) -> BTreeMap<ModuleId, Arc<dyn StateModule>> {
    let own: [Arc<dyn StateModule>; 2] = [Arc::new(Scheduler), Arc::new(KeptObjects)];
    modules
        .into_iter()
        .chain(own)
        .map(|module| (module.id(), module))
        .collect()
}
