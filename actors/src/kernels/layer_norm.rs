//! Layer normalisation over the last dimension, differentiable in all three arguments. candle's own `LayerNorm`
//! cuts gradients silently.
//!
//! `y = (x − mean) / √(variance + ε) · scale + shift` (Ba, Kiros and Hinton, 2016).
//!
//! Order: sums over a row are sixteen lanes and a tree (`lanes.rs`), the variance is taken after the mean; sums
//! over rows (for scale and shift) go through the rows in ascending order.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda::device;
use super::division::{Shared, divide, divide_rows};
use super::lanes::{LANES, LaneOperation, Lanes, dispatch, sixteens, sixteens_mut};
use super::{Execution, by_rows, contiguous_values, last_dimension};

/// Normalises each row (the last dimension) of `values`; `scale` and `shift` have one value a column.
/// `epsilon` is added to the variance.
pub fn layer_norm(values: &Tensor, scale: &Tensor, shift: &Tensor, epsilon: f32) -> Result<Tensor> {
    let columns = values.dims().last().copied().unwrap_or_default();
    for parameter in [scale, shift] {
        if parameter.dims() != [columns] {
            bail!(
                "layer-norm of rows of {columns} values needs as many parameters, not {:?}",
                parameter.dims()
            )
        }
    }
    values.contiguous()?.apply_op3(
        &scale.contiguous()?,
        &shift.contiguous()?,
        LayerNorm { epsilon },
    )
}

/// [`layer_norm`] of rows that lie one after the other, with its bits; nothing is differentiated.
///
/// # Panics
/// If the last row is not whole, or the parameters differ in length.
pub(crate) fn layer_norm_rows(
    execution: Execution,
    values: &[f32],
    scale: &[f32],
    shift: &[f32],
    epsilon: f32,
) -> Vec<f32> {
    let columns = scale.len();
    assert_eq!(columns, shift.len(), "parameters of one length");
    assert!(
        values.len().is_multiple_of(columns),
        "rows of {columns} values"
    );
    let mut result = vec![0.0; values.len()];
    divide_rows(execution, &mut result, columns, |rows, result| {
        let operation = Forward {
            values: &values[rows.start * columns..rows.end * columns],
            scale,
            shift,
            result,
            epsilon,
        };
        dispatch(execution.instructions(), operation);
    });
    result
}

#[derive(Debug, Clone, Copy)]
struct LayerNorm {
    epsilon: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let values = contiguous_values(values, layout, self.name())?;
        let scale = contiguous_values(scale, scale_layout, self.name())?;
        let shift = contiguous_values(shift, shift_layout, self.name())?;
        let columns = last_dimension(layout);
        Ok(by_rows(layout, columns, |instructions, range, result| {
            let operation = Forward {
                values: &values[range],
                scale,
                shift,
                result,
                epsilon: self.epsilon,
            };
            dispatch(instructions, operation);
        }))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        values: &CudaStorage,
        layout: &Layout,
        scale: &CudaStorage,
        scale_layout: &Layout,
        shift: &CudaStorage,
        shift_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let operands = [
            (values, layout),
            (scale, scale_layout),
            (shift, shift_layout),
        ];
        device::layer_norm_forward(operands, self.epsilon)
    }

    fn bwd(
        &self,
        values: &Tensor,
        scale: &Tensor,
        _shift: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let for_values = match values.track_op() {
            true => Some(values.apply_op3_no_bwd(scale, &gradient, &ValuesBackward(*self))?),
            false => None,
        };
        let for_parameters =
            values.apply_op3_no_bwd(scale, &gradient, &ParametersBackward(*self))?;
        Ok((
            for_values,
            Some(for_parameters.get(0)?),
            Some(for_parameters.get(1)?),
        ))
    }
}

/// What a row is normalised by: its mean, and 1 / √(variance + ε).
#[derive(Clone, Copy)]
struct Moments<L> {
    mean: L,
    inverse: L,
}

impl<L: Lanes> Moments<L> {
    #[inline(always)]
    fn of(row: &[f32], epsilon: f32) -> Self {
        let (whole, rest) = sixteens(row);
        let count = row.len() as f32;
        let mut sum = L::splat(0.0);
        for sixteen in whole {
            sum = sum.add(L::load(sixteen));
        }
        let mean = L::splat(sum.add(L::load_part(rest)).sum() / count);
        let mut squares = L::splat(0.0);
        for sixteen in whole {
            let centred = L::load(sixteen).subtract(mean);
            squares = centred.multiply_add(centred, squares);
        }
        // What is not there must count as zero, so it becomes the mean first.
        let mut padded = [0.0; LANES];
        mean.store(&mut padded);
        padded[..rest.len()].copy_from_slice(rest);
        let centred = L::load(&padded).subtract(mean);
        let variance = centred.multiply_add(centred, squares).sum() / count;
        let inverse = L::splat(1.0 / (variance + epsilon).sqrt());
        Moments { mean, inverse }
    }

