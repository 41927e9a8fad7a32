//! Questions about the tables, and their answers.
//!
//! Invariants:
//! 1. A question changes nothing.
//! 2. A list answers at most [`PAGE_ROWS`] rows, and the next page begins after the last one; the
//!    list of nodes comes as a whole, as there are few.
//! 3. Variants are append-only: their position is their tag on the wire.

use std::collections::BTreeMap;

use mobula_core::control::Reader;
use mobula_core::order::ActorAddress;
use mobula_core::{ActorId, ErrorCode, ExitReason, Incarnation, JobId, NodeId, Rejection, codec};
use serde::{Deserialize, Serialize};

use crate::explain::{self, Explanation};
use crate::limits::{PAGE_ROWS, PAYLOAD_BYTES_MAX};
use crate::state::actor::{self, ActorRow, ActorState};
use crate::state::{job, namespace, node, token};
use crate::view::{self, ActorView, ClusterStatus, JobView, NodeView, TokenView};

/// A question to the scheduler's tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// Jobs in order of their ids. Answer: [`QueryResponse::Jobs`].
    ListJobs {
        /// Only those with a larger id.
        after: Option<JobId>,
        /// At most so many; 0 for as many as one answer holds.
        limit: u32,
    },
    /// One job. Answer: [`QueryResponse::Job`].
    Job {
        /// The job.
        job: JobId,
    },
    /// Actors in order of their ids. Answer: [`QueryResponse::Actors`].
    ListActors {
        /// Only those of this job.
        job: Option<JobId>,
        /// Only those with a larger id.
        after: Option<ActorId>,
        /// At most so many; 0 for as many as one answer holds.
        limit: u32,
    },
    /// One actor. Answer: [`QueryResponse::Actor`].
    Actor {
        /// The actor.
        actor: ActorId,
    },
    /// Where an actor can be called. Answer: [`QueryResponse::Resolved`].
    ResolveActor {
        /// The job that it belongs to.
        job: JobId,
        /// Which actor.
        target: ActorTarget,
    },
    /// All workers, in order of their ids. Answer: [`QueryResponse::Nodes`].
    ListNodes,
    /// One worker. Answer: [`QueryResponse::Node`].
    Node {
        /// The worker.
        node: NodeId,
    },
    /// Why an actor is where it is, or is not. Answer: [`QueryResponse::Explained`].
    ExplainActor {
        /// The actor.
        actor: ActorId,
    },
    /// Why a job is not running: its pending actors. Answer: [`QueryResponse::Explained`].
    ExplainJob {
        /// The job.
        job: JobId,
    },
    /// Counts and sums. Answer: [`QueryResponse::Status`].
    Status,
    /// All tokens, in order of their names. Answer: [`QueryResponse::Tokens`].
    ListTokens {
        /// Only those with a larger name.
        after: Option<String>,
        /// At most so many; 0 for as many as one answer holds.
        limit: u32,
    },
    /// Whether an incarnation of an actor is over. Answer: [`QueryResponse::Ended`].
    EndedActor {
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// What keeps actors pending, counted. Answer: [`QueryResponse::PendingReasons`].
    PendingReasons,
    /// Whether two different jobs are in one namespace. Answer: [`QueryResponse::IsShared`].
    SharesNamespace {
        /// One job.
        job: JobId,
        /// The other.
        other: JobId,
    },
    /// The living actor of this name in a namespace. Answer: [`QueryResponse::Actor`].
    ActorInNamespace {
        /// The namespace's name.
        namespace: String,
        /// The actor's.
        name: String,
    },
}

/// How a caller names an actor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActorTarget {
    /// By id.
    Id(ActorId),
    /// By its name within the job, or within the job's namespace; only a living actor has one.
    Name(String),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueryResponse {
    /// Jobs.
    Jobs(Vec<JobView>),
    /// A job.
    Job(JobView),
    /// Actors.
    Actors(Vec<ActorView>),
    /// An actor.
    Actor(ActorView),
    /// Where an actor can be called.
    Resolved(Resolution),
    /// Workers.
    Nodes(Vec<NodeView>),
    /// A worker.
    Node(NodeView),
    /// Why something is as it is.
    Explained(Explanation),
    /// Counts and sums.
    Status(ClusterStatus),
    /// Tokens.
    Tokens(Vec<TokenView>),
    /// Whether an incarnation is over.
    Ended {
        /// Whether it is.
        ended: bool,
        /// Why, as far as it is known: an older incarnation's reason is not kept.
        reason: Option<ExitReason>,
    },
    /// Pending actors by a short stable word for what is in their way.
    PendingReasons(BTreeMap<String, u64>),
    /// Whether two jobs are in one namespace.
    IsShared(bool),
}

/// Where an actor can be called, or why it cannot be now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resolution {
    /// It runs there.
    Address(ActorAddress),
    /// It does not run now but will: ask again.
    NotRunning {
        /// The actor.
        actor: ActorId,
        /// `pending`, `assigned` or `stopping`.
        state: String,
        /// Why its latest incarnation ended, if it had one.
        last_exit: Option<ExitReason>,
    },
    /// It has ended for good.
    Ended {
        /// The actor.
        actor: ActorId,
        /// Why.
        reason: ExitReason,
    },
    /// Pending actors by a short stable word for what is in their way.
    PendingReasons(BTreeMap<String, u64>),
}

impl Query {
    /// The question as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    /// The question that `payload` spells.
    pub fn decode(payload: &[u8]) -> Result<Self, Rejection> {
        codec::decode(payload, PAYLOAD_BYTES_MAX)
            .map_err(|error| Rejection::invalid(format!("scheduler query: {error}")))
    }
}

