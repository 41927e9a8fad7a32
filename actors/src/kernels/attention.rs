//! Causal attention: each token looks at itself and at those before it in its window.
//!
//! Order: scores and sums of values are products as `product` makes them, one chain of fused multiply-adds from zero
//! in ascending order; shares are the softmax, as `softmax.rs` says, of a query's scores up to its own token. Queries
//! go in blocks of `BLOCK`, whose products end with the block's last token: what lies behind a query within its
//! block counts as zero, what lies behind the block is not computed. The backward pass computes the shares again
//! instead of keeping them: they take a context squared for each head.
//!
//! `full` is the attention of encoders, in which each token looks at all tokens of its text; `head` is what both do with
//! one head.

mod full;
mod head;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda::device;
use super::division::{Shared, divide};
use super::lanes::{LaneOperation, Lanes, dispatch, sixteens, sixteens_mut};
use super::product::{MatrixView, multiply, multiply_add};
use super::{Execution, contiguous_values};
use head::{Block, Head, Mask, Shares, one_thread};

pub(crate) use full::FullAttention;
pub(crate) use head::BLOCK;

/// Causal attention in candle's graph: the shape of the windows and heads.
#[derive(Debug, Clone, Copy)]
pub struct CausalAttention {
    /// Tokens of a window.
    pub context: usize,
    /// Heads, which divide the width.
    pub heads: usize,
}

impl CausalAttention {
    /// From `[windows * context, 3 * width]`, queries beside keys beside values, to `[windows * context, width]`,
    /// differentiable. Scores are divided by the square root of a head's size.
    ///
    /// # Errors
    /// If the windows or the heads do not divide the matrix.
    pub fn apply(self, projected: &Tensor) -> Result<Tensor> {
        projected.contiguous()?.apply_op1(self)
    }

    /// The sizes, of what was projected, if they fit.
    pub(crate) fn sizes(&self, projected: &Layout) -> Result<Attention> {
        let &[rows, columns] = projected.dims() else {
            bail!("attention needs a matrix, not {:?}", projected.dims())
        };
        let width = columns / 3;
        if columns != width * 3
            || !width.is_multiple_of(self.heads)
            || !rows.is_multiple_of(self.context)
        {
            bail!(
                "attention over windows of {} tokens with {} heads cannot take {rows}x{columns}",
                self.context,
                self.heads
            )
        }
        let size = width / self.heads;
        Ok(Attention {
            rows,
            context: self.context,
            heads: self.heads,
            size,
            scale: head::scale(size),
        })
    }
}

