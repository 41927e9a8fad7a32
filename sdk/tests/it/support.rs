//! A head that does as the test says, and one host process's worth of actors behind it: gRPC, TLS
//! and QUIC are real.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mobula::prelude::*;
use mobula_core::error::ErrorCode;
use mobula_core::exit::ExitReason;
use mobula_core::id::{HostId, NodeId};
use mobula_core::order::StartActor;
use mobula_core::spec::{ActorKind, ActorSpec, Program};
use mobula_host::calls::serve_calls;
use mobula_host::client::CallClient;
use mobula_host::objects::ObjectTable;
use mobula_host::supervision::{ActorEvent, ActorTable};
use mobula_host::{HostInfo, HostRuntime, Registry};
use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{ClusterCa, Identity, Role, Token, Validity};
use mobula_net::tcp::{ApiListener, CountRequests};
use mobula_wire::control as api;
use mobula_wire::control::control_server::{Control, ControlServer};
use mobula_wire::host::HostRole;
use mobula_wire::session::StorageLocation;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

pub(crate) const JOB: JobId = JobId(3);

/// Certificates of tests live for an hour.
fn an_hour() -> Validity {
    Validity::for_ttl(Duration::from_secs(3600))
}

fn slot_kind() -> ActorKind {
    ActorKind::Actor {
        type_name: mobula_host::tasks::SLOT_TYPE.to_owned(),
    }
}

pub(crate) struct Head {
    ca: ClusterCa,
    table: Mutex<Option<Arc<ActorTable>>>,
    call_address: Mutex<String>,
    actors: watch::Sender<BTreeMap<u64, api::Actor>>,
    specs: Mutex<BTreeMap<u64, ActorSpec>>,
    incarnations: AtomicU32,
    sessions: AtomicU64,
    /// How many answers to mutations are still to be lost.
    pub(crate) lose_replies: AtomicU32,
    /// How many slots for tasks run at once; more stay pending.
    pub(crate) slots_max: AtomicU32,
    /// Sessions below this one are forgotten.
    pub(crate) first_known_session: AtomicU64,
    /// Whether a lost reply takes its session along.
    pub(crate) forgets_with_reply: AtomicBool,
    /// The stamps of all mutations that arrived.
    pub(crate) stamps: Mutex<Vec<(u64, u64)>>,
    /// The sessions that were closed.
    pub(crate) closed: watch::Sender<Vec<u64>>,
    applied: Mutex<BTreeMap<(u64, u64), Vec<u64>>>,
}

