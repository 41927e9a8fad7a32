//! Cross-entropy over classes, and its gradient in the same pass.
//!
//! Order: within a row as in `softmax.rs`; a row's loss is `largest + ln Σ − logit` in `f64`, and rows are added in
//! ascending order.

use std::cell::Cell;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda::device;
use super::division::{Shared, divide};
use super::elementary::{log_of_sum, shifted_exponentials};
use super::lanes::{LaneOperation, Lanes, dispatch};
use super::math;
use super::softmax::{divide_by, softmax_rows};
use super::{Execution, contiguous_values};

/// The loss of some samples, as sums.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossEntropy {
    /// −Σ ln p(label).
    pub loss_sum: f64,
    /// The gradient of `loss_sum` with respect to each logit: p − 1 at the label, p elsewhere.
    pub logit_gradients: Vec<f32>,
}

/// The cross-entropy of `logits` (`labels.len()` rows of `classes`).
///
/// # Panics
/// If a label is not below `classes`, or the lengths do not fit.
pub fn cross_entropy<L: Copy + Into<u32>>(
    logits: &[f32],
    labels: &[L],
    classes: usize,
) -> CrossEntropy {
    assert_eq!(
        logits.len(),
        labels.len() * classes,
        "a row of logits for each label"
    );
    let labels: Vec<usize> = labels
        .iter()
        .map(|label| (*label).into() as usize)
        .collect();
    let execution = Execution::current();
    let mut logit_gradients = vec![0.0; logits.len()];
    // Of each row, the largest logit and the sum of the exponentials.
    let mut facts = vec![0.0; 2 * labels.len()];
    let shared_gradients = Shared::new(&mut logit_gradients);
    let shared_facts = Shared::new(&mut facts);
    divide(execution, labels.len(), classes, 1, |rows| {
        let values = rows.start * classes..rows.end * classes;
        // SAFETY: the ranges of rows do not overlap.
        let (gradients, facts) = unsafe {
            (
                shared_gradients.part(values.clone()),
                shared_facts.part(2 * rows.start..2 * rows.end),
            )
        };
        let operation = Rows {
            logits: &logits[values],
            labels: &labels[rows],
            classes,
            gradients,
            facts,
        };
        dispatch(execution.instructions(), operation);
    });
    let rows = logits
        .chunks_exact(classes.max(1))
        .zip(&labels)
        .zip(facts.chunks_exact(2));
    let mut loss_sum = 0.0;
    for ((row, label), facts) in rows {
        loss_sum += row_loss(facts[0], facts[1], row[*label]);
    }
    CrossEntropy {
        loss_sum,
        logit_gradients,
    }
}

/// A row's loss, of its largest logit, the sum of its exponentials and its label's logit.
pub(super) fn row_loss(largest: f32, sum: f32, logit: f32) -> f64 {
    f64::from(largest) + log_of_sum(sum) - f64::from(logit)
}

/// The loss of some samples whose logits are a tensor.
#[derive(Debug, Clone)]
pub struct TensorCrossEntropy {
    /// −Σ ln p(label).
    pub loss_sum: f64,
    /// The gradient of a multiple of `loss_sum`, where the logits are.
    pub logit_gradients: Tensor,
}

/// As [`cross_entropy`], of logits `(labels.len(), classes)` on any device. The gradient is that of `scale` times the
/// sum, and stays on the device.
pub fn cross_entropy_of(logits: &Tensor, labels: &[u32], scale: f32) -> Result<TensorCrossEntropy> {
    let &[rows, classes] = logits.dims() else {
        bail!(
            "a cross-entropy needs rows of logits, not {:?}",
            logits.dims()
        )
    };
    if rows != labels.len() {
        bail!("{rows} rows of logits have {} labels", labels.len())
    }
    if let Some(label) = labels.iter().find(|label| **label as usize >= classes) {
        bail!("label {label} is not one of {classes} classes")
    }
    let pass = CrossEntropyPass {
        labels,
        scale,
        loss_sum: Cell::new(0.0),
    };
    let logit_gradients = logits.contiguous()?.apply_op1_no_bwd(&pass)?;
    Ok(TensorCrossEntropy {
        loss_sum: pass.loss_sum.get(),
        logit_gradients,
    })
}

