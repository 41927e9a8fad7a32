//! Softmax over the last dimension, differentiable. candle's own `softmax_last_dim` cuts gradients silently.
//!
//! Order: the largest value is taken off, the exponentials are added as sixteen lanes and a tree (see
//! `lanes.rs`), and each is divided by the sum. Backward, `x̄ = y · (ȳ − Σ ȳ y)` with the sum in the same order,
//! fused.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::cuda::device;
use super::division::divide_rows;
use super::elementary::shifted_exponentials;
use super::lanes::{LaneOperation, Lanes, dispatch, sixteens, sixteens_mut};
use super::{Execution, by_rows, contiguous_values, last_dimension};

/// The probabilities of each row (the last dimension) of logits; zero where a logit is −∞.
pub fn softmax(logits: &Tensor) -> Result<Tensor> {
    logits.contiguous()?.apply_op1(Softmax)
}

struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = contiguous_values(storage, layout, self.name())?;
        let mut probabilities = vec![0.0; logits.len()];
        softmax_rows(
            Execution::current(),
            logits,
            last_dimension(layout),
            &mut probabilities,
        );
        Ok((CpuStorage::F32(probabilities), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        device::softmax_forward((storage, layout))
    }

    fn bwd(&self, _logits: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        Ok(Some(gradient.apply_op2_no_bwd(result, &SoftmaxBackward)?))
    }
}

/// The probabilities of rows of `row_length` logits.
pub(super) fn softmax_rows(
    execution: Execution,
    logits: &[f32],
    row_length: usize,
    probabilities: &mut [f32],
) {
    divide_rows(execution, probabilities, row_length, |rows, part| {
        let logits = &logits[rows.start * row_length..rows.end * row_length];
        dispatch(
            execution.instructions(),
            Forward {
                logits,
                probabilities: part,
                row_length,
            },
        );
    });
}

struct Forward<'a> {
    logits: &'a [f32],
    probabilities: &'a mut [f32],
    row_length: usize,
}

impl LaneOperation for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self.logits.chunks_exact(self.row_length);
        for (logits, probabilities) in
            rows.zip(self.probabilities.chunks_exact_mut(self.row_length))
        {
            let (_, sum) = shifted_exponentials::<L>(logits, probabilities);
            divide_by::<L>(probabilities, sum);
        }
    }
}

#[inline(always)]
pub(super) fn divide_by<L: Lanes>(values: &mut [f32], divisor: f32) {
    let divisor = L::splat(divisor);
    let (whole, rest) = sixteens_mut(values);
    for sixteen in whole {
        L::load(sixteen).divide(divisor).store(sixteen);
    }
    L::load_part(rest).divide(divisor).store_part(rest);
}

/// Of the gradient and the probabilities, the gradient of the logits.
pub(super) struct SoftmaxBackward;

impl CustomOp2 for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax-backward"
    }

    fn cpu_fwd(
        &self,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
        probabilities: &CpuStorage,
        layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gradient = contiguous_values(gradient, gradient_layout, self.name())?;
        let probabilities = contiguous_values(probabilities, layout, self.name())?;
        let row_length = last_dimension(layout);
        Ok(by_rows(
            layout,
            row_length,
            |instructions, range, result| {
                let operation = Backward {
                    gradient: &gradient[range.clone()],
                    probabilities: &probabilities[range],
                    result,
                    row_length,
                };
                dispatch(instructions, operation);
            },
        ))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
        probabilities: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        device::softmax_backward((gradient, gradient_layout), (probabilities, layout))
    }
}

struct Backward<'a> {
    gradient: &'a [f32],
    probabilities: &'a [f32],
    result: &'a mut [f32],
    row_length: usize,
}

impl LaneOperation for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let length = self.row_length;
        let rows = self
            .gradient
            .chunks_exact(length)
            .zip(self.probabilities.chunks_exact(length));
        for ((gradient, probabilities), result) in rows.zip(self.result.chunks_exact_mut(length)) {
            let (gradient, gradient_rest) = sixteens(gradient);
            let (probabilities, probabilities_rest) = sixteens(probabilities);
            let mut sum = L::splat(0.0);
            for (gradient, probability) in gradient.iter().zip(probabilities) {
                sum = L::load(gradient).multiply_add(L::load(probability), sum);
            }
            let last = (
                L::load_part(gradient_rest),
                L::load_part(probabilities_rest),
            );
            let sum = L::splat(last.0.multiply_add(last.1, sum).sum());
            let (result, result_rest) = sixteens_mut(result);
            for ((gradient, probability), result) in gradient.iter().zip(probabilities).zip(result)
            {
                let centred = L::load(gradient).subtract(sum);
                L::load(probability).multiply(centred).store(result);
            }
            last.1
                .multiply(last.0.subtract(sum))
                .store_part(result_rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::kernels::execution::all_executions;
    use crate::kernels::test_values::{bits, normal, relative_error};

    fn reference(logits: &[f64]) -> Vec<f64> {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    }

    /// Forward and backward within `1e-6` of `f64`, of the largest probability and the largest incoming
    /// gradient, and equal bits on every path.
    #[test]
    fn agrees_with_f64_forward_and_backward_on_every_path() {
        for (rows, length) in [(1, 1), (3, 10), (5, 16), (7, 77), (450, 600)] {
            let logits = normal("logits", rows * length, 3.0);
            let weights = normal("weights", rows * length, 1.0);
            let mut seen: Option<[Vec<u32>; 2]> = None;
            for execution in all_executions() {
                let device = Device::Cpu;
                let input = Var::from_slice(&logits, (rows, length), &device).unwrap();
                let seed = Tensor::from_slice(&weights, (rows, length), &device).unwrap();
                let (result, gradient) = execution.run(|| {
                    let result = softmax(input.as_tensor()).unwrap();
                    let loss = (&result * &seed).unwrap().sum_all().unwrap();
                    let gradients = loss.backward().unwrap();
                    (result, gradients.get(input.as_tensor()).unwrap().clone())
                });
                let flat =
                    |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let (result, gradient) = (flat(&result), flat(&gradient));
                for row in 0..rows {
                    let range = row * length..(row + 1) * length;
                    let wide =
                        |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
                    let expected = reference(&wide(&logits[range.clone()]));
                    assert!(relative_error(&result[range.clone()], &expected) < 1e-6);
                    let seed = wide(&weights[range.clone()]);
                    let dot: f64 = seed.iter().zip(&expected).map(|(g, y)| g * y).sum();
                    let slopes: Vec<f64> = seed
                        .iter()
                        .zip(&expected)
                        .map(|(g, y)| y * (g - dot))
                        .collect();
                    // Differences cancel, so the measure is what they are made from.
                    let largest = seed.iter().fold(0.0f64, |largest, g| largest.max(g.abs()));
                    for (found, slope) in gradient[range].iter().zip(&slopes) {
                        assert!((f64::from(*found) - slope).abs() < 1e-6 * largest);
                    }
                }
                let found = [bits(&result), bits(&gradient)];
                assert_eq!(
                    *seen.get_or_insert_with(|| found.clone()),
                    found,
                    "{execution:?}"
                );
            }
        }
    }

    #[test]
    fn masked_classes_get_nothing_and_nan_shows() {
        let logits = [1.0f32, f32::NEG_INFINITY, 1.0, 0.0, f32::NAN, 0.0];
        let logits = Tensor::from_slice(&logits, (2, 3), &Device::Cpu).unwrap();
        let rows = softmax(&logits).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows[0], [0.5, 0.0, 0.5]);
        assert!(rows[1].iter().all(|value| value.is_nan()));
    }
}
