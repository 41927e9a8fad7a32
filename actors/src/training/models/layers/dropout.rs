//! Dropout whose mask is a function of where it is used.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::super::super::random::Stream;
use super::super::super::trainable::{Mode, ShardContext};
use super::contiguous;
#[cfg(any(test, feature = "cuda"))]
use crate::kernels::cuda::Dropping;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::device;

/// Sets a share of the values to zero and scales the others up, so that their expectation stays.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout {
    stream: Stream,
    first_sample: u64,
    /// Values of one sample.
    sample_values: usize,
    rate: f64,
}

impl Dropout {
    /// Drops a share `rate` in [0, 1) of `values`, whose first dimension is that of the samples (or a
    /// multiple of it); in training only.
    pub(crate) fn apply(
        values: &Tensor,
        rate: f64,
        layer: &str,
        samples: usize,
        context: &ShardContext,
    ) -> Result<Tensor> {
        if rate == 0.0 || context.mode == Mode::Evaluation {
            return Ok(values.clone());
        }
        let sample_values = values.elem_count() / samples.max(1);
        let dropout = Dropout::new(rate, layer, sample_values, context);
        values.contiguous()?.apply_op1(dropout)
    }

    /// Dropout at a layer, of samples of so many values.
    pub(crate) fn new(
        rate: f64,
        layer: &str,
        sample_values: usize,
        context: &ShardContext,
    ) -> Self {
        Dropout {
            stream: context.stream(layer),
            first_sample: context.first_sample,
            sample_values,
            rate,
        }
    }

    /// What the values that stay are multiplied by.
    fn scale(&self) -> f32 {
        (1.0 / (1.0 - self.rate)) as f32
    }

    /// Below this, of 32 random bits, a value is dropped.
    fn threshold(&self) -> u32 {
        (self.rate * 4_294_967_296.0) as u32
    }

    /// The same for a GPU, of so many values.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn dropping(&self, value_count: usize) -> Dropping {
        Dropping {
            samples: value_count
                .checked_div(self.sample_values)
                .unwrap_or_default(),
            sample_values: self.sample_values,
            first_sample: self.first_sample,
            key: self.stream.key(),
            threshold: self.threshold(),
            scale: self.scale(),
        }
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = contiguous(storage, layout, self.name())?;
        let (scale, threshold) = (self.scale(), self.threshold());
        let mut kept = Vec::with_capacity(values.len());
        for (row, sample) in values.chunks(self.sample_values.max(1)).enumerate() {
            let number = self.first_sample + row as u64;
            for (draw, four) in sample.chunks(4).enumerate() {
                let bits = self.stream.block(number, draw as u32);
                let keep = |(value, bits): (&f32, u32)| match bits < threshold {
                    true => 0.0,
                    false => value * scale,
                };
                kept.extend(four.iter().zip(bits).map(keep));
            }
        }
        Ok((CpuStorage::F32(kept), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let dropping = self.dropping(layout.shape().elem_count());
        device::dropout((storage, layout), &dropping)
    }

    fn bwd(&self, _values: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        // The same mask, drawn again.
        Ok(Some(gradient.contiguous()?.apply_op1_no_bwd(self)?))
    }
}
