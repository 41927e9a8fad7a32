//! Why something is as it is: for a pending actor, the exact constraint on each node.
//!
//! Invariant: the reasons come from the same filter that places actors, so an explanation is what
//! the next pass would decide.

use std::collections::BTreeMap;

use mobula_core::control::Reader;
use mobula_core::{ActorId, JobId, NodeId, Rejection};
use serde::{Deserialize, Serialize};

use crate::placement::filter::{self, Distance, Unfit};
use crate::placement::{Nodes, Request, gang};
use crate::state::actor::{self, ActorRow, ActorState, Then};
use crate::state::group;
use crate::state::job::{self, JobState};
use crate::state::lifecycle;
use crate::state::namespace;

/// Why an actor or a job is as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// What it is about: `job-3`, `actor-7`.
    pub subject: String,
    /// The subject's state, as in its view.
    pub state: String,
    /// The answer in one sentence.
    pub verdict: String,
    /// For a pending actor: each node, and why it does or does not take the actor.
    pub nodes: Vec<NodeVerdict>,
    /// What to do about it; empty when there is nothing to do.
    pub next_step: String,
}

/// What one node says to one pending actor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeVerdict {
    /// The node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Whether the actor could go there.
    pub fits: bool,
    /// `fits`, or the first constraint that is not met, with what is asked and what there is.
    pub reason: String,
}

/// Why `id` is where it is, or is not.
pub fn explain_actor(
    reader: &dyn Reader,
    id: ActorId,
    now_ms: u64,
) -> Result<Explanation, Rejection> {
    Ok(explain(reader, actor::require(reader, id)?, now_ms))
}

fn explain(reader: &dyn Reader, row: ActorRow, now_ms: u64) -> Explanation {
    let on_node =
        |what: &str, node: &NodeId| format!("{what} on {node} as incarnation {}", row.incarnation);
    let (state, verdict, next_step) = match &row.state {
        ActorState::Pending { not_before_ms, .. } => {
            return explain_pending(reader, &row, *not_before_ms, now_ms);
        }
        ActorState::Assigned { node, .. } => (
            "assigned",
            on_node("being started", node),
            "see the worker's log if it stays so",
        ),
        ActorState::Running { node, .. } => ("running", on_node("running", node), ""),
        ActorState::Stopping {
            node,
            since_ms,
            grace_ms,
            then,
            ..
        } => {
            let left_ms = since_ms.saturating_add(*grace_ms).saturating_sub(now_ms);
            let after = match then {
                Then::End => "ending for good",
                Then::StartElsewhere => "leaving a node that is being emptied",
            };
            (
                "stopping",
                format!("{}, {left_ms} ms left", on_node(after, node)),
                "",
            )
        }
        ActorState::Ended { reason, .. } => (
            "ended",
            format!("ended for good after {} restarts: {reason}", row.restarts),
            "",
        ),
    };
    let verdict = match &row.state {
        ActorState::Ended { .. } => verdict,
        _ => verdict + &lasting(reader, &row),
    };
    Explanation {
        subject: row.id.to_string(),
        state: state.to_owned(),
        verdict,
        nodes: Vec::new(),
        next_step: next_step.to_owned(),
    }
}

/// What keeps a detached actor alive, said behind its state.
fn lasting(reader: &dyn Reader, row: &ActorRow) -> String {
    match namespace::of_job(reader, row.job).filter(|_| row.detached) {
        Some(namespace) => format!(
            "; detached: it lives in namespace `{namespace}` until it is stopped, whatever becomes of \
             the job that made it"
        ),
        None => String::new(),
    }
}

/// Pending actors that are looked at to be counted: times every node, a quarter of a million checks.
const PENDING_COUNTED_MAX: usize = 256;

/// What keeps the first [`PENDING_COUNTED_MAX`] pending actors from being placed, counted by a short
/// stable word. An actor that fits on no node counts for what is in its way on most of them.
pub(crate) fn pending_reasons(reader: &dyn Reader, now_ms: u64) -> BTreeMap<String, u64> {
    let nodes = Nodes::load_all(reader);
    let mut counts = BTreeMap::new();
    for (not_before_ms, id) in lifecycle::pending(reader).take(PENDING_COUNTED_MAX) {
        let Some(actor) = actor::load(reader, id) else {
            continue;
        };
        let reason = match not_before_ms > now_ms {
            true => "backing_off",
            false => commonest_obstacle(&nodes, &actor),
        };
        *counts.entry(reason.to_owned()).or_insert(0) += 1;
    }
    counts
}

