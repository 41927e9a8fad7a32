//! What an experiment is. These types are rows of a replicated table: fields and variants are appended,
//! never changed.
//!
//! Invariants:
//! 1. A plan is whole before the first request is assigned, and nothing changes it: no command can.
//! 2. Everything is bounded: guardrails, names, and how many keys are counted.

use std::fmt;

use mobula_core::codec;
use mobula_core::error::Rejection;
use mobula_core::id::Incarnation;
use serde::{Deserialize, Serialize};

use super::findings::Findings;
use crate::name;
use crate::serving::rollout::plan::{Cleanup, Served};
use crate::serving::rollout::split::BUCKETS;
use crate::units;

/// Guardrails of a plan. Each makes the others less sensitive, as they share the chance of a false alarm.
pub const GUARDRAILS_MAX: usize = 4;

/// Keys that an experiment counts: a router holds some twenty bytes for each.
pub const SAMPLES_MAX: u64 = 1_000_000;

/// The fewest samples that can come to anything: the intervals hold from fifty of each version on.
const SAMPLES_MIN: u64 = 100;

/// The smallest share of the requests, in basis points: one percent.
const SHARE_MIN_BP: u32 = 100;

/// The largest chance of a false conclusion, in basis points.
const ALPHA_MAX_BP: u32 = 2_000;

/// The longest seed, in bytes.
const SEED_BYTES_MAX: usize = 128;

/// What is measured of a key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Measure {
    /// Whether its first request failed: 1 if it did, else 0.
    ErrorRate,
    /// How long its first request took, if that was answered. Compared by the geometric mean.
    Latency,
    /// What the caller reports under this name.
    Outcome(String),
}

impl Measure {
    /// What a difference between the versions' means is in the unit that people read: itself, or for latencies
    /// the relative difference of the geometric means.
    #[must_use]
    pub fn natural(&self, difference: f64) -> f64 {
        match self {
            Measure::Latency => difference.exp_m1(),
            Measure::ErrorRate | Measure::Outcome(_) => difference,
        }
    }

    /// The inverse of [`Measure::natural`].
    #[must_use]
    pub fn internal(&self, change: f64) -> f64 {
        match self {
            Measure::Latency => change.ln_1p(),
            Measure::ErrorRate | Measure::Outcome(_) => change,
        }
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Measure::ErrorRate => f.write_str("error-rate"),
            Measure::Latency => f.write_str("latency"),
            Measure::Outcome(name) => write!(f, "outcome:{name}"),
        }
    }
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// More is better.
    Up,
    /// Less is better.
    Down,
}

impl Direction {
    /// 1 if more is better, else -1.
    #[must_use]
    pub fn sign(self) -> f64 {
        match self {
            Direction::Up => 1.0,
            Direction::Down => -1.0,
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Up => "up",
            Direction::Down => "down",
        })
    }
}

/// A measure, and which way it is better.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metric {
    /// What is measured.
    pub measure: Measure,
    /// Which way is better.
    pub direction: Direction,
}

impl Metric {
    /// How much better a treatment is that differs so much from the control for the better, in the unit that
    /// means are compared in.
    #[must_use]
    pub fn benefit(&self, change: f64) -> f64 {
        let sign = self.direction.sign();
        sign * self.measure.internal(sign * change)
    }

    /// The same for the worse.
    #[must_use]
    pub fn harm(&self, change: f64) -> f64 {
        let sign = -self.direction.sign();
        sign * self.measure.internal(sign * change)
    }

    /// Whether a change of this size, for the better or the worse, can be at all.
    fn has_change(&self, change: f64) -> bool {
        let most = match self.measure {
            // Nothing is shorter by all of it.
            Measure::Latency => 0.99,
            Measure::ErrorRate => 1.0,
            Measure::Outcome(_) => VALUE_MAX,
        };
        change > 0.0 && change <= most
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.measure, self.direction)
    }
}

