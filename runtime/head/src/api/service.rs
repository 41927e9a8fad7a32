//! The control API's methods, one line each.

use std::sync::Arc;

use mobula_core::control::Origin;
use mobula_wire::control::control_server::Control;
use mobula_wire::control::{self as api, Empty};
use tonic::{Request, Response, Status, Streaming};

use super::{
    actors, artifacts, audit, auth, backup, heads, jobs, logs, modules, nodes, observe, status,
    tokens, with_leader,
};
use crate::context::HeadContext;
use crate::origin;

/// The control API over a head's context.
#[derive(Clone)]
pub(crate) struct ControlService {
    pub(crate) context: Arc<HeadContext>,
}

/// Answers a method: who calls is found out first, then the function does the work; what it changes
/// is recorded as that call's. What this head
/// cannot do because it does not lead names the leader.
macro_rules! answer {
    ($self:ident, $request:ident, $function:path) => {{
        let context = &$self.context;
        let call = observe::called(&$request);
        let answered = async {
            let (caller, principal) = auth::identify(context, &$request).await?;
            let origin = Origin { principal, call };
            let call = $function(context, &caller, $request.into_inner());
            origin::serving(origin, call).await
        };
        answered
            .await
            .map(Response::new)
            .map_err(|status| with_leader(context, status))
    }};
}

#[tonic::async_trait]
impl Control for ControlService {
    type JobLogsStream = logs::LogStream;
    type BackupStream = backup::PartStream;

    async fn join(&self, r: Request<api::JoinRequest>) -> Result<Response<api::JoinReply>, Status> {
        let peer = auth::peer_identity(&r).cloned();
        let call = observe::called(&r);
        let request = r.into_inner();
        let answered = async {
            let principal = auth::joining(&self.context, peer.as_ref(), &request.token).await?;
            let joining = status::join(&self.context, peer, request);
            origin::serving(Origin { principal, call }, joining).await
        };
        answered
            .await
            .map(Response::new)
            .map_err(|status| with_leader(&self.context, status))
    }

    async fn create_token(
        &self,
        r: Request<api::CreateTokenRequest>,
    ) -> Result<Response<api::CreateTokenReply>, Status> {
        answer!(self, r, tokens::create)
    }

    async fn list_tokens(
        &self,
        r: Request<api::ListTokensRequest>,
    ) -> Result<Response<api::ListTokensReply>, Status> {
        answer!(self, r, tokens::list)
    }

