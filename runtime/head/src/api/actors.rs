//! Actors.

use std::time::Duration;

use mobula_core::control::{Caller, Subject};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{ActorId, Incarnation, JobId};
use mobula_core::spec::ActorSpec;
use mobula_scheduler::{
    ActorIncarnation, ActorTarget, Command, Query, QueryResponse, Resolution, Response,
};
use mobula_wire::control::resolve_actor_request::Target;
use mobula_wire::control::{self as api, Empty};
use tonic::Status;

use super::access::{may_find, may_read, only_job};
use super::jobs::{LOOK_AGAIN, unexpected};
use super::modules::{WAIT_MAX, stamp};
use super::{page, rejected, views};
use crate::context::HeadContext;

/// Actors that one question may wait for: each is a ticket and a row to read.
const AWAITED_MAX: usize = 1024;

pub(super) async fn create(
    context: &HeadContext,
    caller: &Caller,
    request: api::CreateActorsRequest,
) -> Result<api::CreateActorsReply, Status> {
    let actors = request
        .actors
        .into_iter()
        .map(ActorSpec::try_from)
        .collect::<Result<_, _>>()
        .map_err(|rejection| rejected(&rejection))?;
    let command = Command::CreateActors {
        job: JobId(request.job),
        actors,
        gang: request.gang,
        get_or_create: request.get_or_create,
        creator: request.creator.map(|creator| ActorIncarnation {
            actor: ActorId(creator.actor),
            incarnation: Incarnation(creator.incarnation),
        }),
    };
    context.authorize_scheduler(caller, &command)?;
    let (session, seq) = stamp(context, caller, request.stamp).await?;
    match context.propose_scheduler(session, seq, &command).await? {
        Response::ActorsCreated { actors } => Ok(api::CreateActorsReply {
            actors: actors.into_iter().map(|actor| actor.0).collect(),
        }),
        other => Err(unexpected(&other)),
    }
}

pub(super) async fn list(
    context: &HeadContext,
    caller: &Caller,
    request: api::ListActorsRequest,
) -> Result<api::ListActorsReply, Status> {
    // A host that asks for all of them sees all that it may.
    let job = request.job.map(JobId).or(only_job(caller));
    if let Some(job) = job {
        may_find(context, caller, job).await?;
    }
    let query = Query::ListActors {
        job,
        after: page::after(&request.page_token)?.map(ActorId),
        limit: request.page_size,
    };
    let QueryResponse::Actors(found) = context.ask(query).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    let found = found
        .into_iter()
        .map(|view| (view.actor.0, views::actor(view)));
    let (actors, next_page_token) = page::of(found, request.page_size);
    Ok(api::ListActorsReply {
        actors,
        next_page_token,
    })
}

/// An actor that `caller` may read of, or call.
pub(super) async fn view_for(
    context: &HeadContext,
    caller: &Caller,
    actor: ActorId,
) -> Result<api::Actor, Status> {
    let view = view(context, actor).await?;
    may_find(context, caller, JobId(view.job)).await?;
    Ok(view)
}

async fn view(context: &HeadContext, actor: ActorId) -> Result<api::Actor, Status> {
    match context.ask(Query::Actor { actor }).await? {
        QueryResponse::Actor(view) => Ok(views::actor(view)),
        _ => Err(Status::internal("the scheduler answered another question")),
    }
}

pub(super) async fn get(
    context: &HeadContext,
    caller: &Caller,
    request: api::GetActorRequest,
) -> Result<api::Actor, Status> {
    view_for(context, caller, ActorId(request.actor)).await
}

pub(super) async fn resolve(
    context: &HeadContext,
    caller: &Caller,
    request: api::ResolveActorRequest,
) -> Result<api::Actor, Status> {
    let actor = match request.target {
        Some(Target::Actor(actor)) => ActorId(actor),
        Some(Target::Named(named)) => match named.namespace {
            Some(namespace) => {
                may_look_into(context, caller, &namespace).await?;
                in_namespace(context, namespace, named.name).await?
            }
            None => {
                may_read(caller, JobId(named.job))?;
                by_name(context, JobId(named.job), named.name).await?
            }
        },
        None => {
            return Err(rejected(&Rejection::invalid(
                "name an actor by its id or its name",
            )));
        }
    };
    let limit = Duration::from_millis(request.timeout_ms).min(WAIT_MAX);
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let mut ticket = context.changes.follow(Subject::Actor(actor));
        let now = view_for(context, caller, actor).await?;
        let is_newer = now
            .incarnation
            .is_some_and(|i| i > request.after_incarnation);
        // One that waits to be placed again has the incarnation of its last start still.
        let is_over = now.state == "pending" || now.incarnation != Some(request.after_incarnation);
        let is_settled = now.state == "ended"
            || (now.state == "running" && is_newer)
            || (request.or_over && is_over);
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        if is_settled || left.is_zero() {
            return Ok(now);
        }
        // Woken, or time to look: both go round again.
        let _ = tokio::time::timeout(left.min(LOOK_AGAIN), ticket.changed()).await;
    }
}

