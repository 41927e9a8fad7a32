//! What the numbers of an experiment say. These types are rows of a replicated table: fields and variants are
//! appended, never changed.

use serde::{Deserialize, Serialize};

use super::plan::{GUARDRAILS_MAX, Measure};
use crate::serving::rollout::trial::EVIDENCE_TEXT_BYTES_MAX;

/// What follows for the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Nothing yet.
    #[default]
    Undecided,
    /// The control stays: the treatment is not better by what is worth anything, or violates a guardrail.
    Control,
    /// The treatment is better.
    Treatment,
}

/// One version's values of one measure.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Values {
    /// Keys that have one.
    pub count: u64,
    /// Their mean; of latencies the geometric one, in microseconds.
    pub mean: f64,
    /// Their standard deviation; of latencies that of the natural logarithm.
    pub deviation: f64,
}

/// By how much the treatment differs from the control: the difference of the means, of latencies the relative
/// difference of the geometric means.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// As it looks.
    pub estimate: f64,
    /// At least; holds at every look.
    pub lower: f64,
    /// At the most; holds at every look.
    pub upper: f64,
}

/// What was found of a measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What was measured.
    pub measure: Measure,
    /// The control's values.
    pub control: Values,
    /// The treatment's.
    pub treatment: Values,
    /// By how much they differ; absent while there are too few values for it to hold.
    pub effect: Option<Interval>,
}

/// What a guardrail says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardrailFinding {
    /// What it is about.
    pub measure: Measure,
    /// What `value` is: `log_e_value`, or `worsening_at_least`.
    pub statistic: String,
    /// What was found.
    pub value: f64,
    /// From where on it ends the experiment.
    pub limit: f64,
    /// Whether it does.
    pub is_violated: bool,
}

/// Whether the groups have the sizes that the plan's shares make likely.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// What was counted: `keys`, or the outcomes of this name.
    pub of: String,
    /// How many of the control.
    pub control: u64,
    /// How many of the treatment.
    pub treatment: u64,
    /// The chance of sizes that are as far off.
    pub p_value: f64,
    /// Whether that is too small to be chance.
    pub is_mismatch: bool,
}

/// The numbers of an experiment, and what follows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Findings {
    /// What follows.
    pub decision: Decision,
    /// Why, in words.
    pub reason: String,
    /// The sizes of the groups: of their keys, and of each measure that callers report.
    pub ratios: Vec<Ratio>,
    /// What was measured, the primary metric's first.
    pub measured: Vec<Measured>,
    /// Every guardrail that could be computed.
    pub guardrails: Vec<GuardrailFinding>,
    /// Requests of keys that came after as many as a router holds.
    pub uncounted: u64,
}

impl Findings {
    /// Nothing but a reason.
    pub(super) fn because(reason: String) -> Self {
        Findings {
            reason,
            ..Findings::default()
        }
    }

    /// Keys and values that it is about, all together: of two reports of one count, the later one has no fewer.
    #[must_use]
    pub fn counted(&self) -> u64 {
        let groups = self.ratios.iter().map(|row| (row.control, row.treatment));
        let values = self
            .measured
            .iter()
            .map(|row| (row.control.count, row.treatment.count));
        // They are what a host says, whatever it says.
        groups
            .chain(values)
            .fold(self.uncounted, |sum, (control, treatment)| {
                sum.saturating_add(control).saturating_add(treatment)
            })
    }

    /// Whether it is of a size and with numbers that a row may have.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        let measures = self
            .measured
            .iter()
            .map(|row| &row.measure)
            .chain(self.guardrails.iter().map(|row| &row.measure));
        let names = measures.filter_map(|measure| match measure {
            Measure::Outcome(name) => Some(name),
            Measure::ErrorRate | Measure::Latency => None,
        });
        let texts = names
            .chain(self.ratios.iter().map(|row| &row.of))
            .chain(self.guardrails.iter().map(|row| &row.statistic))
            .chain([&self.reason]);
        let values = self.measured.iter().flat_map(|row| {
            let effect = row.effect.map_or([0.0; 3], |effect| {
                [effect.estimate, effect.lower, effect.upper]
            });
            let (control, treatment) = (row.control, row.treatment);
            effect.into_iter().chain([
                control.mean,
                control.deviation,
                treatment.mean,
                treatment.deviation,
            ])
        });
        let mut numbers = values
            .chain(
                self.guardrails
                    .iter()
                    .flat_map(|row| [row.value, row.limit]),
            )
            .chain(self.ratios.iter().map(|row| row.p_value));
        // The primary metric's measure and those of the guardrails, and the keys beside them.
        let most = GUARDRAILS_MAX + 2;
        let lengths = [
            self.ratios.len(),
            self.measured.len(),
            self.guardrails.len(),
        ];
        lengths.iter().all(|length| *length <= most)
            && numbers.all(f64::is_finite)
            && texts
                .into_iter()
                .all(|text| text.len() <= EVIDENCE_TEXT_BYTES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_counted_makes_one_number_whatever_a_host_says() {
        let values = |count| Values {
            count,
            ..Values::default()
        };
        let mut findings = Findings {
            uncounted: 1,
            ratios: vec![Ratio {
                of: "keys".into(),
                control: 10,
                treatment: 20,
                p_value: 1.0,
                is_mismatch: false,
            }],
            measured: vec![Measured {
                measure: Measure::Latency,
                control: values(100),
                treatment: values(200),
                effect: None,
            }],
            ..Findings::default()
        };
        assert_eq!(findings.counted(), 331);
        findings.measured[0].control.count = u64::MAX;
        assert_eq!(findings.counted(), u64::MAX);
    }
}
