//! Causal attention: each token looks at itself and at those before it in its window.
//!
//! Order: for each query, the scores of the tokens up to it in ascending order, their softmax in `f64` from
//! the largest score down, then the values' sum in ascending order. The backward pass computes the scores
//! again instead of keeping them: they take a context squared for each head.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::super::super::math;
use super::{add_scaled, contiguous, dot};
#[cfg(any(test, feature = "cuda"))]
use crate::kernels::cuda::Attention;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::device;

/// The shape of the windows and heads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CausalAttention {
    /// Tokens of a window.
    pub(crate) context: usize,
    /// Heads, which divide the width.
    pub(crate) heads: usize,
}

/// One head's part of a window: rows of queries, keys and values lie in one matrix.
struct Head<'a> {
    values: &'a [f32],
    /// Values of a row: three times the width.
    row: usize,
    width: usize,
    /// Where the head begins in a width.
    start: usize,
    /// Values of a head.
    size: usize,
}

impl<'a> Head<'a> {
    fn part(&self, token: usize, which: usize) -> &'a [f32] {
        &self.values[token * self.row + which * self.width + self.start..][..self.size]
    }

    fn query(&self, token: usize) -> &'a [f32] {
        self.part(token, 0)
    }

    fn key(&self, token: usize) -> &'a [f32] {
        self.part(token, 1)
    }

    fn value(&self, token: usize) -> &'a [f32] {
        self.part(token, 2)
    }

    /// How much `token` looks at each token up to itself.
    fn shares(&self, token: usize, scale: f32, shares: &mut Vec<f32>) {
        shares.clear();
        let query = self.query(token);
        let mut largest = f32::NEG_INFINITY;
        for other in 0..=token {
            let score = dot(query, self.key(other)) * scale;
            largest = largest.max(score);
            shares.push(score);
        }
        let mut total = 0.0f64;
        for share in shares.iter_mut() {
            let power = math::exp(f64::from(*share - largest));
            total += power;
            *share = power as f32;
        }
        let inverse = (1.0 / total) as f32;
        for share in shares.iter_mut() {
            *share *= inverse;
        }
    }
}

impl CausalAttention {
    /// From `[windows * context, 3 * width]`, queries beside keys beside values, to `[windows * context,
    /// width]`.
    pub(crate) fn apply(self, projected: &Tensor) -> Result<Tensor> {
        projected.contiguous()?.apply_op1(self)
    }

    /// Rows, width and size of a head, if they fit.
    fn sizes(&self, layout: &Layout) -> Result<(usize, usize, usize)> {
        let &[rows, columns] = layout.dims() else {
            bail!("attention needs a matrix, not {:?}", layout.dims())
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
        Ok((rows, width, width / self.heads))
    }

    /// The same for a GPU, of what was projected.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn on_gpu(&self, projected: &Layout) -> Result<Attention> {
        let (rows, _, size) = self.sizes(projected)?;
        Ok(Attention {
            rows,
            context: self.context,
            heads: self.heads,
            size,
            scale: Self::scale(size),
        })
    }

    fn scale(size: usize) -> f32 {
        (1.0 / (size as f64).sqrt()) as f32
    }

    fn head<'a>(&self, values: &'a [f32], window: usize, index: usize, width: usize) -> Head<'a> {
        let (row, size) = (3 * width, width / self.heads);
        Head {
            values: &values[window * self.context * row..][..self.context * row],
            row,
            width,
            start: index * size,
            size,
        }
    }
}

impl CustomOp1 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width, size) = self.sizes(layout)?;
        let values = contiguous(storage, layout, "attention")?;
        let mut out = vec![0.0; rows * width];
        let mut shares = Vec::with_capacity(self.context);
        for window in 0..rows / self.context {
            for index in 0..self.heads {
                let head = self.head(values, window, index, width);
                for token in 0..self.context {
                    head.shares(token, Self::scale(size), &mut shares);
                    let at = (window * self.context + token) * width + head.start;
                    for (other, share) in shares.iter().enumerate() {
                        add_scaled(&mut out[at..at + size], *share, head.value(other));
                    }
                }
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        device::attention_forward((storage, layout), &self.on_gpu(layout)?)
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
        let shape = self.0;
        let (rows, width, size) = shape.sizes(projected_layout)?;
        let values = contiguous(projected, projected_layout, "attention")?;
        let gradient = contiguous(gradient, gradient_layout, "attention")?;
        let scale = CausalAttention::scale(size);
        let mut result = vec![0.0f32; values.len()];
        let (mut shares, mut slopes) = (Vec::new(), Vec::new());
        for window in 0..rows / shape.context {
            let first = window * shape.context;
            for index in 0..shape.heads {
                let head = shape.head(values, window, index, width);
                for token in 0..shape.context {
                    head.shares(token, scale, &mut shares);
                    let from_above = &gradient[(first + token) * width + head.start..][..size];
                    slopes.clear();
                    slopes.extend((0..=token).map(|other| dot(from_above, head.value(other))));
                    let mean = dot(&shares, &slopes);
                    let at = |token: usize, which: usize| {
                        (first + token) * head.row + which * width + head.start
                    };
                    for (other, (share, slope)) in shares.iter().zip(&slopes).enumerate() {
                        let to_score = share * (slope - mean) * scale;
                        let (query, key, value) = (at(token, 0), at(other, 1), at(other, 2));
                        add_scaled(&mut result[query..query + size], to_score, head.key(other));
                        add_scaled(&mut result[key..key + size], to_score, head.query(token));
                        add_scaled(&mut result[value..value + size], *share, from_above);
                    }
                }
            }
        }
        Ok((CpuStorage::F32(result), Shape::from((rows, 3 * width))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        projected: &CudaStorage,
        projected_layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let attention = self.0.on_gpu(projected_layout)?;
        let projected = (projected, projected_layout);
        device::attention_backward(projected, (gradient, gradient_layout), &attention)
    }
}
