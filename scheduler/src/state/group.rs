//! Creating actors, alone or as a gang, and carrying out a placement pass's decisions.
//!
//! Invariants:
//! 1. The pending members of a gang are assigned together or not at all.
//! 2. A decision is carried out only if everything it was based on still holds.

use std::collections::BTreeMap;

use mobula_core::control::Reader;
use mobula_core::label::Requirement;
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::spec::{ActorKind, ActorSpec, INIT_LIMIT_BYTES, PlacementPolicy};
use mobula_core::{ActorId, ErrorCode, GroupId, JobId, NodeId, Rejection, Resources};
use serde::{Deserialize, Serialize};

use super::actor::{self, ActorRow, ActorState};
use super::lifecycle::{self, Grant};
use super::{
    Apply, check_name, detached, held, job, job_checks, namespace, overloaded, precondition,
    stopping,
};
use crate::command::{ActorIncarnation, Assignment, Response, SkippedAssignment};
use crate::limits::{
    ACTORS_PER_COMMAND_MAX, COMMAND_INIT_BYTES_MAX, GANG_MEMBERS_MAX, LIVE_ACTORS_MAX,
    LIVING_BYTES_MAX, MAILBOX_CAPACITY_MAX, REQUEST_NAMES_MAX,
};
use crate::placement::{Nodes, Request, gpu::GpuShare};
use crate::row::{self, Counter, GROUPS};

/// Actors that are placed all or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupRow {
    pub(crate) id: GroupId,
    pub(crate) job: JobId,
    pub(crate) members: Vec<ActorId>,
    /// Whether it was ever placed; before, no member has an incarnation.
    pub(crate) placed: bool,
}

pub(crate) fn load(reader: &dyn Reader, id: GroupId) -> Option<GroupRow> {
    row::get(reader, GROUPS, &id.to_key())
}

/// The members of `group` that wait for a node, in order of their ids.
pub(crate) fn pending_members(reader: &dyn Reader, group: &GroupRow) -> Vec<ActorRow> {
    let members = group
        .members
        .iter()
        .filter_map(|id| actor::load(reader, *id));
    members.filter(|actor| actor.state.is_pending()).collect()
}

/// A member is over for good: the group goes with its last one.
pub(crate) fn member_ended(apply: &mut Apply<'_>, id: GroupId) {
    let group = load(apply.txn, id).expect("a group is kept as long as one member lives");
    let is_over = |id: &ActorId| actor::load(apply.txn, *id).is_none_or(|a| a.state.is_ended());
    if group.members.iter().all(is_over) {
        apply.txn.delete(GROUPS, &id.to_key());
    }
}

/// What a `CreateActors` asks for.
pub(crate) struct Creation {
    pub(crate) job: JobId,
    pub(crate) specs: Vec<ActorSpec>,
    pub(crate) gang: bool,
    pub(crate) get_or_create: bool,
    pub(crate) creator: Option<ActorIncarnation>,
}

pub(crate) fn create_actors(
    apply: &mut Apply<'_>,
    creation: Creation,
) -> Result<Response, Rejection> {
    let is_detached = check_creation(apply.txn, &creation)?;
    let Creation {
        job: asked_in,
        specs,
        gang,
        get_or_create,
        ..
    } = creation;
    let existing = existing_actors(apply.txn, asked_in, &specs, get_or_create)?;
    let missing = existing.iter().filter(|id| id.is_none()).count();
    if gang && missing > 0 && missing < specs.len() {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "{} of the {} members of this gang exist already: stop them first, since a gang is \
                 created as a whole",
                specs.len() - missing,
                specs.len()
            ),
        ));
    }
    if Counter::LiveActors.value(apply.txn) + missing as u64 > LIVE_ACTORS_MAX {
        return Err(overloaded(
            "actors",
            LIVE_ACTORS_MAX,
            "create these when some have ended",
        ));
    }
    let new = specs.iter().zip(&existing).filter(|(_, id)| id.is_none());
    let added_bytes: u64 = new.map(|(spec, _)| held::actor_bytes(spec)).sum();
    let what = format!("{missing} new actors of {asked_in}");
    held::check_living(apply.txn, &what, added_bytes, LIVING_BYTES_MAX)?;
    // Nothing is refused from here on but by this.
    let job = match is_detached && missing > 0 {
        true => detached::home(apply, asked_in, added_bytes)?,
        false => asked_in,
    };
    let group = (gang && missing > 0).then(|| GroupId(Counter::LastGroup.increment(apply.txn)));
    let mut actors = Vec::with_capacity(specs.len());
    for (spec, existing) in specs.iter().zip(existing) {
        actors.push(existing.unwrap_or_else(|| lifecycle::create(apply, job, spec, group)));
    }
    if let Some(id) = group {
        let row = GroupRow {
            id,
            job,
            members: actors.clone(),
            placed: false,
        };
        row::put(apply.txn, GROUPS, &id.to_key(), &row);
    }
    let mut row = job::require(apply.txn, job)?;
    let missing = u32::try_from(missing).expect("a command creates few actors");
    row.live_actors += missing;
    if let Some(detached) = row.detached_actors.as_mut().filter(|_| is_detached) {
        *detached += missing;
    }
    job::store(apply, &row);
    Ok(Response::ActorsCreated { actors })
}

