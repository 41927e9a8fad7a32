//! What always holds between the tables: one list for tests, properties and the simulator.
//!
//! Names in parentheses are those of the project's list of invariants.

mod sums;

use std::collections::BTreeMap;

use mobula_core::control::{Reader, Table};
use mobula_core::namespace::Namespace;
use mobula_core::spec::JobSpec;
use mobula_core::{ActorId, JobId, NodeId, SessionId};

use crate::limits::{
    DETACHED_JOBS_MAX, FINISHED_ACTORS_KEPT, FINISHED_JOBS_KEPT, NAMESPACES_MAX, NODES_MAX,
    SESSIONS_MAX, TOKENS_MAX,
};
use crate::placement::gpu;
use crate::row::{
    self, ACTOR_SPECS, ACTORS, ACTORS_BY_JOB, ACTORS_BY_NAME, ACTORS_BY_NAMESPACE, ACTORS_FINISHED,
    Counter, GROUPS, JOB_SPECS, JOB_SUBMITTERS, JOBS, JOBS_BY_KEY, JOBS_FINISHED, LEASES,
    NAMESPACES, NODES, NODES_BY_NAME, PENDING, SESSION_RESPONSES, SESSIONS, SESSIONS_BY_AGE,
    TOKENS, TOKENS_BY_HASH,
};
use crate::state::actor::{self, ActorRow, ActorState};
use crate::state::group::GroupRow;
use crate::state::job::{JobRow, JobState};
use crate::state::lease;
use crate::state::namespace::NamespaceRow;
use crate::state::node::{self, NodeRow};

/// A state of the tables that must not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invariant `{rule}` is broken: {detail}")]
pub struct Violation {
    /// Which rule.
    pub rule: &'static str,
    /// Which rows break it, and how.
    pub detail: String,
}

fn ensure(
    holds: bool,
    rule: &'static str,
    detail: impl FnOnce() -> String,
) -> Result<(), Violation> {
    if holds {
        Ok(())
    } else {
        Err(Violation {
            rule,
            detail: detail(),
        })
    }
}

/// Reads all tables and checks all rules.
pub fn check(reader: &dyn Reader) -> Result<(), Violation> {
    let actors: BTreeMap<ActorId, ActorRow> = row::scan(reader, ACTORS, &[])
        .map(|(_, value)| row::from_bytes::<ActorRow>(ACTORS, &value))
        .map(|actor| (actor.id, actor))
        .collect();
    resources_add_up(reader)?;
    leases_match_actors(reader, &actors)?;
    pending_actors_are_listed(reader, &actors)?;
    names_are_unique(reader, &actors)?;
    gangs_are_whole(reader, &actors)?;
    jobs_match_actors(reader, &actors)?;
    namespaces_match_jobs(reader, &actors)?;
    sums::kept_objects_match_jobs(reader)?;
    living_are_counted(reader, &actors)?;
    counters_match_rows(reader)?;
    indexes_match_rows(reader)?;
    sums::bytes_match_rows(reader, &actors)?;
    sums::sessions_match_holders(reader)?;
    sums::responses_match_sessions(reader)
}

/// On every node, free and leased add up to the capacity, device by device too (I10).
fn resources_add_up(reader: &dyn Reader) -> Result<(), Violation> {
    const RULE: &str = "resources add up";
    for node in node::all(reader) {
        let usage = lease::usage(reader, node.id);
        let by_key: BTreeMap<_, _> = lease::usage_by_key(reader, node.id, &usage)
            .into_iter()
            .collect();
        let sums = lease::sums(reader, node.id);
        ensure((&usage, &by_key) == (&sums.0, &sums.1), RULE, || {
            format!(
                "{} keeps {usage:?}, {by_key:?}; its leases are {sums:?}",
                node.id
            )
        })?;
        let shortfalls = node.capacity.shortfalls(&usage.resources);
        ensure(shortfalls.is_empty(), RULE, || {
            format!("{} leases {shortfalls:?}", node.id)
        })?;
        let mut devices = gpu::devices(&node.capacity);
        for (actor, lease) in lease::of_node(reader, node.id) {
            let sum: u64 = lease.gpus.iter().map(|share| u64::from(share.milli)).sum();
            ensure(sum == lease.resources.gpu_milli, RULE, || {
                format!(
                    "{actor} holds {sum} of {} GPU thousandths",
                    lease.resources.gpu_milli
                )
            })?;
            for share in &lease.gpus {
                let free = devices.get_mut(share.device as usize);
                let rest = free.and_then(|free| {
                    *free = free.checked_sub(u64::from(share.milli))?;
                    Some(())
                });
                ensure(rest.is_some(), RULE, || {
                    format!("device {} of {} is given away twice", share.device, node.id)
                })?;
            }
        }
    }
    Ok(())
}

