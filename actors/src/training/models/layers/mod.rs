//! What networks are made of beside matrix products, each with a backward pass of its own.
//!
//! Invariant: one fixed order of additions, on the caller's thread; whatever is random is drawn by the
//! number of the sample, so the backward pass draws it again instead of remembering it.

mod attention;
mod dropout;
mod embedding;

pub(crate) use attention::CausalAttention;
pub(crate) use dropout::Dropout;
pub(crate) use embedding::embed;

#[cfg(test)]
pub(crate) use attention::Backward as AttentionBackward;
#[cfg(test)]
pub(crate) use embedding::Scatter;

pub(super) use crate::kernels::{gelu, layer_norm};

use candle_core::{CpuStorage, Layout, Result, bail};

/// The values of a contiguous tensor.
fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout, what: &str) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("{what} needs contiguous values"),
    }
}

/// Lanes of a sum of products: what is added to which lane is fixed, so vectors change no bit.
const LANES: usize = 8;

/// Σ a · b: eight lanes, then a tree over them, then the rest in order.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let halves = [0, 1, 2, 3].map(|lane| lanes[lane] + lanes[lane + 4]);
    let mut sum = (halves[0] + halves[2]) + (halves[1] + halves[3]);
    for (a, b) in a_rest.iter().zip(b_rest) {
        sum += a * b;
    }
    sum
}

/// `sums += factor · values`, each by itself.
fn add_scaled(sums: &mut [f32], factor: f32, values: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += factor * value;
    }
}

#[cfg(test)]
mod tests;
