//! Dropout whose mask is a function of where it is used.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::super::super::random::Stream;
use super::super::super::trainable::{Mode, ShardContext};
use super::contiguous;

/// Sets a share of the values to zero and scales the others up, so that their expectation stays.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Dropout {
    stream: Stream,
    first_sample: u64,
    /// Values of one sample.
    sample_values: usize,
    rate: f64,
}

impl Dropout {
    /// Drops a share `rate` in [0, 1) of `values`, whose first dimension is that of the samples (or a
    /// multiple of it); in training only.
    pub(in super::super) fn apply(
        values: &Tensor,
        rate: f64,
        layer: &str,
        samples: usize,
        context: &ShardContext,
    ) -> Result<Tensor> {
        if rate == 0.0 || context.mode == Mode::Evaluation {
            return Ok(values.clone());
        }
        let dropout = Dropout {
            stream: context.stream(layer),
            first_sample: context.first_sample,
            sample_values: values.elem_count() / samples.max(1),
            rate,
        };
        values.contiguous()?.apply_op1(dropout)
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = contiguous(storage, layout, self.name())?;
        let scale = (1.0 / (1.0 - self.rate)) as f32;
        // Below this, of 32 random bits, a value is dropped.
        let threshold = (self.rate * 4_294_967_296.0) as u32;
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

    fn bwd(&self, _values: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        // The same mask, drawn again.
        Ok(Some(gradient.contiguous()?.apply_op1_no_bwd(self)?))
    }
}