impl Head {
    /// Once for each stamp; and the answer may be lost.
    async fn create(&self, request: api::CreateActorsRequest) -> Result<Vec<u64>, Status> {
        let stamp = request.stamp.unwrap();
        let stamp = (stamp.session, stamp.sequence);
        self.stamps.lock().unwrap().push(stamp);
        if stamp.0 < self.first_known_session.load(Ordering::SeqCst) {
            let mut status = Status::failed_precondition("the session is not known");
            let code = ErrorCode::SessionExpired.as_str().parse().unwrap();
            status.metadata_mut().insert("mobula-code", code);
            return Err(status);
        }
        let known = self.applied.lock().unwrap().get(&stamp).cloned();
        let ids = match known {
            Some(ids) => ids,
            None => {
                let mut ids = Vec::new();
                for spec in request.actors {
                    let id = 100 + self.actors.borrow().len() as u64;
                    let name = spec.name.clone().unwrap_or_default();
                    let actor = api::Actor {
                        id,
                        job: JOB.0,
                        name,
                        type_name: spec.type_name.clone(),
                        state: "pending".into(),
                        ..Default::default()
                    };
                    self.specs
                        .lock()
                        .unwrap()
                        .insert(id, ActorSpec::try_from(spec).unwrap());
                    self.actors
                        .send_modify(|actors| drop(actors.insert(id, actor)));
                    self.start(id).await;
                    ids.push(id);
                }
                self.applied.lock().unwrap().insert(stamp, ids.clone());
                ids
            }
        };
        let lost = self
            .lose_replies
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            })
            .is_ok();
        if lost && self.forgets_with_reply.load(Ordering::SeqCst) {
            self.first_known_session
                .store(stamp.0 + 1, Ordering::SeqCst);
        }
        if lost {
            Err(Status::unavailable("the reply is lost"))
        } else {
            Ok(ids)
        }
    }

    async fn start(&self, id: u64) {
        let table = self.table.lock().unwrap().clone().unwrap();
        let spec = self.specs.lock().unwrap()[&id].clone();
        if spec.kind == slot_kind() {
            let limit = self.slots_max.load(Ordering::SeqCst) as usize;
            let specs = self.specs.lock().unwrap();
            let is_slot = |id: &u64| specs[id].kind == slot_kind();
            let running = self.actors.borrow();
            let live = |actor: &&api::Actor| actor.state != "ended" && actor.id != id;
            let slots = running.values().filter(live).filter(|a| is_slot(&a.id));
            if slots.count() >= limit {
                return;
            }
        }
        let incarnation = u64::from(self.incarnations.fetch_add(1, Ordering::SeqCst));
        table
            .start_actor(StartActor {
                actor: ActorId(id),
                incarnation: Incarnation(incarnation),
                job: JOB,
                program: Program::Builtin,
                spec,
                args: Vec::new(),
                env: BTreeMap::new(),
                files: Vec::new(),
                secrets: Default::default(),
            })
            .await;
    }

    /// Ends everything that runs as a slot for tasks, in the midst of what it does.
    pub(crate) async fn kill_slots(&self) {
        let table = self.table.lock().unwrap().clone().unwrap();
        let slots: Vec<_> = {
            let specs = self.specs.lock().unwrap();
            let running = self.actors.borrow();
            let slots = running
                .values()
                .filter(|actor| specs[&actor.id].kind == slot_kind());
            slots
                .filter_map(|slot| Some((ActorId(slot.id), Incarnation(slot.incarnation?))))
                .collect()
        };
        for (actor, incarnation) in slots {
            table.stop_actor(actor, incarnation, Duration::ZERO).await;
        }
    }

    async fn heard(&self, event: ActorEvent) {
        let call_address = self.call_address.lock().unwrap().clone();
        let mut again = None;
        self.actors.send_modify(|actors| match event {
            ActorEvent::Started { actor, incarnation } => {
                let row = actors.get_mut(&actor.0).unwrap();
                row.state = "running".into();
                row.node = Some(1);
                row.incarnation = Some(incarnation.0);
                row.call_address = Some(call_address);
            }
            ActorEvent::Exited { actor, reason, .. } => {
                let row = actors.get_mut(&actor.0).unwrap();
                let budget = self.specs.lock().unwrap()[&actor.0].restart.max_restarts;
                let restart = !reason.is_wanted() && row.restarts < budget;
                row.exit_reason = Some(reason.to_string());
                row.state = if restart { "pending" } else { "ended" }.into();
                (row.incarnation, row.call_address) = (None, None);
                if restart {
                    row.restarts += 1;
                    again = Some(actor.0);
                }
                let _: ExitReason = reason;
            }
        });
        if let Some(id) = again {
            self.start(id).await;
        }
    }

    async fn resolve(&self, request: api::ResolveActorRequest) -> Result<api::Actor, Status> {
        let mut actors = self.actors.subscribe();
        let matches = |actor: &api::Actor| match &request.target {
            Some(api::resolve_actor_request::Target::Actor(id)) => actor.id == *id,
            Some(api::resolve_actor_request::Target::Named(named)) => actor.name == named.name,
            None => false,
        };
        let after = request.after_incarnation;
        let ready = actors.wait_for(|actors| {
            actors
                .values()
                .find(|actor| matches(actor))
                .is_none_or(|actor| {
                    actor.state == "ended" || actor.incarnation.is_some_and(|i| i > after)
                })
        });
        let _ = tokio::time::timeout(Duration::from_millis(request.timeout_ms), ready).await;
        let actors = self.actors.borrow();
        actors
            .values()
            .find(|a| matches(a))
            .cloned()
            .ok_or(Status::not_found("no such actor"))
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

pub(crate) struct Api(pub Arc<Head>);

macro_rules! head_api {
    (answers { $($answers:item)* } refuses { $($name:ident($request:ident) -> $reply:ident;)* }) => {
        #[tonic::async_trait]
        impl Control for Api {
            type JobLogsStream = tokio_stream::Empty<Result<api::LogChunk, Status>>;
            async fn job_logs(
                &self,
                _: Request<api::JobLogsRequest>,
            ) -> Result<Response<Self::JobLogsStream>, Status> {
                Ok(Response::new(tokio_stream::empty()))
            }
            type BackupStream = tokio_stream::Empty<Result<api::BackupPart, Status>>;
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
        async fn open_session(
            &self,
            _: Request<api::OpenSessionRequest>,
        ) -> Result<Response<api::OpenSessionReply>, Status> {
            Ok(Response::new(api::OpenSessionReply { session: self.0.sessions.fetch_add(1, Ordering::SeqCst) }))
        }
        async fn close_session(
            &self,
            request: Request<api::CloseSessionRequest>,
        ) -> Result<Response<api::Empty>, Status> {
            let session = request.into_inner().session;
            self.0.closed.send_modify(|closed| closed.push(session));
            Ok(Response::new(api::Empty {}))
        }
        async fn create_actors(
            &self,
            request: Request<api::CreateActorsRequest>,
        ) -> Result<Response<api::CreateActorsReply>, Status> {
            let actors = self.0.create(request.into_inner()).await?;
            Ok(Response::new(api::CreateActorsReply { actors }))
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

/// A head, and a host whose actors it starts and restarts.
pub(crate) struct Stage {
    pub(crate) head: Arc<Head>,
    /// The cluster as an actor of the host sees it.
    pub(crate) inside: Cluster,
    /// The cluster as a person's program sees it.
    pub(crate) outside: Cluster,
    /// Its object store: gone with it.
    _directory: tempfile::TempDir,
}

pub(crate) async fn stage() -> Stage {
    let directory = tempfile::tempdir().unwrap();
    let ca = ClusterCa::create("test").unwrap();
    let loopback = "127.0.0.1:0".parse().unwrap();
    let identity = Identity::new("test", Role::Head, "head-1", 1);
    let listener = ApiListener::bind(
        loopback,
        &ca.issue_with_new_key(&identity, an_hour()).unwrap(),
    )
    .await
    .unwrap();
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
    let registry = Registry::of_this_program().unwrap();
    let (table, mut events) = ActorTable::start(Arc::clone(&runtime), registry)
        .await
        .unwrap();
    runtime.set_credentials(credentials);
    let local = (endpoint.local_address(), Arc::downgrade(&table));
    let calls = CallClient::new(endpoint.clone(), Some(local));
    let address = endpoint.local_address().to_string();
    runtime.set_objects(ObjectTable::start(address, calls.clone()));
    runtime.set_calls(calls);
    tokio::spawn(serve_calls(endpoint.clone(), Arc::clone(&table)));

    let token = Token::generate(Role::Client, ca.key_hash()).to_text();
    let head = Arc::new(Head {
        ca,
        table: Mutex::new(Some(table)),
        call_address: Mutex::new(endpoint.local_address().to_string()),
        actors: watch::Sender::new(BTreeMap::new()),
        specs: Mutex::default(),
        incarnations: AtomicU32::new(1),
        sessions: AtomicU64::new(9),
        lose_replies: AtomicU32::new(0),
        slots_max: AtomicU32::new(u32::MAX),
        first_known_session: AtomicU64::new(0),
        forgets_with_reply: AtomicBool::new(false),
        stamps: Mutex::default(),
        closed: watch::Sender::new(Vec::new()),
        applied: Mutex::default(),
    });
    let listening = Arc::clone(&head);
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            listening.heard(event).await;
        }
    });
    let service = ControlServer::new(Api(Arc::clone(&head)));
    let server = tonic::transport::Server::builder()
        .layer(CountRequests)
        .add_service(service);
    tokio::spawn(server.serve_with_incoming(listener));

    let context = ActorContext::new(ActorId(1), Incarnation(1), None, runtime);
    let outside = Cluster::connect(&api_address, &token)
        .await
        .unwrap()
        .in_job(JOB);
    Stage {
        head,
        inside: context.cluster(),
        outside,
        _directory: directory,
    }
}
