//! What clients, routers and the controller say about rollouts. Persisted: positions of variants and fields
//! never change.

use mobula_core::control::Caller;
use mobula_core::id::{Incarnation, JobId};
use serde::{Deserialize, Serialize};

use super::plan::{Guardrails, Strategy};
use super::trial::Evidence;
use crate::serving::shadow;

/// What a router found of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The step is passed.
    Pass,
    /// The candidate violates a guardrail.
    RollBack,
}

/// What a client wants to be rolled out, all of it. Fields are appended, never changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proposed {
    /// The endpoint.
    pub endpoint: String,
    /// Its model.
    pub model: String,
    /// The version to try; the newest if absent.
    pub version: Option<u64>,
    /// How.
    pub strategy: Strategy,
    /// The weights, in percent; those of the strategy if empty. With a shadow, a first one of 0 is put before them.
    pub steps: Vec<u32>,
    /// What the candidate may not do.
    pub guardrails: Guardrails,
    /// How many requests of each side a step needs.
    pub min_samples: u64,
    /// How the candidate is shadowed before it answers anybody, if it is.
    pub shadow: Option<shadow::Plan>,
    /// How long a step may wait for replicas of the candidate, in milliseconds; for ever if 0.
    pub replica_wait_max_ms: u64,
}

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Begins a rollout. Answer: [`Rollout`](super::plan::Rollout), like that of all commands of clients.
    Start {
        /// The endpoint.
        endpoint: String,
        /// Its model.
        model: String,
        /// The version to try; the newest if absent.
        version: Option<u64>,
        /// How.
        strategy: Strategy,
        /// The weights, in percent; those of the strategy if empty.
        steps: Vec<u32>,
        /// What the candidate may not do.
        guardrails: Guardrails,
        /// How many requests of each side a step needs.
        min_samples: u64,
    },
    /// Stays at the step.
    Pause {
        /// The endpoint.
        endpoint: String,
    },
    /// Goes on.
    Resume {
        /// The endpoint.
        endpoint: String,
    },
    /// Makes the candidate the endpoint's version now.
    Promote {
        /// The endpoint.
        endpoint: String,
    },
    /// Ends an open rollout without one.
    Abort {
        /// The endpoint.
        endpoint: String,
    },
    /// Returns to the version of before, also after the promotion.
    RollBack {
        /// The endpoint.
        endpoint: String,
    },
    /// A router has judged a step. Answer: nothing.
    Judge {
        /// The endpoint.
        endpoint: String,
        /// The rollout.
        rollout: u64,
        /// The step that was judged.
        step: u32,
        /// The router's incarnation.
        router: Incarnation,
        /// What it found.
        verdict: Verdict,
        /// In numbers.
        evidence: Evidence,
    },
    /// A router has no request with the version that lost, and will send it none. Answer: nothing.
    Drained {
        /// The endpoint.
        endpoint: String,
        /// The rollout.
        rollout: u64,
        /// The revision that the router follows.
        revision: u64,
        /// The router's incarnation.
        router: Incarnation,
    },
    /// The actors of the version that lost have ended. Answer: nothing.
    Retired {
        /// The endpoint.
        endpoint: String,
        /// The rollout.
        rollout: u64,
        /// The revision that the controller saw.
        revision: u64,
    },
    /// Begins a rollout whose candidate is shadowed before it answers anybody.
    StartShadowed {
        /// The endpoint.
        endpoint: String,
        /// Its model.
        model: String,
        /// The version to try; the newest if absent.
        version: Option<u64>,
        /// How.
        strategy: Strategy,
        /// The weights, in percent; those of the strategy if empty. A first one of 0, at which the candidate is
        /// shadowed, is put before them.
        steps: Vec<u32>,
        /// What the candidate may not do.
        guardrails: Guardrails,
        /// How many requests of each side a step needs.
        min_samples: u64,
        /// How it is shadowed.
        shadow: shadow::Plan,
    },
    /// What a router has counted so far of a step that is not decided. Answer: nothing.
    Report {
        /// The endpoint.
        endpoint: String,
        /// The rollout.
        rollout: u64,
        /// The step.
        step: u32,
        /// The router's incarnation.
        router: Incarnation,
        /// In numbers.
        evidence: Evidence,
    },
    /// The same of a step that waits for replicas of the candidate, again and again while it does. Answer: nothing.
    Wait {
        /// The endpoint.
        endpoint: String,
        /// The rollout.
        rollout: u64,
        /// The step.
        step: u32,
        /// The router's incarnation.
        router: Incarnation,
        /// In numbers.
        evidence: Evidence,
    },
    /// Begins a rollout by a plan that says all of it. Those that begin one otherwise wait for replicas for
    /// [`REPLICA_WAIT_MS`](super::plan::REPLICA_WAIT_MS).
    Begin(Proposed),
}

/// Whether `caller` may give this command.
pub(in crate::serving) fn is_allowed(caller: &Caller, command: &Command) -> bool {
    match (caller, command) {
        (Caller::Head, _) => true,
        // Routers are the platform's own actors.
        (
            Caller::Host { job, .. },
            Command::Judge { .. }
            | Command::Drained { .. }
            | Command::Report { .. }
            | Command::Wait { .. },
        ) => *job == JobId::SYSTEM,
        (
            _,
            Command::Judge { .. }
            | Command::Drained { .. }
            | Command::Retired { .. }
            | Command::Report { .. }
            | Command::Wait { .. },
        ) => false,
        (caller, _) => matches!(caller, Caller::Client),
    }
}
