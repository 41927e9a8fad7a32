//! Policies and decisions, replicated.
//!
//! Invariants:
//! 1. The endpoint's row has the number of replicas; each change of it that a router decided is here, with
//!    its numbers, the last [`CHANGES_MAX`] of them.
//! 2. Only the endpoint's newest router decides, on what it saw last: it names the revision. What it
//!    decides is checked against the policy again.
//! 3. Replicas that are too many are ended after the router has said that none of its requests is with
//!    them, and are known until they have ended.

use mobula_core::control::{ApplyContext, Caller, ModuleId, Reader, Table, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{Incarnation, JobId};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::decision::{Change, Choice, Standing};
use super::policy::Policy;
use crate::serving::experiment::state as experiment;
use crate::serving::rollout::plan::Cleanup;
use crate::serving::rollout::state::{heard, newest, standing};
use crate::serving::state::{Endpoint, put_endpoint};

/// Endpoint name → [`Scaling`].
const SCALING: Table = Table {
    module: ModuleId::SERVING,
    tag: 4,
};

/// Changes that are kept of an endpoint, the newest: the limits on how fast it is scaled look back five
/// minutes as a rule, in which there are hardly as many.
pub const CHANGES_MAX: usize = 50;

/// How an endpoint is scaled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scaling {
    /// What its operator asks for.
    pub policy: Policy,
    /// The log index of the last change of the policy or of the replicas: routers name it.
    pub revision: u64,
    /// What was decided, oldest first.
    pub changes: Vec<Change>,
    /// Replicas up to this number may live still, though fewer are wanted; 0 if none does.
    pub surplus: u32,
    /// Whether the router has no request with them any more.
    pub is_drained: bool,
}

impl Scaling {
    /// So many replicas, as long as nobody asks for another number.
    #[must_use]
    pub fn fixed(endpoint: &Endpoint) -> Self {
        Scaling {
            policy: Policy::between(endpoint.replicas, endpoint.replicas),
            revision: 0,
            changes: Vec::new(),
            surplus: 0,
            is_drained: false,
        }
    }

    /// The highest number that a replica of this endpoint may have.
    #[must_use]
    pub fn replicas_living(&self, endpoint: &Endpoint) -> u32 {
        endpoint.replicas.max(self.surplus)
    }
}

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Another policy. Answer: [`Scaling`], like that of all of these.
    SetPolicy {
        /// The endpoint.
        endpoint: String,
        /// What holds from now on.
        policy: Policy,
    },
    /// A router has decided.
    Decide {
        /// The endpoint.
        endpoint: String,
        /// The router's incarnation.
        router: Incarnation,
        /// The revision that it follows.
        revision: u64,
        /// What it decided.
        choice: Choice,
    },
    /// A router has no request with replicas that are too many, and will send them none.
    Drained {
        /// The endpoint.
        endpoint: String,
        /// The router's incarnation.
        router: Incarnation,
        /// The revision that it follows.
        revision: u64,
    },
    /// The replicas that were too many have ended.
    Ended {
        /// The endpoint.
        endpoint: String,
        /// The revision that the controller saw.
        revision: u64,
    },
}

/// How an endpoint is scaled.
pub fn find(reader: &dyn Reader, endpoint: &Endpoint) -> Scaling {
    row::get(reader, SCALING, endpoint.name.as_bytes()).unwrap_or_else(|| Scaling::fixed(endpoint))
}

/// Forgets how an endpoint that is gone was scaled.
pub(in crate::serving) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    txn.delete(SCALING, endpoint.as_bytes());
}

fn put(txn: &mut dyn Txn, endpoint: &str, scaling: &Scaling) {
    row::put(txn, SCALING, endpoint.as_bytes(), scaling);
}

