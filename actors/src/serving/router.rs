//! The router: an endpoint's front door. It listens for HTTP and gRPC at one port, keeps track of the endpoint's
//! replicas, and feeds its monitor.
//!
//! Invariants:
//! 1. It listens before it says where, and says where before anybody is told to ask it.
//! 2. It finds its replicas and its monitor by name; it serves without a monitor, and without the
//!    head once it knows its replicas. Which versions it answers with, [`super::steering`] follows.
//! 3. Its tasks end with it.
//! 4. What an ingress hands on is answered as what comes in at its own port, by the same rules.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mobula::{ActorContext, ActorRef, ContextExt};
use mobula_core::codec;
use mobula_core::control::ModuleId;
use mobula_core::error::ErrorCode;
use mobula_core::id::Incarnation;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::access::follow;
use super::access::keyring::EndpointGate;
use super::access::state::Access;
use super::asynchronous::Fetched;
use super::auth::Caller;
use super::endpoint_service::EndpointService;
use super::experiment::outcomes::outcome_routes;
use super::grpc::oip_routes;
use super::http::InferenceService;
use super::labels::{LabelDesk, label_routes};
use super::oip::{
    InferRequest, InferResponse, ModelMetadata, OipError, RepositoryEntry, validate_request,
};
use super::replica::Replica;
use super::server::{self, ActorServer};
use super::shadow::mirror::{compare_copies, mirror};
use super::state::{Command, Endpoint};
use super::statistics::ModelStatistics;
use super::steering::Steering;
use super::versions::{SignatureError, Versions};
use crate::serving::client;

/// The pause after something that could not be done now.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// How long a router that leaves its node waits for the requests that it has: they take
/// milliseconds, and meanwhile nobody listens.
const LEAVE_DRAIN: Duration = Duration::from_secs(1);

/// How often a router that starts asks which version is active. Without an answer it fails, and its
/// policy starts it again after growing pauses.
const ROUTING_TRIES: u32 = 20;

/// Why a router cannot serve.
#[derive(Debug, thiserror::Error)]
enum RouterError {
    #[error("this process has no address that others can reach")]
    NoAddress,
    #[error("cannot listen on {ip}: {source}; give the worker another `listen` address")]
    Bind { ip: IpAddr, source: std::io::Error },
    #[error("the head does not say which version is active: {0}")]
    Routing(#[source] mobula::Error),
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

/// What an ingress must know of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    /// What it takes and gives.
    pub metadata: ModelMetadata,
    /// Bytes of a request's body, before and after inflating.
    pub body_bytes_max: u64,
}

/// Answers an endpoint's requests.
pub struct Router {
    endpoint: Endpoint,
    running: Option<Running>,
}

struct Running {
    address: SocketAddr,
    service: Arc<EndpointService<ActorRef<Replica>>>,
    body_bytes_max: u64,
    server: ActorServer,
    /// Aborted when dropped.
    _tasks: JoinSet<()>,
}

// As many requests at once as its mailbox holds: they wait for replicas, whose queues are bounded.
#[mobula::actor(name = "mobula.router", max_concurrency = 1024)]
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

    /// Describes the endpoint, or one of its versions.
    pub async fn describe(&self, version: Option<String>) -> Result<Described, OipError> {
        let running = self.running()?;
        let described = running
            .service
            .model_metadata(&self.endpoint.name, version.as_deref());
        Ok(Described {
            metadata: described.await?,
            body_bytes_max: running.body_bytes_max,
        })
    }

    /// Succeeds when it can answer.
    pub async fn ready(&self, version: Option<String>) -> Result<(), OipError> {
        let service = &self.running()?.service;
        service
            .model_ready(&self.endpoint.name, version.as_deref())
            .await
    }

    /// What a version has answered.
    pub async fn statistics(
        &self,
        version: Option<String>,
    ) -> Result<(String, ModelStatistics), OipError> {
        let service = &self.running()?.service;
        service
            .model_statistics(&self.endpoint.name, version.as_deref())
            .await
    }

    /// Its versions.
    pub async fn index(&self) -> Result<Vec<RepositoryEntry>, OipError> {
        let caller = Caller::default();
        self.running()?.service.repository_index(&caller).await
    }

    /// Answers a request whose caller an ingress has let in.
    pub async fn answer(
        &self,
        version: Option<String>,
        request: InferRequest,
    ) -> Result<InferResponse, OipError> {
        let service = &self.running()?.service;
        let (model, version) = (&*self.endpoint.name, version.as_deref());
        let metadata = service.infer_metadata(model, version).await?;
        validate_request(&request, &metadata)?;
        service.infer(model, version, request).await
    }