/// The largest value of an outcome, and the smallest with a minus: the third powers of differences between two
/// of them, added up a million times, are numbers still.
pub const VALUE_MAX: f64 = 1e12;

/// What the treatment may not do, however good it is otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guardrail {
    /// What it is held against.
    pub metric: Metric,
    /// How much worse than the control it may be: a share of the requests, a part of the latency, or in the
    /// unit of the outcome.
    pub worsening_max: f64,
}

/// What is compared, and by which numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The endpoint.
    pub endpoint: String,
    /// Its model.
    pub model: String,
    /// The endpoint's version, which answers whoever takes no part as well.
    pub control: Served,
    /// The version that it is compared with.
    pub treatment: Served,
    /// The control's share of all keys, in basis points.
    pub control_share_bp: u32,
    /// The treatment's. Who is in neither takes no part.
    pub treatment_share_bp: u32,
    /// What keys are hashed with.
    pub seed: String,
    /// What decides.
    pub primary: Metric,
    /// The smallest difference that is worth anything: a share of the requests, a part of the latency, or in
    /// the unit of the outcome.
    pub effect_min: f64,
    /// What ends the experiment early.
    pub guardrails: Vec<Guardrail>,
    /// The chance of a false conclusion, in basis points.
    pub alpha_bp: u32,
    /// After so many values of the primary metric, of both versions together, the experiment ends undecided.
    pub samples_max: u64,
}

impl Plan {
    /// BLAKE3 of the plan: whoever noted it knows later that the plan is the same.
    #[must_use]
    pub fn digest(&self) -> String {
        blake3::hash(&codec::encode_plain(self))
            .to_hex()
            .to_string()
    }

    /// What is measured, the primary metric's first, each once.
    #[must_use]
    pub fn measures(&self) -> Vec<Measure> {
        let mut measures = vec![self.primary.measure.clone()];
        for guardrail in &self.guardrails {
            if !measures.contains(&guardrail.metric.measure) {
                measures.push(guardrail.metric.measure.clone());
            }
        }
        measures
    }

