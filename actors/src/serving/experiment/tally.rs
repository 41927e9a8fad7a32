//! Which keys met which version, what came of them, and what follows.
//!
//! Invariants:
//! 1. A key counts once: with its first request, and with the first value that is reported of it under each
//!    name, for the version that it met. Keys are what is assigned at random, so only they are independent.
//! 2. At most [`SAMPLES_MAX`] keys are held; later ones are not counted, and how many that were is said.
//! 3. Nothing is concluded while the groups do not have the sizes that they should. Guardrails hold all the same.

pub(in crate::serving::experiment) mod stored;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use serde::{Deserialize, Serialize};

use super::analysis::{VALUES_MIN, are_enough, difference, ratio, shown};
use super::findings::{Decision, Findings, GuardrailFinding, Measured, Ratio, Values};
use super::plan::{Ending, Guardrail, Measure, Plan, SAMPLES_MAX, VALUE_MAX};
use crate::serving::rollout::sequential::{Moments, increase_lower_bound, log_e_value};
use crate::serving::rollout::split::{BUCKETS, bucket};
use crate::serving::rollout::trial::{Outcome, shortened};

/// The version that a key meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// The endpoint's.
    Control,
    /// The one that it is compared with.
    Treatment,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A key, by a hash of it.
    Key(u64),
    /// A request without one, which is a unit of its own.
    Request,
}

impl Unit {
    /// The unit of a key. Two of a million keys are taken for one another in one of ten million experiments.
    #[must_use]
    pub fn of(key: &str) -> Self {
        let hash = blake3::hash(key.as_bytes());
        let first = hash.as_bytes().first_chunk();
        Unit::Key(u64::from_le_bytes(*first.expect("a hash has 32 bytes")))
    }
}

/// Which version a key meets; `None` if it takes no part.
#[must_use]
pub fn variant(plan: &Plan, key: &str) -> Option<Variant> {
    match bucket(&plan.seed, key) {
        bucket if bucket < plan.treatment_share_bp => Some(Variant::Treatment),
        bucket if bucket >= BUCKETS.saturating_sub(plan.control_share_bp) => Some(Variant::Control),
        _ => None,
    }
}

/// Why a reported value is not counted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotCounted {
    /// The plan has no such outcome.
    #[error("the experiment does not measure an outcome `{name}`: it measures {known}")]
    NotMeasured {
        /// What was reported.
        name: String,
        /// What could be.
        known: String,
    },
    /// There are several, and none was named.
    #[error("the experiment measures {known}: say which of them this is")]
    NotNamed {
        /// What could be reported.
        known: String,
    },
    /// The key has met neither version.
    #[error(
        "no request with this key is counted: send it in the header x-mobula-key of a request first (the last \
         seconds of a router that was started again are lost, and some keys take no part)"
    )]
    NotExposed,
    /// There is one of this key already.
    #[error("this key has a value of `{name}` already: a key counts once, with the first")]
    Twice {
        /// The outcome.
        name: String,
    },
    /// No number, or a huge one.
    #[error("{value} cannot be counted: give a number of at most 1e12 either way")]
    NoNumber {
        /// What was reported.
        value: String,
    },
}

/// What is known of a key.
#[derive(Debug, Clone, Copy)]
struct Seen {
    variant: Variant,
    /// Whether its first request was answered or failed: one that a full queue refused says nothing.
    is_measured: bool,
    /// The measures that a value was reported of, by their positions.
    reported: u8,
}

/// What both versions have of a measure. Stored: fields are appended, never changed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Sums {
    control: Moments,
    treatment: Moments,
}

impl Sums {
    fn of(&mut self, variant: Variant) -> &mut Moments {
        match variant {
            Variant::Control => &mut self.control,
            Variant::Treatment => &mut self.treatment,
        }
    }

    fn counts(&self) -> (u64, u64) {
        (self.control.count(), self.treatment.count())
    }
}

