//! Rows of a table by number.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::contiguous;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::device;

/// The rows of `table` (`[count, width]`) that `rows` names, which must exist: `[rows.len(), width]`.
pub(crate) fn embed(table: &Tensor, rows: Vec<u32>) -> Result<Tensor> {
    table.contiguous()?.apply_op1(Embedding { rows })
}

struct Embedding {
    rows: Vec<u32>,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let &[count, width] = layout.dims() else {
            bail!("an embedding needs a table, not {:?}", layout.dims())
        };
        let table = contiguous(storage, layout, self.name())?;
        let mut values = Vec::with_capacity(self.rows.len() * width);
        for row in &self.rows {
            if *row as usize >= count {
                bail!("row {row} of an embedding with {count} rows")
            }
            values.extend_from_slice(&table[*row as usize * width..][..width]);
        }
        let shape = Shape::from((self.rows.len(), width));
        Ok((CpuStorage::F32(values), shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        device::embedding_forward((storage, layout), &self.rows)
    }

    fn bwd(&self, table: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let scatter = Scatter {
            rows: self.rows.clone(),
            count: table.dim(0)?,
        };
        Ok(Some(gradient.contiguous()?.apply_op1_no_bwd(&scatter)?))
    }
}

/// Adds each row to the table's row that it came from, in order.
pub(crate) struct Scatter {
    pub(crate) rows: Vec<u32>,
    pub(crate) count: usize,
}

impl CustomOp1 for Scatter {
    fn name(&self) -> &'static str {
        "embedding-gradient"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims().last().copied().unwrap_or(1);
        let values = contiguous(storage, layout, self.name())?;
        let mut table = vec![0.0; self.count * width];
        for (row, values) in self.rows.iter().zip(values.chunks_exact(width)) {
            let sums = &mut table[*row as usize * width..][..width];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value;
            }
        }
        Ok((CpuStorage::F32(table), Shape::from((self.count, width))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        device::embedding_backward((storage, layout), &self.rows, self.count)
    }
}
