//! Measuring on held-out samples as a job goes, and stopping early.
//!
//! Invariants:
//! 1. Whether a job stops at a step depends only on what was measured at that step and before, and those
//!    numbers are functions of the weights: so it stops at the same step however it was run.
//! 2. [`Watch`] is all that is carried from one evaluation to the next. A driver that goes on from a
//!    state later than its watch knows would judge with a gap, so [`Watch::covers`] says whether it may.

use serde::{Deserialize, Serialize};

use super::trainable::Evaluation;
use super::validation::{InvalidField, check};

/// Evaluations without an improvement that a job may wait for, at most.
const PATIENCE_MAX: u32 = 10_000;

/// Characters of a metric's name, at most.
pub(super) const METRIC_LEN_MAX: usize = 64;

/// When to measure, and when to stop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSpec {
    /// Measures after each so many steps.
    pub every_steps: u64,
    /// Stops early; absent: takes all steps.
    #[serde(default)]
    pub early_stop: Option<EarlyStopSpec>,
}

/// When to stop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopSpec {
    /// What is watched: `loss`, or a metric of the model such as `accuracy`.
    #[serde(default = "loss")]
    pub metric: String,
    /// Whether less of it is better; absent: yes for `loss`, no for everything else.
    #[serde(default)]
    pub lower_is_better: Option<bool>,
    /// Stops after so many evaluations in a row that were no improvement.
    pub patience: u32,
    /// By how much it must be better to count as an improvement.
    #[serde(default)]
    pub min_delta: f64,
}

fn loss() -> String {
    "loss".to_owned()
}

/// Whether less of `metric` is better, where that was `said` or is usual: yes for `loss`, no for everything else.
#[must_use]
pub fn lower_is_better(metric: &str, said: Option<bool>) -> bool {
    said.unwrap_or(metric == "loss")
}

impl EvaluationSpec {
    /// Checks the values against their limits.
    pub(super) fn check(&self) -> Result<(), InvalidField> {
        check(
            "every_steps",
            self.every_steps,
            self.every_steps >= 1,
            "at least one step lies between evaluations".to_owned(),
            "give 1 or more",
        )?;
        let Some(stop) = &self.early_stop else {
            return Ok(());
        };
        check(
            "patience",
            stop.patience,
            (1..=PATIENCE_MAX).contains(&stop.patience),
            format!("1 to {PATIENCE_MAX} evaluations are waited for"),
            "5 is usual",
        )?;
        check(
            "min_delta",
            stop.min_delta,
            stop.min_delta.is_finite() && stop.min_delta >= 0.0,
            "it is 0 or more".to_owned(),
            "leave it out for 0",
        )?;
        check(
            "metric",
            &stop.metric,
            (1..=METRIC_LEN_MAX).contains(&stop.metric.len()),
            format!("a metric has a name of 1 to {METRIC_LEN_MAX} characters"),
            "loss, or accuracy where samples have classes",
        )
    }

    /// Whether the model is measured after `step` steps.
    #[must_use]
    pub fn is_due(&self, step: u64) -> bool {
        step > 0 && step.is_multiple_of(self.every_steps)
    }

    /// After how many steps it is measured next, where `step` were taken.
    #[must_use]
    pub fn next_due(&self, step: u64) -> u64 {
        (step / self.every_steps + 1) * self.every_steps
    }
}

/// What is known of the evaluations so far.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Watch {
    /// Steps taken when it was measured last; 0 before.
    pub step: u64,
    /// The best value of the watched metric, and after how many steps it was measured.
    pub best: Option<(f64, u64)>,
    /// Evaluations since then.
    pub since_best: u32,
    /// Whether it is time to stop.
    pub stop: bool,
}

/// A metric is not among what the model measures.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{who} watches {metric}, which this model does not measure; it measures {known}")]
pub struct UnknownMetric {
    who: &'static str,
    metric: String,
    known: String,
}

/// The value of `metric`, which `who` in a job's description asks for.
pub fn measured_as(
    who: &'static str,
    metric: &str,
    measured: &Evaluation,
) -> Result<f64, UnknownMetric> {
    measured.get(metric).ok_or_else(|| {
        let mut known = vec!["loss"];
        known.extend(measured.metrics.keys().map(String::as_str));
        UnknownMetric {
            who,
            metric: metric.to_owned(),
            known: known.join(", "),
        }
    })
}