/// An actor is on a node exactly if the node has a lease for that incarnation, and that node's
/// incarnation lives (I4, I6).
fn leases_match_actors(
    reader: &dyn Reader,
    actors: &BTreeMap<ActorId, ActorRow>,
) -> Result<(), Violation> {
    const RULE: &str = "leases match actors";
    let nodes: BTreeMap<NodeId, NodeRow> = node::all(reader).map(|node| (node.id, node)).collect();
    let mut leases = 0;
    for (key, value) in row::scan(reader, LEASES, &[]) {
        let (node, id) = (
            NodeId(row::number_at(&key, 0)),
            ActorId(row::number_at(&key, 1)),
        );
        let lease: lease::Lease = row::from_bytes(LEASES, &value);
        let actor = actors.get(&id);
        let matches = actor.is_some_and(|actor| {
            actor.state.node() == Some(node)
                && actor.incarnation == lease.incarnation
                && actor.job == lease.job
                && actor.resources == lease.resources
        });
        ensure(matches, RULE, || {
            format!("{node} has a lease for {id}, which is {actor:?}")
        })?;
        leases += 1;
    }
    let mut on_nodes = 0;
    for actor in actors.values() {
        if let Some((id, incarnation)) = actor.state.node_and_incarnation() {
            let lives = nodes
                .get(&id)
                .is_some_and(|node| node.lost_ms.is_none() && node.incarnation == incarnation);
            ensure(lives, RULE, || {
                format!("{} is on {id}{incarnation}, which is over", actor.id)
            })?;
            on_nodes += 1;
        }
    }
    ensure(leases == on_nodes, RULE, || {
        format!("{leases} leases, {on_nodes} actors on nodes")
    })
}

/// The list of pending actors is exactly those in that state.
fn pending_actors_are_listed(
    reader: &dyn Reader,
    actors: &BTreeMap<ActorId, ActorRow>,
) -> Result<(), Violation> {
    const RULE: &str = "pending actors are listed";
    for (key, _) in row::scan(reader, PENDING, &[]) {
        let id = ActorId(row::number_at(&key, 1));
        let at_ms = row::number_at(&key, 0);
        let listed = matches!(
            actors.get(&id).map(|actor| &actor.state),
            Some(ActorState::Pending { not_before_ms, .. }) if *not_before_ms == at_ms
        );
        ensure(listed, RULE, || {
            format!("{id} is listed for {at_ms} ms but is not pending then")
        })?;
        let from_ms = Counter::PendingFrom.value(reader);
        ensure(from_ms <= at_ms, RULE, || {
            format!("{id} is listed for {at_ms} ms, which nobody looks at before {from_ms} ms")
        })?;
    }
    let pending = actors
        .values()
        .filter(|actor| actor.state.is_pending())
        .count();
    let listed = row::scan(reader, PENDING, &[]).count();
    ensure(pending == listed, RULE, || {
        format!("{pending} pending, {listed} listed")
    })
}

/// Each living named actor is the one that its name finds.
fn names_are_unique(
    reader: &dyn Reader,
    actors: &BTreeMap<ActorId, ActorRow>,
) -> Result<(), Violation> {
    const RULE: &str = "names are unique";
    let living = actors.values().filter(|actor| !actor.state.is_ended());
    let mut named = 0;
    for actor in living {
        if let Some(name) = &actor.name {
            let found = actor::by_name(reader, actor.job, name);
            ensure(found == Some(actor.id), RULE, || {
                format!(
                    "`{name}` of {} finds {found:?}, not {}",
                    actor.job, actor.id
                )
            })?;
            named += 1;
        }
    }
    let rows = |table: Table| row::scan(reader, table, &[]).count();
    let names = rows(ACTORS_BY_NAME) + rows(ACTORS_BY_NAMESPACE);
    ensure(names == named, RULE, || {
        format!("{names} names for {named} living named actors")
    })
}