    async fn revoke_token(
        &self,
        r: Request<api::RevokeTokenRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, tokens::revoke)
    }

    async fn status(
        &self,
        r: Request<api::StatusRequest>,
    ) -> Result<Response<api::StatusReply>, Status> {
        // Workers ask too: for the address of the cluster's endpoint.
        let answered = async {
            if auth::peer_identity(&r).is_none() {
                auth::caller(&self.context, &r).await?;
            }
            status::status(&self.context).await
        };
        answered
            .await
            .map(Response::new)
            .map_err(|status| with_leader(&self.context, status))
    }

    async fn open_session(
        &self,
        r: Request<api::OpenSessionRequest>,
    ) -> Result<Response<api::OpenSessionReply>, Status> {
        answer!(self, r, status::open_session)
    }

    async fn close_session(
        &self,
        r: Request<api::CloseSessionRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, status::close_session)
    }

    async fn submit_job(
        &self,
        r: Request<api::SubmitJobRequest>,
    ) -> Result<Response<api::SubmitJobReply>, Status> {
        let call = observe::called(&r);
        let answered = async {
            let (caller, principal) = auth::identify(&self.context, &r).await?;
            let origin = Origin { principal, call };
            // A namespace is its owner's, and who that is the request cannot say itself.
            let is_named = r
                .get_ref()
                .spec
                .as_ref()
                .is_some_and(|spec| spec.namespace.is_some());
            let owner = match is_named {
                true => auth::namespace_owner(&self.context, &r).await?,
                false => String::new(),
            };
            let submitting = jobs::submit(&self.context, &caller, owner, r.into_inner());
            origin::serving(origin, submitting).await
        };
        answered
            .await
            .map(Response::new)
            .map_err(|status| with_leader(&self.context, status))
    }

    async fn list_jobs(
        &self,
        r: Request<api::ListJobsRequest>,
    ) -> Result<Response<api::ListJobsReply>, Status> {
        answer!(self, r, jobs::list)
    }

    async fn get_job(&self, r: Request<api::GetJobRequest>) -> Result<Response<api::Job>, Status> {
        answer!(self, r, jobs::get)
    }

    async fn wait_job(
        &self,
        r: Request<api::WaitJobRequest>,
    ) -> Result<Response<api::Job>, Status> {
        answer!(self, r, jobs::wait)
    }

    async fn stop_job(&self, r: Request<api::StopJobRequest>) -> Result<Response<Empty>, Status> {
        answer!(self, r, jobs::stop)
    }

    async fn set_job_result(
        &self,
        r: Request<api::SetJobResultRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, jobs::set_result)
    }

    async fn timeline(
        &self,
        r: Request<api::TimelineRequest>,
    ) -> Result<Response<api::TimelineReply>, Status> {
        answer!(self, r, observe::timeline)
    }

    async fn metrics(
        &self,
        r: Request<api::MetricsRequest>,
    ) -> Result<Response<api::MetricsReply>, Status> {
        answer!(self, r, observe::metrics)
    }

    async fn job_logs(
        &self,
        r: Request<api::JobLogsRequest>,
    ) -> Result<Response<Self::JobLogsStream>, Status> {
        answer!(self, r, logs::job_logs)
    }

    async fn create_actors(
        &self,
        r: Request<api::CreateActorsRequest>,
    ) -> Result<Response<api::CreateActorsReply>, Status> {
        answer!(self, r, actors::create)
    }

    async fn list_actors(
        &self,
        r: Request<api::ListActorsRequest>,
    ) -> Result<Response<api::ListActorsReply>, Status> {
        answer!(self, r, actors::list)
    }

    async fn get_actor(
        &self,
        r: Request<api::GetActorRequest>,
    ) -> Result<Response<api::Actor>, Status> {
        answer!(self, r, actors::get)
    }

    async fn resolve_actor(
        &self,
        r: Request<api::ResolveActorRequest>,
    ) -> Result<Response<api::Actor>, Status> {
        answer!(self, r, actors::resolve)
    }

    async fn await_actors(
        &self,
        r: Request<api::AwaitActorsRequest>,
    ) -> Result<Response<api::AwaitActorsReply>, Status> {
        answer!(self, r, actors::await_any)
    }

    async fn stop_actor(
        &self,
        r: Request<api::StopActorRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, actors::stop)
    }

    async fn yield_actor(
        &self,
        r: Request<api::YieldActorRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, actors::leave)
    }

    async fn list_nodes(
        &self,
        r: Request<api::ListNodesRequest>,
    ) -> Result<Response<api::ListNodesReply>, Status> {
        answer!(self, r, nodes::list)
    }

    async fn drain_node(
        &self,
        r: Request<api::DrainNodeRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, nodes::drain)
    }

    async fn preempt_node(
        &self,
        r: Request<api::PreemptNodeRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, nodes::preempt)
    }

    async fn explain(
        &self,
        r: Request<api::ExplainRequest>,
    ) -> Result<Response<api::ExplainReply>, Status> {
        answer!(self, r, nodes::explain)
    }

    async fn list_heads(
        &self,
        r: Request<api::ListHeadsRequest>,
    ) -> Result<Response<api::ListHeadsReply>, Status> {
        // Also while there is no leader to confirm a token: its addresses are what is wanted then.
        let answered = async {
            let caller = auth::caller_by_own_tables(&self.context, &r).await?;
            heads::list(&self.context, &caller, r.into_inner()).await
        };
        answered
            .await
            .map(Response::new)
            .map_err(|status| with_leader(&self.context, status))
    }

    async fn announce_head(
        &self,
        r: Request<api::AnnounceHeadRequest>,
    ) -> Result<Response<Empty>, Status> {
        let peer = auth::peer_identity(&r).cloned();
        let origin = Origin {
            principal: peer.as_ref().map(ToString::to_string).unwrap_or_default(),
            call: observe::called(&r),
        };
        let announcing = heads::announce(&self.context, peer.as_ref(), r.into_inner());
        origin::serving(origin, announcing)
            .await
            .map(Response::new)
            .map_err(|status| with_leader(&self.context, status))
    }

    async fn head_key(
        &self,
        r: Request<api::HeadKeyRequest>,
    ) -> Result<Response<api::HeadKeyReply>, Status> {
        let peer = auth::peer_identity(&r).cloned();
        heads::key(&self.context, peer.as_ref(), &r.into_inner()).map(Response::new)
    }

    async fn promote_head(
        &self,
        r: Request<api::PromoteHeadRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, heads::promote)
    }

    async fn remove_head(
        &self,
        r: Request<api::RemoveHeadRequest>,
    ) -> Result<Response<Empty>, Status> {
        answer!(self, r, heads::remove)
    }

    async fn transfer_leadership(
        &self,
        r: Request<api::TransferLeadershipRequest>,
    ) -> Result<Response<api::TransferLeadershipReply>, Status> {
        answer!(self, r, heads::transfer)
    }

    async fn backup(
        &self,
        r: Request<api::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let call = observe::called(&r);
        // Also while there is no leader to confirm a token: a backup may be what is left to do then.
        let answered = async {
            let (caller, principal) = match r.get_ref().local {
                // And there is no way to record it.
                true => {
                    let caller = auth::caller_by_own_tables(&self.context, &r).await?;
                    return backup::backup(&self.context, &caller, r.into_inner()).await;
                }
                false => auth::identify(&self.context, &r).await?,
            };
            let origin = Origin { principal, call };
            let making = backup::backup(&self.context, &caller, r.into_inner());
            origin::serving(origin, making).await
        };
        answered
            .await
            .map(Response::new)
            .map_err(|status| with_leader(&self.context, status))
    }

    async fn list_audit(
        &self,
        r: Request<api::ListAuditRequest>,
    ) -> Result<Response<api::ListAuditReply>, Status> {
        answer!(self, r, audit::list)
    }

    async fn has_artifact(
        &self,
        r: Request<api::HasArtifactRequest>,
    ) -> Result<Response<api::HasArtifactReply>, Status> {
        answer!(self, r, artifacts::has)
    }

    async fn put_artifact(
        &self,
        r: Request<Streaming<api::ArtifactChunk>>,
    ) -> Result<Response<api::PutArtifactReply>, Status> {
        answer!(self, r, artifacts::put)
    }

    async fn apply(
        &self,
        r: Request<api::ApplyRequest>,
    ) -> Result<Response<api::ApplyReply>, Status> {
        answer!(self, r, modules::apply)
    }

    async fn query(
        &self,
        r: Request<api::QueryRequest>,
    ) -> Result<Response<api::QueryReply>, Status> {
        answer!(self, r, modules::query)
    }

    async fn wait_module(
        &self,
        r: Request<api::WaitModuleRequest>,
    ) -> Result<Response<api::WaitModuleReply>, Status> {
        answer!(self, r, modules::wait)
    }
}
