//! A head that knows the routers which a test has started, and the host that runs them: gRPC, TLS and QUIC are real, and
//! so is every call. Only what a router answers is as the test says.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mobula::{Actor, Cluster};
use mobula_actors::serving::ingress::link::RouterLink;
use mobula_actors::serving::router::Router;
use mobula_core::codec;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId};
use mobula_core::order::StartActor;
use mobula_core::spec::{ActorSpec, Program};
use mobula_host::calls::serve_calls;
use mobula_host::client::CallClient;
use mobula_host::objects::ObjectTable;
use mobula_host::supervision::{ActorEvent, ActorTable};
use mobula_host::{HostInfo, HostRuntime};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{ClusterCa, Identity, Role, Token, Validity};
use mobula_net::tcp::{ApiListener, CountRequests};
use mobula_wire::control as api;
use mobula_wire::control::control_server::{Control, ControlServer};
use mobula_wire::host::HostRole;
use mobula_wire::session::StorageLocation;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::scripted_router::{ENDPOINT, Script, registry};

/// How long anything that is waited for may take: less than a call that nobody calls back.
const SOON: Duration = Duration::from_secs(20);

const JOB: JobId = JobId(3);

/// Its router's name.
const ROUTER_NAME: &str = "serving/digits/router";

/// Certificates of tests live for an hour.
fn an_hour() -> Validity {
    Validity::for_ttl(Duration::from_secs(3600))
}

/// Waits for something, within a bound.
pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(SOON, future).await;
    waited.unwrap_or_else(|_| panic!("{what} did not happen within {} s", SOON.as_secs()))
}

struct Head {
    ca: ClusterCa,
    call_address: String,
    actors: watch::Sender<BTreeMap<u64, api::Actor>>,
    /// How often a router was looked for by its name.
    looks: watch::Sender<u64>,
}

impl Head {
    fn heard(&self, event: ActorEvent) {
        self.actors.send_modify(|actors| match event {
            ActorEvent::Started { actor, incarnation } => {
                let row = actors.get_mut(&actor.0).unwrap();
                row.state = "running".into();
                row.node = Some(1);
                row.incarnation = Some(incarnation.0);
                row.call_address = Some(self.call_address.clone());
            }
            ActorEvent::Exited { actor, reason, .. } => {
                let row = actors.get_mut(&actor.0).unwrap();
                row.state = "ended".into();
                row.exit_reason = Some(reason.to_string());
                (row.incarnation, row.call_address) = (None, None);
            }
        });
    }

    async fn resolve(&self, request: api::ResolveActorRequest) -> Result<api::Actor, Status> {
        use api::resolve_actor_request::Target;
        if matches!(request.target, Some(Target::Named(_))) {
            self.looks.send_modify(|looks| *looks += 1);
        }
        let matches = |actor: &api::Actor| match &request.target {
            Some(Target::Actor(id)) => actor.id == *id,
            // A name is that of one who lives.
            Some(Target::Named(named)) => actor.name == named.name && actor.state != "ended",
            None => false,
        };
        let after = request.after_incarnation;
        let is_due = |actor: &api::Actor| {
            actor.state == "ended" || actor.incarnation.is_some_and(|known| known > after)
        };
        let mut actors = self.actors.subscribe();
        let due = actors.wait_for(|actors| {
            let mut found = actors.values().filter(|actor| matches(actor));
            found.next().is_none_or(is_due)
        });
        let _ = tokio::time::timeout(Duration::from_millis(request.timeout_ms), due).await;
        let actors = self.actors.borrow();
        let found = actors.values().find(|actor| matches(actor)).cloned();
        found.ok_or(Status::not_found("no such actor"))
    }

    fn join(&self, request: &api::JoinRequest) -> api::JoinReply {
        let identity = Identity::new("test", Role::Client, request.name.clone(), 1);
        api::JoinReply {
            certificate_pem: self
                .ca
                .issue(&request.csr_pem, &identity, an_hour())
                .unwrap(),
            ca_pem: self.ca.certificate_pem().to_owned(),
            cluster_id: "test".into(),
            cluster_address: String::new(),
            raft_id: 0,
            heads: Vec::new(),
        }
    }
}

struct Api(Arc<Head>);

type NothingOf<T> = futures::stream::Empty<Result<T, Status>>;

