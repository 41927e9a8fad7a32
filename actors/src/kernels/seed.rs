//! Enters a gradient that is known already into candle's graph.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda::device;

/// A scalar, zero, whose gradient with respect to `output` is `gradient`: for losses that compute their own.
pub(super) fn seeded(output: &Tensor, gradient: Tensor) -> Result<Tensor> {
    if output.dims() != gradient.dims() {
        bail!(
            "a gradient of shape {:?} for an output of shape {:?}",
            gradient.dims(),
            output.dims()
        )
    }
    output.apply_op1(Seed(gradient))
}

struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _output: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, output: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        device::zero(output)
    }

    fn bwd(
        &self,
        _output: &Tensor,
        _result: &Tensor,
        _gradient: &Tensor,
    ) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