/// Whether what is asked for is detached, if it may be asked for.
fn check_creation(reader: &dyn Reader, creation: &Creation) -> Result<bool, Rejection> {
    let Creation {
        job,
        specs,
        gang,
        creator,
        ..
    } = creation;
    let count = specs.len();
    let limit = if *gang {
        GANG_MEMBERS_MAX
    } else {
        ACTORS_PER_COMMAND_MAX
    };
    if count == 0 || count > limit {
        let what = if *gang { "a gang" } else { "one command" };
        return Err(Rejection::invalid(format!(
            "{what} creates {count} actors, allowed are 1 to {limit}: split them up"
        )));
    }
    let init_bytes: usize = specs.iter().map(|spec| spec.init.len()).sum();
    if init_bytes > COMMAND_INIT_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "the constructor arguments of these actors have {init_bytes} bytes together, the limit \
             is {COMMAND_INIT_BYTES_MAX}: create fewer at once, or pass an object reference"
        )));
    }
    let row = job::require(reader, *job)?;
    if !row.state.is_open() {
        return Err(precondition(format!(
            "{job} is over or ending, so no actor is created in it: submit a new job"
        )));
    }
    if let Some(creator) = creator {
        let actor = actor::require(reader, creator.actor)?;
        if actor.job != *job {
            return Err(Rejection::invalid(format!(
                "{} belongs to {}, not to {job}: an actor creates actors in its own job",
                actor.id, actor.job
            )));
        }
        stopping::check_incarnation(&actor, creator.incarnation)?;
    }
    specs.iter().try_for_each(check_actor)?;
    detached::check(reader, *job, specs)
}

fn check_actor(spec: &ActorSpec) -> Result<(), Rejection> {
    let ActorKind::Actor { type_name } = &spec.kind else {
        return Err(Rejection::invalid(
            "a driver cannot be created as an actor: submit a job instead",
        ));
    };
    check_name("the actor's type", type_name)?;
    if let Some(name) = &spec.name {
        check_name("the actor's name", name)?;
    }
    let init_bytes = spec.init.len();
    if init_bytes > INIT_LIMIT_BYTES {
        return Err(Rejection::invalid(format!(
            "the constructor argument of `{type_name}` has {init_bytes} bytes, the limit is \
             {INIT_LIMIT_BYTES}: pass an object reference instead"
        )));
    }
    if spec.mailbox_capacity == 0 {
        return Err(Rejection::invalid(format!(
            "the mailbox of `{type_name}` has room for no call: give it a capacity of at least 1"
        )));
    }
    if spec.mailbox_capacity > MAILBOX_CAPACITY_MAX {
        return Err(Rejection::invalid(format!(
            "the mailbox of `{type_name}` would hold {} calls, the limit is {MAILBOX_CAPACITY_MAX}: \
             let callers wait instead",
            spec.mailbox_capacity
        )));
    }
    let what = format!("`{type_name}`");
    job_checks::check_restart(&what, &spec.restart)?;
    check_placement(&what, &spec.resources, &spec.placement)
}