/// What a router has counted of an experiment.
#[derive(Debug, Clone)]
pub struct Tally {
    plan: Plan,
    /// The chance of a false conclusion that this count may have.
    alpha: f64,
    measures: Vec<Measure>,
    /// In the order of `measures`.
    sums: Vec<Sums>,
    seen: HashMap<u64, Seen>,
    /// Keys, and requests without one.
    exposed: (u64, u64),
    /// Failed requests, for the guardrail on errors.
    failed: (u64, u64),
    uncounted: u64,
}

impl Tally {
    /// Nothing counted so far.
    #[must_use]
    pub fn new(plan: Plan, alpha: f64) -> Self {
        let measures = plan.measures();
        Tally {
            sums: vec![Sums::default(); measures.len()],
            measures,
            plan,
            alpha,
            seen: HashMap::new(),
            exposed: (0, 0),
            failed: (0, 0),
            uncounted: 0,
        }
    }

    /// Keys and requests without one that were counted.
    #[must_use]
    pub fn exposed(&self) -> u64 {
        self.exposed.0 + self.exposed.1
    }

    /// Keys, requests without one, and values: more of them with all that changes what follows.
    #[must_use]
    pub fn counted(&self) -> u64 {
        let values = self.sums.iter().map(Sums::counts);
        let values = values.map(|(control, treatment)| control + treatment);
        self.exposed() + values.sum::<u64>()
    }

    /// Counts a request and what came of it.
    pub fn record(&mut self, unit: Unit, variant: Variant, outcome: Outcome<'_>) {
        let is_measured = !matches!(outcome, Outcome::Refused);
        let is_new = match unit {
            Unit::Request => true,
            Unit::Key(key) => {
                let is_full = self.seen.len() as u64 >= SAMPLES_MAX;
                match self.seen.entry(key) {
                    Entry::Occupied(mut known) => {
                        let known = known.get_mut();
                        if known.is_measured || !is_measured {
                            return;
                        }
                        known.is_measured = true;
                        false
                    }
                    Entry::Vacant(_) if is_full => {
                        self.uncounted += 1;
                        return;
                    }
                    Entry::Vacant(place) => {
                        place.insert(Seen {
                            variant,
                            is_measured,
                            reported: 0,
                        });
                        true
                    }
                }
            }
        };
        if is_new {
            *of(&mut self.exposed, variant) += 1;
        }
        let (failed, latency) = match outcome {
            Outcome::Refused => return,
            Outcome::Failed(_) => (true, None),
            // Below a microsecond the clock says little.
            Outcome::Answered(latency) => (false, Some((latency.as_secs_f64() * 1e6).max(1.0))),
        };
        *of(&mut self.failed, variant) += u64::from(failed);
        self.add(&Measure::ErrorRate, variant, f64::from(u8::from(failed)));
        if let Some(latency_us) = latency {
            self.add(&Measure::Latency, variant, latency_us.ln());
        }
    }

    /// Counts a value that a caller reports of a key, under a name if there are several; the version that it
    /// counts for.
    pub fn report(
        &mut self,
        key: &str,
        name: Option<&str>,
        value: f64,
    ) -> Result<Variant, NotCounted> {
        let (at, name) = self.outcome(name)?;
        if !value.is_finite() || value.abs() > VALUE_MAX {
            return Err(NotCounted::NoNumber {
                value: value.to_string(),
            });
        }
        let Unit::Key(key) = Unit::of(key) else {
            return Err(NotCounted::NotExposed);
        };
        let seen = self.seen.get_mut(&key).ok_or(NotCounted::NotExposed)?;
        if seen.reported & (1 << at) != 0 {
            return Err(NotCounted::Twice { name });
        }
        seen.reported |= 1 << at;
        let variant = seen.variant;
        self.sums[at].of(variant).add(value);
        Ok(variant)
    }

