//! How the learning rate changes over a job: a function of the step alone.
//!
//! Invariant: rates are computed in `f64` with the functions of [`super::math`], so they have the same
//! bits on every machine, and nothing is carried from step to step.

use serde::{Deserialize, Serialize};

use super::math;
use super::validation::{InvalidField, check};

/// How the learning rate changes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// It does not.
    Constant,
    /// Half a cosine wave, from the full rate at the first step to zero after the last.
    Cosine,
    /// A straight line from zero up to the full rate, then half a cosine wave down to a share of it.
    WarmupCosine {
        /// Steps until the full rate is reached.
        warmup_steps: u64,
        /// The share of the rate that is left after the last step, in [0, 1].
        #[serde(default)]
        floor: f64,
    },
    /// The rate is multiplied by a factor after each so many steps.
    Step {
        /// Steps with the same rate.
        every_steps: u64,
        /// The factor, above 0 and at most 1.
        factor: f64,
    },
}

impl Schedule {
    /// The share of the full rate at `step` (counted from 0) of a job of `steps`.
    #[must_use]
    pub fn share(&self, step: u64, steps: u64) -> f64 {
        match *self {
            Schedule::Constant => 1.0,
            Schedule::Cosine => cosine(step, steps),
            Schedule::WarmupCosine {
                warmup_steps,
                floor,
            } => match step.checked_sub(warmup_steps) {
                // The first step moves already.
                None => (step + 1) as f64 / (warmup_steps + 1) as f64,
                Some(after) => {
                    floor + (1.0 - floor) * cosine(after, steps.saturating_sub(warmup_steps))
                }
            },
            Schedule::Step {
                every_steps,
                factor,
            } => math::power(factor, step / every_steps.max(1)),
        }
    }

    /// Checks the values against their limits, for a job of `steps`.
    pub(super) fn check(&self, steps: u64) -> Result<(), InvalidField> {
        match *self {
            Schedule::Constant | Schedule::Cosine => Ok(()),
            Schedule::WarmupCosine {
                warmup_steps,
                floor,
            } => {
                check(
                    "warmup_steps",
                    warmup_steps,
                    warmup_steps < steps,
                    format!("the rate must reach its height within the {steps} steps of the job"),
                    "a tenth of the steps is usual",
                )?;
                check(
                    "floor",
                    floor,
                    (0.0..=1.0).contains(&floor),
                    "it is a share of the rate, in 0 to 1".to_owned(),
                    "0.1 is usual",
                )
            }
            Schedule::Step {
                every_steps,
                factor,
            } => {
                check(
                    "every_steps",
                    every_steps,
                    every_steps >= 1,
                    "at least one step has the same rate".to_owned(),
                    "a third of the steps is usual",
                )?;
                check(
                    "factor",
                    factor,
                    factor > 0.0 && factor <= 1.0,
                    "it is above 0 and at most 1".to_owned(),
                    "0.1 is usual",
                )
            }
        }
    }
}

/// From one at the beginning to zero at the end, as half a cosine wave.
fn cosine(step: u64, steps: u64) -> f64 {
    let part = step.min(steps) as f64 / steps.max(1) as f64;
    0.5 * (1.0 + math::cos_turns(part * 0.5))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(schedule: Schedule, at: [u64; 4]) -> [f64; 4] {
        at.map(|step| schedule.share(step, 100))
    }

    fn close(found: [f64; 4], expected: [f64; 4]) {
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn each_schedule_has_its_shape() {
        close(shares(Schedule::Constant, [0, 1, 99, 100]), [1.0; 4]);
        close(
            shares(Schedule::Cosine, [0, 50, 100, 1000]),
            [1.0, 0.5, 0.0, 0.0],
        );
        let warmup = Schedule::WarmupCosine {
            warmup_steps: 20,
            floor: 0.2,
        };
        close(
            shares(warmup, [0, 20, 60, 100]),
            [1.0 / 21.0, 1.0, 0.6, 0.2],
        );
        let step = Schedule::Step {
            every_steps: 30,
            factor: 0.5,
        };
        close(shares(step, [0, 29, 30, 99]), [1.0, 1.0, 0.5, 0.125]);
    }

    #[test]
    fn values_outside_their_limits_are_named() {
        for (schedule, expected) in [
            (
                Schedule::WarmupCosine {
                    warmup_steps: 100,
                    floor: 0.0,
                },
                "warmup_steps is 100",
            ),
            (
                Schedule::WarmupCosine {
                    warmup_steps: 1,
                    floor: f64::NAN,
                },
                "floor is NaN",
            ),
            (
                Schedule::Step {
                    every_steps: 0,
                    factor: 0.5,
                },
                "every_steps is 0",
            ),
            (
                Schedule::Step {
                    every_steps: 1,
                    factor: 0.0,
                },
                "factor is 0",
            ),
        ] {
            let error = schedule.check(100).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn toml_spells_them_as_words_or_tables() {
        #[derive(Deserialize)]
        struct File {
            schedule: Schedule,
        }
        let read = |text: &str| toml::from_str::<File>(text).map(|file| file.schedule);
        assert_eq!(read("schedule = \"cosine\"").unwrap(), Schedule::Cosine);
        assert_eq!(
            read("[schedule.warmup_cosine]\nwarmup_steps = 3\n").unwrap(),
            Schedule::WarmupCosine {
                warmup_steps: 3,
                floor: 0.0
            }
        );
        assert!(read("[schedule.step]\nevery_steps = 3\nfactor = 0.5\nx = 1\n").is_err());
    }
}