    /// The same for a caller who comes back for the answer; the id to fetch it with.
    pub async fn submit(
        &self,
        version: Option<String>,
        request: InferRequest,
    ) -> Result<String, OipError> {
        let service = &self.running()?.service;
        let (model, version) = (&*self.endpoint.name, version.as_deref());
        let metadata = service.infer_metadata(model, version).await?;
        validate_request(&request, &metadata)?;
        service.submit(model, version, request).await
    }

    /// The answer to such a request; `None` as long as it is under way.
    pub async fn fetch(&self, id: String) -> Result<Option<Fetched>, OipError> {
        let service = &self.running()?.service;
        service.fetch(&self.endpoint.name, &id).await
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
        server::leave_node(ctx, "a router", deadline_ms).await;
    }

    /// Finishes the requests that it has.
    #[mobula(stop)]
    async fn drain(&mut self) {
        if let Some(running) = &mut self.running {
            running.server.drain().await;
        }
    }
}

impl Router {
    fn running(&self) -> Result<&Running, OipError> {
        self.running
            .as_ref()
            .ok_or_else(|| OipError::ServerNotReady {
                reason: "the router does not know yet which version is active".to_owned(),
            })
    }
}

impl Running {
    async fn start(ctx: &ActorContext, endpoint: &Endpoint) -> Result<Self, RouterError> {
        let cluster = ctx.cluster();
        // What this router was created with may be versions ago.
        let routing =
            first_answer(&endpoint.name, || client::routing(&cluster, &endpoint.name)).await?;
        let access =
            first_answer(&endpoint.name, || client::access(&cluster, &endpoint.name)).await?;
        let versions = Versions::new(cluster.clone(), ctx.storage().clone());
        let signature = versions.signature(&routing.endpoint).await?;
        let body = signature.body_limits();
        let ip = ctx
            .runtime()
            .call_address()
            .ok_or(RouterError::NoAddress)?
            .ip();
        let listener = bind(ip, last_port(&routing.endpoint, ip)).await?;
        let address = listener
            .local_addr()
            .map_err(|source| RouterError::Bind { ip, source })?;

        let mut tasks = JoinSet::new();
        let (steering, routes) =
            Steering::new(versions, ctx.incarnation(), signature.clone(), &routing);
        tasks.spawn(steering.follow());
        tasks.spawn(announce(
            ctx.clone(),
            endpoint.name.clone(),
            ctx.incarnation(),
            address,
        ));

        let (sender, access): (_, watch::Receiver<Arc<Access>>) = watch::channel(Arc::new(access));
        tasks.spawn(follow::follow(
            cluster.clone(),
            endpoint.name.clone(),
            sender,
        ));
        let gate = EndpointGate::new(&endpoint.name, access.clone());
        let outcomes = outcome_routes(&endpoint.name, routes.clone(), gate.clone());
        let labels = label_routes(LabelDesk {
            cluster,
            endpoint: endpoint.name.clone(),
            routes: routes.clone(),
            gate: Box::new(gate.clone()),
        });
        let (mirror, copies) = mirror();
        let service = EndpointService::new(&endpoint.name, signature, routes, mirror);
        let service = service.with_access(access).shared();
        tasks.spawn(compare_copies(Arc::clone(&service), copies));
        let routes = oip_routes(Arc::clone(&service) as _, gate, body);
        let routes = routes.merge(outcomes).merge(labels);
        Ok(Running {
            address,
            service,
            body_bytes_max: body.max_bytes as u64,
            server: ActorServer::start(ctx, listener, routes),
            _tasks: tasks,
        })
    }
}

/// What the head says about the endpoint now.
async fn first_answer<T, F>(endpoint: &str, question: impl Fn() -> F) -> Result<T, RouterError>
where
    F: Future<Output = mobula::Result<T>>,
{
    let mut tries = 1;
    loop {
        match question().await {
            Ok(answer) => return Ok(answer),
            Err(error) if tries == ROUTING_TRIES || error.code() == Some(ErrorCode::NotFound) => {
                return Err(RouterError::Routing(error));
            }
            Err(error) => tracing::debug!(endpoint, %error, "the active version is not known yet"),
        }
        tries += 1;
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// The port that this endpoint had at this address, so that a router that is started again is
/// found where it was.
fn last_port(known: &Endpoint, ip: IpAddr) -> Option<u16> {
    let address: SocketAddr = known.http_address.as_ref()?.parse().ok()?;
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