/// From logits to their gradient; the loss, which the same pass gives, is left in the cell.
struct CrossEntropyPass<'a> {
    labels: &'a [u32],
    scale: f32,
    loss_sum: Cell<f64>,
}

impl CustomOp1 for CrossEntropyPass<'_> {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = contiguous_values(storage, layout, self.name())?;
        let (_, classes) = layout.shape().dims2()?;
        let mut loss = cross_entropy(logits, self.labels, classes);
        if self.scale != 1.0 {
            for value in &mut loss.logit_gradients {
                *value *= self.scale;
            }
        }
        self.loss_sum.set(loss.loss_sum);
        let gradients = CpuStorage::F32(loss.logit_gradients);
        Ok((gradients, layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (gradients, facts) = device::cross_entropy((storage, layout), self.labels, self.scale)?;
        let mut loss_sum = 0.0;
        for row in facts.chunks_exact(3) {
            loss_sum += row_loss(row[0], row[1], row[2]);
        }
        self.loss_sum.set(loss_sum);
        Ok((gradients, layout.shape().clone()))
    }
}

struct Rows<'a> {
    logits: &'a [f32],
    labels: &'a [usize],
    classes: usize,
    gradients: &'a mut [f32],
    facts: &'a mut [f32],
}

impl LaneOperation for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self
            .logits
            .chunks_exact(self.classes.max(1))
            .zip(self.labels);
        let results = self
            .gradients
            .chunks_exact_mut(self.classes.max(1))
            .zip(self.facts.chunks_exact_mut(2));
        for ((logits, label), (gradients, facts)) in rows.zip(results) {
            let (largest, sum) = shifted_exponentials::<L>(logits, gradients);
            divide_by::<L>(gradients, sum);
            gradients[*label] -= 1.0;
            facts.copy_from_slice(&[largest, sum]);
        }
    }
}

/// The probabilities for `logits` in rows of `classes`.
#[must_use]
pub fn softmax(logits: &[f32], classes: usize) -> Vec<f32> {
    let mut probabilities = vec![0.0; logits.len()];
    softmax_rows(Execution::current(), logits, classes, &mut probabilities);
    probabilities
}