    /// In which of the fields that a client gives another plan differs, for a refusal that says so.
    #[must_use]
    pub fn differences(&self, other: &Plan) -> Vec<&'static str> {
        let fields = [
            ("treatment", self.treatment != other.treatment),
            (
                "split",
                self.control_share_bp != other.control_share_bp
                    || self.treatment_share_bp != other.treatment_share_bp,
            ),
            ("seed", self.seed != other.seed),
            ("primary metric", self.primary != other.primary),
            ("minimum effect", self.effect_min != other.effect_min),
            ("guardrails", self.guardrails != other.guardrails),
            ("alpha", self.alpha_bp != other.alpha_bp),
            ("maximal samples", self.samples_max != other.samples_max),
        ];
        let changed = fields.iter().filter(|(_, differs)| *differs);
        changed.map(|(name, _)| *name).collect()
    }

    /// Refuses a plan that cannot be followed.
    pub(super) fn check(&self) -> Result<(), Rejection> {
        let (control, treatment) = (self.control_share_bp, self.treatment_share_bp);
        let is_split = control >= SHARE_MIN_BP
            && treatment >= SHARE_MIN_BP
            && control.saturating_add(treatment) <= BUCKETS;
        if !is_split {
            return Err(Rejection::invalid(format!(
                "shares of {control} and {treatment} basis points (`--split`) are not possible: give each \
                 {SHARE_MIN_BP} at least, and {BUCKETS} at the most together"
            )));
        }
        if self.seed.is_empty() || self.seed.len() > SEED_BYTES_MAX {
            return Err(Rejection::invalid(format!(
                "a seed (`--seed`) has 1 to {SEED_BYTES_MAX} bytes, this one {}",
                self.seed.len()
            )));
        }
        if !(1..=ALPHA_MAX_BP).contains(&self.alpha_bp) {
            return Err(Rejection::invalid(format!(
                "a chance of {} for a false conclusion (`--alpha`) is not possible: give {} to {}",
                units::share(self.alpha_bp),
                units::share(1),
                units::share(ALPHA_MAX_BP)
            )));
        }
        if !(SAMPLES_MIN..=SAMPLES_MAX).contains(&self.samples_max) {
            return Err(Rejection::invalid(format!(
                "{} samples (`--max-samples`) are not possible: ask for {SAMPLES_MIN} to {SAMPLES_MAX}",
                self.samples_max
            )));
        }
        if self.guardrails.len() > GUARDRAILS_MAX {
            return Err(Rejection::invalid(format!(
                "{} guardrails (`--guardrail`) are too many: name {GUARDRAILS_MAX} at the most",
                self.guardrails.len()
            )));
        }
        self.check_metrics()
    }

    fn check_metrics(&self) -> Result<(), Rejection> {
        let primary = (&self.primary, self.effect_min, "--min-effect");
        let others = self
            .guardrails
            .iter()
            .map(|guardrail| (&guardrail.metric, guardrail.worsening_max, "--guardrail"));
        for (metric, change, option) in std::iter::once(primary).chain(others) {
            if let Measure::Outcome(name) = &metric.measure {
                name::check("an outcome", name)?;
            }
            if !metric.has_change(change) {
                return Err(Rejection::invalid(format!(
                    "{metric} cannot differ by {change} (`{option}`): give a number above 0, at most 0.99 for latency (a \
                     part of it), 1 for error-rate (a share of the requests), {VALUE_MAX:e} for an outcome"
                )));
            }
        }
        let mut measures: Vec<&Measure> = self
            .guardrails
            .iter()
            .map(|guardrail| &guardrail.metric.measure)
            .collect();
        measures.sort();
        if let Some(twice) = measures.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Rejection::invalid(format!(
                "{} has two guardrails (`--guardrail`): give it one",
                twice[0]
            )));
        }
        Ok(())
    }
}

/// Why an experiment is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The numbers decide.
    Decided,
    /// As many samples as the plan allows decide nothing.
    Exhausted,
    /// The treatment violates a guardrail.
    Guardrail,
    /// The treatment takes or gives something else than the endpoint does.
    Unfit,
    /// A client ended it.
    Stopped,
    /// The treatment answered a row whose answer is known, and wrongly.
    Sentinel,
}

/// An experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Experiment {
    /// Counted from 1 within its endpoint.
    pub number: u64,
    /// What is compared, and how.
    pub plan: Plan,
    /// When it began, in milliseconds since the Unix epoch.
    pub started_ms: u64,
    /// When it ended.
    pub ended_ms: Option<u64>,
    /// Why; absent while it is under way.
    pub ending: Option<Ending>,
    /// The log index of its beginning, then of its end: acknowledgements name it.
    pub revision: u64,
    /// What has become of the treatment's replicas.
    pub cleanup: Cleanup,
    /// How many counts there were, one after the other. A router goes on with that of the one before it; another
    /// one begins where that is lost.
    pub counts: u32,
    /// The router that counts now.
    pub counting: Option<Incarnation>,
    /// When the numbers were reported, in milliseconds since the Unix epoch.
    pub reported_ms: Option<u64>,
    /// The numbers, those of the end once it is over.
    pub findings: Option<Findings>,
    /// The BLAKE3 hash of what they follow from, which the next router goes on with; absent once it is over.
    pub stored: Option<[u8; 32]>,
}

