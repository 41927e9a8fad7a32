//! The scheduler: what runs where, as a function of state and command.
//!
//! A [`Command`] goes in through the Raft log, table writes and effects come out; a
//! [`placement_pass`] reads the tables and proposes where pending actors go. Everything the head
//! needs to know about nodes, jobs, actors, sessions and tokens is answered by a [`Query`]. What jobs keep
//! is a module of its own, [`KeptObjects`].
//!
//! Invariants:
//! 1. Nothing here knows the time, chance, or the world: same tables and command, same outcome.
//! 2. Every table has a bound ([`limits`]).
//! 3. What effects say can be rebuilt from the tables ([`orders_for_node`], [`placement_pass`],
//!    [`next_wakeup_ms`]).
//! 4. The tables always agree with each other ([`invariants`]).
//!
//! How the head drives it: apply a committed command → perform its effects; on
//! [`Effect::Place`](mobula_core::control::Effect::Place), and when [`next_wakeup_ms`] comes, call
//! [`placement_pass`] and propose what it returns until it returns nothing.

mod authorize;
mod command;
mod explain;
pub mod invariants;
pub mod limits;
pub mod memory_txn;
mod orders;
pub mod placement;
mod query;
mod row;
mod state;
mod subject;
mod view;

pub use command::{
    ActorIncarnation, Assignment, Command, EventOutcome, Response, Role, SkippedAssignment,
};
pub use explain::{Explanation, NodeVerdict, explain_actor, explain_job};
pub use orders::{next_wakeup_ms, orders_for_node};
pub use placement::placement_pass;
pub use query::{ActorTarget, Query, QueryResponse, Resolution, answer};
pub use state::actor::Start;
pub use state::job::of_key as job_of_key;
pub use state::kept::{KeptObjects, kept_chunks};
pub use state::namespace::owner as namespace_owner;
pub use state::principal::{job_submitter, principal_of};
pub use state::session;
pub use state::token::{check as check_token, principal as token_principal};
pub use view::{ActorView, ClusterStatus, JobView, NodeView, TokenView};

use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Origin, Reader, StateModule, TableGauge, Txn,
};
use mobula_core::{Rejection, codec};

/// The scheduler's replicated part, to be plugged into the head.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scheduler;

impl StateModule for Scheduler {
    fn id(&self) -> ModuleId {
        ModuleId::SCHEDULER
    }

    fn name(&self) -> &'static str {
        "scheduler"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        self.apply_from(context, None, txn, payload)
    }

    fn apply_from(
        &self,
        context: &ApplyContext,
        origin: Option<&Origin>,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let command = Command::decode(payload)?;
        let mut apply = state::Apply::new(*context, origin, txn);
        let response = state::apply(&mut apply, command)?;
        let effects = apply.into_effects();
        if let Some(origin) = origin {
            state::principal::note_submitter(txn, origin, &response);
        }
        Ok(Applied {
            response: codec::encode_plain(&response),
            effects,
        })
    }

    fn gauges(&self, reader: &dyn Reader) -> Vec<TableGauge> {
        let states = view::training_jobs(reader).into_iter();
        let training = states.map(|(state, value)| TableGauge {
            name: "ml_training_jobs_total",
            help: "Training jobs that the head knows, by state",
            label: Some(("state", state.into())),
            value,
        });
        let bytes = view::held_bytes(reader).into_iter();
        let bytes = bytes.map(|(of, value)| TableGauge {
            name: "mobula_tables_held_bytes",
            help: "What jobs and actors hold in the tables, in bytes",
            label: Some(("of", of.into())),
            value,
        });
        training.chain(bytes).collect()
    }

    fn subject(&self, payload: &[u8], response: Option<&[u8]>) -> String {
        let response = response.and_then(|bytes| Response::decode(bytes).ok());
        match Command::decode(payload) {
            Ok(command) => subject::subject(&command, response.as_ref()),
            Err(_) => self.name().to_owned(),
        }
    }

    fn query(
        &self,
        reader: &dyn Reader,
        now_ms: u64,
        payload: &[u8],
    ) -> Result<Vec<u8>, Rejection> {
        let query = Query::decode(payload)?;
        Ok(codec::encode_plain(&query::answer(reader, now_ms, query)?))
    }

    fn authorize(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        authorize::authorize(caller, &Command::decode(payload)?)
    }
}
