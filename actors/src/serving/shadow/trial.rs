//! What a candidate answered to copies of requests, and what follows from it.
//!
//! Invariants:
//! 1. A step is passed only after enough comparisons; without copies it stays where it is.
//! 2. What was shed before the candidate had it says nothing about the candidate, and is counted apart.
//! 3. The chance that a candidate is rolled back which differs and fails as little as allowed is divided among
//!    the steps of the rollout and the two guardrails of this one.

use std::time::Duration;

use super::plan::Plan;
use crate::serving::rollout::plan::Rollout;
use crate::serving::rollout::sequential::rate_bounds;
use crate::serving::rollout::trial::{
    Evidence, GuardrailEvidence, Judgement, Outcome, Sample, shortened,
};

/// Guardrails of a shadow: differences, failures.
const GUARDRAILS: f64 = 2.0;

/// What came of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied<'a> {
    /// It was answered as the caller was, in so much time.
    Same(Duration),
    /// It was answered otherwise: how.
    Different(Duration, &'a str),
    /// It was not answered, for this reason.
    Failed(&'a str),
    /// There was no room for it.
    Shed,
}

/// The trial of a shadowed candidate.
#[derive(Debug, Clone)]
pub struct ShadowTrial {
    plan: Plan,
    failures_max: f64,
    /// The chance of a false alarm that each guardrail has.
    alpha: f64,
    candidate: Sample,
    /// What the callers got instead.
    answered: Sample,
    different: u64,
    shed: u64,
    last_difference: String,
}

impl ShadowTrial {
    /// A trial without copies, at the first step of a rollout.
    #[must_use]
    pub fn new(plan: Plan, rollout: &Rollout) -> Self {
        let guardrails = &rollout.guardrails;
        let share = f64::from(rollout.judged_steps()) * GUARDRAILS;
        ShadowTrial {
            plan,
            failures_max: f64::from(guardrails.error_increase_max_bp) / 10_000.0,
            alpha: f64::from(guardrails.false_rollback_max_bp) / 10_000.0 / share,
            candidate: Sample::new(),
            answered: Sample::new(),
            different: 0,
            shed: 0,
            last_difference: String::new(),
        }
    }

    /// Counts a copy of a request that its caller waited so long for.
    pub fn record(&mut self, waited: Duration, copied: Copied<'_>) {
        let outcome = match copied {
            Copied::Shed => {
                self.shed += 1;
                return;
            }
            Copied::Same(took) => Outcome::Answered(took),
            Copied::Different(took, how) => {
                self.different += 1;
                self.last_difference = shortened(how);
                Outcome::Answered(took)
            }
            Copied::Failed(reason) => Outcome::Failed(reason),
        };
        self.candidate.record(outcome);
        self.answered.record(Outcome::Answered(waited));
    }

    /// What follows from what was counted so far. It may be asked as often as one likes.
    #[must_use]
    pub fn judge(&self) -> Judgement {
        let guardrails = vec![
            self.guardrail(
                "mismatches",
                self.different,
                self.compared(),
                self.mismatch_max(),
            ),
            self.guardrail(
                "failures",
                self.candidate.errors(),
                self.candidate.requests(),
                self.failures_max,
            ),
        ];
        let violated: Vec<&str> = guardrails
            .iter()
            .filter(|row| row.is_violated)
            .map(|row| row.guardrail.as_str())
            .collect();
        let is_violated = !violated.is_empty();
        let held = self.held();
        let reason = match &held {
            _ if is_violated => format!("as a shadow, too many {}", violated.join(" and ")),
            Some(held) => held.clone(),
            None => "as a shadow, within the guardrails".to_owned(),
        };
        let last = if self.last_difference.is_empty() {
            String::new()
        } else {
            format!("; the last: {}", self.last_difference)
        };
        let evidence = Evidence {
            reason: shortened(&format!(
                "{reason}: {} of {} answers differ, {} copies were shed{last}",
                self.different,
                self.compared(),
                self.shed
            )),
            candidate: self.candidate.evidence(),
            baseline: self.answered.evidence(),
            guardrails,
        };
        match held {
            _ if is_violated => Judgement::RollBack(evidence),
            Some(_) => Judgement::Hold(evidence),
            None => Judgement::Pass(evidence),
        }
    }

    fn mismatch_max(&self) -> f64 {
        f64::from(self.plan.mismatch_max_bp) / 10_000.0
    }

    /// Answers that were compared.
    fn compared(&self) -> u64 {
        self.candidate.requests() - self.candidate.errors()
    }

    fn guardrail(&self, name: &str, events: u64, count: u64, most: f64) -> GuardrailEvidence {
        let (at_least, _) = rate_bounds(events, count, self.alpha);
        GuardrailEvidence {
            guardrail: name.to_owned(),
            statistic: "rate_at_least".to_owned(),
            value: at_least,
            limit: most,
            is_violated: at_least > most,
        }
    }

    /// Why the step is not passed, if it is not.
    fn held(&self) -> Option<String> {
        let compared = self.compared();
        if compared < self.plan.samples {
            return Some(format!("{compared} of {} comparisons", self.plan.samples));
        }
        let rate = |events: u64, count: u64| events as f64 / count.max(1) as f64;
        if rate(self.different, compared) > self.mismatch_max() {
            return Some("more differences than allowed, which may yet be chance".to_owned());
        }
        if rate(self.candidate.errors(), self.candidate.requests()) > self.failures_max {
            return Some("more failures than allowed, which may yet be chance".to_owned());
        }
        None
    }
}

#[cfg(test)]
#[path = "trial_tests.rs"]
mod tests;
