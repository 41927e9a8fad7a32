//! What networks are made of beside matrix products, each with a backward pass of its own.
//!
//! Invariant: one fixed order of additions, however many threads add; whatever is random is drawn by the
//! number of the sample, so the backward pass draws it again instead of remembering it.

mod dropout;
mod embedding;

pub(crate) use dropout::Dropout;
pub(crate) use embedding::embed;

#[cfg(test)]
pub(crate) use embedding::Scatter;

pub(super) use crate::kernels::attention::CausalAttention;
pub(super) use crate::kernels::{gelu, layer_norm};

use candle_core::{CpuStorage, Layout, Result, bail};

/// The values of a contiguous tensor.
fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout, what: &str) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("{what} needs contiguous values"),
    }
}

#[cfg(test)]
mod tests;