/// Before a gang is placed, no member has an incarnation; a group goes with its last member.
fn gangs_are_whole(
    reader: &dyn Reader,
    actors: &BTreeMap<ActorId, ActorRow>,
) -> Result<(), Violation> {
    const RULE: &str = "gangs are whole";
    for (_, value) in row::scan(reader, GROUPS, &[]) {
        let group: GroupRow = row::from_bytes(GROUPS, &value);
        let members: Vec<&ActorRow> = group
            .members
            .iter()
            .filter_map(|id| actors.get(id))
            .collect();
        let started = members
            .iter()
            .filter(|actor| actor.incarnation.0 > 0)
            .count();
        ensure(group.placed || started == 0, RULE, || {
            format!("{} was never placed, yet {started} members were", group.id)
        })?;
        let living = members.iter().any(|actor| !actor.state.is_ended());
        ensure(living, RULE, || {
            format!("{} outlives its members", group.id)
        })?;
    }
    Ok(())
}

/// A job's count of living actors is right, a job that is over has none (I5), and every actor has
/// its job.
fn jobs_match_actors(
    reader: &dyn Reader,
    actors: &BTreeMap<ActorId, ActorRow>,
) -> Result<(), Violation> {
    const RULE: &str = "jobs match actors";
    let mut living: BTreeMap<JobId, u32> = BTreeMap::new();
    for actor in actors.values() {
        *living.entry(actor.job).or_default() += u32::from(!actor.state.is_ended());
    }
    for (_, value) in row::scan(reader, JOBS, &[]) {
        let job: JobRow = row::from_bytes(JOBS, &value);
        let count = living.remove(&job.id).unwrap_or(0);
        ensure(count == job.live_actors, RULE, || {
            format!(
                "{} counts {} living actors, there are {count}",
                job.id, job.live_actors
            )
        })?;
        let over = matches!(job.state, JobState::Over(_));
        ensure(!over || count == 0, RULE, || {
            format!("{} is over with {count} actors", job.id)
        })?;
        let is_finite = job.driver.is_some() || job.detached_actors.is_some();
        let idle = is_finite && count == 0;
        ensure(over || !idle, RULE, || {
            format!("{} has no actor left and is not over", job.id)
        })?;
    }
    ensure(living.is_empty(), RULE, || {
        format!("actors without a job: {living:?}")
    })
}

/// A namespace is there exactly as long as a job in it is not over, and knows which of its jobs keep
/// detached actors; those live nowhere else, and each such job has one.
fn namespaces_match_jobs(
    reader: &dyn Reader,
    actors: &BTreeMap<ActorId, ActorRow>,
) -> Result<(), Violation> {
    const RULE: &str = "namespaces match jobs";
    let mut detached: BTreeMap<JobId, u32> = BTreeMap::new();
    for actor in actors.values().filter(|actor| actor.detached) {
        *detached.entry(actor.job).or_default() += u32::from(!actor.state.is_ended());
    }
    let mut expected: BTreeMap<Namespace, (u32, Vec<JobId>)> = BTreeMap::new();
    for (_, value) in row::scan(reader, JOBS, &[]) {
        let job: JobRow = row::from_bytes(JOBS, &value);
        let count = detached.remove(&job.id);
        ensure(
            job.detached_actors.unwrap_or(0) == count.unwrap_or(0),
            RULE,
            || format!("{job:?} has {count:?} living detached actors"),
        )?;
        ensure(
            job.detached_actors != Some(0) || !job.state.is_open(),
            RULE,
            || format!("{} keeps nothing and is open", job.id),
        )?;
        if let (Some(namespace), false) = (job.namespace, matches!(job.state, JobState::Over(_))) {
            let (jobs, keeping) = expected.entry(namespace).or_default();
            *jobs += 1;
            keeping.extend(job.detached_actors.map(|_| job.id));
        }
    }
    ensure(detached.is_empty(), RULE, || {
        format!("detached actors without a job: {detached:?}")
    })?;
    let mut found = BTreeMap::new();
    for (key, value) in row::scan(reader, NAMESPACES, &[]) {
        let row: NamespaceRow = row::from_bytes(NAMESPACES, &value);
        let name = String::from_utf8_lossy(&key).into_owned();
        let incarnation = row.incarnation;
        ensure(row.detached_jobs.len() <= DETACHED_JOBS_MAX, RULE, || {
            format!("`{name}` has {} detached jobs", row.detached_jobs.len())
        })?;
        found.insert(
            Namespace { name, incarnation },
            (row.jobs, row.detached_jobs),
        );
    }
    ensure(found == expected, RULE, || {
        format!("namespaces are {found:?}, their jobs say {expected:?}")
    })
}

