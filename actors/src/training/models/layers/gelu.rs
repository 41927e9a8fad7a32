//! GELU by its tanh form (Hendrycks and Gimpel, 2016): `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::super::super::math;
use super::contiguous;

/// GELU of each value.
pub(in super::super) fn gelu(values: &Tensor) -> Result<Tensor> {
    values.contiguous()?.apply_op1(Gelu)
}

const ROOT_2_BY_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

fn tanh(x: f64) -> f64 {
    // 1 − 2/(e^2x + 1): exact at both ends, where the exponential is zero or infinite.
    1.0 - 2.0 / (math::exp(2.0 * x) + 1.0)
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let value = |x: &f32| {
            let x = f64::from(*x);
            (0.5 * x * (1.0 + tanh(ROOT_2_BY_PI * (x + CUBIC * x * x * x)))) as f32
        };
        let values = contiguous(storage, layout, self.name())?.iter().map(value);
        Ok((CpuStorage::F32(values.collect()), layout.shape().clone()))
    }

    fn bwd(&self, values: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        Ok(Some(
            values.contiguous()?.apply_op2_no_bwd(&gradient, &Slope)?,
        ))
    }
}

/// The gradient times the slope at each value.
struct Slope;

impl CustomOp2 for Slope {
    fn name(&self) -> &'static str {
        "gelu-gradient"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        values_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let slope = |(x, gradient): (&f32, &f32)| {
            let x = f64::from(*x);
            let t = tanh(ROOT_2_BY_PI * (x + CUBIC * x * x * x));
            let inner = ROOT_2_BY_PI * (1.0 + 3.0 * CUBIC * x * x);
            let slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner;
            (slope * f64::from(*gradient)) as f32
        };
        let values = contiguous(values, values_layout, self.name())?;
        let gradient = contiguous(gradient, gradient_layout, self.name())?;
        let result = values.iter().zip(gradient).map(slope).collect();
        Ok((CpuStorage::F32(result), values_layout.shape().clone()))
    }
}
