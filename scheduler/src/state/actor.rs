//! Actors as the tables have them. What happens to them is in [`super::lifecycle`].

use mobula_core::control::{Reader, Subject, Table};
use mobula_core::namespace::Namespace;
use mobula_core::spec::{ActorKind, ActorSpec, PlacementPolicy, RestartPolicy};
use mobula_core::{
    ActorId, ExitReason, GroupId, HostId, Incarnation, JobId, NodeId, Rejection, Resources,
};
use serde::{Deserialize, Serialize};

use super::{Apply, namespace};
use crate::row::{self, ACTOR_SPECS, ACTORS, ACTORS_BY_JOB, ACTORS_BY_NAME, ACTORS_BY_NAMESPACE};

/// An actor, with what a placement pass needs of its (possibly large) specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ActorRow {
    pub(crate) id: ActorId,
    pub(crate) job: JobId,
    pub(crate) group: Option<GroupId>,
    pub(crate) name: Option<String>,
    pub(crate) driver: bool,
    pub(crate) resources: Resources,
    pub(crate) placement: PlacementPolicy,
    pub(crate) restart: RestartPolicy,
    pub(crate) created_ms: u64,
    pub(crate) state: ActorState,
    /// The latest incarnation that was granted; 0 before the first.
    pub(crate) incarnation: Incarnation,
    pub(crate) restarts: u32,
    /// Those restarts that count against the policy.
    pub(crate) counted_restarts: u32,
    pub(crate) last_exit: Option<ExitReason>,
    /// Its latest starts, oldest first: where its output is.
    pub(crate) starts: Vec<Start>,
    /// It lives on without the job that made it, in a job that keeps it.
    pub(crate) detached: bool,
}

/// One start of an actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The node that it was given to.
    pub node: NodeId,
    /// Its incarnation there.
    pub incarnation: Incarnation,
    /// When it was given to the node, in milliseconds since the Unix epoch.
    pub assigned_ms: u64,
    /// When its worker said that it runs.
    pub started_ms: Option<u64>,
    /// When it was over.
    pub ended_ms: Option<u64>,
}

/// Where an actor stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ActorState {
    Pending {
        since_ms: u64,
        not_before_ms: u64,
    },
    Assigned {
        node: NodeId,
        node_incarnation: Incarnation,
        since_ms: u64,
    },
    Running {
        node: NodeId,
        node_incarnation: Incarnation,
        since_ms: u64,
        place: HostPlace,
    },
    Stopping {
        node: NodeId,
        node_incarnation: Incarnation,
        since_ms: u64,
        grace_ms: u64,
        then: Then,
    },
    Ended {
        reason: ExitReason,
        at_ms: u64,
        finished: u64,
    },
}

/// The process that an actor runs in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HostPlace {
    pub(crate) host: HostId,
    pub(crate) call_address: String,
    pub(crate) pid: u32,
}

/// What follows when a stopping actor has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Then {
    /// Nothing more.
    End,
    /// It starts again, elsewhere.
    StartElsewhere,
}

impl ActorState {
    /// The node where an incarnation may be running.
    pub(crate) fn node(&self) -> Option<NodeId> {
        self.node_and_incarnation().map(|(node, _)| node)
    }

    pub(crate) fn node_and_incarnation(&self) -> Option<(NodeId, Incarnation)> {
        match self {
            ActorState::Assigned {
                node,
                node_incarnation,
                ..
            }
            | ActorState::Running {
                node,
                node_incarnation,
                ..
            }
            | ActorState::Stopping {
                node,
                node_incarnation,
                ..
            } => Some((*node, *node_incarnation)),
            ActorState::Pending { .. } | ActorState::Ended { .. } => None,
        }
    }

    pub(crate) fn is_ended(&self) -> bool {
        matches!(self, ActorState::Ended { .. })
    }

    pub(crate) fn is_pending(&self) -> bool {
        matches!(self, ActorState::Pending { .. })
    }
}

pub(crate) fn load(reader: &dyn Reader, id: ActorId) -> Option<ActorRow> {
    row::get(reader, ACTORS, &id.to_key())
}