/// Applies a command; how the endpoint is scaled then.
pub(in crate::serving) fn apply(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    command: Command,
) -> Result<Scaling, Rejection> {
    match command {
        Command::SetPolicy { endpoint, policy } => {
            policy.check()?;
            let endpoint = standing(txn, &endpoint)?;
            let scaling = Scaling {
                policy,
                revision: context.index,
                ..find(txn, &endpoint)
            };
            put(txn, &endpoint.name, &scaling);
            Ok(scaling)
        }
        Command::Decide {
            endpoint,
            router,
            revision,
            choice,
        } => {
            heard(txn, &endpoint, router)?;
            decide(context, txn, &endpoint, revision, choice)
        }
        Command::Drained {
            endpoint,
            router,
            revision,
        } => {
            heard(txn, &endpoint, router)?;
            let (endpoint, mut scaling) = at_revision(txn, &endpoint, revision)?;
            scaling.is_drained = scaling.surplus > endpoint.replicas;
            put(txn, &endpoint.name, &scaling);
            Ok(scaling)
        }
        Command::Ended { endpoint, revision } => {
            let (endpoint, mut scaling) = at_revision(txn, &endpoint, revision)?;
            if scaling.is_drained {
                (scaling.surplus, scaling.is_drained) = (0, false);
            }
            put(txn, &endpoint.name, &scaling);
            Ok(scaling)
        }
    }
}

/// An endpoint of which nothing was changed since.
fn at_revision(
    reader: &dyn Reader,
    name: &str,
    revision: u64,
) -> Result<(Endpoint, Scaling), Rejection> {
    let endpoint = standing(reader, name)?;
    let scaling = find(reader, &endpoint);
    if scaling.revision == revision {
        return Ok((endpoint, scaling));
    }
    Err(Rejection::fenced(format!(
        "how endpoint `{name}` is scaled was changed at {}: a decision on what was so at {revision} is late",
        scaling.revision
    )))
}

fn decide(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    name: &str,
    revision: u64,
    choice: Choice,
) -> Result<Scaling, Rejection> {
    let (mut endpoint, mut scaling) = at_revision(txn, name, revision)?;
    let Choice { to, cause, figures } = choice;
    let from = endpoint.replicas;
    let (low, high) =
        standing_of(txn, &endpoint, &scaling).allowed(&scaling.policy, context.now_ms);
    if to == from || !(low..=high).contains(&to) {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "endpoint `{name}` has {from} replicas and may have {low} to {high} now, not {to}: see \
                 `mobula serve explain {name}`"
            ),
        ));
    }
    if to < from {
        scaling.surplus = scaling.surplus.max(from);
        scaling.is_drained = false;
    } else if to >= scaling.surplus {
        (scaling.surplus, scaling.is_drained) = (0, false);
    }
    scaling.changes.push(Change {
        at_ms: context.now_ms,
        version: endpoint.version,
        from,
        to,
        cause,
        figures,
    });
    let excess = scaling.changes.len().saturating_sub(CHANGES_MAX);
    scaling.changes.drain(..excess);
    scaling.revision = context.index;
    put(txn, name, &scaling);
    endpoint.replicas = to;
    put_endpoint(txn, &endpoint);
    Ok(scaling)
}

/// What the next decision about an endpoint goes by.
fn standing_of<'a>(reader: &dyn Reader, endpoint: &Endpoint, scaling: &'a Scaling) -> Standing<'a> {
    let rollout = newest(reader, &endpoint.name);
    Standing {
        replicas: endpoint.replicas,
        version: endpoint.version,
        changes: &scaling.changes,
        is_rolling_out: rollout.is_some_and(|rollout| rollout.cleanup != Cleanup::Done)
            || experiment::unfinished(reader, &endpoint.name).is_some(),
    }
}

/// Gives an endpoint without replicas one, for what is about to begin.
pub(in crate::serving) fn wake(txn: &mut dyn Txn, endpoint: Endpoint) -> Endpoint {
    if endpoint.replicas > 0 {
        return endpoint;
    }
    let endpoint = Endpoint {
        replicas: 1,
        ..endpoint
    };
    put_endpoint(txn, &endpoint);
    endpoint
}

/// Whether `caller` may give this command.
pub(in crate::serving) fn is_allowed(caller: &Caller, command: &Command) -> bool {
    match (caller, command) {
        (Caller::Head, _) => true,
        (Caller::Client, command) => matches!(command, Command::SetPolicy { .. }),
        // Routers are the platform's own actors.
        (Caller::Host { job, .. }, Command::Decide { .. } | Command::Drained { .. }) => {
            *job == JobId::SYSTEM
        }
        _ => false,
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
