//! Workers: joining, being lost, being drained, being given notice.
//!
//! Invariants:
//! 1. A name has one id as long as the node is known; each start of its agent has an incarnation
//!    of its own. Only a lost node is ever forgotten, to make room for another.
//! 2. An incarnation that was declared lost never counts as alive again (I6).
//! 3. A start that another start of the same name has replaced does not come back while that one
//!    lives: two workers of one name would end each other's actors in turn for ever.
//! 4. What a node has given away is the business of [`super::lease`] alone (I10).

use mobula_core::control::{Reader, Subject};
use mobula_core::label::Labels;
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::order::{Order, WorkerEvent};
use mobula_core::{ActorId, ErrorCode, ExitReason, Incarnation, NodeId, Rejection, Resources};
use serde::{Deserialize, Serialize};

use super::{Apply, actor, check_name, lease, lifecycle, overloaded, precondition, stopping};
use crate::command::{EventOutcome, Response};
use crate::limits::{DRAIN_GRACE_MS, GRACE_MS_MAX, LABELS_MAX, NODES_MAX};
use crate::row::{self, Counter, NODES, NODES_BY_NAME};

/// A worker, as the tables know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeRow {
    pub(crate) id: NodeId,
    pub(crate) name: String,
    pub(crate) boot_id: String,
    pub(crate) incarnation: Incarnation,
    pub(crate) capacity: Resources,
    pub(crate) labels: Labels,
    pub(crate) version: String,
    pub(crate) registered_ms: u64,
    /// When it was declared lost; `None` while it is there.
    pub(crate) lost_ms: Option<u64>,
    pub(crate) notice: Option<Notice>,
    pub(crate) draining: bool,
    /// Starts of its agent that a later one has replaced while they were alive, the latest last.
    pub(crate) replaced_boot_ids: Vec<String>,
}

/// Replaced starts that are remembered: whoever made more than that many copies of a worker runs at
/// most so many at once.
const REPLACED_BOOT_IDS_KEPT: usize = 16;

/// A warning that a worker will be gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Notice {
    pub(crate) deadline_ms: u64,
    pub(crate) source: String,
}

/// A worker's own account of itself.
pub(crate) struct Registration {
    pub(crate) name: String,
    pub(crate) boot_id: String,
    pub(crate) capacity: Resources,
    pub(crate) labels: Labels,
    pub(crate) version: String,
}

pub(crate) fn load(reader: &dyn Reader, id: NodeId) -> Option<NodeRow> {
    row::get(reader, NODES, &id.to_key())
}

fn store(apply: &mut Apply<'_>, node: &NodeRow) {
    row::put(apply.txn, NODES, &node.id.to_key(), node);
    apply.changed(Subject::Node(node.id));
}

pub(crate) fn require(reader: &dyn Reader, id: NodeId) -> Result<NodeRow, Rejection> {
    load(reader, id).ok_or_else(|| {
        Rejection::not_found(format!(
            "{id} is not known: see `mobula nodes list` for those that are"
        ))
    })
}

/// All nodes, in order of their ids.
pub(crate) fn all(reader: &dyn Reader) -> impl Iterator<Item = NodeRow> + '_ {
    row::scan(reader, NODES, &[]).map(|(_, value)| row::from_bytes(NODES, &value))
}

pub(crate) fn register(
    apply: &mut Apply<'_>,
    registration: Registration,
) -> Result<Response, Rejection> {
    check_registration(&registration)?;
    let known: Option<NodeId> = row::get(apply.txn, NODES_BY_NAME, registration.name.as_bytes());
    match known {
        None => register_new(apply, registration),
        Some(id) => {
            let mut node = load(apply.txn, id).expect("the index by name names a node that exists");
            if is_planted(Mutant::LostNodeReturns) && node.boot_id == registration.boot_id {
                node.lost_ms = None;
                store(apply, &node);
            }
            if node.lost_ms.is_none() && node.boot_id == registration.boot_id {
                register_again(apply, node, registration)
            } else if node.lost_ms.is_none()
                && node.replaced_boot_ids.contains(&registration.boot_id)
            {
                Err(precondition(format!(
                    "worker `{}` was started again somewhere and runs there as incarnation {}: stop \
                     one of the two, or give one another name and data directory",
                    node.name, node.incarnation
                )))
            } else {
                register_restarted(apply, node, registration)
            }
        }
    }
}

fn check_registration(registration: &Registration) -> Result<(), Rejection> {
    check_name("the worker's name", &registration.name)?;
    check_name("the worker's boot id", &registration.boot_id)?;
    check_name("the worker's version", &registration.version)?;
    if registration.labels.len() > LABELS_MAX || registration.capacity.custom.len() > LABELS_MAX {
        return Err(Rejection::invalid(format!(
            "worker `{}` has {} labels and {} custom resources, the limit of each is {LABELS_MAX}: \
             remove some from its configuration",
            registration.name,
            registration.labels.len(),
            registration.capacity.custom.len(),
        )));
    }
    for (key, value) in &registration.labels {
        check_name("a label's key", key)?;
        if !value.is_empty() {
            check_name(&format!("the value of label `{key}`"), value)?;
        }
    }
    for key in registration.capacity.custom.keys() {
        check_name("a custom resource's name", key)?;
    }
    Ok(())
}