/// The counts of what lives, which bound the tables, are right (I13).
fn living_are_counted(
    reader: &dyn Reader,
    actors: &BTreeMap<ActorId, ActorRow>,
) -> Result<(), Violation> {
    const RULE: &str = "the living are counted";
    let living = actors
        .values()
        .filter(|actor| !actor.state.is_ended())
        .count() as u64;
    let counted = Counter::LiveActors.value(reader);
    ensure(living == counted, RULE, || {
        format!("{counted} actors counted, {living} live")
    })?;
    let jobs =
        row::scan(reader, JOBS, &[]).map(|(_, value)| row::from_bytes::<JobRow>(JOBS, &value));
    let living = jobs
        .filter(|job| job.id != JobId::SYSTEM && !matches!(job.state, JobState::Over(_)))
        .count() as u64;
    let counted = Counter::LiveJobs.value(reader);
    ensure(living == counted, RULE, || {
        format!("{counted} jobs counted, {living} live")
    })
}

/// Counters say what the tables hold, and bounds hold (I13).
fn counters_match_rows(reader: &dyn Reader) -> Result<(), Violation> {
    const RULE: &str = "counters match rows";
    let rows = |table: Table| row::scan(reader, table, &[]).count() as u64;
    let cases = [
        ("nodes", Counter::Nodes, rows(NODES), NODES_MAX),
        (
            "ended jobs",
            Counter::FinishedJobs,
            rows(JOBS_FINISHED),
            FINISHED_JOBS_KEPT,
        ),
        (
            "ended actors",
            Counter::FinishedActors,
            rows(ACTORS_FINISHED),
            FINISHED_ACTORS_KEPT,
        ),
        (
            "pending actors",
            Counter::PendingActors,
            rows(PENDING),
            u64::MAX,
        ),
        ("sessions", Counter::Sessions, rows(SESSIONS), SESSIONS_MAX),
        ("tokens", Counter::Tokens, rows(TOKENS), TOKENS_MAX),
        (
            "namespaces",
            Counter::Namespaces,
            rows(NAMESPACES),
            NAMESPACES_MAX,
        ),
    ];
    for (what, counter, count, limit) in cases {
        let counted = counter.value(reader);
        ensure(counted == count, RULE, || {
            format!("{counted} {what} counted, there are {count}")
        })?;
        ensure(count <= limit, RULE, || {
            format!("{count} {what}, the limit is {limit}")
        })?;
    }
    Ok(())
}

/// What is found by an index is there, and what is there is found (I13: no row is left behind).
fn indexes_match_rows(reader: &dyn Reader) -> Result<(), Violation> {
    const RULE: &str = "indexes match rows";
    let rows = |table: Table| row::scan(reader, table, &[]).count();
    // The system job has no specification.
    let system = usize::from(reader.get(JOBS, &JobId::SYSTEM.to_key()).is_some());
    let jobs = row::all::<JobSpec>(reader, JOB_SPECS, &[]);
    let keyed = jobs
        .iter()
        .filter(|(_, spec)| spec.idempotency_key.is_some());
    let cases = [
        ("nodes by name", rows(NODES_BY_NAME), rows(NODES)),
        ("specifications of jobs", jobs.len() + system, rows(JOBS)),
        ("jobs by key", rows(JOBS_BY_KEY), keyed.count()),
        ("specifications of actors", rows(ACTOR_SPECS), rows(ACTORS)),
        ("actors by job", rows(ACTORS_BY_JOB), rows(ACTORS)),
        ("sessions by age", rows(SESSIONS_BY_AGE), rows(SESSIONS)),
        ("tokens by hash", rows(TOKENS_BY_HASH), rows(TOKENS)),
    ];
    for (what, found, expected) in cases {
        ensure(found == expected, RULE, || {
            format!("{found} {what}, there are {expected}")
        })?;
    }
    for (key, _) in row::scan(reader, JOB_SUBMITTERS, &[]) {
        ensure(reader.get(JOBS, &key).is_some(), RULE, || {
            let job = JobId(row::number_at(&key, 0));
            format!("the submitter of {job}, which is not known")
        })?;
    }
    for (key, _) in row::scan(reader, SESSION_RESPONSES, &[]) {
        let session = SessionId(row::number_at(&key, 0));
        ensure(
            reader.get(SESSIONS, &session.to_key()).is_some(),
            RULE,
            || format!("a response of {session}, which is not open"),
        )?;
    }
    Ok(())
}
