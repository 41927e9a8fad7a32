//! The update of the parameters: SGD with momentum and AdamW, with state that can be saved.
//!
//! Invariants:
//! 1. An update is elementwise, with one fixed order of operations (`kernels/update.rs`).
//! 2. Scalars (learning rate, bias corrections) are computed in `f64` from the step number alone, so an
//!    optimizer has no state but its moments, which live in [`TrainState`].
//! 3. The gradient's norm is a sum in `f64` within each parameter, in the order of
//!    [`square_sum`], then over parameters in name order.
//! 4. A gradient that is not finite changes nothing and is reported with the parameter's name.
//! 5. Parameters and moments that are not finite are never those of a step that was taken: the update that makes them is
//!    reported with the tensor's name, and who has made it drops the state.

use std::ops::Range;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::math;
use super::model::{ModelError, check_length};
use super::reduction::Partial;
use super::schedule::Schedule;
use super::spec::TrainSpec;
use super::state::{TrainState, tensor_name};
use crate::kernels::Execution;
use crate::kernels::update::{AdamwUpdate, SgdUpdate, square_sum};

/// Where a step's gradient, as the update takes it, has a smaller norm than this, the square of each of its values is below
/// half of the largest `f32`, and so is a mean of such squares: no moment can have overflowed.
const NORM_OF_SAFE_SQUARES: f64 = 1.3e19;

/// Which rule updates the parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum OptimizerSpec {
    /// Stochastic gradient descent with momentum: `m ← momentum·m + g`, `p ← p − rate·m`.
    Sgd {
        /// Share of the old direction that is kept, in `[0, 1)`.
        momentum: f64,
    },
    /// AdamW (Loshchilov and Hutter, ICLR 2019).
    Adamw {
        /// Decay of the mean, in `[0, 1)`.
        beta1: f64,
        /// Decay of the mean square, in `[0, 1)`.
        beta2: f64,
        /// Added to the root of the mean square.
        epsilon: f64,
    },
}

/// Which parameters weight decay shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decayed {
    /// Every one.
    #[default]
    All,
    /// Those of two dimensions or more: not biases, nor the scales of normalisation.
    Matrices,
}

impl OptimizerSpec {
    /// Vectors of the parameters' size that the optimizer keeps.
    pub fn moment_count(&self) -> usize {
        match self {
            Self::Sgd { .. } => 1,
            Self::Adamw { .. } => 2,
        }
    }
}

/// Why a step could not be taken. The state is unchanged, but for [`StepError::Overflow`].
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A vector of the wrong size.
    #[error(transparent)]
    Length(#[from] ModelError),
    /// The root does not hold the whole batch.
    #[error("the reduced step holds {found} samples where the global batch is {expected}")]
    Count {
        /// Samples needed.
        expected: u64,
        /// Samples given.
        found: u64,
    },
    /// The loss itself has diverged, though its gradients have not.
    #[error(
        "step {step}: the loss is {loss} while all gradients are finite; the loss has diverged, lower the learning rate or set clip_norm"
    )]
    Loss {
        /// The step.
        step: u64,
        /// Its sum.
        loss: f64,
    },
    /// The loss has diverged.
    #[error(
        "step {step}: the gradient of {parameter} is not finite; the loss has diverged, lower the learning rate or set clip_norm"
    )]
    NotFinite {
        /// The step.
        step: u64,
        /// The first such parameter in name order.
        parameter: String,
    },
    /// The update has made a parameter, or a moment of the optimizer, larger than an `f32` can be, or no number. The state
    /// is of no use any more: what has an infinite mean square is never changed again.
    #[error(
        "step {step}: after its update {tensor} is not finite; the loss has diverged, lower the learning rate or set clip_norm"
    )]
    Overflow {
        /// The step.
        step: u64,
        /// The first such parameter in name order; if all of them are finite the first such moment, under the name that it
        /// has in checkpoints.
        tensor: String,
    },
}

