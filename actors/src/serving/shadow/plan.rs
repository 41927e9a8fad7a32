//! How a candidate is shadowed. These types are rows of a replicated table: fields and variants are appended,
//! never changed.

use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

/// Outputs with a rule of their own: more than a model has.
pub const OUTPUTS_MAX: usize = 32;

/// The longest name of an output, in bytes.
const OUTPUT_NAME_BYTES_MAX: usize = 256;

/// The largest number of comparisons that a step may ask for, as of samples.
const SAMPLES_MAX: u64 = 1_000_000;

/// When two values of an output are the same. Integers, truth values and bytes are compared exactly by the first
/// two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Numbers whose difference is at most `absolute + relative · |what the caller got|`.
    Close {
        /// In the unit of the values.
        absolute: f64,
        /// As a part of what the caller got.
        relative: f64,
    },
    /// Numbers with so many others of their type between them at the most.
    Ulps(u32),
    /// Rows whose so many largest values are at the same positions, in the same order.
    Top(u32),
    /// Anything.
    Ignore,
}

impl Rule {
    /// Why nothing can be compared by it, if nothing can.
    fn fault(self) -> Option<String> {
        match self {
            Rule::Close { absolute, relative } => {
                let is_tolerance = |value: f64| value.is_finite() && value >= 0.0;
                let is_possible = is_tolerance(absolute) && is_tolerance(relative);
                (!is_possible).then(|| {
                    format!(
                        "a tolerance of {absolute} (`--atol`) and of {relative} (`--rtol`) is no rule: give numbers of 0 or more"
                    )
                })
            }
            Rule::Top(0) => Some(
                "to compare the 0 largest values (`--top-k`) is no rule: give 1 at least"
                    .to_owned(),
            ),
            Rule::Top(_) | Rule::Ulps(_) | Rule::Ignore => None,
        }
    }
}

/// How a candidate is shadowed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Of how many of a hundred keys the requests are copied.
    pub percent: u32,
    /// How many answers must have been compared before the step is passed.
    pub samples: u64,
    /// How many of ten thousand answers may differ.
    pub mismatch_max_bp: u32,
    /// When two values are the same, of outputs that have no rule of their own.
    pub rule: Rule,
    /// Outputs with a rule of their own.
    pub outputs: Vec<(String, Rule)>,
}

impl Plan {
    /// When two values of an output are the same.
    #[must_use]
    pub fn rule_of(&self, output: &str) -> Rule {
        let own = self.outputs.iter().find(|(name, _)| name == output);
        own.map_or(self.rule, |(_, rule)| *rule)
    }

    /// Refuses what cannot be followed.
    pub(in crate::serving) fn check(&self) -> Result<(), Rejection> {
        if !(1..=100).contains(&self.percent) {
            return Err(Rejection::invalid(format!(
                "a shadow of {} percent (`--shadow-percent`) is not possible: give 1 to 100 percent",
                self.percent
            )));
        }
        if !(1..=SAMPLES_MAX).contains(&self.samples) {
            return Err(Rejection::invalid(format!(
                "a shadow of {} samples (`--shadow-samples`) is not possible: give 1 to {SAMPLES_MAX} samples",
                self.samples
            )));
        }
        if self.mismatch_max_bp >= 10_000 {
            return Err(Rejection::invalid(format!(
                "{} basis points of answers that may differ (`--max-mismatch-bp`) are all: give fewer than 10000",
                self.mismatch_max_bp
            )));
        }
        if self.outputs.len() > OUTPUTS_MAX {
            return Err(Rejection::invalid(format!(
                "{} outputs with a rule of their own (`--top-k`, `--ignore-output`) are too many: name {OUTPUTS_MAX} at the most",
                self.outputs.len()
            )));
        }
        let names = self.outputs.iter().map(|(name, _)| name);
        if let Some(long) = names
            .into_iter()
            .find(|name| name.len() > OUTPUT_NAME_BYTES_MAX)
        {
            return Err(Rejection::invalid(format!(
                "the name of an output (`--top-k`, `--ignore-output`) has {} bytes: give {OUTPUT_NAME_BYTES_MAX} at the most",
                long.len()
            )));
        }
        let mut rules = self
            .outputs
            .iter()
            .map(|(_, rule)| *rule)
            .chain([self.rule]);
        match rules.find_map(Rule::fault) {
            Some(fault) => Err(Rejection::invalid(fault)),
            None => Ok(()),
        }
    }
}
