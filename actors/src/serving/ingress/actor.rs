//! The ingress of one worker: an actor that listens at the address which the worker was told.
//!
//! Invariants:
//! 1. It goes on with the endpoints that it knows while the head is away.
//! 2. A worker that leaves says first that it is not ready, goes on answering while those who balance load look
//!    elsewhere, then closes its door and finishes what it has.
//! 3. Its tasks end with it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mobula::{ActorContext, Cluster, ContextExt};
use mobula_core::error::ErrorCode;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::doors::{self, DoorTable, IngressGate};
use super::service::IngressService;
use crate::serving::access::keyring::now_ms;
use crate::serving::client;
use crate::serving::grpc::oip_routes;
use crate::serving::server::{self, ActorServer, DRAIN_TIMEOUT};
use crate::serving::signature::BODY_LIMITS_MAX;

/// How long an ingress that leaves says so and goes on answering: a load balancer's usual health check comes every
/// few seconds.
const LAME_DUCK_MAX: Duration = Duration::from_secs(5);

/// Of the time until its worker is gone, it says that it leaves for this part of it at the most.
const LAME_DUCK_SHARE: u32 = 6;

/// The pause after something that could not be done now.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// How often an ingress that starts asks where it shall listen. Without an answer it fails, and its policy starts it
/// again after growing pauses.
const ADDRESS_TRIES: u32 = 20;

/// Why an ingress cannot serve.
#[derive(Debug, thiserror::Error)]
enum IngressError {
    #[error("the head does not say where this worker's ingress shall listen: {0}")]
    Head(#[source] mobula::Error),
    #[error(
        "worker {node} was not told of an ingress: start it with `mobula worker --ingress IP:PORT`"
    )]
    NotTold { node: String },
    #[error("the ingress address `{text}` of worker {node} is not ip:port")]
    Address { node: String, text: String },
    #[error(
        "cannot listen on {address}: {source}; free the port, or start the worker with another `--ingress`"
    )]
    Bind {
        address: SocketAddr,
        source: std::io::Error,
    },
}

/// Answers for all endpoints at one worker.
pub struct Ingress {
    node: String,
    running: Option<Running>,
}

struct Running {
    address: SocketAddr,
    service: Arc<IngressService>,
    server: ActorServer,
    /// Aborted when dropped.
    _follower: JoinSet<()>,
}

#[mobula::actor(name = "mobula.ingress")]
impl Ingress {
    /// The ingress of the worker of this name; it listens once it has started.
    pub fn new(node: String) -> Self {
        Ingress {
            node,
            running: None,
        }
    }

    /// Where it answers, `ip:port`.
    pub fn address(&self) -> Option<String> {
        let running = self.running.as_ref()?;
        Some(running.address.to_string())
    }

    #[mobula(started)]
    async fn listen(&mut self, ctx: &ActorContext) {
        match Running::start(ctx, &self.node).await {
            Ok(running) => self.running = Some(running),
            Err(error) => ctx.fail(error.to_string()),
        }
    }

    /// Leaves a worker that will be taken away.
    #[mobula(notice)]
    async fn leave(&mut self, ctx: &ActorContext, deadline_ms: u64) {
        let left = Duration::from_millis(deadline_ms.saturating_sub(now_ms()));
        if let Some(running) = &self.running {
            running.service.leave();
            tokio::time::sleep(LAME_DUCK_MAX.min(left / LAME_DUCK_SHARE)).await;
        }
        if tokio::time::timeout(DRAIN_TIMEOUT.min(left / 2), self.drain())
            .await
            .is_err()
        {
            tracing::warn!("an ingress leaves its worker with requests unanswered");
        }
        server::leave_node(ctx, "an ingress", deadline_ms).await;
    }

    /// Finishes the requests that it has.
    #[mobula(stop)]
    async fn drain(&mut self) {
        if let Some(running) = &mut self.running {
            running.service.leave();
            running.server.drain().await;
        }
    }
}

impl Running {
    async fn start(ctx: &ActorContext, node: &str) -> Result<Self, IngressError> {
        let cluster = ctx.cluster();
        let text = told_address(&cluster, node).await?;
        let parsed = text.parse();
        let address: SocketAddr = parsed.map_err(|_| IngressError::Address {
            node: node.to_owned(),
            text,
        })?;
        let bound = TcpListener::bind(address).await;
        let listener = bound.map_err(|source| IngressError::Bind { address, source })?;

        let (sender, table) = watch::channel(Arc::<DoorTable>::default());
        let mut follower = JoinSet::new();
        follower.spawn(doors::follow(cluster, sender));
        let service = Arc::new(IngressService::new(table.clone()));
        // Of a model that is known, its own limit holds as well.
        let gate = IngressGate::new(table);
        let routes = oip_routes(Arc::clone(&service) as _, gate, BODY_LIMITS_MAX);
        Ok(Running {
            address,
            service,
            server: ActorServer::start(ctx, listener, routes),
            _follower: follower,
        })
    }
}

/// Where this worker's ingress shall listen.
async fn told_address(cluster: &Cluster, node: &str) -> Result<String, IngressError> {
    let mut tries = 1;
    loop {
        match client::ingress_address(cluster, node).await {
            Ok(told) => {
                return told.ok_or_else(|| IngressError::NotTold {
                    node: node.to_owned(),
                });
            }
            Err(error) if tries == ADDRESS_TRIES || error.code() == Some(ErrorCode::NotFound) => {
                return Err(IngressError::Head(error));
            }
            Err(error) => tracing::debug!(node, %error, "the ingress's address is not known yet"),
        }
        tries += 1;
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}
