//! What clients, routers and the controller say about experiments. Persisted: positions of variants and
//! fields never change.

use mobula_core::control::Caller;
use mobula_core::id::{Incarnation, JobId};
use serde::{Deserialize, Serialize};

use super::findings::Findings;
use super::plan::{Ending, Guardrail, Metric};

/// What a client asks for. The rest of a plan is what the tables say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proposed {
    /// The endpoint.
    pub endpoint: String,
    /// Its model.
    pub model: String,
    /// The version to compare with; the newest if absent.
    pub version: Option<u64>,
    /// The control's share of all keys, in basis points.
    pub control_share_bp: u32,
    /// The treatment's.
    pub treatment_share_bp: u32,
    /// What keys are hashed with; another text for each experiment if absent.
    pub seed: Option<String>,
    /// What decides.
    pub primary: Metric,
    /// The smallest difference that is worth anything.
    pub effect_min: f64,
    /// What ends the experiment early.
    pub guardrails: Vec<Guardrail>,
    /// The chance of a false conclusion, in basis points.
    pub alpha_bp: u32,
    /// After so many values of the primary metric it ends undecided.
    pub samples_max: u64,
}

/// A change. Append-only: positions are tags. Answer of all: [`Experiment`](super::plan::Experiment).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Begins an experiment.
    Start(Proposed),
    /// Ends it.
    Stop {
        /// The endpoint.
        endpoint: String,
    },
    /// A router is about to count: to go on with what the one before it stored, if there was one.
    Count {
        /// The endpoint.
        endpoint: String,
        /// The experiment.
        experiment: u64,
        /// The router's incarnation.
        router: Incarnation,
    },
    /// What a router has counted so far.
    Report {
        /// The endpoint.
        endpoint: String,
        /// The experiment.
        experiment: u64,
        /// The router's incarnation.
        router: Incarnation,
        /// In numbers.
        findings: Findings,
        /// The BLAKE3 hash of all that was counted, which is in the object store.
        stored: [u8; 32],
    },
    /// A router has found that the experiment is over.
    Conclude {
        /// The endpoint.
        endpoint: String,
        /// The experiment.
        experiment: u64,
        /// The router's incarnation.
        router: Incarnation,
        /// Why.
        ending: Ending,
        /// In numbers.
        findings: Findings,
    },
    /// A router has no request with the treatment, and will send it none.
    Drained {
        /// The endpoint.
        endpoint: String,
        /// The experiment.
        experiment: u64,
        /// The revision that the router follows.
        revision: u64,
        /// The router's incarnation.
        router: Incarnation,
    },
    /// The treatment's actors have ended.
    Retired {
        /// The endpoint.
        endpoint: String,
        /// The experiment.
        experiment: u64,
        /// The revision that the controller saw.
        revision: u64,
    },
    /// A router cannot go on with what was stored, ever, and is about to count from zero.
    CountAnew {
        /// The endpoint.
        endpoint: String,
        /// The experiment.
        experiment: u64,
        /// Which of its counts is given up.
        count: u32,
        /// The router's incarnation.
        router: Incarnation,
    },
}

/// Whether `caller` may give this command.
pub(in crate::serving) fn is_allowed(caller: &Caller, command: &Command) -> bool {
    match (caller, command) {
        (Caller::Head, _) => true,
        (Caller::Client, Command::Start(_) | Command::Stop { .. }) => true,
        // Routers are the platform's own actors.
        (
            Caller::Host { job, .. },
            Command::Count { .. }
            | Command::Report { .. }
            | Command::Conclude { .. }
            | Command::Drained { .. }
            | Command::CountAnew { .. },
        ) => *job == JobId::SYSTEM,
        _ => false,
    }
}
