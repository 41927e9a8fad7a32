//! What a policy and a retraining are. These types are rows of a replicated table: fields and variants are
//! appended, never changed.
//!
//! Invariant: everything is bounded: texts, steps, and the times that the budget is counted from.

use mobula_core::error::Rejection;
use mobula_core::spec::JobSpec;
use serde::{Deserialize, Serialize};

use super::evaluation::Comparison;
use crate::registry::stages::Stage;
use crate::serving::rollout::plan::{Guardrails, STEPS_MAX, Served, Strategy};
use crate::units;

/// The most jobs that a budget may allow in its period: so many times of submission are kept.
pub const BUDGET_JOBS_MAX: u32 = 64;

/// The longest period and cooldown: a year, in milliseconds.
pub const PERIOD_MS_MAX: u64 = 366 * 24 * 3_600_000;

/// The longest reason of a step, in bytes.
pub const REASON_BYTES_MAX: usize = 512;

/// The longest name of a metric, in bytes: that of the registry.
const METRIC_BYTES_MAX: usize = 64;

/// Steps that are kept of a retraining: it has at most nine, of which none comes back.
pub const STEPS_KEPT_MAX: usize = 16;

/// Who begins a retraining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A drift event does.
    Auto,
    /// A drift event suggests it, and a client decides.
    Suggest,
}

/// How many jobs may be submitted in which time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// So many at the most.
    pub jobs: u32,
    /// Within this time, in milliseconds.
    pub period_ms: u64,
}

/// How a new version is tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryPlan {
    /// How.
    pub strategy: Strategy,
    /// The weights, in percent; those of the strategy if empty.
    pub steps: Vec<u32>,
    /// What the candidate may not do.
    pub guardrails: Guardrails,
    /// How many requests of each side a step needs.
    pub min_samples: u64,
}

/// What a new version must fulfil, and what follows the end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// For so long after an end no drift event begins another retraining, in milliseconds.
    pub cooldown_ms: u64,
    /// What is compared; absent: `accuracy` where both versions have it, else `loss`.
    pub metric: Option<String>,
    /// By how much the new version must be better than the active one; below zero: how much worse it may be.
    pub min_gain: f64,
    /// The stage that the new version must have in the registry before it is tried.
    pub gate: Stage,
    /// How it is tried.
    pub canary: CanaryPlan,
}

/// What is done about drift at an endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrainPolicy {
    /// The model that the job registers: that of the endpoint.
    pub model: String,
    /// The job that trains a new version. Its idempotency key is made when it is submitted.
    pub job: JobSpec,
    /// Who begins.
    pub mode: Mode,
    /// How often.
    pub budget: Budget,
    /// What a new version must fulfil.
    pub terms: Terms,
}

impl RetrainPolicy {
    /// Refuses what is out of range, and jobs that cannot be submitted later.
    pub(super) fn check(&self) -> Result<(), Rejection> {
        let Budget { jobs, period_ms } = self.budget;
        if !(1..=BUDGET_JOBS_MAX).contains(&jobs) || !(1..=PERIOD_MS_MAX).contains(&period_ms) {
            return Err(Rejection::invalid(format!(
                "a budget of {jobs} jobs in {} (`--budget`) is not possible: give 1 to {BUDGET_JOBS_MAX} jobs in {} to {}",
                units::millis(period_ms),
                units::millis(1),
                units::millis(PERIOD_MS_MAX)
            )));
        }
        if self.terms.cooldown_ms > PERIOD_MS_MAX {
            return Err(Rejection::invalid(format!(
                "a cooldown (`--cooldown`) of {} is not possible: give {} at the most",
                units::millis(self.terms.cooldown_ms),
                units::millis(PERIOD_MS_MAX)
            )));
        }
        if !self.terms.min_gain.is_finite() {
            return Err(Rejection::invalid(
                "the gain that a new version needs (`--min-gain`) must be a number",
            ));
        }
        let metric = self.terms.metric.as_deref().unwrap_or("accuracy");
        if metric.is_empty() || metric.len() > METRIC_BYTES_MAX {
            return Err(Rejection::invalid(format!(
                "a metric's name (`--metric`) has 1 to {METRIC_BYTES_MAX} bytes, and this one has {}",
                metric.len()
            )));
        }
        if self.terms.gate == Stage::Archived {
            return Err(Rejection::invalid(
                "no version is tried that is archived: the gate is candidate, staging or production (`--gate`)",
            ));
        }
        if self.terms.canary.steps.len() > STEPS_MAX {
            return Err(Rejection::invalid(format!(
                "a rollout has {STEPS_MAX} steps at the most, and this one {} (`--steps`)",
                self.terms.canary.steps.len()
            )));
        }
        let JobSpec {
            secrets,
            namespace,
            idempotency_key,
            ..
        } = &self.job;
        if !secrets.is_empty() || namespace.is_some() || idempotency_key.is_some() {
            return Err(Rejection::invalid(
                "the job of a policy has no secrets, no namespace and no idempotency key: a policy is kept \
                 and shown, secrets are not",
            ));
        }
        Ok(())
    }
}