impl QueryResponse {
    /// The answer that `bytes` spell.
    pub fn decode(bytes: &[u8]) -> Result<Self, codec::DecodeError> {
        // A page of jobs, each with the largest result, is the largest answer.
        const ANSWER_BYTES_MAX: usize = 128 * 1024 * 1024;
        codec::decode(bytes, ANSWER_BYTES_MAX)
    }
}

/// Answers a question from the tables; `now_ms` is for ages and back-offs.
pub fn answer(reader: &dyn Reader, now_ms: u64, query: Query) -> Result<QueryResponse, Rejection> {
    Ok(match query {
        Query::ListJobs { after, limit } => {
            QueryResponse::Jobs(view::jobs(reader, after, rows(limit)))
        }
        Query::Job { job } => QueryResponse::Job(JobView::of(job::require(reader, job)?)),
        Query::ListActors { job, after, limit } => {
            let actors = actor::page(reader, job, after, rows(limit)).into_iter();
            QueryResponse::Actors(actors.map(|row| ActorView::of(reader, row)).collect())
        }
        Query::Actor { actor } => {
            QueryResponse::Actor(ActorView::of(reader, actor::require(reader, actor)?))
        }
        Query::ResolveActor { job, target } => {
            QueryResponse::Resolved(resolve(reader, job, target)?)
        }
        Query::ListNodes => QueryResponse::Nodes(
            node::all(reader)
                .map(|row| NodeView::of(reader, row))
                .collect(),
        ),
        Query::Node { node } => {
            QueryResponse::Node(NodeView::of(reader, node::require(reader, node)?))
        }
        Query::ExplainActor { actor } => {
            QueryResponse::Explained(explain::explain_actor(reader, actor, now_ms)?)
        }
        Query::ExplainJob { job } => {
            QueryResponse::Explained(explain::explain_job(reader, job, now_ms)?)
        }
        Query::Status => QueryResponse::Status(ClusterStatus::read(reader)),
        Query::ListTokens { after, limit } => {
            let tokens = token::page(reader, after.as_deref(), rows(limit)).into_iter();
            QueryResponse::Tokens(tokens.map(|row| TokenView::of(row, now_ms)).collect())
        }
        Query::PendingReasons => {
            QueryResponse::PendingReasons(explain::pending_reasons(reader, now_ms))
        }
        Query::EndedActor { actor, incarnation } => ended(reader, actor, incarnation)?,
        Query::SharesNamespace { job, other } => {
            QueryResponse::IsShared(namespace::is_shared(reader, job, other))
        }
        Query::ActorInNamespace { namespace, name } => {
            let row = in_namespace(reader, &namespace, &name)?;
            QueryResponse::Actor(ActorView::of(reader, row))
        }
    })
}

fn rows(limit: u32) -> usize {
    match usize::try_from(limit) {
        Ok(0) | Err(_) => PAGE_ROWS,
        Ok(limit) => limit.min(PAGE_ROWS),
    }
}

fn in_namespace(reader: &dyn Reader, namespace: &str, name: &str) -> Result<ActorRow, Rejection> {
    let Some(row) = namespace::load(reader, namespace) else {
        return Err(Rejection::not_found(format!(
            "no job lives in a namespace called `{namespace}`: submit one with `mobula submit \
             --namespace {namespace}`"
        )));
    };
    let id = actor::by_name_in(reader, row.incarnation, name).ok_or_else(|| {
        Rejection::not_found(format!(
            "namespace `{namespace}` has no living actor called `{name}`: see `mobula actors list`"
        ))
    })?;
    actor::require(reader, id)
}

fn resolve(reader: &dyn Reader, job: JobId, target: ActorTarget) -> Result<Resolution, Rejection> {
    let row = match target {
        ActorTarget::Name(name) => {
            let id = actor::by_name(reader, job, &name).ok_or_else(|| {
                let whose = match namespace::of_job(reader, job) {
                    Some(namespace) => format!("namespace `{namespace}`"),
                    None => job.to_string(),
                };
                Rejection::not_found(format!(
                    "{whose} has no living actor called `{name}`: see `mobula actors list`"
                ))
            })?;
            actor::require(reader, id)?
        }
        ActorTarget::Id(id) => {
            let row = actor::require(reader, id)?;
            if row.job != job {
                return Err(Rejection::new(
                    ErrorCode::NotFound,
                    format!("{id} is not an actor of {job}: name the job that it belongs to"),
                ));
            }
            row
        }
    };
    let not_running = |state: &str| Resolution::NotRunning {
        actor: row.id,
        state: state.to_owned(),
        last_exit: row.last_exit.clone(),
    };
    Ok(match &row.state {
        ActorState::Running { node, place, .. } => Resolution::Address(ActorAddress {
            actor: row.id,
            incarnation: row.incarnation,
            node: *node,
            call_address: place.call_address.clone(),
        }),
        ActorState::Pending { .. } => not_running("pending"),
        ActorState::Assigned { .. } => not_running("assigned"),
        ActorState::Stopping { .. } => not_running("stopping"),
        ActorState::Ended { reason, .. } => Resolution::Ended {
            actor: row.id,
            reason: reason.clone(),
        },
    })
}

fn ended(
    reader: &dyn Reader,
    actor: ActorId,
    incarnation: Incarnation,
) -> Result<QueryResponse, Rejection> {
    let row = actor::require(reader, actor)?;
    let on_node = row.state.node().is_some();
    let ended = incarnation < row.incarnation || (incarnation == row.incarnation && !on_node);
    let reason = if ended && incarnation == row.incarnation {
        row.last_exit
    } else {
        None
    };
    Ok(QueryResponse::Ended { ended, reason })
}
