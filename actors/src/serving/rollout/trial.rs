//! What the candidate's and the stable version's requests came to in one step, and what follows from it.
//!
//! All requests of the stable version are the baseline. They meet the same replicas as any part of them would, and a part as
//! large as a candidate with five percent takes more than twice as long to tell.
//!
//! Invariants:
//! 1. Both sides are counted over the same time: nothing is counted while the candidate does not answer.
//! 2. A step is passed only after enough requests of both sides; without requests it stays where it is. It takes more
//!    where 95th percentiles are too close to call, up to a bound (`tail`).
//! 3. The chance that a version which is no worse is rolled back is divided among steps and guardrails,
//!    so that it holds for the whole rollout.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::plan::Guardrails;
use super::sequential::{Moments, increase_lower_bound, log_e_value};
use super::split::Side;
use super::tail::{Excess, Held, Histogram, SlowAnswers};

/// Guardrails of a step: errors, refusals, mean latency, 95th percentile.
const GUARDRAILS: f64 = 4.0;

/// The largest part of all requests that a candidate is taken to have: one that has all of them is compared with nothing.
const FAIR_MAX: f64 = 0.99;

/// Answers of each side before means are compared: the bound on them is asymptotic.
const MEAN_SAMPLES_MIN: u64 = 50;

/// The longest text in evidence, in bytes.
pub const EVIDENCE_TEXT_BYTES_MAX: usize = 300;

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It was answered, in so much time.
    Answered(Duration),
    /// It was not, for this reason.
    Failed(&'a str),
    /// It was not executed, as too many others were waiting.
    Refused,
}

/// One side's numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SideEvidence {
    /// Requests that were sent to it.
    pub requests: u64,
    /// Those that it did not answer.
    pub errors: u64,
    /// The geometric mean of its answers' latency, in microseconds.
    pub latency_mean_us: u64,
    /// The 95th percentile, in microseconds, to one percent.
    pub latency_p95_us: u64,
    /// Why the last one failed; empty if none did.
    pub last_error: String,
}

/// What a guardrail says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardrailEvidence {
    /// `errors`, `refusals`, `latency_mean` or `latency_p95`; of a shadow `mismatches` or `failures`.
    pub guardrail: String,
    /// What `value` is: `log_e_value`, `increase_percent_at_least` or `rate_at_least`.
    pub statistic: String,
    /// What was found.
    pub value: f64,
    /// From where on the guardrail rolls back.
    pub limit: f64,
    /// Whether it does.
    pub is_violated: bool,
}

/// The numbers that a decision rests on.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Evidence {
    /// What was decided and why, in words.
    pub reason: String,
    /// The candidate's requests.
    pub candidate: SideEvidence,
    /// Those of the stable version, over the same time.
    pub baseline: SideEvidence,
    /// Every guardrail that could be computed.
    pub guardrails: Vec<GuardrailEvidence>,
}

impl Evidence {
    /// Whether it is of a size and with numbers that a row may have.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        let texts = [
            &self.reason,
            &self.candidate.last_error,
            &self.baseline.last_error,
        ];
        let words = self
            .guardrails
            .iter()
            .flat_map(|row| [&row.guardrail, &row.statistic]);
        self.guardrails.len() <= GUARDRAILS as usize
            && self
                .guardrails
                .iter()
                .all(|row| row.value.is_finite() && row.limit.is_finite())
            && texts
                .into_iter()
                .chain(words)
                .all(|text| text.len() <= EVIDENCE_TEXT_BYTES_MAX)
    }
}

/// What follows from a trial.
#[derive(Debug, Clone, PartialEq)]
pub enum Judgement {
    /// The step is passed.
    Pass(Evidence),
    /// There is not enough to go by yet.
    Hold(Evidence),
    /// A guardrail is violated.
    RollBack(Evidence),
}

/// What one side did.
#[derive(Debug, Clone)]
pub(in crate::serving) struct Sample {
    requests: u64,
    errors: u64,
    /// Beside `requests`: they say nothing about what the version would have answered.
    refused: u64,
    last_error: String,
    /// Of the logarithm of the latency in microseconds.
    log_latency: Moments,
    histogram: Histogram,
}

impl Sample {
    /// Nothing.
    pub(in crate::serving) fn new() -> Self {
        Sample {
            requests: 0,
            errors: 0,
            refused: 0,
            last_error: String::new(),
            log_latency: Moments::default(),
            histogram: Histogram::new(),
        }
    }