fn commonest_obstacle(nodes: &Nodes, actor: &ActorRow) -> &'static str {
    let request = Request::of(actor);
    let mut obstacles: BTreeMap<&'static str, u64> = BTreeMap::new();
    for node in nodes.iter() {
        match filter::check(node, &request) {
            Ok(_) if actor.group.is_some() => return "gang_incomplete",
            Ok(_) => return "placeable",
            Err(unfit) => *obstacles.entry(unfit.code()).or_insert(0) += 1,
        }
    }
    obstacles
        .into_iter()
        .max_by_key(|(_, nodes)| *nodes)
        .map_or("no_nodes", |(code, _)| code)
}

fn explain_pending(
    reader: &dyn Reader,
    row: &ActorRow,
    not_before_ms: u64,
    now_ms: u64,
) -> Explanation {
    let request = Request::of(row);
    let mut nodes = Nodes::load_all(reader);
    let checks: Vec<(NodeVerdict, Option<Unfit>)> = nodes
        .iter()
        .map(|node| {
            let unfit = filter::check(node, &request).err();
            let reason = unfit
                .as_ref()
                .map_or_else(|| "fits".to_owned(), Unfit::to_string);
            let (id, name) = (node.id, node.name.clone());
            (
                NodeVerdict {
                    node: id,
                    name,
                    fits: unfit.is_none(),
                    reason,
                },
                unfit,
            )
        })
        .collect();
    let (verdict, next_step) = if not_before_ms > now_ms {
        backing_off(row, not_before_ms - now_ms)
    } else {
        let of_gang = gang_verdict(reader, &mut nodes, row, now_ms);
        match of_gang {
            Some(verdict) if checks.iter().any(|(_, unfit)| unfit.is_none()) => verdict,
            _ => alone_verdict(&checks),
        }
    };
    Explanation {
        subject: row.id.to_string(),
        state: "pending".to_owned(),
        verdict,
        nodes: checks.into_iter().map(|(verdict, _)| verdict).collect(),
        next_step,
    }
}

fn backing_off(row: &ActorRow, left_ms: u64) -> (String, String) {
    let why = row
        .last_exit
        .as_ref()
        .map_or_else(String::new, |reason| format!(" ({reason})"));
    let verdict = format!(
        "waits another {left_ms} ms before restart {} of at most {}{why}",
        row.counted_restarts, row.restart.max_restarts
    );
    (verdict, "see the job's log for why it ended".to_owned())
}

/// What keeps a gang from being placed; `None` for an actor that is in none.
fn gang_verdict(
    reader: &dyn Reader,
    nodes: &mut Nodes,
    row: &ActorRow,
    now_ms: u64,
) -> Option<(String, String)> {
    let group = group::load(reader, row.group?)?;
    let members = group::pending_members(reader, &group);
    let count = members.len();
    let waiting = members.iter().find_map(|member| match member.state {
        ActorState::Pending { not_before_ms, .. } if not_before_ms > now_ms => {
            Some((member.id, not_before_ms - now_ms))
        }
        _ => None,
    });
    if let Some((id, left_ms)) = waiting {
        let verdict = format!("its gang waits for {id}, which may start in {left_ms} ms");
        return Some((verdict, "wait".to_owned()));
    }
    let requests: Vec<Request> = members.iter().map(Request::of).collect();
    Some(match gang::place(nodes, &requests) {
        Ok(_) => placeable(),
        Err(no_place) => (
            format!(
                "its gang is placed all or nothing: {} of {count} pending members find a node, {} \
                 does not",
                no_place.placed, no_place.actor
            ),
            format!(
                "add workers, or stop something; `mobula explain {}` says what that member lacks",
                no_place.actor
            ),
        ),
    })
}

fn placeable() -> (String, String) {
    (
        "can be placed now: the next pass assigns it".to_owned(),
        String::new(),
    )
}