/// Where a retraining is. Append-only: positions are tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// A client has to say that it shall begin.
    Suggested,
    /// Its job is being submitted.
    Submitting,
    /// Its job trains.
    Training,
    /// The job's version is registered, and compared with the active one.
    Evaluating,
    /// The version is better, and waits for the stage that it must have.
    Gate,
    /// The version waits until the endpoint has no other rollout.
    Queued,
    /// The version is tried on the endpoint's requests.
    Canary,
    /// The version is the endpoint's.
    Promoted,
    /// The version was tried and is not the endpoint's.
    RolledBack,
    /// A step could not be taken.
    Failed,
    /// The version is no better than the active one.
    NotBetter,
    /// The policy allows no further job now.
    BudgetSpent,
    /// A client ended it, or nothing was left to do it for.
    Cancelled,
}

impl Phase {
    /// Whether another step may follow.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(
            self,
            Phase::Suggested
                | Phase::Submitting
                | Phase::Training
                | Phase::Evaluating
                | Phase::Gate
                | Phase::Queued
                | Phase::Canary
        )
    }

    /// A short stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Suggested => "suggested",
            Phase::Submitting => "submitting",
            Phase::Training => "training",
            Phase::Evaluating => "evaluating",
            Phase::Gate => "gate",
            Phase::Queued => "queued",
            Phase::Canary => "canary",
            Phase::Promoted => "promoted",
            Phase::RolledBack => "rolled_back",
            Phase::Failed => "failed",
            Phase::NotBetter => "not_better",
            Phase::BudgetSpent => "budget_spent",
            Phase::Cancelled => "cancelled",
        }
    }
}

/// A step: which phase was entered, when and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The entry of the log.
    pub index: u64,
    /// The phase since then.
    pub phase: Phase,
    /// In a sentence.
    pub reason: String,
}

/// A retraining.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Retraining {
    /// The endpoint.
    pub endpoint: String,
    /// Counted from 1 within its endpoint.
    pub number: u64,
    /// The log index at which it began: no other retraining has it, also of an endpoint that is deployed
    /// again under the same name.
    pub began_index: u64,
    /// The endpoint's model.
    pub model: String,
    /// The drift event.
    pub event: u64,
    /// What had drifted.
    pub drift: String,
    /// The version that was active when it began.
    pub baseline: Served,
    /// What the policy said then.
    pub terms: Terms,
    /// Where it is.
    pub phase: Phase,
    /// Its training job.
    pub job: Option<u64>,
    /// The version that the job registered.
    pub candidate: Option<u64>,
    /// That version against the active one.
    pub comparison: Option<Comparison>,
    /// The number of its rollout at the endpoint.
    pub rollout: Option<u64>,
    /// The log index of its latest step.
    pub revision: u64,
    /// What happened, oldest first.
    pub steps: Vec<Step>,
}

impl Retraining {
    /// The idempotency key of its job.
    #[must_use]
    pub fn job_key(&self) -> String {
        format!("retrain/{}/{}", self.endpoint, self.began_index)
    }

    /// When it entered its phase, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn since_ms(&self) -> u64 {
        self.steps.last().map_or(0, |step| step.at_ms)
    }

    /// When it began, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn began_ms(&self) -> u64 {
        self.steps.first().map_or(0, |step| step.at_ms)
    }
}

/// The first bytes of a text, as many as a reason may have.
pub(super) fn cut(text: &str) -> String {
    let mut end = text.len().min(REASON_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}
