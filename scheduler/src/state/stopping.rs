//! Ending actors on request: for good, or to start elsewhere.
//!
//! Invariants:
//! 1. Nothing is over until its worker says so, except where no worker has it, or where its own
//!    incarnation gives it up.
//! 2. Stopping for good wins over leaving a node, never the other way round.

use mobula_core::control::Reader;
use mobula_core::order::Order;
use mobula_core::{ActorId, ErrorCode, ExitReason, Incarnation, JobId, Rejection};

use super::actor::{self, ActorRow, ActorState, Then};
use super::{Apply, lifecycle, namespace, node, precondition};
use crate::command::Response;

/// Ends an actor for good: at once if nothing runs, otherwise by telling its worker.
pub(crate) fn stop(apply: &mut Apply<'_>, actor: ActorRow, grace_ms: u64) {
    match actor.state {
        ActorState::Ended { .. } => {}
        ActorState::Pending { .. } => lifecycle::end(apply, actor, ExitReason::Stopped),
        ActorState::Stopping {
            then: Then::End, ..
        } => {}
        _ => begin_stopping(apply, actor, grace_ms, Then::End),
    }
}

/// Has an actor leave its node and start elsewhere, within the grace.
pub(crate) fn leave(apply: &mut Apply<'_>, id: ActorId, grace_ms: u64) {
    let actor = actor::load(apply.txn, id).expect("a lease names an actor that exists");
    if !matches!(actor.state, ActorState::Stopping { .. }) {
        begin_stopping(apply, actor, grace_ms, Then::StartElsewhere);
    }
}

fn begin_stopping(apply: &mut Apply<'_>, mut actor: ActorRow, grace_ms: u64, then: Then) {
    let (node, node_incarnation) = actor
        .state
        .node_and_incarnation()
        .expect("only what a node holds can be stopped there");
    let since_ms = apply.now_ms();
    actor.state = ActorState::Stopping {
        node,
        node_incarnation,
        since_ms,
        grace_ms,
        then,
    };
    actor::store(apply, &actor);
    let order = Order::Stop {
        actor: actor.id,
        incarnation: actor.incarnation,
        grace_ms,
    };
    apply.order(node, order);
}

/// Refuses to act on an actor in the name of a job that it does not belong to.
pub(super) fn check_job(actor: &ActorRow, job: JobId) -> Result<(), Rejection> {
    if actor.job == job {
        return Ok(());
    }
    Err(Rejection::new(
        ErrorCode::PermissionDenied,
        format!(
            "{} does not belong to {job}: act only on actors of that job",
            actor.id
        ),
    ))
}

/// Jobs of one namespace may stop each other's actors, and so may an actor that was made by another
/// job; a job's driver is the job, and stopped with it.
fn check_may_stop(reader: &dyn Reader, actor: &ActorRow, job: JobId) -> Result<(), Rejection> {
    if !actor.driver && namespace::is_shared(reader, actor.job, job) {
        return Ok(());
    }
    check_job(actor, job)
}

pub(crate) fn stop_command(
    apply: &mut Apply<'_>,
    job: Option<JobId>,
    id: ActorId,
    grace_ms: u64,
) -> Result<Response, Rejection> {
    node::check_grace(grace_ms)?;
    let actor = actor::require(apply.txn, id)?;
    if let Some(job) = job {
        check_may_stop(apply.txn, &actor, job)?;
    }
    stop(apply, actor, grace_ms);
    Ok(Response::Done)
}

pub(crate) fn yield_command(
    apply: &mut Apply<'_>,
    job: JobId,
    id: ActorId,
    incarnation: Incarnation,
) -> Result<Response, Rejection> {
    let actor = actor::require(apply.txn, id)?;
    check_job(&actor, job)?;
    check_incarnation(&actor, incarnation)?;
    let node_id = actor
        .state
        .node()
        .expect("a current incarnation is on a node");
    let node = node::load(apply.txn, node_id).expect("a lease names a node that exists");
    if node.notice.is_none() && !node.draining {
        return Err(precondition(format!(
            "{id} cannot leave {node_id}: the node has no notice and is not draining; stay, or stop \
             the actor instead"
        )));
    }
    // The worker may still be running it: its effects are fenced from now on.
    apply.order(
        node_id,
        Order::Stop {
            actor: id,
            incarnation,
            grace_ms: 0,
        },
    );
    lifecycle::end_incarnation(apply, actor, ExitReason::Preempted);
    Ok(Response::Done)
}

/// Refuses what a stale incarnation of `actor` asks for (I4).
pub(crate) fn check_incarnation(
    actor: &ActorRow,
    incarnation: Incarnation,
) -> Result<(), Rejection> {
    if actor.incarnation == incarnation && actor.state.node().is_some() {
        return Ok(());
    }
    let current = match &actor.state {
        ActorState::Pending { .. } => "it waits to be started again".to_owned(),
        ActorState::Ended { reason, .. } => format!("it has ended: {reason}"),
        _ => format!("the current one is {}", actor.incarnation),
    };
    Err(Rejection::fenced(format!(
        "incarnation {incarnation} of {} is over ({current}): stop working for it",
        actor.id
    )))
}