fn alone_verdict(checks: &[(NodeVerdict, Option<Unfit>)]) -> (String, String) {
    if checks.is_empty() {
        return (
            "no worker has joined the cluster".to_owned(),
            "start one with `mobula worker`".to_owned(),
        );
    }
    let unfit: Vec<(&NodeVerdict, &Unfit)> = checks
        .iter()
        .filter_map(|(verdict, unfit)| Some((verdict, unfit.as_ref()?)))
        .collect();
    if unfit.len() < checks.len() {
        return placeable();
    }
    let present: Vec<_> = unfit
        .iter()
        .filter(|(_, unfit)| !matches!(unfit, Unfit::Lost))
        .collect();
    let lost = unfit.len() - present.len();
    if present.is_empty() {
        return (
            format!("all {lost} nodes are lost"),
            "start their workers again, or add one with `mobula worker`".to_owned(),
        );
    }
    // Of several nodes the one that is nearest to taking it is the best example.
    let (example, reason) = present
        .iter()
        .min_by_key(|(_, unfit)| unfit.distance())
        .expect("there is at least one that is not lost");
    let lost = match lost {
        0 => String::new(),
        lost => format!(", {lost} more are lost"),
    };
    let verdict = format!(
        "none of {} nodes takes it{lost}; {} (`{}`): {}",
        present.len(),
        example.node,
        example.name,
        example.reason
    );
    let next_step = match reason.distance() {
        Distance::MayPass => {
            let may_pass = present
                .iter()
                .filter(|(_, unfit)| unfit.distance() == Distance::MayPass);
            format!(
                "wait until something ends on one of {} nodes, or add a worker",
                may_pass.count()
            )
        }
        Distance::Draining => format!(
            "add a worker, or take back the draining with `mobula nodes drain {} --undo`",
            example.name
        ),
        Distance::Noticed => "add a worker; a node that is there again after its notice takes \
                              actors when its worker is started again"
            .to_owned(),
        Distance::Never => "no present node can ever take it as they are: change what it asks \
                            for, or add a worker that offers it"
            .to_owned(),
    };
    (verdict, next_step)
}

/// Why `id` is not running: the explanation of its driver, or of the first of its actors that
/// waits.
pub fn explain_job(reader: &dyn Reader, id: JobId, now_ms: u64) -> Result<Explanation, Rejection> {
    let row = job::require(reader, id)?;
    let subject = id.to_string();
    let state = crate::view::JobView::of(row.clone()).state;
    if matches!(row.state, JobState::Over(_)) {
        let why = row
            .exit_reason
            .map_or_else(String::new, |reason| format!(": {reason}"));
        let verdict = format!("the job is over{why}");
        let next_step = format!("see `mobula jobs logs {id}`");
        return Ok(Explanation {
            subject,
            state,
            verdict,
            nodes: Vec::new(),
            next_step,
        });
    }
    let of_job = |wanted: fn(&ActorState) -> bool| {
        let rows = actor::ids_of_job(reader, id).filter_map(|actor| actor::load(reader, actor));
        rows.filter(move |actor| wanted(&actor.state))
    };
    let pending = of_job(ActorState::is_pending).count();
    let first = of_job(ActorState::is_pending).next().or_else(|| {
        of_job(|state| {
            matches!(
                state,
                ActorState::Stopping { .. } | ActorState::Assigned { .. }
            )
        })
        .next()
    });
    let Some(first) = first else {
        let verdict = match row.live_actors {
            0 => "it has no living actor".to_owned(),
            living => format!("all {living} living actors run"),
        };
        let verdict = match (row.detached_actors, &row.namespace) {
            (Some(detached), Some(namespace)) => format!(
                "{verdict}; it lives with its detached actors in namespace `{namespace}`, of which there \
                 {} left",
                match detached {
                    1 => "is 1".to_owned(),
                    count => format!("are {count}"),
                }
            ),
            _ => verdict,
        };
        return Ok(Explanation {
            subject,
            state,
            verdict,
            nodes: Vec::new(),
            next_step: String::new(),
        });
    };
    let role = if first.driver {
        "its driver"
    } else {
        "an actor of it"
    };
    let first = explain(reader, first, now_ms);
    let verdict = format!(
        "{pending} of {} living actors are pending; {role}, {} ({}): {}",
        row.live_actors, first.subject, first.state, first.verdict
    );
    Ok(Explanation {
        subject,
        state,
        verdict,
        nodes: first.nodes,
        next_step: first.next_step,
    })
}
