//! Nodes, and why something is where it is.

use mobula_core::control::Caller;
use mobula_core::error::Rejection;
use mobula_core::id::{ActorId, JobId, NodeId};
use mobula_scheduler::{Command, Query, QueryResponse};
use mobula_wire::control::explain_request::Subject;
use mobula_wire::control::{self as api, Empty};
use tonic::Status;

use super::access::may_read;
use super::{rejected, views};
use crate::context::HeadContext;

pub(super) async fn list(
    context: &HeadContext,
    _caller: &Caller,
    _request: api::ListNodesRequest,
) -> Result<api::ListNodesReply, Status> {
    match context.ask(Query::ListNodes).await? {
        QueryResponse::Nodes(nodes) => Ok(api::ListNodesReply {
            nodes: nodes.into_iter().map(views::node).collect(),
        }),
        _ => Err(Status::internal("the scheduler answered another question")),
    }
}

/// The node with this id, or, where a name is given, with that name.
pub(super) async fn find(context: &HeadContext, id: u64, name: &str) -> Result<NodeId, Status> {
    if name.is_empty() {
        return Ok(NodeId(id));
    }
    let QueryResponse::Nodes(nodes) = context.ask(Query::ListNodes).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    nodes
        .iter()
        .find(|node| node.name == name)
        .map(|node| node.node)
        .ok_or_else(|| {
            let known: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
            rejected(&Rejection::not_found(format!(
                "no node is called `{name}`: the nodes are [{}]",
                known.join(", ")
            )))
        })
}

pub(super) async fn drain(
    context: &HeadContext,
    caller: &Caller,
    request: api::DrainNodeRequest,
) -> Result<Empty, Status> {
    let node = find(context, request.node, &request.name).await?;
    context
        .change(
            caller,
            request.stamp,
            Command::DrainNode {
                node,
                on: !request.undo,
            },
        )
        .await
}

pub(super) async fn preempt(
    context: &HeadContext,
    caller: &Caller,
    request: api::PreemptNodeRequest,
) -> Result<Empty, Status> {
    let node = find(context, request.node, &request.name).await?;
    let command = Command::PreemptNode {
        node,
        grace_ms: request.grace_ms,
    };
    context.change(caller, request.stamp, command).await
}

pub(super) async fn explain(
    context: &HeadContext,
    caller: &Caller,
    request: api::ExplainRequest,
) -> Result<api::ExplainReply, Status> {
    let query = match request.subject {
        Some(Subject::Job(job)) => {
            may_read(caller, JobId(job))?;
            Query::ExplainJob { job: JobId(job) }
        }
        Some(Subject::Actor(actor)) => {
            let actor = ActorId(actor);
            super::actors::view_for(context, caller, actor).await?;
            Query::ExplainActor { actor }
        }
        None => {
            return Err(rejected(&Rejection::invalid(
                "name a job or an actor to explain",
            )));
        }
    };
    match context.ask(query).await? {
        QueryResponse::Explained(explanation) => {
            let mut reply = views::explanation(explanation);
            // What has ended waits for nothing.
            let has_ended = ["ended", "succeeded", "failed", "stopped"];
            if !has_ended.contains(&reply.state.as_str()) {
                reply.storage_problem = context.store_health.problem().await;
            }
            Ok(reply)
        }
        _ => Err(Status::internal("the scheduler answered another question")),
    }
}
