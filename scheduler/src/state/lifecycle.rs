//! The life of an actor: from pending over assigned and running to ended, and round again.
//!
//! Invariants:
//! 1. Each assignment is a new incarnation; events of any other one change nothing (I4).
//! 2. An actor that ends unasked starts again while its policy allows; what the infrastructure
//!    took away does not count against it.
//! 3. An ended actor never lives again, and its name is free.

use mobula_core::control::{Reader, Subject};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::order::Order;
use mobula_core::spec::{ActorKind, ActorSpec, RestartPolicy};
use mobula_core::{ActorId, ExitReason, GroupId, Incarnation, JobId, NodeId};

use super::actor::{self, ActorRow, ActorState, HostPlace, Start, Then};
use super::lease::{self, Lease};
use super::{Apply, group, held, job};
use crate::command::EventOutcome;
use crate::limits::{
    ENDED_ACTORS_BYTES_MAX, EXIT_TEXT_BYTES_MAX, FINISHED_ACTORS_KEPT, STARTS_KEPT_MAX, SWEEP_ROWS,
};
use crate::placement::gpu::GpuShare;
use crate::row::{self, ACTOR_SPECS, ACTORS, ACTORS_BY_JOB, ACTORS_FINISHED, Counter, PENDING};

/// Creates one pending actor. Whoever calls this has checked the specification and the bounds.
pub(crate) fn create(
    apply: &mut Apply<'_>,
    job: JobId,
    spec: &ActorSpec,
    group: Option<GroupId>,
) -> ActorId {
    let id = ActorId(Counter::LastActor.increment(apply.txn));
    Counter::LiveActors.increment(apply.txn);
    let driver = spec.kind == ActorKind::Driver;
    if !driver {
        Counter::LivingBytes.add(apply.txn, held::actor_bytes(spec));
    }
    let now_ms = apply.now_ms();
    row::put(apply.txn, ACTOR_SPECS, &id.to_key(), spec);
    row::put(apply.txn, ACTORS_BY_JOB, &row::pair(job.0, id.0), &());
    if let Some(name) = &spec.name {
        actor::take_name(apply, job, name, id);
    }
    let actor = ActorRow {
        id,
        job,
        group,
        name: spec.name.clone(),
        driver,
        resources: spec.resources.clone(),
        placement: spec.placement.clone(),
        restart: spec.restart.clone(),
        created_ms: now_ms,
        state: ActorState::Ended {
            reason: ExitReason::Completed,
            at_ms: now_ms,
            finished: 0,
        },
        incarnation: Incarnation::default(),
        restarts: 0,
        counted_restarts: 0,
        last_exit: None,
        starts: Vec::new(),
        detached: spec.detached,
    };
    make_pending(apply, actor, 0);
    id
}

fn make_pending(apply: &mut Apply<'_>, mut actor: ActorRow, delay_ms: u64) {
    let since_ms = apply.now_ms();
    let not_before_ms = since_ms.saturating_add(delay_ms);
    actor.state = ActorState::Pending {
        since_ms,
        not_before_ms,
    };
    row::put(
        apply.txn,
        PENDING,
        &row::pair(not_before_ms, actor.id.0),
        &(),
    );
    Counter::PendingActors.increment(apply.txn);
    actor::store(apply, &actor);
    apply.place();
}

fn leave_pending(apply: &mut Apply<'_>, actor: &ActorRow) {
    if let ActorState::Pending { not_before_ms, .. } = actor.state {
        apply
            .txn
            .delete(PENDING, &row::pair(not_before_ms, actor.id.0));
        Counter::PendingActors.decrement(apply.txn);
    }
}

/// The pending actors with the time from which each may be placed, earliest first.
pub(crate) fn pending(reader: &dyn Reader) -> impl Iterator<Item = (u64, ActorId)> + '_ {
    let mut after = pending_after(reader);
    std::iter::from_fn(move || {
        let page = reader.scan(PENDING, &[], Some(&after), SWEEP_ROWS);
        after.clone_from(&page.last()?.0);
        Some(page)
    })
    .flatten()
    .map(|(key, _)| (row::number_at(&key, 0), ActorId(row::number_at(&key, 1))))
}

