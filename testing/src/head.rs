//! The control API of a head that does as its test says.

use std::sync::Arc;
use std::time::Duration;

use mobula_net::identity::{ClusterCa, Credentials, Identity, Role, Validity};
use mobula_wire::control as api;
use mobula_wire::control::control_server::Control;
use mobula_wire::control::resolve_actor_request::Target;
use tonic::{Request, Response, Status};

use crate::actors::Actors;

/// The cluster's id.
pub(crate) const CLUSTER: &str = "test";

/// A head that does as its test says. It lets everybody join and knows its actors; what else of the control API a test needs, it
/// says itself, and the rest is refused as unimplemented.
#[tonic::async_trait]
pub trait ScriptedHead: Send + Sync + 'static {
    /// The actors that it knows.
    fn actors(&self) -> &Actors;

    /// Starts an actor that is to be started again.
    async fn start(&self, id: u64) {
        self.actors().start(id).await;
    }

    /// Opens a session; its number.
    async fn open_session(&self) -> Result<u64, Status> {
        Err(Status::unimplemented("open_session"))
    }

    /// Closes a session.
    async fn close_session(&self, session: u64) -> Result<(), Status> {
        let _ = session;
        Err(Status::unimplemented("close_session"))
    }

    /// Creates actors; their ids.
    async fn create_actors(&self, request: api::CreateActorsRequest) -> Result<Vec<u64>, Status> {
        let _ = request;
        Err(Status::unimplemented("create_actors"))
    }

    /// Finds an actor.
    async fn resolve_actor(&self, request: api::ResolveActorRequest) -> Result<api::Actor, Status> {
        self.actors().resolve(request).await
    }
}

/// Credentials of a cluster that lives for an hour at the most.
pub(crate) fn credentials(ca: &ClusterCa, identity: &Identity) -> Credentials {
    ca.issue_with_new_key(identity, an_hour())
        .expect("the CA issues certificates of its own cluster")
}

fn an_hour() -> Validity {
    Validity::for_ttl(Duration::from_secs(3600))
}

/// What the head answers by gRPC.
pub(crate) struct Api<H> {
    pub(crate) head: Arc<H>,
    pub(crate) ca: ClusterCa,
}

impl<H> Api<H> {
    fn certified(&self, request: &api::JoinRequest) -> api::JoinReply {
        let identity = Identity::new(CLUSTER, Role::Client, request.name.clone(), 1);
        let issued = self.ca.issue(&request.csr_pem, &identity, an_hour());
        api::JoinReply {
            certificate_pem: issued.expect("a client's request for a certificate is well formed"),
            ca_pem: self.ca.certificate_pem().to_owned(),
            cluster_id: CLUSTER.into(),
            cluster_address: String::new(),
            raft_id: 0,
            heads: Vec::new(),
        }
    }
}

type NothingOf<T> = futures::stream::Empty<Result<T, Status>>;

macro_rules! control {
    (answers { $($answers:item)* } refuses { $($name:ident($request:ident) -> $reply:ident;)* }) => {
        #[tonic::async_trait]
        impl<H: ScriptedHead> Control for Api<H> {
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

control! {
    answers {
        async fn join(
            &self,
            request: Request<api::JoinRequest>,
        ) -> Result<Response<api::JoinReply>, Status> {
            Ok(Response::new(self.certified(request.get_ref())))
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
            let session = self.head.open_session().await?;
            Ok(Response::new(api::OpenSessionReply { session }))
        }
        async fn close_session(
            &self,
            request: Request<api::CloseSessionRequest>,
        ) -> Result<Response<api::Empty>, Status> {
            self.head.close_session(request.into_inner().session).await?;
            Ok(Response::new(api::Empty {}))
        }
        async fn create_actors(
            &self,
            request: Request<api::CreateActorsRequest>,
        ) -> Result<Response<api::CreateActorsReply>, Status> {
            let actors = self.head.create_actors(request.into_inner()).await?;
            Ok(Response::new(api::CreateActorsReply { actors }))
        }
        async fn resolve_actor(
            &self,
            request: Request<api::ResolveActorRequest>,
        ) -> Result<Response<api::Actor>, Status> {
            Ok(Response::new(self.head.resolve_actor(request.into_inner()).await?))
        }
        async fn await_actors(
            &self,
            request: Request<api::AwaitActorsRequest>,
        ) -> Result<Response<api::AwaitActorsReply>, Status> {
            let api::AwaitActorsRequest { actors, timeout_ms } = request.into_inner();
            let found = actors.into_iter().map(|actor| {
                self.head.resolve_actor(api::ResolveActorRequest {
                    target: Some(Target::Actor(actor)),
                    timeout_ms,
                    ..Default::default()
                })
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
