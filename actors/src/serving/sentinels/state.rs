//! How far the sentinels of the version beside the active one are answered, replicated: what a router says of it, for a status.
//!
//! Invariants:
//! 1. It is known while the step or the experiment that it is about is under way, and not afterwards.
//! 2. It comes from the endpoint's newest router. What an older one says, or one says late, changes nothing.
//! 3. Nothing follows from it: of a wrong answer the head hears with what follows, a rollback or the end of an experiment.

use mobula_core::control::{ApplyContext, Caller, ModuleId, Reader, Table, Txn};
use mobula_core::error::Rejection;
use mobula_core::id::{Incarnation, JobId};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use crate::serving::experiment::state as experiment;
use crate::serving::rollout::state as rollout;

/// Endpoint name → [`Asked`], the last that was said.
const ASKED: Table = Table {
    module: ModuleId::SERVING,
    tag: 11,
};

/// What a version is asked for. Append-only: positions are tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Of {
    /// A step of a rollout, whose candidate it is. Each step begins anew.
    Step {
        /// The rollout's number.
        rollout: u64,
        /// The step, counted from 0.
        step: u32,
    },
    /// An experiment, whose treatment it is.
    Experiment {
        /// Its number.
        experiment: u64,
    },
}

/// How far a version is asked. Persisted: positions of fields never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Standing {
    /// Rows that it has for this; without any it is not asked.
    pub sentinels: u32,
    /// Its replicas that take requests.
    pub replicas: u32,
    /// How many of these have answered all rows rightly.
    pub right: u32,
}

impl Standing {
    /// Whether nobody is left who has not answered.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.sentinels == 0 || self.replicas > 0 && self.right == self.replicas
    }
}

/// What a router said. Persisted: positions of fields never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// What it is about.
    pub of: Of,
    /// How far that was.
    pub standing: Standing,
    /// The router that asks.
    pub router: Incarnation,
    /// When it said so, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// A router says how far a version is asked. Answer: nothing.
    Note {
        /// The endpoint.
        endpoint: String,
        /// The router's incarnation.
        router: Incarnation,
        /// What it is about.
        of: Of,
        /// How far.
        standing: Standing,
    },
}

/// Whether a step or an experiment is the one that an endpoint is at.
fn is_under_way(reader: &dyn Reader, endpoint: &str, of: Of) -> bool {
    match of {
        Of::Step {
            rollout: number,
            step,
        } => rollout::newest(reader, endpoint).is_some_and(|newest| {
            newest.number == number && newest.step == step && newest.phase.is_open()
        }),
        Of::Experiment { experiment: number } => experiment::newest(reader, endpoint)
            .is_some_and(|newest| newest.number == number && newest.is_open()),
    }
}

/// How far the version is asked that is beside the active one of an endpoint now, if a router has said so.
pub fn find(reader: &dyn Reader, endpoint: &str) -> Option<Asked> {
    let asked: Asked = row::get(reader, ASKED, endpoint.as_bytes())?;
    is_under_way(reader, endpoint, asked.of).then_some(asked)
}

/// Forgets what was said of an endpoint that is gone.
pub(in crate::serving) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    txn.delete(ASKED, endpoint.as_bytes());
}

/// Applies a command.
pub(in crate::serving) fn apply(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    command: Command,
) -> Result<(), Rejection> {
    let Command::Note {
        endpoint,
        router,
        of,
        standing,
    } = command;
    rollout::heard(txn, &endpoint, router)?;
    if standing.right > standing.replicas {
        return Err(Rejection::invalid(format!(
            "{} of {} replicas cannot have answered: nothing was changed",
            standing.right, standing.replicas
        )));
    }
    if !is_under_way(txn, &endpoint, of) {
        let what = match of {
            Of::Step { rollout, step } => format!("rollout {rollout} at step {step}"),
            Of::Experiment { experiment } => format!("experiment {experiment}"),
        };
        return Err(Rejection::fenced(format!(
            "{what} of endpoint `{endpoint}` is not under way any more"
        )));
    }
    let asked = Asked {
        of,
        standing,
        router,
        at_ms: context.now_ms,
    };
    row::put(txn, ASKED, endpoint.as_bytes(), &asked);
    Ok(())
}

/// Whether `caller` may give this command: routers are the platform's own actors.
pub(in crate::serving) fn is_allowed(caller: &Caller) -> bool {
    match caller {
        Caller::Head => true,
        Caller::Host { job, .. } => *job == JobId::SYSTEM,
        _ => false,
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