fn register_new(apply: &mut Apply<'_>, registration: Registration) -> Result<Response, Rejection> {
    if Counter::Nodes.value(apply.txn) >= NODES_MAX {
        forget_one_lost(apply)?;
    }
    Counter::Nodes.increment(apply.txn);
    let id = NodeId(Counter::LastNode.increment(apply.txn));
    row::put(apply.txn, NODES_BY_NAME, registration.name.as_bytes(), &id);
    Ok(store_incarnation(
        apply,
        id,
        registration,
        false,
        Vec::new(),
    ))
}

/// The same agent again: its incarnation stays, its description may change.
fn register_again(
    apply: &mut Apply<'_>,
    mut node: NodeRow,
    registration: Registration,
) -> Result<Response, Rejection> {
    let usage = lease::usage(apply.txn, node.id);
    if let Some(shortfall) = registration
        .capacity
        .shortfalls(&usage.resources)
        .into_iter()
        .next()
    {
        return Err(precondition(format!(
            "worker `{}` registers with less than its actors hold ({shortfall}): drain it first, \
             or start it with a new boot id",
            node.name
        )));
    }
    let gpus_shrink = registration.capacity.gpu_milli < node.capacity.gpu_milli;
    if gpus_shrink && !usage.gpu_milli.is_empty() {
        return Err(precondition(format!(
            "worker `{}` registers with fewer GPUs while its actors hold some: drain it first, or \
             start it with a new boot id",
            node.name
        )));
    }
    let grown = node.capacity != registration.capacity || node.labels != registration.labels;
    let response = Response::Registered {
        node: node.id,
        incarnation: node.incarnation,
    };
    if !grown && node.version == registration.version {
        return Ok(response);
    }
    node.capacity = registration.capacity;
    node.labels = registration.labels;
    node.version = registration.version;
    store(apply, &node);
    apply.place();
    Ok(response)
}

/// A new start of a known worker, or the return of one that was declared lost.
fn register_restarted(
    apply: &mut Apply<'_>,
    node: NodeRow,
    registration: Registration,
) -> Result<Response, Rejection> {
    end_all(apply, node.id, &ExitReason::NodeLost);
    let mut replaced_boot_ids = node.replaced_boot_ids;
    replaced_boot_ids.retain(|boot_id| *boot_id != registration.boot_id);
    if node.lost_ms.is_none() {
        replaced_boot_ids.push(node.boot_id);
    }
    if replaced_boot_ids.len() > REPLACED_BOOT_IDS_KEPT {
        replaced_boot_ids.remove(0);
    }
    Ok(store_incarnation(
        apply,
        node.id,
        registration,
        node.draining,
        replaced_boot_ids,
    ))
}

fn store_incarnation(
    apply: &mut Apply<'_>,
    id: NodeId,
    registration: Registration,
    draining: bool,
    replaced_boot_ids: Vec<String>,
) -> Response {
    let Registration {
        name,
        boot_id,
        capacity,
        labels,
        version,
    } = registration;
    let incarnation = Incarnation(apply.context.index);
    let registered_ms = apply.now_ms();
    let node = NodeRow {
        id,
        name,
        boot_id,
        incarnation,
        capacity,
        labels,
        version,
        registered_ms,
        lost_ms: None,
        notice: None,
        draining,
        replaced_boot_ids,
    };
    store(apply, &node);
    apply.place();
    Response::Registered {
        node: id,
        incarnation,
    }
}

/// Makes room for a new worker by forgetting a lost one.
fn forget_one_lost(apply: &mut Apply<'_>) -> Result<(), Rejection> {
    let lost = all(apply.txn).find(|node| node.lost_ms.is_some());
    let Some(node) = lost else {
        return Err(overloaded(
            "workers",
            NODES_MAX,
            "stop one before another joins",
        ));
    };
    apply.txn.delete(NODES, &node.id.to_key());
    apply.txn.delete(NODES_BY_NAME, node.name.as_bytes());
    Counter::Nodes.decrement(apply.txn);
    Ok(())
}

/// Ends every incarnation that `node` holds, for `reason`.
fn end_all(apply: &mut Apply<'_>, node: NodeId, reason: &ExitReason) {
    let actors: Vec<ActorId> = lease::of_node(apply.txn, node)
        .map(|(actor, _)| actor)
        .collect();
    for id in actors {
        let row = actor::load(apply.txn, id).expect("a lease names an actor that exists");
        // Ending one actor may have ended others of its job; those are no longer here.
        if row.state.node() == Some(node) {
            lifecycle::end_incarnation(apply, row, reason.clone());
        }
    }
}

