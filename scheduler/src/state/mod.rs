//! The tables and the commands that change them: one file a kind of thing.
//!
//! Invariants (checked by [`crate::invariants`] after every command of the property test):
//! 1. Preconditions are checked before the first write of a command.
//! 2. Ids come from counters, incarnations from the Raft index; neither is ever given out twice.
//! 3. An actor's lease on a node exists exactly while one of its incarnations may run there.

pub(crate) mod actor;
pub(crate) mod detached;
pub(crate) mod group;
pub(crate) mod held;
pub(crate) mod job;
mod job_checks;
pub(crate) mod kept;
pub(crate) mod lease;
pub(crate) mod lifecycle;
pub(crate) mod namespace;
pub(crate) mod node;
pub(crate) mod principal;
pub mod session;
pub(crate) mod stopping;
pub(crate) mod token;

use std::collections::BTreeSet;

use mobula_core::control::{ApplyContext, Effect, Origin, Subject, Txn};
use mobula_core::order::Order;
use mobula_core::{ErrorCode, JobId, NodeId, Rejection};

use crate::command::{Command, Response};
use crate::limits::NAME_BYTES_MAX;
use crate::row::Counter;

/// One command under way: where it writes, and what it wants done afterwards.
pub(crate) struct Apply<'a> {
    pub(crate) context: ApplyContext,
    /// Whose call it comes of; `None` for what the heads decide themselves.
    pub(crate) origin: Option<&'a Origin>,
    pub(crate) txn: &'a mut dyn Txn,
    orders: Vec<Effect>,
    ended: Vec<JobId>,
    changed: BTreeSet<Subject>,
    place: bool,
}

impl<'a> Apply<'a> {
    pub(crate) fn new(
        context: ApplyContext,
        origin: Option<&'a Origin>,
        txn: &'a mut dyn Txn,
    ) -> Self {
        Apply {
            context,
            origin,
            txn,
            orders: Vec::new(),
            ended: Vec::new(),
            changed: BTreeSet::new(),
            place: false,
        }
    }

    /// The effects, orders first: each subject that changed once, and one pass at most.
    pub(crate) fn into_effects(self) -> Vec<Effect> {
        let ended = self.ended.into_iter().map(Effect::JobEnded);
        let changed = self.changed.into_iter().map(Effect::Changed);
        let place = self.place.then_some(Effect::Place);
        self.orders
            .into_iter()
            .chain(ended)
            .chain(changed)
            .chain(place)
            .collect()
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.context.now_ms
    }

    pub(crate) fn order(&mut self, node: NodeId, order: Order) {
        self.orders.push(Effect::Order { node, order });
    }

    pub(crate) fn job_ended(&mut self, job: JobId) {
        self.ended.push(job);
    }

    pub(crate) fn changed(&mut self, subject: Subject) {
        self.changed.insert(subject);
    }

    /// Asks for a placement pass.
    pub(crate) fn place(&mut self) {
        self.place = true;
    }
}

/// Applies one command.
pub(crate) fn apply(apply: &mut Apply<'_>, command: Command) -> Result<Response, Rejection> {
    match command {
        Command::RegisterNode {
            name,
            boot_id,
            capacity,
            labels,
            version,
        } => node::register(
            apply,
            node::Registration {
                name,
                boot_id,
                capacity,
                labels,
                version,
            },
        ),
        Command::NodeLost { node, incarnation } => node::lost(apply, node, incarnation),
        Command::NodeEvent {
            node,
            incarnation,
            event,
        } => node::event(apply, node, incarnation, event),
        Command::DrainNode { node, on } => node::drain(apply, node, on),
        Command::PreemptNode { node, grace_ms } => node::preempt(apply, node, grace_ms),
        Command::SubmitJob { spec } => job::submit(apply, spec),
        Command::StopJob { job } => job::stop(apply, job),
        Command::SetJobResult {
            job,
            actor,
            incarnation,
            result_json,
        } => job::set_result(apply, job, actor, incarnation, result_json),
        Command::CreateActors {
            job,
            actors,
            gang,
            get_or_create,
            creator,
        } => {
            let request = group::Creation {
                job,
                specs: actors,
                gang,
                get_or_create,
                creator,
            };
            group::create_actors(apply, request)
        }
        Command::StopActor {
            job,
            actor,
            grace_ms,
        } => stopping::stop_command(apply, job, actor, grace_ms),
        Command::YieldActor {
            job,
            actor,
            incarnation,
        } => stopping::yield_command(apply, job, actor, incarnation),
        Command::Assign { assignments } => group::assign(apply, &assignments),
        Command::OpenSession { client } => session::open(apply, client),
        Command::CloseSession { session, client } => session::close(apply, session, &client),
        Command::CreateToken {
            id,
            secret_hash,
            role,
            expires_at_ms,
            uses,
            ends_with,
            principal,
        } => {
            let row = token::TokenRow {
                id,
                secret_hash,
                role,
                expires_at_ms,
                uses_left: uses,
                ends_with,
                principal,
            };
            token::create(apply, row)
        }
        Command::UseToken { secret_hash } => token::consume(apply, &secret_hash),
        Command::RevokeToken { id } => token::revoke(apply, &id),
        Command::Restored { ids_left_out } => Ok(leave_ids_out(apply, ids_left_out)),
    }
}

/// Leaves out the next `count` ids of each kind. Incarnations are indexes of the log, which the head
/// sees to.
fn leave_ids_out(apply: &mut Apply<'_>, count: u64) -> Response {
    let given_out = [
        Counter::LastNode,
        Counter::LastJob,
        Counter::LastActor,
        Counter::LastGroup,
        Counter::LastSession,
    ];
    for counter in given_out {
        let last = counter.value(apply.txn);
        counter.set(apply.txn, last.saturating_add(count));
    }
    apply.place();
    Response::Done
}

/// Refuses a name that is empty or too long.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), Rejection> {
    if name.is_empty() {
        return Err(Rejection::invalid(format!(
            "{what} is empty: give at least one character"
        )));
    }
    if name.len() > NAME_BYTES_MAX {
        let size = name.len();
        return Err(Rejection::invalid(format!(
            "{what} has {size} bytes, the limit is {NAME_BYTES_MAX}: choose a shorter one"
        )));
    }
    Ok(())
}

/// A refusal because the state does not allow it now.
pub(crate) fn precondition(message: impl Into<String>) -> Rejection {
    Rejection::new(ErrorCode::FailedPrecondition, message)
}

/// A refusal because a bound is reached.
pub(crate) fn overloaded(what: &str, limit: u64, next_step: &str) -> Rejection {
    Rejection::new(
        ErrorCode::Overloaded,
        format!("there are {limit} {what} already, which is the limit: {next_step}"),
    )
}