    /// `value` of that row, normalised.
    #[inline(always)]
    fn normalise(self, value: L) -> L {
        value.subtract(self.mean).multiply(self.inverse)
    }
}

struct Forward<'a> {
    values: &'a [f32],
    scale: &'a [f32],
    shift: &'a [f32],
    result: &'a mut [f32],
    epsilon: f32,
}

impl LaneOperation for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let columns = self.scale.len();
        let (scale, scale_rest) = sixteens(self.scale);
        let (shift, shift_rest) = sixteens(self.shift);
        let rows = self.values.chunks_exact(columns);
        for (row, result) in rows.zip(self.result.chunks_exact_mut(columns)) {
            let moments = Moments::<L>::of(row, self.epsilon);
            let (row, row_rest) = sixteens(row);
            let (result, result_rest) = sixteens_mut(result);
            for (index, (value, result)) in row.iter().zip(result).enumerate() {
                let value = moments.normalise(L::load(value));
                value
                    .multiply_add(L::load(&scale[index]), L::load(&shift[index]))
                    .store(result);
            }
            let value = moments.normalise(L::load_part(row_rest));
            value
                .multiply_add(L::load_part(scale_rest), L::load_part(shift_rest))
                .store_part(result_rest);
        }
    }
}

/// Of values, scale and gradient, the gradient of the values:
/// `(s − mean(s) − n · mean(s n)) / √(variance + ε)` with `s = gradient · scale` and `n` normalised.
struct ValuesBackward(LayerNorm);

impl CustomOp3 for ValuesBackward {
    fn name(&self) -> &'static str {
        "layer-norm-backward"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let values = contiguous_values(values, layout, self.name())?;
        let scale = contiguous_values(scale, scale_layout, self.name())?;
        let gradient = contiguous_values(gradient, gradient_layout, self.name())?;
        let columns = last_dimension(layout);
        Ok(by_rows(layout, columns, |instructions, range, result| {
            let operation = BackwardRows {
                values: &values[range.clone()],
                gradient: &gradient[range],
                scale,
                result,
                epsilon: self.0.epsilon,
            };
            dispatch(instructions, operation);
        }))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        values: &CudaStorage,
        layout: &Layout,
        scale: &CudaStorage,
        scale_layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let operands = [
            (values, layout),
            (scale, scale_layout),
            (gradient, gradient_layout),
        ];
        device::layer_norm_backward(operands, self.0.epsilon)
    }
}

struct BackwardRows<'a> {
    values: &'a [f32],
    gradient: &'a [f32],
    scale: &'a [f32],
    result: &'a mut [f32],
    epsilon: f32,
}

impl LaneOperation for BackwardRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let columns = self.scale.len();
        let count = L::splat(columns as f32);
        let (scale, scale_rest) = sixteens(self.scale);
        let rows = self
            .values
            .chunks_exact(columns)
            .zip(self.gradient.chunks_exact(columns));
        for ((row, gradient), result) in rows.zip(self.result.chunks_exact_mut(columns)) {
            let moments = Moments::<L>::of(row, self.epsilon);
            let (row, row_rest) = sixteens(row);
            let (gradient, gradient_rest) = sixteens(gradient);
            let (mut sum, mut product_sum) = (L::splat(0.0), L::splat(0.0));
            for (index, (value, gradient)) in row.iter().zip(gradient).enumerate() {
                let scaled = L::load(gradient).multiply(L::load(&scale[index]));
                sum = sum.add(scaled);
                product_sum = scaled.multiply_add(moments.normalise(L::load(value)), product_sum);
            }
            // Beyond the row the gradient is zero, and with it both terms.
            let scaled_rest = L::load_part(gradient_rest).multiply(L::load_part(scale_rest));
            let normalised_rest = moments.normalise(L::load_part(row_rest));
            let sum = sum.add(scaled_rest).sum();
            let product_sum = scaled_rest.multiply_add(normalised_rest, product_sum).sum();
            let sum_mean = L::splat(sum).divide(count);
            let product_mean = L::splat(product_sum).divide(count);
            let slope = |scaled: L, normalised: L| {
                let centred = scaled.subtract(sum_mean);
                centred
                    .subtract(normalised.multiply(product_mean))
                    .multiply(moments.inverse)
            };
            let (result, result_rest) = sixteens_mut(result);
            for (index, ((value, gradient), result)) in
                row.iter().zip(gradient).zip(result).enumerate()
            {
                let scaled = L::load(gradient).multiply(L::load(&scale[index]));
                slope(scaled, moments.normalise(L::load(value))).store(result);
            }
            slope(scaled_rest, normalised_rest).store_part(result_rest);
        }
    }
}