macro_rules! head_api {
    (answers { $($answers:item)* } refuses { $($name:ident($request:ident) -> $reply:ident;)* }) => {
        #[tonic::async_trait]
        impl Control for Api {
            type JobLogsStream = NothingOf<api::LogChunk>;
            async fn job_logs(
                &self,
                _: Request<api::JobLogsRequest>,
            ) -> Result<Response<Self::JobLogsStream>, Status> {
                Err(Status::unimplemented("job_logs"))
            }
            type BackupStream = NothingOf<api::BackupPart>;
            async fn backup(
                &self,
                _: Request<api::BackupRequest>,
            ) -> Result<Response<Self::BackupStream>, Status> {
                Err(Status::unimplemented("backup"))
            }
            async fn put_artifact(
                &self,
                _: Request<tonic::Streaming<api::ArtifactChunk>>,
            ) -> Result<Response<api::PutArtifactReply>, Status> {
                Err(Status::unimplemented("put_artifact"))
            }
            $($answers)*
            $(async fn $name(
                &self,
                _: Request<api::$request>,
            ) -> Result<Response<api::$reply>, Status> {
                Err(Status::unimplemented(stringify!($name)))
            })*
        }
    };
}

head_api! {
    answers {
        async fn join(
            &self,
            request: Request<api::JoinRequest>,
        ) -> Result<Response<api::JoinReply>, Status> {
            Ok(Response::new(self.0.join(request.get_ref())))
        }
        async fn status(
            &self,
            _: Request<api::StatusRequest>,
        ) -> Result<Response<api::StatusReply>, Status> {
            Ok(Response::new(api::StatusReply::default()))
        }
        async fn resolve_actor(
            &self,
            request: Request<api::ResolveActorRequest>,
        ) -> Result<Response<api::Actor>, Status> {
            Ok(Response::new(self.0.resolve(request.into_inner()).await?))
        }
        async fn await_actors(
            &self,
            request: Request<api::AwaitActorsRequest>,
        ) -> Result<Response<api::AwaitActorsReply>, Status> {
            let api::AwaitActorsRequest { actors, timeout_ms } = request.into_inner();
            let found = actors.into_iter().map(|actor| {
                Box::pin(self.0.resolve(api::ResolveActorRequest {
                    target: Some(api::resolve_actor_request::Target::Actor(actor)),
                    timeout_ms,
                    ..Default::default()
                }))
            });
            let (first, ..) = futures::future::select_all(found).await;
            Ok(Response::new(api::AwaitActorsReply { actors: vec![first?] }))
        }
    }
    refuses {
        open_session(OpenSessionRequest) -> OpenSessionReply;
        close_session(CloseSessionRequest) -> Empty;
        create_actors(CreateActorsRequest) -> CreateActorsReply;
        create_token(CreateTokenRequest) -> CreateTokenReply;
        list_tokens(ListTokensRequest) -> ListTokensReply;
        revoke_token(RevokeTokenRequest) -> Empty;
        submit_job(SubmitJobRequest) -> SubmitJobReply;
        list_jobs(ListJobsRequest) -> ListJobsReply;
        get_job(GetJobRequest) -> Job;
        wait_job(WaitJobRequest) -> Job;
        stop_job(StopJobRequest) -> Empty;
        set_job_result(SetJobResultRequest) -> Empty;
        list_actors(ListActorsRequest) -> ListActorsReply;
        get_actor(GetActorRequest) -> Actor;
        stop_actor(StopActorRequest) -> Empty;
        yield_actor(YieldActorRequest) -> Empty;
        list_nodes(ListNodesRequest) -> ListNodesReply;
        drain_node(DrainNodeRequest) -> Empty;
        preempt_node(PreemptNodeRequest) -> Empty;
        explain(ExplainRequest) -> ExplainReply;
        list_heads(ListHeadsRequest) -> ListHeadsReply;
        announce_head(AnnounceHeadRequest) -> Empty;
        head_key(HeadKeyRequest) -> HeadKeyReply;
        promote_head(PromoteHeadRequest) -> Empty;
        remove_head(RemoveHeadRequest) -> Empty;
        transfer_leadership(TransferLeadershipRequest) -> TransferLeadershipReply;
        list_audit(ListAuditRequest) -> ListAuditReply;
        has_artifact(HasArtifactRequest) -> HasArtifactReply;
        apply(ApplyRequest) -> ApplyReply;
        query(QueryRequest) -> QueryReply;
        wait_module(WaitModuleRequest) -> WaitModuleReply;
        metrics(MetricsRequest) -> MetricsReply;
        timeline(TimelineRequest) -> TimelineReply;
    }
}