fn pending_after(reader: &dyn Reader) -> Vec<u8> {
    match Counter::PendingFrom.value(reader).checked_sub(1) {
        Some(before_ms) => row::pair(before_ms, u64::MAX),
        None => Vec::new(),
    }
}

/// Notes from where on actors are pending, after some of them were placed.
pub(crate) fn advance_pending(apply: &mut Apply<'_>) {
    let now_ms = apply.now_ms();
    let first = pending(apply.txn).next();
    // Who becomes pending later does so from the present on: log time never goes back.
    let from_ms = first.map_or(now_ms, |(from_ms, _)| from_ms.min(now_ms));
    if from_ms > Counter::PendingFrom.value(apply.txn) {
        Counter::PendingFrom.set(apply.txn, from_ms);
    }
}

/// Where and with what a new incarnation runs.
pub(crate) struct Grant {
    pub(crate) node: NodeId,
    pub(crate) node_incarnation: Incarnation,
    pub(crate) gpus: Vec<GpuShare>,
    pub(crate) affinity_key: Option<String>,
    pub(crate) spread_key: Option<String>,
}

/// Gives a pending actor to a node. Whoever calls this has checked that it fits.
pub(crate) fn assign(apply: &mut Apply<'_>, mut actor: ActorRow, grant: Grant) -> Incarnation {
    leave_pending(apply, &actor);
    let Grant {
        node,
        node_incarnation,
        gpus,
        affinity_key,
        spread_key,
    } = grant;
    let is_reused = is_planted(Mutant::IncarnationReused) && actor.incarnation.0 > 0;
    let incarnation = if is_reused {
        actor.incarnation
    } else {
        Incarnation(apply.context.index)
    };
    let lease = Lease {
        job: actor.job,
        incarnation,
        resources: actor.resources.clone(),
        gpus,
        affinity_key,
        spread_key,
    };
    lease::grant(apply.txn, node, actor.id, &lease);
    actor.incarnation = incarnation;
    if actor.starts.len() >= STARTS_KEPT_MAX {
        actor.starts.remove(0);
    }
    actor.starts.push(Start {
        node,
        incarnation,
        assigned_ms: apply.now_ms(),
        started_ms: None,
        ended_ms: None,
    });
    actor.state = ActorState::Assigned {
        node,
        node_incarnation,
        since_ms: apply.now_ms(),
    };
    actor::store(apply, &actor);
    let order = crate::orders::start(apply.txn, &actor);
    apply.order(node, order);
    incarnation
}

/// A worker says that an actor runs.
pub(crate) fn started(
    apply: &mut Apply<'_>,
    node: NodeId,
    id: ActorId,
    incarnation: Incarnation,
    place: HostPlace,
) -> EventOutcome {
    let Some(mut actor) = current(apply, node, id, incarnation) else {
        // Something runs there that should not: have it ended.
        apply.order(
            node,
            Order::Stop {
                actor: id,
                incarnation,
                grace_ms: 0,
            },
        );
        return EventOutcome::AlreadyKnown;
    };
    let ActorState::Assigned {
        node,
        node_incarnation,
        ..
    } = actor.state
    else {
        return EventOutcome::AlreadyKnown;
    };
    let since_ms = apply.now_ms();
    if let Some(start) = actor.starts.last_mut() {
        start.started_ms = Some(since_ms);
    }
    actor.state = ActorState::Running {
        node,
        node_incarnation,
        since_ms,
        place,
    };
    actor::store(apply, &actor);
    if actor.driver {
        job::driver_started(apply, actor.job);
    }
    EventOutcome::Applied
}

/// A worker says that an actor ended.
pub(crate) fn exited(
    apply: &mut Apply<'_>,
    node: NodeId,
    id: ActorId,
    incarnation: Incarnation,
    reason: ExitReason,
) -> EventOutcome {
    match current(apply, node, id, incarnation) {
        None => EventOutcome::AlreadyKnown,
        Some(actor) => {
            end_incarnation(apply, actor, reason);
            EventOutcome::Applied
        }
    }
}