impl Watch {
    /// Takes note of what was measured after `step` steps.
    pub fn note(
        &mut self,
        spec: &EvaluationSpec,
        step: u64,
        measured: &Evaluation,
    ) -> Result<(), UnknownMetric> {
        if step <= self.step {
            // Measured before, by a driver that this one follows.
            return Ok(());
        }
        let Some(rule) = &spec.early_stop else {
            self.step = step;
            return Ok(());
        };
        let value = measured_as("early_stop", &rule.metric, measured)?;
        self.step = step;
        let lower = lower_is_better(&rule.metric, rule.lower_is_better);
        // What is no number is never better.
        let is_better = match self.best {
            None => !value.is_nan(),
            Some((best, _)) if lower => value < best - rule.min_delta,
            Some((best, _)) => value > best + rule.min_delta,
        };
        if is_better {
            self.best = Some((value, step));
            self.since_best = 0;
        } else {
            self.since_best += 1;
        }
        self.stop = self.since_best >= rule.patience;
        Ok(())
    }

    /// Whether nothing was measured between the last evaluation that this knows of and `step`: then a
    /// driver may go on from there.
    #[must_use]
    pub fn covers(&self, spec: &EvaluationSpec, step: u64) -> bool {
        // The evaluation at `step` itself can be made again from the state.
        let last_before = step.saturating_sub(1) / spec.every_steps * spec.every_steps;
        spec.early_stop.is_none() || last_before <= self.step
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn spec(metric: &str, patience: u32, min_delta: f64) -> EvaluationSpec {
        EvaluationSpec {
            every_steps: 10,
            early_stop: Some(EarlyStopSpec {
                metric: metric.into(),
                lower_is_better: None,
                patience,
                min_delta,
            }),
        }
    }

    fn measured(loss: f64, accuracy: f64) -> Evaluation {
        Evaluation {
            loss,
            metrics: BTreeMap::from([("accuracy".to_owned(), accuracy)]),
        }
    }

    #[test]
    fn it_stops_after_the_patience_is_over_and_not_before() {
        let rule = spec("loss", 2, 0.0);
        let mut watch = Watch::default();
        let losses = [3.0, 2.0, 2.0, 1.5, 1.6, f64::NAN];
        let mut stops = Vec::new();
        for (index, loss) in losses.into_iter().enumerate() {
            let step = 10 * (index as u64 + 1);
            watch.note(&rule, step, &measured(loss, 0.0)).unwrap();
            stops.push(watch.stop);
        }
        assert_eq!(stops, [false, false, false, false, false, true]);
        assert_eq!(watch.best, Some((1.5, 40)));
    }

    #[test]
    fn accuracy_must_grow_by_the_least_difference() {
        let rule = spec("accuracy", 1, 0.01);
        let mut watch = Watch::default();
        watch.note(&rule, 10, &measured(0.0, 0.5)).unwrap();
        watch.note(&rule, 20, &measured(0.0, 0.6)).unwrap();
        assert!(!watch.stop);
        // Said again, as by a driver that was started again: nothing changes.
        watch.note(&rule, 20, &measured(0.0, 0.6)).unwrap();
        assert!(!watch.stop);
        watch.note(&rule, 30, &measured(0.0, 0.605)).unwrap();
        assert!(watch.stop);
    }

    #[test]
    fn a_gap_in_what_was_measured_is_seen() {
        let rule = spec("loss", 3, 0.0);
        let mut watch = Watch::default();
        for (step, expected) in [(0, true), (10, true), (11, false), (25, false)] {
            assert_eq!(watch.covers(&rule, step), expected, "{step}");
        }
        watch.note(&rule, 10, &measured(1.0, 0.0)).unwrap();
        assert!(watch.covers(&rule, 20) && !watch.covers(&rule, 21));
        let never = EvaluationSpec {
            early_stop: None,
            ..rule
        };
        assert!(watch.covers(&never, 1000));
        assert!(never.is_due(20) && !never.is_due(0) && !never.is_due(15));
        assert_eq!([0, 9, 10].map(|step| never.next_due(step)), [10, 10, 20]);
    }

    #[test]
    fn a_metric_that_nobody_measures_is_named() {
        let error = Watch::default()
            .note(&spec("f1", 3, 0.0), 10, &measured(1.0, 0.5))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "early_stop watches f1, which this model does not measure; it measures loss, accuracy"
        );
    }

    #[test]
    fn values_outside_their_limits_are_named() {
        let cases = [
            (
                EvaluationSpec {
                    every_steps: 0,
                    early_stop: None,
                },
                "every_steps is 0",
            ),
            (spec("loss", 0, 0.0), "patience is 0"),
            (spec("loss", 1, f64::NAN), "min_delta is NaN"),
            (spec("", 1, 0.0), "metric is "),
        ];
        for (spec, expected) in cases {
            let error = spec.check().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