/// Refuses requests that no node could ever meet, or that are too large to keep.
pub(crate) fn check_placement(
    what: &str,
    resources: &Resources,
    placement: &PlacementPolicy,
) -> Result<(), Rejection> {
    let gpu = resources.gpu_milli;
    if gpu > 1000 && !gpu.is_multiple_of(1000) {
        return Err(Rejection::invalid(format!(
            "{what} asks for {gpu} thousandths of a GPU: a share below one GPU, or whole GPUs, can \
             be placed"
        )));
    }
    if let Some((name, _)) = resources.custom.iter().find(|(_, amount)| **amount == 0) {
        return Err(Rejection::invalid(format!(
            "{what} asks for nothing of the custom resource `{name}`: leave it out"
        )));
    }
    check_names(what, resources, placement)?;
    if let Some(key) = &placement.affinity_key {
        check_name("the affinity key", key)?;
    }
    if let Some(spread) = &placement.spread_key {
        check_name("the spread key", &spread.key)?;
    }
    Ok(())
}

/// Bounds everything in a request that is text: it is kept in several rows.
fn check_names(
    what: &str,
    resources: &Resources,
    placement: &PlacementPolicy,
) -> Result<(), Rejection> {
    let mut count = resources.custom.len();
    for name in resources.custom.keys() {
        check_name("a custom resource's name", name)?;
    }
    for requirement in &placement.selector {
        let (label, values) = match requirement {
            Requirement::In(label, values) | Requirement::NotIn(label, values) => {
                (label, values.as_slice())
            }
            Requirement::Exists(label) => (label, [].as_slice()),
        };
        count += 1 + values.len();
        check_name("a selector's label", label)?;
        // A label's value may be empty, so an empty one may be asked for.
        for value in values.iter().filter(|value| !value.is_empty()) {
            check_name(
                &format!("a value for the selector's label `{label}`"),
                value,
            )?;
        }
    }
    if count > REQUEST_NAMES_MAX {
        return Err(Rejection::invalid(format!(
            "{what} names {count} labels, values and custom resources, the limit is \
             {REQUEST_NAMES_MAX}: ask for fewer, or give the nodes one label that says it all"
        )));
    }
    Ok(())
}

/// For each specification, the living actor that has its name.
fn existing_actors(
    reader: &dyn Reader,
    job: JobId,
    specs: &[ActorSpec],
    get_or_create: bool,
) -> Result<Vec<Option<ActorId>>, Rejection> {
    let mut seen: BTreeMap<&str, ()> = BTreeMap::new();
    let mut existing = Vec::with_capacity(specs.len());
    for spec in specs {
        let Some(name) = &spec.name else {
            existing.push(None);
            continue;
        };
        if seen.insert(name, ()).is_some() {
            return Err(Rejection::invalid(format!(
                "two of these actors are called `{name}`: names are unique within a job and its \
                 namespace"
            )));
        }
        let actor = actor::by_name(reader, job, name);
        if let (Some(actor), false) = (actor, get_or_create) {
            let whose = match namespace::of_job(reader, job) {
                Some(namespace) => format!("namespace `{namespace}`"),
                None => job.to_string(),
            };
            return Err(Rejection::new(
                ErrorCode::AlreadyExists,
                format!(
                    "{whose} has a living actor called `{name}` ({actor}): use get-or-create, stop \
                     it, or choose another name"
                ),
            ));
        }
        if let Some(actor) = actor {
            check_same_type(reader, actor, name, spec)?;
            check_as_lasting(reader, actor, name, spec)?;
        }
        existing.push(actor);
    }
    Ok(existing)
}

/// Refuses an actor that has the name and is something else: its caller would speak another
/// language to it.
fn check_same_type(
    reader: &dyn Reader,
    actor: ActorId,
    name: &str,
    spec: &ActorSpec,
) -> Result<(), Rejection> {
    let found = actor::type_name(reader, actor);
    let wanted = actor::type_name_of(&spec.kind);
    if found == wanted {
        return Ok(());
    }
    Err(Rejection::new(
        ErrorCode::AlreadyExists,
        format!(
            "`{name}` is {actor}, a living `{found}`, and a `{wanted}` was asked for: stop it, or \
             choose another name"
        ),
    ))
}

/// Refuses an actor that ends with its job to whoever asked for one that does not.
fn check_as_lasting(
    reader: &dyn Reader,
    actor: ActorId,
    name: &str,
    spec: &ActorSpec,
) -> Result<(), Rejection> {
    let found = actor::require(reader, actor)?;
    if found.detached || !spec.detached {
        return Ok(());
    }
    Err(Rejection::new(
        ErrorCode::AlreadyExists,
        format!(
            "`{name}` is {actor}, which ends with {}, and a detached one was asked for: stop it, or \
             choose another name",
            found.job
        ),
    ))
}