impl StepError {
    /// Whether the state cannot be gone on from: the update was made before it was found to be useless.
    #[must_use]
    pub fn spoils_state(&self) -> bool {
        matches!(self, StepError::Overflow { .. })
    }
}

/// What one update did.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct StepReport {
    /// The step taken, counted from 0.
    pub step: u64,
    /// Mean loss of the global batch, before the update.
    pub loss_mean: f64,
    /// Norm of the mean gradient, before clipping.
    pub gradient_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// How long it took here. Everything else is a function of the job and the step.
    pub took: Duration,
}

/// The update rule of a job.
#[derive(Debug, Clone)]
pub struct Optimizer {
    rule: OptimizerSpec,
    schedule: Schedule,
    learning_rate: f64,
    weight_decay: f64,
    clip_norm: Option<f64>,
    steps: u64,
    global_batch: u64,
    layout: Layout,
    /// Neighbouring ranges that cover all values, and whether weight decay shrinks those.
    decayed: Vec<(Range<usize>, bool)>,
}

impl Optimizer {
    /// The update rule that a job asks for, over parameters that lie so.
    pub fn new(spec: &TrainSpec, layout: &Layout) -> Self {
        Self {
            rule: spec.optimizer,
            schedule: spec.schedule,
            learning_rate: spec.learning_rate,
            weight_decay: spec.weight_decay,
            clip_norm: spec.clip_norm,
            steps: spec.steps,
            global_batch: spec.global_batch,
            layout: layout.clone(),
            decayed: decayed_ranges(layout, spec.weight_decay_on),
        }
    }

    /// The learning rate of a step.
    pub fn learning_rate(&self, step: u64) -> f64 {
        self.learning_rate * self.schedule.share(step, self.steps)
    }

    /// Takes one step with the reduced sums of the whole batch, and advances the state's step.
    pub fn step(&self, state: &mut TrainState, root: &Partial) -> Result<StepReport, StepError> {
        let begun = Instant::now();
        let expected = self.layout.value_count();
        check_length("the gradient", expected, root.grads.len())?;
        check_length("the parameter vector", expected, state.params.len())?;
        check_length(
            "the list of moments",
            self.rule.moment_count(),
            state.moments.len(),
        )?;
        for moment in &state.moments {
            check_length("an optimizer moment", expected, moment.len())?;
        }
        if root.count != self.global_batch {
            return Err(StepError::Count {
                expected: self.global_batch,
                found: root.count,
            });
        }
        // The sums become means in one multiplication, after the reduction.
        let mean = 1.0 / self.global_batch as f64;
        let gradient_norm = self.norm(&root.grads, state.step)? * mean;
        if !root.loss_sum.is_finite() {
            return Err(StepError::Loss {
                step: state.step,
                loss: root.loss_sum,
            });
        }
        let clipped = match self.clip_norm {
            Some(limit) if gradient_norm > limit => limit / gradient_norm,
            _ => 1.0,
        };
        let learning_rate = self.learning_rate(state.step);
        let scale = (mean * clipped) as f32;
        let execution = Execution::current();
        match self.rule {
            OptimizerSpec::Sgd { momentum } => {
                let update = SgdUpdate {
                    scale,
                    momentum: momentum as f32,
                    keep: self.keep(learning_rate),
                    rate: learning_rate as f32,
                };
                let (mut params, mut moments) = state.targets();
                let [moments] = &mut moments[..] else {
                    unreachable!("the number of moments was checked above")
                };
                for (part, decays) in &self.decayed {
                    let keep = if *decays { update.keep } else { 1.0 };
                    let update = SgdUpdate { keep, ..update };
                    let (params, moments) =
                        (params.range(part.clone()), moments.range(part.clone()));
                    update.apply(execution, params, moments, &root.grads[part.clone()]);
                }
            }
            OptimizerSpec::Adamw {
                beta1,
                beta2,
                epsilon,
            } => {
                let number = state.step + 1;
                let mean_correction = 1.0 - math::power(beta1, number);
                let square_correction = 1.0 - math::power(beta2, number);
                let update = AdamwUpdate {
                    scale,
                    beta1: beta1 as f32,
                    one_minus_beta1: (1.0 - beta1) as f32,
                    beta2: beta2 as f32,
                    one_minus_beta2: (1.0 - beta2) as f32,
                    epsilon: epsilon as f32,
                    inverse_square_correction: (1.0 / square_correction) as f32,
                    keep: self.keep(learning_rate),
                    rate: (learning_rate / mean_correction) as f32,
                };
                let (mut params, mut moments) = state.targets();
                let [means, squares] = &mut moments[..] else {
                    unreachable!("the number of moments was checked above")
                };
                for (part, decays) in &self.decayed {
                    let keep = if *decays { update.keep } else { 1.0 };
                    let update = AdamwUpdate { keep, ..update };
                    let (means, squares) = (means.range(part.clone()), squares.range(part.clone()));
                    let (params, grads) = (params.range(part.clone()), &root.grads[part.clone()]);
                    update.apply(execution, params, means, squares, grads);
                }
            }
        }
        let step = state.step;
        self.check_updated(state, gradient_norm * clipped)?;
        state.step += 1;
        Ok(StepReport {
            step,
            loss_mean: root.loss_sum * mean,
            gradient_norm,
            learning_rate,
            took: begun.elapsed(),
        })
    }

