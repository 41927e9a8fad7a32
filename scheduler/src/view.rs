//! What people and programs see of nodes, jobs, actors and tokens.
//!
//! Invariant: field names and the words in `state` and `exit_code` are stable: `--json` prints them
//! as they are, and scripts depend on them. Fields are only ever added.

use mobula_core::control::Reader;
use mobula_core::label::Labels;
use mobula_core::namespace::Namespace;
use mobula_core::spec::Program;
use mobula_core::{ActorId, ExitReason, GroupId, HostId, Incarnation, JobId, NodeId, Resources};
use serde::{Deserialize, Serialize};

use crate::command::Role;
use crate::row::Counter;
use crate::state::actor::{self, ActorRow, ActorState, Start};
use crate::state::job::{self, JobRow, JobState, Outcome};
use crate::state::lease;
use crate::state::namespace;
use crate::state::node::{self, NodeRow};
use crate::state::session;
use crate::state::token::TokenRow;

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobView {
    /// Its id.
    pub job: JobId,
    /// Its name.
    pub name: String,
    /// `pending`, `running`, `stopping`, `succeeded`, `failed` or `stopped`.
    pub state: String,
    /// Whether `state` is final.
    pub finished: bool,
    /// Its driver; none for the system job and for one that keeps detached actors.
    pub driver: Option<ActorId>,
    /// How often its driver was started again.
    pub restarts: u32,
    /// How often its other actors were started again, together.
    pub actor_restarts: u32,
    /// Its actors that have not ended, the driver included.
    pub live_actors: u32,
    /// When it was submitted, in milliseconds since the Unix epoch.
    pub submitted_ms: u64,
    /// When its driver first ran.
    pub started_ms: Option<u64>,
    /// When the last of its actors had ended.
    pub ended_ms: Option<u64>,
    /// The JSON document that its driver stored.
    pub result: Option<String>,
    /// Why its driver ended for good, for programs: see [`ExitReason::code`].
    pub exit_code: Option<String>,
    /// Why its driver ended for good, for people.
    pub exit_reason: Option<String>,
    /// The namespace that it is in.
    pub namespace: Option<Namespace>,
    /// Only in a job that keeps detached actors: how many of them have not ended.
    pub detached_actors: Option<u32>,
}

impl JobView {
    pub(crate) fn of(row: JobRow) -> Self {
        let state = match row.state {
            JobState::Pending => "pending",
            JobState::Running => "running",
            JobState::Stopping(_) => "stopping",
            JobState::Over(Outcome::Succeeded) => "succeeded",
            JobState::Over(Outcome::Failed) => "failed",
            JobState::Over(Outcome::Stopped) => "stopped",
        };
        JobView {
            job: row.id,
            name: row.name,
            state: state.to_owned(),
            finished: matches!(row.state, JobState::Over(_)),
            driver: row.driver,
            restarts: row.driver_restarts,
            actor_restarts: row.actor_restarts,
            live_actors: row.live_actors,
            submitted_ms: row.submitted_ms,
            started_ms: row.started_ms,
            ended_ms: row.ended_ms,
            result: row.result_json,
            exit_code: row
                .exit_reason
                .as_ref()
                .map(|reason| reason.code().to_owned()),
            exit_reason: row.exit_reason.map(|reason| reason.to_string()),
            namespace: row.namespace,
            detached_actors: row.detached_actors,
        }
    }
}

/// An actor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActorView {
    /// Its id.
    pub actor: ActorId,
    /// Its job.
    pub job: JobId,
    /// Its name within the job, or within the job's namespace.
    pub name: Option<String>,
    /// `driver`, or the registered name of its type.
    pub type_name: String,
    /// `pending`, `assigned`, `running`, `stopping` or `ended`.
    pub state: String,
    /// The gang that it was created in.
    pub group: Option<GroupId>,
    /// The node it is on.
    pub node: Option<NodeId>,
    /// The incarnation granted last; 0 before the first.
    pub incarnation: Incarnation,
    /// Its latest starts, oldest first: where its output is.
    pub starts: Vec<Start>,
    /// How often it was started again.
    pub restarts: u32,
    /// What it holds while it is on a node.
    pub resources: Resources,
    /// The host process that it runs in.
    pub host: Option<HostId>,
    /// That process's id.
    pub pid: Option<u32>,
    /// Where it takes calls, as `ip:port`.
    pub call_address: Option<String>,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Since when it has been in this state.
    pub since_ms: u64,
    /// While pending: from when on it may be placed.
    pub not_before_ms: Option<u64>,
    /// Why it (or its latest incarnation) ended, for programs: see [`ExitReason::code`].
    pub exit_code: Option<String>,
    /// Why it (or its latest incarnation) ended, for people.
    pub exit_reason: Option<String>,
    /// The namespace that its job is in.
    pub namespace: Option<Namespace>,
    /// Whether it lives on when the job that made it ends.
    pub detached: bool,
}