/// The energy of a row of logits, −ln Σ exp (Liu et al., "Energy-based Out-of-distribution Detection", 2020), of its most
/// probable class: the logit `z`, and the probability `p` that [`softmax`] gave it.
///
/// As `p = exp(z) / Σ exp`, it is `ln p − z`: softmax has formed the sum already, without overflowing, and one logarithm
/// has it back. It would be the same of any class, but of the most probable one `p` is at least one part of all classes, so
/// that nothing of it is lost.
#[must_use]
pub fn energy(logit: f32, probability: f32) -> f32 {
    (math::ln(f64::from(probability)) - f64::from(logit)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::execution::all_executions;
    use crate::kernels::test_values::{bits, normal};

    #[test]
    fn agrees_with_the_formula_and_with_differences() {
        let logits = [0.5f32, -1.0, 2.0, 100.0, 100.0, -100.0];
        let labels = [2u8, 1];
        let result = cross_entropy(&logits, &labels, 3);
        let first = (0.5f64.exp() + (-1f64).exp() + 2f64.exp()).ln() - 2.0;
        assert!((result.loss_sum - first - 2f64.ln()).abs() < 1e-6);
        for index in 0..logits.len() {
            let shifted = |by: f32| {
                let mut logits = logits;
                logits[index] += by;
                cross_entropy(&logits, &labels, 3).loss_sum
            };
            let slope = (shifted(0.0078125) - shifted(-0.0078125)) / 0.015625;
            assert!((slope - f64::from(result.logit_gradients[index])).abs() < 1e-4);
        }
    }

    #[test]
    fn every_path_has_the_same_bits() {
        let (rows, classes) = (1100, 257);
        let logits = normal("logits", rows * classes, 4.0);
        let labels: Vec<u32> = (0..rows as u32).map(|row| row * 7 % 257).collect();
        let mut seen = None;
        for execution in all_executions() {
            let found = execution.run(|| cross_entropy(&logits, &labels, classes));
            let found = (found.loss_sum.to_bits(), bits(&found.logit_gradients));
            assert_eq!(
                *seen.get_or_insert_with(|| found.clone()),
                found,
                "{execution:?}"
            );
        }
    }

    #[test]
    fn a_tensor_has_the_loss_of_its_values_and_a_multiple_of_their_gradient() {
        let (rows, classes) = (5, 7);
        let logits = normal("logits", rows * classes, 4.0);
        let labels = [6u32, 0, 3, 3, 1];
        let expected = cross_entropy(&logits, &labels, classes);
        let tensor = Tensor::from_slice(&logits, (rows, classes), &candle_core::Device::Cpu);
        let tensor = tensor.unwrap();
        for scale in [1.0, 0.125] {
            let found = cross_entropy_of(&tensor, &labels, scale).unwrap();
            assert_eq!(found.loss_sum.to_bits(), expected.loss_sum.to_bits());
            let found = found.logit_gradients.flatten_all().unwrap();
            let scaled = expected.logit_gradients.iter().map(|value| value * scale);
            assert_eq!(
                bits(&found.to_vec1::<f32>().unwrap()),
                bits(&scaled.collect::<Vec<_>>())
            );
        }
        for (labels, expected) in [
            (&labels[..4], "5 rows of logits have 4 labels"),
            (&[0, 7, 0, 0, 0], "label 7 is not one of 7 classes"),
        ] {
            let error = cross_entropy_of(&tensor, labels, 1.0).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn energies_are_those_of_the_formula_also_where_its_powers_overflow() {
        let far = (1.0 + (-1.0f64).exp()).ln();
        // The powers of ±1e4 are infinite or zero, in `f64` as well. A tolerance is a few units in the last place.
        for (logits, expected, tolerance) in [
            (vec![1.0f32, 2.0, 3.0], -3.407_605_964, 1e-6),
            (vec![0.0; 10], -(10f64.ln()), 1e-6),
            (vec![-40.0, 25.0, 3.0], -25.0, 6e-6),
            (vec![9_999.0, 1e4, -1e4], -1e4 - far, 3e-3),
            (vec![-1e4; 4], 1e4 - 4f64.ln(), 3e-3),
            (vec![-1e4, -9_999.0], 9_999.0 - far, 3e-3),
        ] {
            let probabilities = softmax(&logits, logits.len());
            let largest = (0..logits.len())
                .max_by(|one, other| logits[*one].total_cmp(&logits[*other]))
                .unwrap();
            let found = f64::from(energy(logits[largest], probabilities[largest]));
            assert!((found - expected).abs() < tolerance, "{logits:?}: {found}");
        }
        // A shift of all logits is seen by the energy alone.
        let logits = normal("logits", 10, 4.0);
        let shifted: Vec<f32> = logits.iter().map(|logit| logit - 8.0).collect();
        let (before, after) = (softmax(&logits, 10), softmax(&shifted, 10));
        let rows = logits.iter().zip(&before).zip(shifted.iter().zip(&after));
        for ((logit, before), (shifted, after)) in rows {
            assert!((before - after).abs() < 1e-5);
            if *before > 1e-3 {
                let grew = energy(*shifted, *after) - energy(*logit, *before);
                assert!((grew - 8.0).abs() < 1e-3, "{grew}");
            }
        }
    }

    #[test]
    fn probabilities_sum_to_one_and_nan_shows() {
        let probabilities = softmax(&[1.0, 2.0, 3.0, -1e30, 0.0, 1e30], 3);
        for row in probabilities.chunks(3) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
        assert_eq!(probabilities[5], 1.0);
        assert!(
            softmax(&[f32::NAN, 0.0], 2)
                .iter()
                .all(|value| value.is_nan())
        );
        assert!(energy(f32::NAN, f32::NAN).is_nan());
        let loss = cross_entropy(&[f32::NAN, 0.0], &[1u8], 2);
        assert!(loss.loss_sum.is_nan() && loss.logit_gradients.iter().all(|value| value.is_nan()));
    }
}