pub(crate) fn lost(
    apply: &mut Apply<'_>,
    id: NodeId,
    incarnation: Incarnation,
) -> Result<Response, Rejection> {
    let mut node = require(apply.txn, id)?;
    if node.incarnation != incarnation {
        return Ok(Response::Event(EventOutcome::Fenced {
            current: node.incarnation,
        }));
    }
    if node.lost_ms.is_some() {
        return Ok(Response::Event(EventOutcome::AlreadyKnown));
    }
    node.lost_ms = Some(apply.now_ms());
    node.notice = None;
    store(apply, &node);
    if !is_planted(Mutant::LostNodeKeepsActors) {
        end_all(apply, id, &ExitReason::NodeLost);
    }
    Ok(Response::Event(EventOutcome::Applied))
}

pub(crate) fn event(
    apply: &mut Apply<'_>,
    id: NodeId,
    incarnation: Incarnation,
    event: WorkerEvent,
) -> Result<Response, Rejection> {
    let mut node = require(apply.txn, id)?;
    let is_stale = node.incarnation != incarnation || node.lost_ms.is_some();
    if is_stale && !is_planted(Mutant::StaleNodeAccepted) {
        return Ok(Response::Event(EventOutcome::Fenced {
            current: node.incarnation,
        }));
    }
    let outcome = match event {
        WorkerEvent::ActorStarted {
            actor,
            incarnation,
            host,
            call_address,
            pid,
        } => {
            check_name("the host's call address", &call_address)?;
            let place = actor::HostPlace {
                host,
                call_address,
                pid,
            };
            lifecycle::started(apply, id, actor, incarnation, place)
        }
        WorkerEvent::ActorExited {
            actor,
            incarnation,
            reason,
        } => lifecycle::exited(apply, id, actor, incarnation, reason),
        WorkerEvent::Notice {
            deadline_ms,
            source,
        } => {
            check_name("the notice's source", &source)?;
            if give_notice(apply, &mut node, deadline_ms, &source) {
                EventOutcome::Applied
            } else {
                EventOutcome::AlreadyKnown
            }
        }
        WorkerEvent::NoticeWithdrawn => match node.notice.take() {
            None => EventOutcome::AlreadyKnown,
            Some(_) => {
                store(apply, &node);
                apply.order(id, Order::NoticeWithdrawn);
                apply.place();
                EventOutcome::Applied
            }
        },
    };
    Ok(Response::Event(outcome))
}

/// Records a notice; the earlier of two deadlines holds. Says whether that changed anything.
fn give_notice(apply: &mut Apply<'_>, node: &mut NodeRow, deadline_ms: u64, source: &str) -> bool {
    if node
        .notice
        .as_ref()
        .is_some_and(|notice| notice.deadline_ms <= deadline_ms)
    {
        return false;
    }
    node.notice = Some(Notice {
        deadline_ms,
        source: source.to_owned(),
    });
    store(apply, node);
    apply.order(node.id, Order::Notice { deadline_ms });
    true
}

pub(crate) fn preempt(
    apply: &mut Apply<'_>,
    id: NodeId,
    grace_ms: u64,
) -> Result<Response, Rejection> {
    check_grace(grace_ms)?;
    let mut node = require(apply.txn, id)?;
    refuse_lost(&node)?;
    let deadline_ms = apply.now_ms().saturating_add(grace_ms);
    give_notice(apply, &mut node, deadline_ms, "command");
    let deadline_ms = node.notice.map_or(deadline_ms, |notice| notice.deadline_ms);
    Ok(Response::Noticed { deadline_ms })
}

pub(crate) fn drain(apply: &mut Apply<'_>, id: NodeId, on: bool) -> Result<Response, Rejection> {
    let mut node = require(apply.txn, id)?;
    if node.draining == on {
        return Ok(Response::Done);
    }
    node.draining = on;
    store(apply, &node);
    if on {
        let actors: Vec<ActorId> = lease::of_node(apply.txn, id)
            .map(|(actor, _)| actor)
            .collect();
        for actor in actors {
            stopping::leave(apply, actor, DRAIN_GRACE_MS);
        }
    } else {
        apply.place();
    }
    Ok(Response::Done)
}

pub(crate) fn check_grace(grace_ms: u64) -> Result<(), Rejection> {
    if grace_ms > GRACE_MS_MAX {
        return Err(Rejection::invalid(format!(
            "grace is {grace_ms} ms, the limit is {GRACE_MS_MAX} ms (one day): ask for less"
        )));
    }
    Ok(())
}

fn refuse_lost(node: &NodeRow) -> Result<(), Rejection> {
    if node.lost_ms.is_none() {
        return Ok(());
    }
    Err(Rejection::new(
        ErrorCode::FailedPrecondition,
        format!(
            "{} (`{}`) was lost as incarnation {}: start its worker again first",
            node.id, node.name, node.incarnation
        ),
    ))
}