impl ActorView {
    pub(crate) fn of(reader: &dyn Reader, row: ActorRow) -> Self {
        let (state, since_ms) = match &row.state {
            ActorState::Pending { since_ms, .. } => ("pending", *since_ms),
            ActorState::Assigned { since_ms, .. } => ("assigned", *since_ms),
            ActorState::Running { since_ms, .. } => ("running", *since_ms),
            ActorState::Stopping { since_ms, .. } => ("stopping", *since_ms),
            ActorState::Ended { at_ms, .. } => ("ended", *at_ms),
        };
        let not_before_ms = match row.state {
            ActorState::Pending { not_before_ms, .. } => Some(not_before_ms),
            _ => None,
        };
        let place = match &row.state {
            ActorState::Running { place, .. } => Some(place.clone()),
            _ => None,
        };
        ActorView {
            actor: row.id,
            job: row.job,
            type_name: actor::type_name(reader, row.id),
            state: state.to_owned(),
            group: row.group,
            node: row.state.node(),
            incarnation: row.incarnation,
            starts: row.starts,
            restarts: row.restarts,
            resources: row.resources,
            host: place.as_ref().map(|place| place.host),
            pid: place.as_ref().map(|place| place.pid),
            call_address: place.map(|place| place.call_address),
            created_ms: row.created_ms,
            since_ms,
            not_before_ms,
            exit_code: row
                .last_exit
                .as_ref()
                .map(|reason| reason.code().to_owned()),
            exit_reason: row.last_exit.as_ref().map(ExitReason::to_string),
            name: row.name,
            namespace: namespace::of_job(reader, row.job),
            detached: row.detached,
        }
    }
}

/// A worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its id.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// `alive`, `noticed`, `draining` or `lost`.
    pub state: String,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// What it offers.
    pub capacity: Resources,
    /// What of it is free; nothing when it is lost.
    pub free: Resources,
    /// Its labels.
    pub labels: Labels,
    /// How many actors it holds.
    pub actors: u32,
    /// When it will be gone, in milliseconds since the Unix epoch, if it has notice.
    pub deadline_ms: Option<u64>,
    /// Who gave the notice.
    pub notice_source: Option<String>,
    /// Whether it is being emptied.
    pub draining: bool,
    /// When this incarnation registered.
    pub registered_ms: u64,
    /// When it was declared lost.
    pub lost_ms: Option<u64>,
    /// Version of its binary.
    pub version: String,
}

impl NodeView {
    pub(crate) fn of(reader: &dyn Reader, row: NodeRow) -> Self {
        let state = match (&row.lost_ms, &row.notice, row.draining) {
            (Some(_), _, _) => "lost",
            (None, Some(_), _) => "noticed",
            (None, None, true) => "draining",
            (None, None, false) => "alive",
        };
        let usage = lease::usage(reader, row.id);
        let free = match row.lost_ms {
            Some(_) => Resources::default(),
            None => row
                .capacity
                .minus(&usage.resources)
                .expect("no more is leased than there is"),
        };
        NodeView {
            node: row.id,
            name: row.name,
            state: state.to_owned(),
            incarnation: row.incarnation,
            capacity: row.capacity,
            free,
            labels: row.labels,
            actors: usage.actors,
            deadline_ms: row.notice.as_ref().map(|notice| notice.deadline_ms),
            notice_source: row.notice.map(|notice| notice.source),
            draining: row.draining,
            registered_ms: row.registered_ms,
            lost_ms: row.lost_ms,
            version: row.version,
        }
    }
}