impl Experiment {
    /// Whether both versions answer.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.ending.is_none()
    }

    /// The chance of a false conclusion that the count which is under way may have: half of it for the first,
    /// half of the rest for each that has to begin anew. So the plan's chance holds for all of them together
    /// (Boole's inequality, which asks for no independence), though the same keys come again.
    #[must_use]
    pub fn alpha(&self) -> f64 {
        let halvings = i32::try_from(self.counts.max(1)).unwrap_or(i32::MAX);
        // Far below it nothing is ever concluded, and logarithms need a number above zero.
        (f64::from(self.plan.alpha_bp) / f64::from(BUCKETS) * 0.5f64.powi(halvings)).max(1e-300)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let served = |version| Served {
            version,
            digest: "d".repeat(64),
            size_bytes: 1,
        };
        Plan {
            endpoint: "digits".into(),
            model: "digits".into(),
            control: served(1),
            treatment: served(2),
            control_share_bp: 5_000,
            treatment_share_bp: 5_000,
            seed: "exp".into(),
            primary: outcome("clicks"),
            effect_min: 0.01,
            guardrails: vec![guardrail(Measure::ErrorRate, 0.005)],
            alpha_bp: 500,
            samples_max: 10_000,
        }
    }

    fn outcome(name: &str) -> Metric {
        Metric {
            measure: Measure::Outcome(name.into()),
            direction: Direction::Up,
        }
    }

    fn guardrail(measure: Measure, worsening_max: f64) -> Guardrail {
        let metric = Metric {
            measure,
            direction: Direction::Down,
        };
        Guardrail {
            metric,
            worsening_max,
        }
    }

    #[test]
    fn plans_that_cannot_be_followed_are_refused() {
        type Change = fn(&mut Plan);
        let changes: [(Change, &str); 10] = [
            (
                |plan| plan.control_share_bp = 9_000,
                "10000 at the most together",
            ),
            (
                |plan| plan.treatment_share_bp = 10,
                "give each 100 at least",
            ),
            (
                |plan| plan.alpha_bp = 5_000,
                "a chance of 0.5 for a false conclusion (`--alpha`) is not possible: give 0.0001 to 0.2",
            ),
            (
                |plan| plan.samples_max = 99,
                "99 samples (`--max-samples`) are not possible: ask for 100 to 1000000",
            ),
            (|plan| plan.effect_min = 0.0, "differ by 0 (`--min-effect`)"),
            (|plan| plan.effect_min = f64::NAN, "cannot differ by NaN"),
            (|plan| plan.seed.clear(), "(`--seed`) has 1 to 128 bytes"),
            (
                |plan| plan.primary = outcome("a b"),
                "cannot name an outcome",
            ),
            (
                |plan| plan.guardrails = vec![guardrail(Measure::Latency, 1.5)],
                "cannot differ by 1.5 (`--guardrail`)",
            ),
            (
                |plan| plan.guardrails = vec![guardrail(Measure::Latency, 0.1); 2],
                "latency has two guardrails (`--guardrail`)",
            ),
        ];
        assert_eq!(plan().check(), Ok(()));
        for (change, reason) in changes {
            let mut plan = plan();
            change(&mut plan);
            let refused = plan.check().unwrap_err();
            assert!(refused.message.contains(reason), "{refused}");
        }
        let many = Plan {
            guardrails: vec![guardrail(Measure::ErrorRate, 0.1); GUARDRAILS_MAX + 1],
            ..plan()
        };
        assert!(
            many.check()
                .unwrap_err()
                .message
                .contains("name 4 at the most")
        );
    }

    #[test]
    fn a_part_of_a_latency_is_more_for_the_better_than_for_the_worse() {
        let latency = guardrail(Measure::Latency, 0.1).metric;
        assert!((latency.benefit(0.1) + 0.9f64.ln()).abs() < 1e-12);
        assert!((latency.harm(0.1) - 1.1f64.ln()).abs() < 1e-12);
        let clicks = outcome("clicks");
        assert_eq!((clicks.benefit(0.1), clicks.harm(0.1)), (0.1, 0.1));
    }

    #[test]
    fn another_plan_has_another_digest() {
        let other = Plan {
            alpha_bp: 501,
            ..plan()
        };
        assert_eq!(plan().digest().len(), 64);
        assert_ne!(plan().digest(), other.digest());
        assert_eq!(plan().differences(&other), ["alpha"]);
    }
}