    /// The position and name of an outcome.
    fn outcome(&self, wanted: Option<&str>) -> Result<(usize, String), NotCounted> {
        let outcomes: Vec<(usize, &String)> = self
            .measures
            .iter()
            .enumerate()
            .filter_map(|(at, measure)| match measure {
                Measure::Outcome(name) => Some((at, name)),
                Measure::ErrorRate | Measure::Latency => None,
            })
            .collect();
        let names: Vec<&str> = outcomes.iter().map(|(_, name)| name.as_str()).collect();
        let known = if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        };
        let found = match (wanted, outcomes.as_slice()) {
            (None, [only]) => Some(only),
            (None, [_, ..]) => return Err(NotCounted::NotNamed { known }),
            (None, []) => None,
            (Some(wanted), outcomes) => outcomes.iter().find(|(_, name)| *name == wanted),
        };
        let (at, name) = found.ok_or_else(|| NotCounted::NotMeasured {
            name: shortened(wanted.unwrap_or_default()),
            known,
        })?;
        Ok((*at, (*name).clone()))
    }

    fn add(&mut self, measure: &Measure, variant: Variant, value: f64) {
        let position = self.measures.iter().position(|known| known == measure);
        if let Some(at) = position {
            self.sums[at].of(variant).add(value);
        }
    }

    fn sums(&self, measure: &Measure) -> &Sums {
        let position = self.measures.iter().position(|known| known == measure);
        &self.sums[position.expect("the plan's measures are all counted")]
    }

    /// What follows from what was counted so far, and whether the experiment is over with it. It may be asked
    /// as often as one likes.
    #[must_use]
    pub fn judge(&self) -> (Option<Ending>, Findings) {
        let ratios = self.ratios();
        let guardrails = self.guardrails();
        let (ending, decision, reason) = self.decide(&ratios, &guardrails);
        let measured = self.measures.iter().zip(&self.sums);
        let findings = Findings {
            decision,
            reason: shortened(&reason),
            ratios,
            measured: measured
                .map(|(measure, sums)| self.measured(measure, sums))
                .collect(),
            guardrails,
            uncounted: self.uncounted,
        };
        (ending, findings)
    }

    fn decide(
        &self,
        ratios: &[Ratio],
        guardrails: &[GuardrailFinding],
    ) -> (Option<Ending>, Decision, String) {
        let violated: Vec<String> = guardrails
            .iter()
            .filter(|row| row.is_violated)
            .map(|row| row.measure.to_string())
            .collect();
        if !violated.is_empty() {
            let reason = format!(
                "the treatment is worse by a guardrail: {}",
                violated.join(", ")
            );
            return (Some(Ending::Guardrail), Decision::Control, reason);
        }
        if let Some(ratio) = ratios.iter().find(|ratio| ratio.is_mismatch) {
            let reason = format!(
                "sample ratio mismatch: {} of the control and {} of the treatment ({}) are no chance (p = \
                 {:.1e}), so the groups are not alike and nothing is concluded",
                ratio.control, ratio.treatment, ratio.of, ratio.p_value
            );
            return (None, Decision::Undecided, reason);
        }
        let metric = &self.plan.primary;
        let sums = self.sums(&metric.measure);
        let samples = sums.control.count() + sums.treatment.count();
        let found = difference(&sums.control, &sums.treatment, self.alpha)
            .filter(|_| are_enough(&sums.control, &sums.treatment));
        let sign = metric.direction.sign();
        let needed = metric.benefit(self.plan.effect_min);
        if let Some(found) = found {
            let (least, most) = if sign > 0.0 {
                (found.lower, found.upper)
            } else {
                (-found.upper, -found.lower)
            };
            // First what the plan asks for: better by less than that is not worth a change.
            if most < needed {
                let reason = format!(
                    "the treatment is not better by {} in {metric}",
                    self.plan.effect_min
                );
                return (Some(Ending::Decided), Decision::Control, reason);
            }
            if least > 0.0 {
                let reason = format!("the treatment is better in {metric}");
                return (Some(Ending::Decided), Decision::Treatment, reason);
            }
        }
        if samples >= self.plan.samples_max {
            let reason = format!("{samples} samples of {metric} decide nothing");
            return (Some(Ending::Exhausted), Decision::Undecided, reason);
        }
        let reason = match found {
            Some(_) => format!("{samples} samples of {metric} may be chance still"),
            None => format!(
                "{samples} samples of {metric} are too few: {VALUES_MIN} of each version at least, more for \
                 what is rare"
            ),
        };
        (None, Decision::Undecided, reason)
    }

    fn ratios(&self) -> Vec<Ratio> {
        let shares = (self.plan.control_share_bp, self.plan.treatment_share_bp);
        let reported = self.measures.iter().zip(&self.sums);
        let reported = reported.filter_map(|(measure, sums)| match measure {
            Measure::Outcome(_) => Some(ratio(&measure.to_string(), sums.counts(), shares)),
            Measure::ErrorRate | Measure::Latency => None,
        });
        std::iter::once(ratio("keys", self.exposed, shares))
            .chain(reported)
            .collect()
    }

    fn measured(&self, measure: &Measure, sums: &Sums) -> Measured {
        let effect = difference(&sums.control, &sums.treatment, self.alpha)
            .filter(|_| are_enough(&sums.control, &sums.treatment));
        let values = |moments: &Moments| Values {
            count: moments.count(),
            mean: match measure {
                Measure::Latency if moments.count() > 0 => moments.mean().exp(),
                _ => moments.mean(),
            },
            deviation: moments.variance().sqrt(),
        };
        Measured {
            measure: measure.clone(),
            control: values(&sums.control),
            treatment: values(&sums.treatment),
            effect: effect.map(|effect| shown(measure, effect)),
        }
    }

    fn guardrails(&self) -> Vec<GuardrailFinding> {
        let guardrails = self.plan.guardrails.iter();
        guardrails
            .filter_map(|guardrail| self.guardrail(guardrail))
            .collect()
    }

    fn guardrail(&self, guardrail: &Guardrail) -> Option<GuardrailFinding> {
        let alpha = self.alpha / self.plan.guardrails.len() as f64;
        let metric = &guardrail.metric;
        let sums = self.sums(&metric.measure);
        let row = |statistic: &str, value, limit, is_violated| GuardrailFinding {
            measure: metric.measure.clone(),
            statistic: statistic.to_owned(),
            value,
            limit,
            is_violated,
        };
        let sign = metric.direction.sign();
        if metric.measure == Measure::ErrorRate && sign < 0.0 {
            // Exact, so a treatment that always fails is found after a dozen requests.
            let shares = (self.plan.control_share_bp, self.plan.treatment_share_bp);
            let fair = f64::from(shares.1) / f64::from(shares.0 + shares.1);
            let value = log_e_value(self.failed.1, self.failed.0, fair);
            let limit = (1.0 / alpha).ln();
            let worse = sums.treatment.mean() - sums.control.mean();
            let is_violated = value >= limit && worse > guardrail.worsening_max;
            return Some(row("log_e_value", value, limit, is_violated));
        }
        if !are_enough(&sums.control, &sums.treatment) {
            return None;
        }
        let (worse, better) = if sign > 0.0 {
            (&sums.control, &sums.treatment)
        } else {
            (&sums.treatment, &sums.control)
        };
        let at_least = increase_lower_bound(worse, better, alpha)?;
        let is_violated = at_least > metric.harm(guardrail.worsening_max);
        let natural = -sign * metric.measure.natural(-sign * at_least);
        Some(row(
            "worsening_at_least",
            natural.clamp(-f64::MAX, f64::MAX),
            guardrail.worsening_max,
            is_violated,
        ))
    }
}

fn of(pair: &mut (u64, u64), variant: Variant) -> &mut u64 {
    match variant {
        Variant::Control => &mut pair.0,
        Variant::Treatment => &mut pair.1,
    }
}

#[cfg(test)]
#[path = "tally_tests.rs"]
mod tests;