impl CustomOp1 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let attention = self.sizes(layout)?;
        let projected = contiguous_values(storage, layout, self.name())?;
        let shape = (attention.rows, attention.width());
        let mut result = vec![0.0; shape.0 * shape.1];
        attention.compute(Execution::current(), projected, &mut result);
        Ok((CpuStorage::F32(result), Shape::from(shape)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        device::attention_forward((storage, layout), &self.sizes(layout)?)
    }

    fn bwd(
        &self,
        projected: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<Option<Tensor>> {
        let backward = Backward(*self);
        Ok(Some(
            projected
                .contiguous()?
                .apply_op2_no_bwd(&gradient.contiguous()?, &backward)?,
        ))
    }
}

pub(crate) struct Backward(pub(crate) CausalAttention);

impl CustomOp2 for Backward {
    fn name(&self) -> &'static str {
        "causal-attention-gradient"
    }

    fn cpu_fwd(
        &self,
        projected: &CpuStorage,
        projected_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let attention = self.0.sizes(projected_layout)?;
        let projected = contiguous_values(projected, projected_layout, self.name())?;
        let gradient = contiguous_values(gradient, gradient_layout, self.name())?;
        let mut result = vec![0.0; projected.len()];
        attention.compute_gradient(Execution::current(), projected, gradient, &mut result);
        Ok((CpuStorage::F32(result), projected_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        projected: &CudaStorage,
        projected_layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let attention = self.0.sizes(projected_layout)?;
        let projected = (projected, projected_layout);
        device::attention_backward(projected, (gradient, gradient_layout), &attention)
    }
}

/// The sizes of an attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention {
    /// Tokens, of all windows.
    pub(crate) rows: usize,
    /// Tokens of a window.
    pub(crate) context: usize,
    pub(crate) heads: usize,
    /// Values of a head.
    pub(crate) size: usize,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
}

impl Attention {
    /// Values of a token, in all heads.
    pub(crate) fn width(&self) -> usize {
        self.heads * self.size
    }

    /// From `[rows, 3 * width]`, queries beside keys beside values, to `[rows, width]`.
    pub(crate) fn compute(&self, execution: Execution, projected: &[f32], result: &mut [f32]) {
        assert_eq!(projected.len(), self.rows * 3 * self.width());
        assert_eq!(result.len(), self.rows * self.width());
        let result = Shared::new(result);
        self.each_head(execution, |head| {
            // SAFETY: each head of each window is there once.
            unsafe { head.attend(execution, projected, &result) };
        });
    }

    /// Of what was projected and the gradient of the result, the gradient of what was projected.
    pub(crate) fn compute_gradient(
        &self,
        execution: Execution,
        projected: &[f32],
        gradient: &[f32],
        result: &mut [f32],
    ) {
        assert_eq!(projected.len(), self.rows * 3 * self.width());
        assert_eq!(gradient.len(), self.rows * self.width());
        assert_eq!(result.len(), projected.len());
        let result = Shared::new(result);
        self.each_head(execution, |head| {
            let alone = one_thread(execution);
            let [keys, values] = [1, 2].map(|which| head.projected(projected, which));
            let mut shares = Shares::new(&head);
            let mut slopes = vec![0.0; BLOCK * self.context];
            let mut of_queries = vec![0.0; BLOCK * self.size];
            let [mut of_keys, mut of_values] =
                [(); 2].map(|()| vec![0.0; self.context * self.size]);
            let put = |which: usize, first: usize, sums: &[f32]| {
                for (token, sums) in (first..).zip(sums.chunks_exact(self.size)) {
                    let at = (head.row(token) * 3 + which) * self.width() + head.column;
                    // SAFETY: each of the three of each token of each head has its own values.
                    unsafe { result.part(at..at + self.size) }.copy_from_slice(sums);
                }
            };
            for block in head.blocks() {
                let query = head
                    .projected(projected, 0)
                    .rows_from(block.start, block.queries);
                let above = head
                    .of(gradient, self.width(), 0)
                    .rows_from(block.start, block.queries);
                shares.compute(alone, &head, &block, query, keys);
                let slopes = &mut slopes[..block.queries * block.known];
                let value = values.rows_from(0, block.known);
                multiply(alone, &above, &value.transposed(), slopes);
                let operation = ScoreSlopes {
                    shares: shares.values(&block),
                    slopes,
                    block: &block,
                    scale: self.scale,
                };
                dispatch(alone.instructions(), operation);
                let slopes = MatrixView::row_major(slopes, block.queries, block.known);
                let of_queries = &mut of_queries[..block.queries * self.size];
                multiply(alone, &slopes, &keys.rows_from(0, block.known), of_queries);
                put(0, block.start, of_queries);
                let known = ..block.known * self.size;
                multiply_add(alone, &slopes.transposed(), &query, &mut of_keys[known]);
                let shares = shares.of(&block).transposed();
                multiply_add(alone, &shares, &above, &mut of_values[known]);
            }
            put(1, 0, &of_keys);
            put(2, 0, &of_values);
        });
    }

    /// Calls `work` for each head of each window, on as many threads as that is worth.
    fn each_head(&self, execution: Execution, work: impl Fn(Head) + Sync) {
        let windows = self.rows / self.context;
        let worth = head::worth(self.context, self.size);
        divide(execution, windows * self.heads, worth, 1, |items| {
            for item in items {
                work(Head {
                    mask: Mask::Causal,
                    context: self.context,
                    width: self.width(),
                    size: self.size,
                    scale: self.scale,
                    first: item / self.heads * self.context,
                    column: item % self.heads * self.size,
                });
            }
        });
    }
}

/// Slopes of shares become slopes of scores, in place: share · (slope − mean) · scale, where the mean is the sum of
/// shares times slopes, as in the backward pass of softmax.
struct ScoreSlopes<'a> {
    shares: &'a [f32],
    slopes: &'a mut [f32],
    block: &'a Block,
    scale: f32,
}

impl LaneOperation for ScoreSlopes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let length = self.block.known;
        let scale = L::splat(self.scale);
        let rows = self.shares.chunks_exact(length);
        let rows = rows.zip(self.slopes.chunks_exact_mut(length));
        for (token, (shares, slopes)) in (self.block.start..).zip(rows) {
            let (known, behind) = slopes.split_at_mut(token + 1);
            let (shares, shares_rest) = sixteens(&shares[..=token]);
            let (slopes, slopes_rest) = sixteens_mut(known);
            let mut mean = L::splat(0.0);
            for (share, slope) in shares.iter().zip(slopes.iter()) {
                mean = L::load(slope).multiply_add(L::load(share), mean);
            }
            let last = (L::load_part(slopes_rest), L::load_part(shares_rest));
            let mean = L::splat(last.0.multiply_add(last.1, mean).sum());
            let to_score =
                |share: L, slope: L| share.multiply(slope.subtract(mean)).multiply(scale);
            for (share, slope) in shares.iter().zip(slopes) {
                to_score(L::load(share), L::load(slope)).store(slope);
            }
            to_score(last.1, last.0).store_part(slopes_rest);
            behind.fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests;