pub(crate) fn load_spec(reader: &dyn Reader, id: ActorId) -> ActorSpec {
    row::get(reader, ACTOR_SPECS, &id.to_key()).expect("every actor row has its specification")
}

pub(crate) fn require(reader: &dyn Reader, id: ActorId) -> Result<ActorRow, Rejection> {
    load(reader, id).ok_or_else(|| {
        Rejection::not_found(format!(
            "{id} is not known (ended actors are forgotten after a while): see `mobula actors list`"
        ))
    })
}

/// `driver`, or the registered name of the actor's type.
pub(crate) fn type_name(reader: &dyn Reader, id: ActorId) -> String {
    type_name_of(&load_spec(reader, id).kind).to_owned()
}

pub(crate) fn type_name_of(kind: &ActorKind) -> &str {
    match kind {
        ActorKind::Driver => "driver",
        ActorKind::Actor { type_name } => type_name,
    }
}

/// At most `rows` actors (of one job) with an id larger than `after`.
pub(crate) fn page(
    reader: &dyn Reader,
    job: Option<JobId>,
    after: Option<ActorId>,
    rows: usize,
) -> Vec<ActorRow> {
    let Some(job) = job else {
        let after = after.map(ActorId::to_key);
        let found = reader.scan(ACTORS, &[], after.as_ref().map(|key| key.as_slice()), rows);
        return found
            .iter()
            .map(|(_, value)| row::from_bytes(ACTORS, value))
            .collect();
    };
    let after = after.map(|actor| row::pair(job.0, actor.0));
    let found = reader.scan(ACTORS_BY_JOB, &job.to_key(), after.as_deref(), rows);
    found
        .iter()
        .filter_map(|(key, _)| load(reader, ActorId(row::number_at(key, 1))))
        .collect()
}

/// The actors of `job`, ended ones included, in order of their ids.
pub(crate) fn ids_of_job(reader: &dyn Reader, job: JobId) -> impl Iterator<Item = ActorId> + '_ {
    row::scan(reader, ACTORS_BY_JOB, &job.to_key()).map(|(key, _)| ActorId(row::number_at(&key, 1)))
}

/// The living actor called `name` in `job`, or in the namespace that `job` is in.
pub(crate) fn by_name(reader: &dyn Reader, job: JobId, name: &str) -> Option<ActorId> {
    let (table, key) = name_at(reader, job, name);
    row::get(reader, table, &key)
}

/// The living actor called `name` in a namespace.
pub(crate) fn by_name_in(
    reader: &dyn Reader,
    namespace: Incarnation,
    name: &str,
) -> Option<ActorId> {
    row::get(reader, ACTORS_BY_NAMESPACE, &key_in(namespace, name))
}

/// Where a name of an actor of `job` stands.
fn name_at(reader: &dyn Reader, job: JobId, name: &str) -> (Table, Vec<u8>) {
    match namespace::of_job(reader, job) {
        Some(Namespace { incarnation, .. }) => (ACTORS_BY_NAMESPACE, key_in(incarnation, name)),
        None => (ACTORS_BY_NAME, [&job.to_key(), name.as_bytes()].concat()),
    }
}

fn key_in(namespace: Incarnation, name: &str) -> Vec<u8> {
    [&namespace.0.to_be_bytes(), name.as_bytes()].concat()
}

/// The actor has the name from now on. Its job is known already.
pub(super) fn take_name(apply: &mut Apply<'_>, job: JobId, name: &str, id: ActorId) {
    let (table, key) = name_at(apply.txn, job, name);
    row::put(apply.txn, table, &key, &id);
}

/// The actor has ended: its name is free.
pub(super) fn free_name(apply: &mut Apply<'_>, job: JobId, name: &str) {
    let (table, key) = name_at(apply.txn, job, name);
    apply.txn.delete(table, &key);
}

pub(crate) fn store(apply: &mut Apply<'_>, actor: &ActorRow) {
    row::put(apply.txn, ACTORS, &actor.id.to_key(), actor);
    apply.changed(Subject::Actor(actor.id));
}