/// A head, and a host whose routers the test starts and ends.
pub(super) struct Stage {
    head: Arc<Head>,
    table: Arc<ActorTable>,
    cluster: Cluster,
    /// Its object store: gone with it.
    _directory: tempfile::TempDir,
}

impl Stage {
    pub(super) async fn up() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ca = ClusterCa::create("test").unwrap();
        let loopback = "127.0.0.1:0".parse().unwrap();
        let identity = Identity::new("test", Role::Head, "head-1", 1);
        let credentials = ca.issue_with_new_key(&identity, an_hour()).unwrap();
        let listener = ApiListener::bind(loopback, &credentials).await.unwrap();
        let api_address = listener.local_address().to_string();

        let runtime = HostRuntime::new(HostInfo {
            cluster_id: "test".into(),
            job: JOB,
            node: NodeId(1),
            node_name: "one".into(),
            host: HostId(5),
            role: HostRole::Actors,
            api_addresses: vec![api_address.clone()],
            storage: StorageLocation {
                url: format!("file://{}", directory.path().display()),
                endpoint: None,
                region: None,
                allow_http: false,
                access_key_env: String::new(),
                secret_key_env: String::new(),
            },
        });
        let identity = Identity::new("test", Role::Host, "host-5", 1).with_job(JOB.0);
        let credentials = ca.issue_with_new_key(&identity, an_hour()).unwrap();
        let endpoint = Endpoint::bind(loopback, &credentials).unwrap();
        let (table, mut events) = ActorTable::start(Arc::clone(&runtime), registry())
            .await
            .unwrap();
        runtime.set_credentials(credentials);
        let local = (endpoint.local_address(), Arc::downgrade(&table));
        let calls = CallClient::new(endpoint.clone(), Some(local));
        let call_address = endpoint.local_address().to_string();
        runtime.set_objects(ObjectTable::start(call_address.clone(), calls.clone()));
        runtime.set_calls(calls);
        tokio::spawn(serve_calls(endpoint, Arc::clone(&table)));

        let token = Token::generate(Role::Client, ca.key_hash()).to_text();
        let head = Arc::new(Head {
            ca,
            call_address,
            actors: watch::Sender::new(BTreeMap::new()),
            looks: watch::Sender::new(0),
        });
        let listening = Arc::clone(&head);
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                listening.heard(event);
            }
        });
        let server = tonic::transport::Server::builder()
            .layer(CountRequests)
            .add_service(ControlServer::new(Api(Arc::clone(&head))));
        tokio::spawn(server.serve_with_incoming(listener));
        let cluster = Cluster::connect(&api_address, &token).await.unwrap();
        Stage {
            head,
            table,
            cluster: cluster.in_job(JOB),
            _directory: directory,
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
        let row = api::Actor {
            id,
            job: JOB.0,
            name: ROUTER_NAME.into(),
            type_name: Router::TYPE_NAME.into(),
            state: "pending".into(),
            ..Default::default()
        };
        self.head
            .actors
            .send_modify(|actors| drop(actors.insert(id, row)));
        let mut spec = ActorSpec::of_type(Router::TYPE_NAME);
        spec.name = Some(ROUTER_NAME.into());
        spec.init = codec::encode(&(id,)).unwrap();
        self.table
            .start_actor(StartActor {
                actor: ActorId(id),
                incarnation: Incarnation(id),
                job: JOB,
                program: Program::Builtin,
                spec,
                args: Vec::new(),
                env: BTreeMap::new(),
                files: Vec::new(),
                secrets: BTreeMap::new(),
            })
            .await;
        self.is(id, "running").await;
        script
    }

    /// Ends a router in the midst of what it does.
    pub(super) async fn kill(&self, router: &Script) {
        let id = router.key();
        self.table
            .stop_actor(ActorId(id), Incarnation(id), Duration::ZERO)
            .await;
        self.is(id, "ended").await;
    }

    async fn is(&self, id: u64, state: &str) {
        let mut actors = self.head.actors.subscribe();
        let is = actors.wait_for(|actors| actors[&id].state == state);
        soon(state, is).await.unwrap();
    }

    /// Waits until a router was looked for so often.
    pub(super) async fn is_asked_for_a_router(&self, times: u64) {
        let mut looks = self.head.looks.subscribe();
        let asked = looks.wait_for(|looks| *looks >= times);
        soon("a look for the router", asked).await.unwrap();
    }
}
