//! What the candidate and an equally large part of the stable version's requests came to in one step,
//! and what follows from it.
//!
//! Invariants:
//! 1. Both sides are counted over the same time: nothing is counted while the candidate does not answer.
//! 2. A step is passed only after enough requests of both sides; without requests it stays where it is.
//! 3. The chance that a version which is no worse is rolled back is divided among steps and guardrails,
//!    so that it holds for the whole rollout.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::plan::Guardrails;
use super::sequential::{Moments, increase_lower_bound, log_e_value};
use super::split::Side;

/// Guardrails of a step: errors, refusals, mean latency, 95th percentile.
const GUARDRAILS: f64 = 4.0;

/// Answers of the baseline from which the 95th percentile is taken that both sides are then held
/// against. The test needs a threshold that does not depend on what it counts.
const TAIL_WARM_UP: usize = 100;

/// Answers of each side before means are compared: the bound on them is asymptotic.
const MEAN_SAMPLES_MIN: u64 = 50;

/// Buckets of a latency histogram, each five percent wider than the one before: up to 20 s.
const LATENCY_BUCKETS: usize = 345;
const LATENCY_BUCKET_GROWTH: f64 = 1.05;

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
    /// The 95th percentile, in microseconds, to five percent.
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
    /// As many requests to the stable version, over the same time.
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
    histogram: Vec<u64>,
    /// Answers beyond the threshold, since there is one.
    slow: u64,
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
            histogram: vec![0; LATENCY_BUCKETS],
            slow: 0,
        }
    }

    /// Counts a request; how long an answer took, in microseconds.
    pub(in crate::serving) fn record(&mut self, outcome: Outcome<'_>) -> Option<f64> {
        let latency_us = match outcome {
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
            Outcome::Answered(latency) => (latency.as_secs_f64() * 1e6).max(1.0),
        };
        self.requests += 1;
        self.log_latency.add(latency_us.ln());
        let bucket = (latency_us.ln() / LATENCY_BUCKET_GROWTH.ln()) as usize;
        self.histogram[bucket.min(LATENCY_BUCKETS - 1)] += 1;
        Some(latency_us)
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

    fn p95_us(&self) -> u64 {
        let total: u64 = self.histogram.iter().sum();
        let rank = (total * 95).div_ceil(100).max(1);
        let mut seen = 0;
        let found = self.histogram.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        found.map_or(0, |at| {
            LATENCY_BUCKET_GROWTH.powi(at as i32 + 1).round() as u64
        })
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
            latency_p95_us: self.p95_us(),
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
    candidate: Sample,
    baseline: Sample,
    /// The baseline's first latencies, in microseconds, until there is a threshold.
    warm_up_us: Vec<f64>,
    slow_from_us: Option<f64>,
}

impl Trial {
    /// A trial without requests, one of `judged_steps` in its rollout.
    #[must_use]
    pub fn new(guardrails: Guardrails, min_samples: u64, judged_steps: u32) -> Self {
        let share = f64::from(judged_steps.max(1)) * GUARDRAILS;
        Trial {
            guardrails,
            min_samples,
            alpha: f64::from(guardrails.false_rollback_max_bp) / 10_000.0 / share,
            candidate: Sample::new(),
            baseline: Sample::new(),
            warm_up_us: Vec::new(),
            slow_from_us: None,
        }
    }

    fn latency_factor(&self) -> f64 {
        1.0 + f64::from(self.guardrails.latency_increase_max_percent) / 100.0
    }

    /// Counts a request; those that are not compared are not.
    pub fn record(&mut self, side: Side, outcome: Outcome<'_>) {
        let factor = self.latency_factor();
        let slow_from_us = self.slow_from_us;
        let (sample, allowance) = match side {
            Side::Candidate => (&mut self.candidate, factor),
            Side::Baseline => (&mut self.baseline, 1.0),
            Side::CandidateUncompared | Side::Stable => return,
        };
        let Some(latency_us) = sample.record(outcome) else {
            return;
        };
        match slow_from_us {
            Some(threshold) => sample.slow += u64::from(latency_us / allowance > threshold),
            None if side == Side::Baseline => self.warm_up(latency_us),
            None => {}
        }
    }

    fn warm_up(&mut self, latency_us: f64) {
        self.warm_up_us.push(latency_us);
        if self.warm_up_us.len() < TAIL_WARM_UP {
            return;
        }
        let mut sorted = std::mem::take(&mut self.warm_up_us);
        sorted.sort_by(f64::total_cmp);
        self.slow_from_us = Some(sorted[TAIL_WARM_UP * 95 / 100 - 1]);
    }

    /// What follows from what was counted so far. It may be asked as often as one likes.
    #[must_use]
    pub fn judge(&self) -> Judgement {
        let guardrails = self.guardrails();
        let violated: Vec<&str> = guardrails
            .iter()
            .filter(|row| row.is_violated)
            .map(|row| row.guardrail.as_str())
            .collect();
        let is_violated = !violated.is_empty();
        let held = self.held();
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

    fn guardrails(&self) -> Vec<GuardrailEvidence> {
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
        let errors = log_e_value(self.candidate.errors, self.baseline.errors);
        let mut rows = vec![row(
            "errors",
            "log_e_value",
            errors,
            limit,
            errors >= limit && self.errors_exceed(),
        )];
        let refused = log_e_value(self.candidate.refused, self.baseline.refused);
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
        if self.slow_from_us.is_some() {
            let tail = log_e_value(self.candidate.slow, self.baseline.slow);
            rows.push(row(
                "latency_p95",
                "log_e_value",
                tail,
                limit,
                tail >= limit,
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
    fn held(&self) -> Option<String> {
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
        None
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