    /// Refuses values that an update by a gradient of `norm` has made infinite or no numbers. Parameters: finite sums of
    /// gradients times a large rate may, and the next gradient would tell only after such a state was saved. Moments: the
    /// square of a finite gradient may, and then the parameter stands still and no gradient tells.
    fn check_updated(&self, state: &TrainState, norm: f64) -> Result<(), StepError> {
        let is_finite = |values: &[f32]| square_sum(Execution::current(), values).is_finite();
        // One pass over a seventh of what an update of AdamW reads and writes, and moments only where one may have
        // overflowed; a mean of gradients (SGD's too) cannot without its parameter. Names are looked for only where one is
        // needed.
        let looked_at = match norm < NORM_OF_SAFE_SQUARES {
            true => 1,
            false => 1 + state.moments.len(),
        };
        for (index, values) in state.vectors().take(looked_at).enumerate() {
            if is_finite(values) {
                continue;
            }
            let mut slots = self.layout.slots.iter();
            let spoilt = slots.find(|slot| !is_finite(&values[slot.range()]));
            let spoilt = spoilt.expect("each value belongs to a parameter");
            return Err(StepError::Overflow {
                step: state.step,
                tensor: match index {
                    0 => spoilt.name.clone(),
                    _ => tensor_name(index, &spoilt.name),
                },
            });
        }
        Ok(())
    }

    fn norm(&self, grads: &[f32], step: u64) -> Result<f64, StepError> {
        let mut total = 0.0f64;
        for slot in &self.layout.slots {
            let sum = square_sum(Execution::current(), &grads[slot.range()]);
            // The squares of finite f32 values cannot overflow an f64 sum.
            if !sum.is_finite() {
                return Err(StepError::NotFinite {
                    step,
                    parameter: slot.name.clone(),
                });
            }
            total += sum;
        }
        Ok(total.sqrt())
    }

    /// The share of a parameter that weight decay leaves.
    fn keep(&self, learning_rate: f64) -> f32 {
        (1.0 - learning_rate * self.weight_decay) as f32
    }
}

/// Neighbouring ranges of a vector that lies so, as long as can be, and whether they are to be shrunk.
fn decayed_ranges(layout: &Layout, decayed: Decayed) -> Vec<(Range<usize>, bool)> {
    let mut ranges: Vec<(Range<usize>, bool)> = Vec::new();
    for slot in &layout.slots {
        let decays = decayed == Decayed::All || slot.shape.len() >= 2;
        match ranges.last_mut() {
            Some((range, before)) if *before == decays => range.end = slot.range().end,
            _ => ranges.push((slot.range(), decays)),
        }
    }
    ranges
}

#[cfg(test)]
#[path = "optimizer_tests.rs"]
mod tests;
