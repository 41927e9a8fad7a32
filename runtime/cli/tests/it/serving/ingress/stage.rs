//! A head that knows the routers which a test has started, and the host that runs them. Only what a router answers is as the
//! test says.

use std::sync::Arc;
use std::time::Duration;

use mobula::{Actor, Cluster};
use mobula_actors::serving::ingress::link::RouterLink;
use mobula_actors::serving::router::Router;
use mobula_core::codec;
use mobula_core::spec::ActorSpec;
use mobula_testing::{Actors, JOB, ScriptedCluster, ScriptedHead};
use mobula_wire::control as api;
use mobula_wire::control::resolve_actor_request::Target;
use tokio::sync::watch;
use tonic::Status;

use super::scripted_router::{ENDPOINT, Script, registry};

/// How long anything that is waited for may take: less than a call that nobody calls back.
const SOON: Duration = Duration::from_secs(20);

/// Its router's name.
const ROUTER_NAME: &str = "serving/digits/router";

/// Waits for something, within a bound.
pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(SOON, future).await;
    waited.unwrap_or_else(|_| panic!("{what} did not happen within {} s", SOON.as_secs()))
}

struct Head {
    actors: Actors,
    /// How often a router was looked for by its name.
    looks: watch::Sender<u64>,
}

#[tonic::async_trait]
impl ScriptedHead for Head {
    fn actors(&self) -> &Actors {
        &self.actors
    }

    async fn resolve_actor(&self, request: api::ResolveActorRequest) -> Result<api::Actor, Status> {
        if matches!(request.target, Some(Target::Named(_))) {
            self.looks.send_modify(|looks| *looks += 1);
        }
        self.actors.resolve(request).await
    }
}

/// A head, and a host whose routers the test starts and ends.
pub(super) struct Stage {
    head: Arc<Head>,
    cluster: Cluster,
    /// Its object store goes with it.
    _scripted: ScriptedCluster<Head>,
}

impl Stage {
    pub(super) async fn up() -> Self {
        let scripted = ScriptedCluster::start(registry(), |actors| Head {
            actors,
            looks: watch::Sender::new(0),
        })
        .await;
        let ScriptedCluster {
            api_address, token, ..
        } = &scripted;
        let cluster = Cluster::connect(api_address, token).await.unwrap();
        Stage {
            head: Arc::clone(&scripted.head),
            cluster: cluster.in_job(JOB),
            _scripted: scripted,
        }
    }

    /// A way to the endpoint's router, whether there is one or not.
    pub(super) fn link(&self) -> Arc<RouterLink> {
        Arc::new(RouterLink::new(self.cluster.clone(), ENDPOINT))
    }

    /// Starts a router.
    pub(super) async fn start_router(&self) -> Arc<Script> {
        let script = Script::begin();
        let id = script.key();
        let mut spec = ActorSpec::of_type(Router::TYPE_NAME);
        spec.name = Some(ROUTER_NAME.into());
        spec.init = codec::encode(&(id,)).unwrap();
        self.head.actors.add(id, spec);
        self.head.actors.start(id).await;
        self.is(id, "running").await;
        script
    }

    /// Ends a router in the midst of what it does.
    pub(super) async fn kill(&self, router: &Script) {
        let id = router.key();
        self.head.actors.kill(id).await;
        self.is(id, "ended").await;
    }

    async fn is(&self, id: u64, state: &str) {
        let mut actors = self.head.actors.watch();
        let is = actors.wait_for(|actors| actors[&id].row.state == state);
        soon(state, is).await.unwrap();
    }

    /// Waits until a router was looked for so often.
    pub(super) async fn is_asked_for_a_router(&self, times: u64) {
        let mut looks = self.head.looks.subscribe();
        let asked = looks.wait_for(|looks| *looks >= times);
        soon("a look for the router", asked).await.unwrap();
    }
}