/// The actor, if this is its incarnation and it is on this node.
fn current(
    apply: &Apply<'_>,
    node: NodeId,
    id: ActorId,
    incarnation: Incarnation,
) -> Option<ActorRow> {
    actor::load(apply.txn, id)
        .filter(|actor| actor.incarnation == incarnation || is_planted(Mutant::StaleActorAccepted))
        .filter(|actor| actor.state.node() == Some(node))
}

/// An incarnation is over: its resources are free, and the actor starts again or has ended.
pub(crate) fn end_incarnation(apply: &mut Apply<'_>, mut actor: ActorRow, reason: ExitReason) {
    let node = actor
        .state
        .node()
        .expect("only what a node holds can end there");
    if !is_planted(Mutant::LeaseLeaks) {
        lease::release(apply.txn, node, actor.id);
    }
    apply.changed(Subject::Node(node));
    apply.place();
    let reason = bounded(match (&actor.state, reason) {
        (_, ExitReason::Completed) => ExitReason::Completed,
        (
            ActorState::Stopping {
                then: Then::End, ..
            },
            _,
        ) if !is_planted(Mutant::RestartAfterStop) => ExitReason::Stopped,
        (
            ActorState::Stopping {
                then: Then::StartElsewhere,
                ..
            },
            _,
        ) => ExitReason::Preempted,
        (_, reason) => reason,
    });
    let ended_ms = apply.now_ms();
    if let Some(start) = actor.starts.last_mut() {
        start.ended_ms = Some(ended_ms);
    }
    actor.last_exit = Some(reason.clone());
    if !may_restart(apply, &actor, &reason) {
        return end(apply, actor, reason);
    }
    actor.restarts = actor.restarts.saturating_add(1);
    let mut delay_ms = 0;
    if reason.counts_against_budget() {
        actor.counted_restarts += 1;
        delay_ms = actor.restart.backoff_ms(restarts_in_a_row(&actor));
    }
    job::count_restart(apply, actor.job, actor.driver);
    make_pending(apply, actor, delay_ms);
}

/// Restarts without a good start between them, the one to come included: a start that ran for as long as
/// the longest delay shows that the actor can run, and delays begin anew behind it.
fn restarts_in_a_row(actor: &ActorRow) -> u32 {
    let is_good = |start: &Start| {
        let ran_ms = start.ended_ms.zip(start.started_ms);
        ran_ms.is_some_and(|(end, begin)| end.saturating_sub(begin) >= actor.restart.backoff_max_ms)
    };
    let failed = actor
        .starts
        .iter()
        .rev()
        .take_while(|start| !is_good(start));
    let failed = u32::try_from(failed.count()).unwrap_or(u32::MAX);
    // Starts that a node took with it cost nothing.
    failed.min(actor.counted_restarts).max(1)
}

fn may_restart(apply: &Apply<'_>, actor: &ActorRow, reason: &ExitReason) -> bool {
    // `max_restarts` of 0 means never, whoever is to blame; only that an operator empties a node
    // does not end a job, whose driver begins again on another one.
    let RestartPolicy { max_restarts, .. } = actor.restart;
    let has_moved = actor.driver && *reason == ExitReason::Preempted;
    let gives_up = actor.driver
        && reason.is_user_error()
        && !job::load_spec(apply.txn, actor.job).retry_errors;
    let in_budget = !reason.counts_against_budget() || actor.counted_restarts < max_restarts;
    !reason.is_wanted()
        && !gives_up
        && (max_restarts > 0 || has_moved)
        && in_budget
        && job::is_open(apply.txn, actor.job)
}

