//! Layer normalisation (Ba, Kiros and Hinton, 2016) over the last dimension, differentiable in all three
//! arguments; candle's own cuts gradients without a word.
//!
//! Order: means and variances are `f64` sums in ascending order; gradients of scale and shift go through
//! the rows in ascending order.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::contiguous;

/// `(x − mean) / √(variance + epsilon) · scale + shift`, row by row.
pub(in super::super) fn layer_norm(
    values: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    epsilon: f32,
) -> Result<Tensor> {
    let columns = values.dims().last().copied().unwrap_or_default();
    if scale.dims() != [columns] || shift.dims() != [columns] || columns == 0 {
        bail!("layer-norm of rows of {columns} values needs as many scales and shifts")
    }
    values
        .contiguous()?
        .apply_op3(scale, shift, LayerNorm { epsilon })
}

#[derive(Clone, Copy)]
struct LayerNorm {
    epsilon: f32,
}

impl LayerNorm {
    /// Mean and reciprocal deviation of a row.
    fn moments(self, row: &[f32]) -> (f64, f64) {
        let count = row.len() as f64;
        let mut sum = 0.0f64;
        for value in row {
            sum += f64::from(*value);
        }
        let mean = sum / count;
        let mut squares = 0.0f64;
        for value in row {
            let difference = f64::from(*value) - mean;
            squares += difference * difference;
        }
        let deviation = (squares / count + f64::from(self.epsilon)).sqrt();
        (mean, 1.0 / deviation)
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        values_layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
        shift: &CpuStorage,
        shift_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let values = contiguous(values, values_layout, self.name())?;
        let scale = contiguous(scale, scale_layout, self.name())?;
        let shift = contiguous(shift, shift_layout, self.name())?;
        let mut result = Vec::with_capacity(values.len());
        for row in values.chunks_exact(scale.len()) {
            let (mean, inverse) = self.moments(row);
            for ((value, scale), shift) in row.iter().zip(scale).zip(shift) {
                let normal = (f64::from(*value) - mean) * inverse;
                result.push((normal * f64::from(*scale) + f64::from(*shift)) as f32);
            }
        }
        Ok((CpuStorage::F32(result), values_layout.shape().clone()))
    }

    fn bwd(
        &self,
        values: &Tensor,
        scale: &Tensor,
        _shift: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (values, gradient) = (values.contiguous()?, gradient.contiguous()?);
        let for_values = values.apply_op3_no_bwd(scale, &gradient, &ValuesGradient(*self))?;
        let both = values.apply_op2_no_bwd(&gradient, &ParametersGradient(*self))?;
        Ok((Some(for_values), Some(both.get(0)?), Some(both.get(1)?)))
    }
}

/// With `n` the normalised values and `g` the gradient times the scale:
/// `(g − mean(g) − n · mean(g n)) / deviation`.
struct ValuesGradient(LayerNorm);

impl CustomOp3 for ValuesGradient {
    fn name(&self) -> &'static str {
        "layer-norm-gradient"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        values_layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let values = contiguous(values, values_layout, self.name())?;
        let scale = contiguous(scale, scale_layout, self.name())?;
        let gradient = contiguous(gradient, gradient_layout, self.name())?;
        let columns = scale.len();
        let mut result = Vec::with_capacity(values.len());
        for (row, gradient) in values
            .chunks_exact(columns)
            .zip(gradient.chunks_exact(columns))
        {
            let (mean, inverse) = self.0.moments(row);
            let pair = |index: usize| {
                let normal = (f64::from(row[index]) - mean) * inverse;
                (normal, f64::from(gradient[index]) * f64::from(scale[index]))
            };
            let (mut sum, mut product_sum) = (0.0f64, 0.0f64);
            for index in 0..columns {
                let (normal, scaled) = pair(index);
                sum += scaled;
                product_sum += scaled * normal;
            }
            let (mean_scaled, mean_product) = (sum / columns as f64, product_sum / columns as f64);
            result.extend((0..columns).map(|index| {
                let (normal, scaled) = pair(index);
                ((scaled - mean_scaled - normal * mean_product) * inverse) as f32
            }));
        }
        Ok((CpuStorage::F32(result), values_layout.shape().clone()))
    }
}

/// The gradients of scale and shift, one below the other.
struct ParametersGradient(LayerNorm);

impl CustomOp2 for ParametersGradient {
    fn name(&self) -> &'static str {
        "layer-norm-parameter-gradient"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        values_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let values = contiguous(values, values_layout, self.name())?;
        let gradient = contiguous(gradient, gradient_layout, self.name())?;
        let columns = values_layout.dims().last().copied().unwrap_or(1);
        let (mut scales, mut shifts) = (vec![0.0f64; columns], vec![0.0f64; columns]);
        for (row, gradient) in values
            .chunks_exact(columns)
            .zip(gradient.chunks_exact(columns))
        {
            let (mean, inverse) = self.0.moments(row);
            for index in 0..columns {
                let gradient = f64::from(gradient[index]);
                scales[index] += gradient * (f64::from(row[index]) - mean) * inverse;
                shifts[index] += gradient;
            }
        }
        let both = scales.into_iter().chain(shifts).map(|sum| sum as f32);
        Ok((CpuStorage::F32(both.collect()), Shape::from((2, columns))))
    }
}