pub(super) async fn await_any(
    context: &HeadContext,
    caller: &Caller,
    request: api::AwaitActorsRequest,
) -> Result<api::AwaitActorsReply, Status> {
    if request.actors.is_empty() || request.actors.len() > AWAITED_MAX {
        return Err(rejected(&Rejection::invalid(format!(
            "{} actors are named, and 1 to {AWAITED_MAX} can be asked for at once: ask for parts",
            request.actors.len()
        ))));
    }
    let limit = Duration::from_millis(request.timeout_ms).min(WAIT_MAX);
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let ids = request.actors.iter().copied().map(ActorId);
        let mut tickets: Vec<_> = ids
            .clone()
            .map(|id| context.changes.follow(Subject::Actor(id)))
            .collect();
        let mut settled = Vec::new();
        let reader = context.raft.read().await?;
        for actor in ids {
            let now = context.answer(&reader, Query::Actor { actor })?;
            let QueryResponse::Actor(now) = now else {
                return Err(Status::internal("the scheduler answered another question"));
            };
            may_find(context, caller, now.job).await?;
            if now.state == "ended" || now.state == "running" {
                settled.push(views::actor(now));
            }
        }
        drop(reader);
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        if !settled.is_empty() || left.is_zero() {
            return Ok(api::AwaitActorsReply { actors: settled });
        }
        let changes = tickets.iter_mut().map(|ticket| Box::pin(ticket.changed()));
        let changed = futures::future::select_all(changes);
        // Woken, or time to look: both go round again.
        let _ = tokio::time::timeout(left.min(LOOK_AGAIN), changed).await;
    }
}

/// Refuses a host whose job is not in the namespace that it names.
async fn may_look_into(
    context: &HeadContext,
    caller: &Caller,
    namespace: &str,
) -> Result<(), Status> {
    let Some(job) = only_job(caller) else {
        return Ok(());
    };
    let QueryResponse::Job(own) = context.ask(Query::Job { job }).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    let found = own.namespace.map(|own| own.name);
    if found.as_deref() == Some(namespace) {
        return Ok(());
    }
    let is_in = found.map_or_else(|| "none".to_owned(), |found| format!("namespace `{found}`"));
    Err(rejected(&Rejection::new(
        ErrorCode::PermissionDenied,
        format!(
            "{job} is in {is_in} and may not look into namespace `{namespace}`: submit it with \
             `--namespace {namespace}`, or use a client token"
        ),
    )))
}

async fn in_namespace(
    context: &HeadContext,
    namespace: String,
    name: String,
) -> Result<ActorId, Status> {
    let query = Query::ActorInNamespace { namespace, name };
    match context.ask(query).await? {
        QueryResponse::Actor(view) => Ok(view.actor),
        _ => Err(Status::internal("the scheduler answered another question")),
    }
}

async fn by_name(context: &HeadContext, job: JobId, name: String) -> Result<ActorId, Status> {
    let query = Query::ResolveActor {
        job,
        target: ActorTarget::Name(name),
    };
    match context.ask(query).await? {
        QueryResponse::Resolved(Resolution::Address(address)) => Ok(address.actor),
        QueryResponse::Resolved(
            Resolution::NotRunning { actor, .. } | Resolution::Ended { actor, .. },
        ) => Ok(actor),
        _ => Err(Status::internal("the scheduler answered another question")),
    }
}

/// The job that a host acts for; clients may reach into any.
fn own_job(caller: &Caller) -> Option<JobId> {
    match caller {
        Caller::Host { job, .. } => Some(*job),
        Caller::Client | Caller::Node(_) | Caller::Head => None,
    }
}

pub(super) async fn stop(
    context: &HeadContext,
    caller: &Caller,
    request: api::StopActorRequest,
) -> Result<Empty, Status> {
    let command = Command::StopActor {
        job: own_job(caller),
        actor: ActorId(request.actor),
        grace_ms: request.grace_ms,
    };
    context.change(caller, request.stamp, command).await
}

pub(super) async fn leave(
    context: &HeadContext,
    caller: &Caller,
    request: api::YieldActorRequest,
) -> Result<Empty, Status> {
    let actor = ActorId(request.actor);
    let job = match own_job(caller) {
        Some(job) => job,
        None => JobId(view(context, actor).await?.job),
    };
    let command = Command::YieldActor {
        job,
        actor,
        incarnation: Incarnation(request.incarnation),
    };
    context.change(caller, request.stamp, command).await
}