/// Of values, scale and gradient, the gradients of scale and shift as two rows.
struct ParametersBackward(LayerNorm);

impl CustomOp3 for ParametersBackward {
    fn name(&self) -> &'static str {
        "layer-norm-parameters-backward"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        layout: &Layout,
        _scale: &CpuStorage,
        _scale_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let values = contiguous_values(values, layout, self.name())?;
        let gradient = contiguous_values(gradient, gradient_layout, self.name())?;
        let columns = last_dimension(layout);
        let execution = Execution::current();
        let mut result = vec![0.0; 2 * columns];
        let rows = values.len().checked_div(columns).unwrap_or_default();
        let mut row_moments = vec![0.0; 2 * rows];
        divide_rows(execution, &mut row_moments, 2, |rows, moments| {
            let values = &values[rows.start * columns..rows.end * columns];
            let operation = RowMoments {
                values,
                columns,
                moments,
                epsilon: self.0.epsilon,
            };
            dispatch(execution.instructions(), operation);
        });
        let (for_scale, for_shift) = result.split_at_mut(columns);
        let (for_scale, for_shift) = (Shared::new(for_scale), Shared::new(for_shift));
        divide(execution, columns, rows, LANES, |range| {
            // SAFETY: the ranges of columns do not overlap.
            let (for_scale, for_shift) =
                unsafe { (for_scale.part(range.clone()), for_shift.part(range.clone())) };
            let operation = BackwardColumns {
                values,
                gradient,
                row_moments: &row_moments,
                columns,
                first: range.start,
                for_scale,
                for_shift,
            };
            dispatch(execution.instructions(), operation);
        });
        Ok((CpuStorage::F32(result), Shape::from((2, columns))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        values: &CudaStorage,
        layout: &Layout,
        _scale: &CudaStorage,
        _scale_layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let operands = [(values, layout), (gradient, gradient_layout)];
        device::layer_norm_parameters_backward(operands, self.0.epsilon)
    }
}

struct RowMoments<'a> {
    values: &'a [f32],
    columns: usize,
    moments: &'a mut [f32],
    epsilon: f32,
}

impl LaneOperation for RowMoments<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self.values.chunks_exact(self.columns);
        for (row, to) in rows.zip(self.moments.chunks_exact_mut(2)) {
            let moments = Moments::<L>::of(row, self.epsilon);
            moments.mean.store_part(&mut to[..1]);
            moments.inverse.store_part(&mut to[1..]);
        }
    }
}

/// Some columns, through all rows.
struct BackwardColumns<'a> {
    values: &'a [f32],
    gradient: &'a [f32],
    row_moments: &'a [f32],
    columns: usize,
    first: usize,
    for_scale: &'a mut [f32],
    for_shift: &'a mut [f32],
}

impl LaneOperation for BackwardColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let width = self.for_scale.len();
        let rows = self
            .values
            .chunks_exact(self.columns)
            .zip(self.gradient.chunks_exact(self.columns));
        for ((row, gradient), pair) in rows.zip(self.row_moments.chunks_exact(2)) {
            let moments = Moments {
                mean: L::splat(pair[0]),
                inverse: L::splat(pair[1]),
            };
            let (row, row_rest) = sixteens(&row[self.first..][..width]);
            let (gradient, gradient_rest) = sixteens(&gradient[self.first..][..width]);
            let (for_scale, scale_rest) = sixteens_mut(self.for_scale);
            let (for_shift, shift_rest) = sixteens_mut(self.for_shift);
            let step = |value: L, gradient: L, for_scale: L, for_shift: L| {
                (
                    gradient.multiply_add(moments.normalise(value), for_scale),
                    for_shift.add(gradient),
                )
            };
            for (index, (value, gradient)) in row.iter().zip(gradient).enumerate() {
                let sums = (L::load(&for_scale[index]), L::load(&for_shift[index]));
                let sums = step(L::load(value), L::load(gradient), sums.0, sums.1);
                sums.0.store(&mut for_scale[index]);
                sums.1.store(&mut for_shift[index]);
            }
            let sums = (L::load_part(scale_rest), L::load_part(shift_rest));
            let sums = step(
                L::load_part(row_rest),
                L::load_part(gradient_rest),
                sums.0,
                sums.1,
            );
            sums.0.store_part(scale_rest);
            sums.1.store_part(shift_rest);
        }
    }
}

#[cfg(test)]
mod tests;