    /// Counts a request; the bucket of an answer's latency.
    pub(in crate::serving) fn record(&mut self, outcome: Outcome<'_>) -> Option<usize> {
        let log_us = match outcome {
            Outcome::Refused => {
                self.refused += 1;
                return None;
            }
            Outcome::Failed(reason) => {
                self.requests += 1;
                self.errors += 1;
                self.last_error = shortened(reason);
                return None;
            }
            // Below a microsecond the clock says little.
            Outcome::Answered(latency) => (latency.as_secs_f64() * 1e6).max(1.0).ln(),
        };
        self.requests += 1;
        self.log_latency.add(log_us);
        Some(self.histogram.add(log_us))
    }

    /// Requests, without those that were refused.
    pub(in crate::serving) fn requests(&self) -> u64 {
        self.requests
    }

    /// Those that failed.
    pub(in crate::serving) fn errors(&self) -> u64 {
        self.errors
    }

    fn error_rate(&self) -> f64 {
        self.errors as f64 / self.requests.max(1) as f64
    }

    fn refusal_rate(&self) -> f64 {
        self.refused as f64 / (self.requests + self.refused).max(1) as f64
    }

    /// In numbers.
    pub(in crate::serving) fn evidence(&self) -> SideEvidence {
        let is_answered = self.log_latency.count() > 0;
        SideEvidence {
            requests: self.requests,
            errors: self.errors,
            latency_mean_us: if is_answered {
                self.log_latency.mean().exp().round() as u64
            } else {
                0
            },
            latency_p95_us: self.histogram.p95_us(),
            last_error: self.last_error.clone(),
        }
    }
}

/// One step's trial.
#[derive(Debug, Clone)]
pub struct Trial {
    guardrails: Guardrails,
    min_samples: u64,
    /// The chance of a false alarm that each guardrail of this step has.
    alpha: f64,
    /// The part of the keys that the candidate gets, between 0 and 1.
    weight: f64,
    candidate: Sample,
    baseline: Sample,
    slow: SlowAnswers,
}

impl Trial {
    /// A trial without requests, one of `judged_steps` in its rollout, in which the candidate gets `weight_percent` of them.
    #[must_use]
    pub fn new(
        guardrails: Guardrails,
        min_samples: u64,
        judged_steps: u32,
        weight_percent: u32,
    ) -> Self {
        let share = f64::from(judged_steps.max(1)) * GUARDRAILS;
        Trial {
            guardrails,
            min_samples,
            alpha: f64::from(guardrails.false_rollback_max_bp) / 10_000.0 / share,
            weight: f64::from(weight_percent.max(1)) / 100.0,
            candidate: Sample::new(),
            baseline: Sample::new(),
            slow: SlowAnswers::default(),
        }
    }

    fn latency_factor(&self) -> f64 {
        1.0 + f64::from(self.guardrails.latency_increase_max_percent) / 100.0
    }

    /// Counts a request.
    pub fn record(&mut self, side: Side, outcome: Outcome<'_>) {
        let sample = match side {
            Side::Candidate => &mut self.candidate,
            Side::Baseline => &mut self.baseline,
        };
        if let Some(bucket) = sample.record(outcome) {
            let is_candidate = side == Side::Candidate;
            self.slow
                .take(is_candidate, bucket, &self.baseline.histogram);
        }
    }

    /// What follows from what was counted so far. It may be asked as often as one likes.
    #[must_use]
    pub fn judge(&self) -> Judgement {
        let excess = Excess::of(
            &self.candidate.histogram,
            &self.baseline.histogram,
            self.latency_factor(),
        );
        let guardrails = self.guardrails(excess);
        let violated: Vec<&str> = guardrails
            .iter()
            .filter(|row| row.is_violated)
            .map(|row| row.guardrail.as_str())
            .collect();
        let is_violated = !violated.is_empty();
        let held = self.held(excess);
        let reason = match &held {
            _ if violated.contains(&"refusals") => format!(
                "worse than the stable version: {} (of the candidate's requests {} were refused, of the \
                 baseline's {})",
                violated.join(", "),
                self.candidate.refused,
                self.baseline.refused
            ),
            _ if is_violated => format!("worse than the stable version: {}", violated.join(", ")),
            Some(held) => held.clone(),
            None => format!("{} requests within the guardrails", self.candidate.requests),
        };
        let evidence = Evidence {
            reason,
            candidate: self.candidate.evidence(),
            baseline: self.baseline.evidence(),
            guardrails,
        };
        match held {
            _ if is_violated => Judgement::RollBack(evidence),
            Some(_) => Judgement::Hold(evidence),
            None => Judgement::Pass(evidence),
        }
    }

