//! The matrix product, with bits that no machine, thread count or shape of the work can change.
//!
//! Invariant: each element of a product is one chain of fused multiply-adds from zero over the inner
//! dimension, in ascending order. A fused multiply-add is exactly rounded, so a chain has the same bits
//! in scalar code and in vectors. Vectors run along the columns of the result, several threads divide its
//! rows or columns, and the inner dimension is cut into blocks by loading a block's sums back into the
//! accumulators: none of this touches the order of a chain. candle's own product sums in blocks whose size
//! depends on the CPU's caches.
//!
//! * `blocked` cuts a product into blocks and tiles; `panels` copies operands, whatever their strides, for it;
//! * `tiles` says what a tile is; `avx512`, `avx2` and `scalar` compute one;
//! * `streamed` is for few rows, and copies nothing; [`PreparedMatrix`] was copied before.

mod blocked;
mod matrix;
mod panels;
mod prepared;
mod scalar;
mod streamed;
mod tiles;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

pub use blocked::{multiply, multiply_add, multiply_prepared};
pub use matrix::MatrixView;
pub use prepared::PreparedMatrix;

pub(super) use panels::copy_row;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor, bail};

use super::Execution;
#[cfg(feature = "cuda")]
use super::cuda::device;

/// `a · b` in `f32`, differentiable in both: matrices, or equally many matrices in equal leading dimensions.
///
/// `(…, rows, inner) · (…, inner, columns) → (…, rows, columns)`. Strides are free: a transposed view costs
/// no copy.
pub fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    readable(a)?.apply_op2(&readable(b)?, FixedOrderProduct)
}

/// [`product`] without a gradient.
pub(super) fn product_without_gradient(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    readable(a)?.apply_op2_no_bwd(&readable(b)?, &FixedOrderProduct)
}

/// The tensor; on a GPU without gaps, where the matrices of a batch have no one stride.
fn readable(tensor: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if tensor.device().is_cuda() && !device::is_readable(tensor.layout()) {
        return tensor.contiguous();
    }
    Ok(tensor.clone())
}

struct FixedOrderProduct;

impl CustomOp2 for FixedOrderProduct {
    fn name(&self) -> &'static str {
        "fixed-order-product"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ([rows, _, columns], shape) = sizes(a_layout.dims(), b_layout.dims())?;
        let (a, b) = (a.as_slice::<f32>()?, b.as_slice::<f32>()?);
        let size = rows * columns;
        let mut c = vec![0.0; shape.iter().product()];
        let starts = batch_starts(a_layout).zip(batch_starts(b_layout));
        let items: Vec<Item<'_>> = starts
            .zip(c.chunks_exact_mut(size.max(1)))
            .map(|((a_start, b_start), c)| {
                let a = matrix(a, a_layout, a_start);
                (a, matrix(b, b_layout, b_start), c)
            })
            .collect();
        multiply_all(Execution::current(), items);
        Ok((CpuStorage::F32(c), Shape::from(shape)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (sizes, shape) = sizes(a_layout.dims(), b_layout.dims())?;
        device::product((a, a_layout), (b, b_layout), sizes, Shape::from(shape))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // The input of the first layer needs no gradient; computing it would cost a third of the step.
        let for_a = match a.track_op() {
            true => Some(product_without_gradient(
                gradient,
                &b.transpose(D::Minus2, D::Minus1)?,
            )?),
            false => None,
        };
        let for_b = match b.track_op() {
            true => Some(product_without_gradient(
                &a.transpose(D::Minus2, D::Minus1)?,
                gradient,
            )?),
            false => None,
        };
        Ok((for_a, for_b))
    }
}

/// Rows, inner dimension and columns of a product, and the result's shape.
fn sizes(a_dims: &[usize], b_dims: &[usize]) -> Result<([usize; 3], Vec<usize>)> {
    let ([a_batch @ .., rows, inner], [b_batch @ .., b_rows, columns]) = (a_dims, b_dims) else {
        bail!("a product needs matrices, not {a_dims:?} and {b_dims:?}")
    };
    if inner != b_rows || a_batch != b_batch {
        bail!(
            "a {} matrix cannot multiply a {} one",
            by(a_dims),
            by(b_dims)
        )
    }
    let shape = a_batch.iter().chain([rows, columns]).copied().collect();
    Ok(([*rows, *inner, *columns], shape))
}

/// `2x3x4`.
fn by(dims: &[usize]) -> String {
    let words: Vec<String> = dims.iter().map(ToString::to_string).collect();
    words.join("x")
}

/// The matrix of the last two dimensions at `start`.
fn matrix<'a>(values: &'a [f32], layout: &Layout, start: usize) -> MatrixView<'a> {
    let last = layout.dims().len() - 1;
    let (dims, strides) = (layout.dims(), layout.stride());
    MatrixView::new(
        &values[start..],
        [dims[last - 1], dims[last]],
        [strides[last - 1], strides[last]],
    )
}

/// Where each matrix of a batch starts, in row-major order of the leading dimensions.
fn batch_starts(layout: &Layout) -> impl Iterator<Item = usize> + '_ {
    let leading = layout.dims().len() - 2;
    let dims = &layout.dims()[..leading];
    let count: usize = dims.iter().product();
    (0..count).map(move |index| {
        let mut rest = index;
        let mut start = layout.start_offset();
        for (size, stride) in dims.iter().zip(layout.stride()).rev() {
            start += rest % size * stride;
            rest /= size;
        }
        start
    })
}

/// One product of a batch: what is multiplied, and where the result goes.
type Item<'a> = (MatrixView<'a>, MatrixView<'a>, &'a mut [f32]);

/// Fewest multiply-adds that a thread is woken for: at 80 a nanosecond, some 25 microseconds of work.
const PARALLEL_WORK_MIN: usize = 1 << 21;

/// All products of a batch; several threads divide the batch, or the one product that there is.
fn multiply_all(execution: Execution, mut items: Vec<Item<'_>>) {
    if let [(a, b, c)] = &mut items[..] {
        return multiply(execution, a, b, c);
    }
    let work: usize = items
        .iter()
        .map(|(a, b, _)| a.rows() * a.columns() * b.columns())
        .sum();
    let parts = execution.threads().min(work / PARALLEL_WORK_MIN).max(1);
    let part_len = items.len().div_ceil(parts).max(1);
    let alone = execution.with_threads(std::num::NonZeroUsize::MIN);
    let one_after_the_other = |part: &mut [Item<'_>]| {
        for (a, b, c) in part {
            multiply(alone, a, b, c);
        }
    };
    if parts == 1 {
        return one_after_the_other(&mut items);
    }
    rayon::scope(|scope| {
        for part in items.chunks_mut(part_len) {
            scope.spawn(move |_| one_after_the_other(part));
        }
    });
}

#[cfg(test)]
mod tests;