/// A decision that holds: the actor, and what it is granted.
type Held = (ActorRow, Grant);

pub(crate) fn assign(
    apply: &mut Apply<'_>,
    assignments: &[Assignment],
) -> Result<Response, Rejection> {
    let mut nodes = Nodes::load(apply.txn, assignments.iter().map(|a| a.node));
    let mut held: Vec<Held> = Vec::new();
    let mut skipped = Vec::new();
    for unit in units(apply.txn, assignments) {
        match check_unit(apply, &mut nodes, &unit) {
            Ok(unit) => held.extend(unit),
            Err(reason) => skipped.extend(unit.iter().map(|a| SkippedAssignment {
                actor: a.actor,
                reason: reason.clone(),
            })),
        }
    }
    let mut assigned = Vec::with_capacity(held.len());
    for (row, grant) in held {
        let actor = row.id;
        if let Some(mut group) = row.group.and_then(|id| load(apply.txn, id))
            && !group.placed
        {
            group.placed = true;
            row::put(apply.txn, GROUPS, &group.id.to_key(), &group);
        }
        let incarnation = lifecycle::assign(apply, row, grant);
        assigned.push(ActorIncarnation { actor, incarnation });
    }
    lifecycle::advance_pending(apply);
    Ok(Response::Assigned { assigned, skipped })
}

/// Splits a pass's decisions into those that hold or fall together: gangs, and single actors.
/// An actor that is named twice is taken once.
fn units(reader: &dyn Reader, assignments: &[Assignment]) -> Vec<Vec<Assignment>> {
    let mut order: Vec<Vec<Assignment>> = Vec::new();
    let mut of_group: BTreeMap<GroupId, usize> = BTreeMap::new();
    let mut seen: BTreeMap<ActorId, NodeId> = BTreeMap::new();
    for assignment in assignments {
        if seen.insert(assignment.actor, assignment.node).is_some() {
            continue;
        }
        match actor::load(reader, assignment.actor).and_then(|actor| actor.group) {
            None => order.push(vec![*assignment]),
            Some(group) => {
                let index = *of_group.entry(group).or_insert(order.len());
                if index == order.len() {
                    order.push(Vec::new());
                }
                order[index].push(*assignment);
            }
        }
    }
    order
}

/// Whether all of `unit` holds; then it is reserved on `nodes`. Otherwise says what does not.
fn check_unit(
    apply: &Apply<'_>,
    nodes: &mut Nodes,
    unit: &[Assignment],
) -> Result<Vec<Held>, String> {
    let mark = nodes.mark();
    let mut held = Vec::with_capacity(unit.len());
    for assignment in unit {
        match check_one(apply, nodes, assignment) {
            Ok(one) => held.push(one),
            Err(reason) => {
                nodes.undo_to(mark);
                return Err(reason);
            }
        }
    }
    let group = held
        .first()
        .and_then(|(row, _)| row.group)
        .and_then(|id| load(apply.txn, id));
    let pending = group.map_or(held.len(), |group| pending_members(apply.txn, &group).len());
    if pending != held.len() {
        nodes.undo_to(mark);
        let count = held.len();
        return Err(format!(
            "gang: {count} of {pending} pending members have a node"
        ));
    }
    Ok(held)
}

fn check_one(
    apply: &Apply<'_>,
    nodes: &mut Nodes,
    assignment: &Assignment,
) -> Result<Held, String> {
    let row = actor::load(apply.txn, assignment.actor).ok_or("the actor is not known")?;
    let ActorState::Pending { not_before_ms, .. } = row.state else {
        return Err("the actor is not pending".to_owned());
    };
    if not_before_ms > apply.now_ms() {
        return Err(format!(
            "the actor waits for another {} ms",
            not_before_ms - apply.now_ms()
        ));
    }
    let request = Request::of(&row);
    let node_incarnation =
        (!is_planted(Mutant::AssignUnchecked)).then_some(assignment.node_incarnation);
    let gpus: Vec<GpuShare> = nodes.reserve(assignment.node, node_incarnation, &request)?;
    let grant = Grant {
        node: assignment.node,
        node_incarnation: assignment.node_incarnation,
        gpus,
        affinity_key: request.placement.affinity_key,
        spread_key: request.placement.spread_key.map(|spread| spread.key),
    };
    Ok((row, grant))
}