    /// The candidate's part of events that hit both alike. Keys are what is assigned, and one of them may have many of the
    /// requests: where the candidate has met more than its part of them, it has its events for that.
    fn fair(&self) -> f64 {
        let met = |sample: &Sample| (sample.requests + sample.refused) as f64;
        let (candidate, baseline) = (met(&self.candidate), met(&self.baseline));
        let part = candidate / (candidate + baseline).max(1.0);
        self.weight.max(part).min(FAIR_MAX)
    }

    fn guardrails(&self, excess: Option<Excess>) -> Vec<GuardrailEvidence> {
        let fair = self.fair();
        let limit = (1.0 / self.alpha).ln();
        let row = |guardrail: &str, statistic: &str, value: f64, limit: f64, is_violated| {
            GuardrailEvidence {
                guardrail: guardrail.to_owned(),
                statistic: statistic.to_owned(),
                value,
                limit,
                is_violated,
            }
        };
        let errors = log_e_value(self.candidate.errors, self.baseline.errors, fair);
        let mut rows = vec![row(
            "errors",
            "log_e_value",
            errors,
            limit,
            errors >= limit && self.errors_exceed(),
        )];
        let refused = log_e_value(self.candidate.refused, self.baseline.refused, fair);
        rows.push(row(
            "refusals",
            "log_e_value",
            refused,
            limit,
            refused >= limit && self.refusals_exceed(),
        ));
        let (candidate, baseline) = (&self.candidate.log_latency, &self.baseline.log_latency);
        if candidate.count().min(baseline.count()) >= MEAN_SAMPLES_MIN
            && let Some(bound) = increase_lower_bound(candidate, baseline, self.alpha)
        {
            let at_least = (bound.exp() - 1.0) * 100.0;
            let most = f64::from(self.guardrails.latency_increase_max_percent);
            rows.push(row(
                "latency_mean",
                "increase_percent_at_least",
                at_least,
                most,
                at_least > most,
            ));
        }
        if let Some(slower) = self.slow.log_e_value(fair) {
            let is_sure = excess.is_some_and(|excess| excess.is_sure());
            rows.push(row(
                "latency_p95",
                "log_e_value",
                slower,
                limit,
                slower >= limit && is_sure,
            ));
        }
        rows
    }

    fn errors_exceed(&self) -> bool {
        self.exceeds(self.candidate.error_rate() - self.baseline.error_rate())
    }

    fn refusals_exceed(&self) -> bool {
        self.exceeds(self.candidate.refusal_rate() - self.baseline.refusal_rate())
    }

    fn exceeds(&self, increase: f64) -> bool {
        increase * 10_000.0 > f64::from(self.guardrails.error_increase_max_bp)
    }

    /// Why the step is not passed, if it is not: too few requests, or numbers that are beyond the
    /// guardrails but may yet be chance.
    fn held(&self, excess: Option<Excess>) -> Option<String> {
        let fewest = self.candidate.requests.min(self.baseline.requests);
        if fewest < self.min_samples {
            return Some(format!("{fewest} of {} requests", self.min_samples));
        }
        if self.errors_exceed() {
            return Some("more errors than allowed, which may yet be chance".to_owned());
        }
        if self.refusals_exceed() {
            return Some("more refusals than allowed, which may yet be chance".to_owned());
        }
        let increase = self.candidate.log_latency.mean() - self.baseline.log_latency.mean();
        if increase > self.latency_factor().ln() {
            return Some("more latency than allowed, which may yet be chance".to_owned());
        }
        match excess?.held(fewest, self.min_samples)? {
            Held::Beyond => {
                Some("a longer 95th percentile than allowed, which may yet be chance".to_owned())
            }
            Held::Close(most) => Some(format!(
                "a 95th percentile that may be longer than allowed: {fewest} requests, {most} are waited for at \
                 the most"
            )),
        }
    }
}

/// As much of a text as evidence holds.
#[must_use]
pub fn shortened(text: &str) -> String {
    let mut end = text.len().min(EVIDENCE_TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
#[path = "trial_tests.rs"]
mod tests;