/// Cuts the text inside a reason, which is kept in a table.
fn bounded(reason: ExitReason) -> ExitReason {
    let cut = |mut text: String| {
        if text.len() > EXIT_TEXT_BYTES_MAX {
            let end = text.floor_char_boundary(EXIT_TEXT_BYTES_MAX);
            text.truncate(end);
            text.push('…');
        }
        text
    };
    match reason {
        ExitReason::Failed(text) => ExitReason::Failed(cut(text)),
        ExitReason::Panicked(text) => ExitReason::Panicked(cut(text)),
        ExitReason::StartFailed(text) => ExitReason::StartFailed(cut(text)),
        ExitReason::Unavailable(text) => ExitReason::Unavailable(cut(text)),
        other => other,
    }
}

/// The actor is over for good.
pub(crate) fn end(apply: &mut Apply<'_>, mut actor: ActorRow, reason: ExitReason) {
    leave_pending(apply, &actor);
    if let Some(name) = &actor.name {
        actor::free_name(apply, actor.job, name);
    }
    let finished = Counter::LastFinished.increment(apply.txn);
    let at_ms = apply.now_ms();
    actor.last_exit = Some(reason.clone());
    actor.state = ActorState::Ended {
        reason: reason.clone(),
        at_ms,
        finished,
    };
    actor::store(apply, &actor);
    forget_init(apply, &actor);
    Counter::LiveActors.decrement(apply.txn);
    if !actor.driver {
        row::put(
            apply.txn,
            ACTORS_FINISHED,
            &row::pair(finished, actor.id.0),
            &(),
        );
        Counter::FinishedActors.increment(apply.txn);
        while are_too_many(apply.txn) {
            forget_oldest(apply);
        }
    }
    if let Some(group) = actor.group {
        group::member_ended(apply, group);
    }
    job::actor_ended(apply, &actor, &reason);
}

/// An ended actor is never constructed again, and its argument may be a quarter of a megabyte. What is left
/// counts as ended from here on.
fn forget_init(apply: &mut Apply<'_>, actor: &ActorRow) {
    let mut spec = actor::load_spec(apply.txn, actor.id);
    let living_bytes = held::actor_bytes(&spec);
    if !spec.init.is_empty() {
        spec.init = Vec::new();
        row::put(apply.txn, ACTOR_SPECS, &actor.id.to_key(), &spec);
    }
    if !actor.driver {
        Counter::LivingBytes.subtract(apply.txn, living_bytes);
        Counter::EndedActorBytes.add(apply.txn, held::actor_bytes(&spec));
    }
}

/// Whether more ended actors are kept than may be, in number or in bytes.
fn are_too_many(reader: &dyn Reader) -> bool {
    Counter::FinishedActors.value(reader) > FINISHED_ACTORS_KEPT
        || Counter::EndedActorBytes.value(reader) > ENDED_ACTORS_BYTES_MAX
}

fn forget_oldest(apply: &mut Apply<'_>) {
    let forgotten = Counter::ForgottenActors.value(apply.txn);
    let after = row::pair(forgotten, u64::MAX);
    let oldest = apply.txn.scan(ACTORS_FINISHED, &[], Some(&after), 1);
    for (key, _) in oldest {
        Counter::ForgottenActors.set(apply.txn, row::number_at(&key, 0));
        let id = ActorId(row::number_at(&key, 1));
        let actor =
            actor::load(apply.txn, id).expect("the list of ended actors names rows that exist");
        forget(apply, &actor);
    }
}

/// Removes an ended actor from all tables.
pub(crate) fn forget(apply: &mut Apply<'_>, actor: &ActorRow) {
    let ActorState::Ended { finished, .. } = actor.state else {
        unreachable!("only ended actors are forgotten, {} has not", actor.id)
    };
    if !actor.driver {
        apply
            .txn
            .delete(ACTORS_FINISHED, &row::pair(finished, actor.id.0));
        Counter::FinishedActors.decrement(apply.txn);
        let spec = actor::load_spec(apply.txn, actor.id);
        Counter::EndedActorBytes.subtract(apply.txn, held::actor_bytes(&spec));
    }
    apply.txn.delete(ACTORS, &actor.id.to_key());
    apply.txn.delete(ACTOR_SPECS, &actor.id.to_key());
    apply
        .txn
        .delete(ACTORS_BY_JOB, &row::pair(actor.job.0, actor.id.0));
}
