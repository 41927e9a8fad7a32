//! How a head is started: what a configuration file says, and what its program plugs in.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use mobula_core::clock::Clock;
use mobula_core::config::{Config, LimitsConfig, RaftConfig, TokensConfig};
use mobula_core::control::{Controller, StateModule};
use mobula_wire::session::StorageLocation;

use crate::error::HeadError;
use crate::join::JoinOptions;
use crate::sweep::SweepOptions;

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