/// A token, without its secret and hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    /// Its name.
    pub token: String,
    /// What it makes of its bearer.
    pub role: Role,
    /// Until when it works, in milliseconds since the Unix epoch.
    pub expires_at_ms: u64,
    /// How often it still works; none: as often as one likes.
    pub uses_left: Option<u32>,
    /// The last characters of its text.
    pub ends_with: String,
    /// Whether it would be refused now.
    pub expired: bool,
    /// Whose namespaces its bearer enters; none: those of this token alone.
    pub principal: Option<String>,
}

impl TokenView {
    pub(crate) fn of(row: TokenRow, now_ms: u64) -> Self {
        TokenView {
            token: row.id,
            role: row.role,
            expires_at_ms: row.expires_at_ms,
            uses_left: row.uses_left,
            ends_with: row.ends_with,
            expired: row.expires_at_ms <= now_ms,
            principal: row.principal,
        }
    }
}

/// Everything at a glance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Workers that are there and take actors.
    pub nodes_alive: u32,
    /// Workers that have notice.
    pub nodes_noticed: u32,
    /// Workers that are being emptied.
    pub nodes_draining: u32,
    /// Workers that are lost.
    pub nodes_lost: u32,
    /// What all workers that are not lost offer together.
    pub capacity: Resources,
    /// What of it is given away.
    pub leased: Resources,
    /// Jobs that have not ended.
    pub jobs_live: u64,
    /// Ended jobs that are kept.
    pub jobs_finished: u64,
    /// Actors that have not ended.
    pub actors_live: u64,
    /// Those of them that wait for a node.
    pub actors_pending: u64,
    /// Open exactly-once sessions.
    pub sessions: u64,
    /// Tokens.
    pub tokens: u64,
}

impl ClusterStatus {
    pub(crate) fn read(reader: &dyn Reader) -> Self {
        let mut status = ClusterStatus {
            jobs_live: Counter::LiveJobs.value(reader),
            jobs_finished: Counter::FinishedJobs.value(reader),
            actors_live: Counter::LiveActors.value(reader),
            actors_pending: Counter::PendingActors.value(reader),
            sessions: session::count(reader),
            tokens: Counter::Tokens.value(reader),
            ..ClusterStatus::default()
        };
        for row in node::all(reader) {
            let count = match (&row.lost_ms, &row.notice, row.draining) {
                (Some(_), _, _) => &mut status.nodes_lost,
                (None, Some(_), _) => &mut status.nodes_noticed,
                (None, None, true) => &mut status.nodes_draining,
                (None, None, false) => &mut status.nodes_alive,
            };
            *count += 1;
            if row.lost_ms.is_none() {
                status.capacity = status.capacity.plus(&row.capacity);
                status.leased = status.leased.plus(&lease::usage(reader, row.id).resources);
            }
        }
        status
    }
}

/// The states of a job, as they are called.
const JOB_STATES: [&str; 6] = [
    "pending",
    "running",
    "stopping",
    "succeeded",
    "failed",
    "stopped",
];

/// The first argument of a built-in program that trains.
const TRAIN: &str = "train";

/// How many training jobs of those that are kept are in each state.
pub(crate) fn training_jobs(reader: &dyn Reader) -> Vec<(&'static str, u64)> {
    let mut counts = JOB_STATES.map(|state| (state, 0));
    for view in jobs(reader, None, usize::MAX) {
        let spec = job::load_spec(reader, view.job);
        let trains =
            spec.program == Program::Builtin && spec.args.first().is_some_and(|kind| kind == TRAIN);
        let count = counts.iter_mut().find(|(state, _)| *state == view.state);
        if let (true, Some((_, count))) = (trains, count) {
            *count += 1;
        }
    }
    counts.to_vec()
}

/// What jobs and actors hold in the tables, in bytes.
pub(crate) fn held_bytes(reader: &dyn Reader) -> [(&'static str, u64); 3] {
    [
        ("living", Counter::LivingBytes),
        ("ended_jobs", Counter::EndedJobBytes),
        ("ended_actors", Counter::EndedActorBytes),
    ]
    .map(|(of, counter)| (of, counter.value(reader)))
}

/// All jobs that are kept, from `after` on; the system job only when it has been used.
pub(crate) fn jobs(reader: &dyn Reader, after: Option<JobId>, rows: usize) -> Vec<JobView> {
    job::page(reader, after, rows)
        .into_iter()
        .map(JobView::of)
        .collect()
}
