//! The arithmetic of training, and of answers: fast, and with the same bits on every machine.
//!
//! Invariants:
//! 1. **One order.** Each kernel says in which order it adds, and every path through it (AVX-512, AVX2, plain
//!    Rust, one thread or several) computes exactly that. A fused multiply-add is written where one is meant,
//!    and nowhere else does the compiler make one.
//! 2. **No library.** `exp`, `ln`, `tanh` and their like are polynomials of our own.
//! 3. **Pure.** A kernel reads its arguments and an [`Execution`], which decides how fast it is and nothing
//!    else. What is shared between threads is divided among them by position.
//!
//! In reading order:
//!
//! * [`execution`]: which instructions, how many threads; `lanes`: sixteen values at a time, alike everywhere;
//!   `division`: work for several threads.
//! * [`mod@product`]: the matrix product, one chain of fused multiply-adds for each element.
//! * [`mod@affine`]: a dense layer with its gradients, and one that is prepared for being asked; [`mod@convolution`]: a layer over
//!   patches of images; [`attention`]: over the tokens before each in its window, or over all tokens of a text.
//! * [`elementary`]: `exp`, `ln`, `tanh`, `erf`, GELU of many `f32`; [`math`]: functions of single `f64`.
//! * [`elementwise`], [`mod@softmax`], [`mod@layer_norm`]: differentiable, for candle's graph.
//! * [`loss`]: cross-entropy with its gradient; `seed` enters that into the graph.
//! * [`gradients`]: a backward pass into one flat vector.
//! * [`update`]: SGD and AdamW, in place or from one place to another ([`target`]); the norm of a gradient. [`memory`]: none of it given back between steps.
//! * `cuda` (with the feature of that name): the same on a GPU.

pub mod affine;
pub mod attention;
pub mod convolution;
#[cfg(any(test, feature = "cuda"))]
pub mod cuda;
pub mod elementary;
pub mod elementwise;
pub mod execution;
pub mod gradients;
pub mod layer_norm;
pub mod loss;
pub mod math;
pub mod memory;
pub mod product;
pub mod softmax;
pub mod target;
pub mod update;

mod division;
mod lanes;
mod seed;

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod test_values;

use std::ops::Range;

use candle_core::{CpuStorage, Layout, Result, Shape, bail};

use self::division::divide_rows;

pub use affine::{Activation, affine};
pub use convolution::convolution;
pub use elementwise::{gelu, overwrite};
pub use execution::{Execution, InstructionSet};
pub use layer_norm::layer_norm;
pub use product::product;
pub use softmax::softmax;

/// The values of a tensor that lie in row-major order without gaps.
fn contiguous_values<'a>(
    storage: &'a CpuStorage,
    layout: &Layout,
    operation: &str,
) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("{operation} needs contiguous values, not {layout:?}"),
    }
}

/// Length of a row; 1 for a scalar.
fn last_dimension(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1)
}

/// A result of the shape of `layout`, made by rows of `row_length` values on several threads: `compute` gets the
/// range of some rows' values and where these values go.
fn by_rows(
    layout: &Layout,
    row_length: usize,
    compute: impl Fn(InstructionSet, Range<usize>, &mut [f32]) + Sync,
) -> (CpuStorage, Shape) {
    let execution = Execution::current();
    let mut result = vec![0.0; layout.shape().elem_count()];
    divide_rows(execution, &mut result, row_length, |rows, part| {
        let values = rows.start * row_length..rows.end * row_length;
        compute(execution.instructions(), values, part);
    });
    (CpuStorage::F32(result), layout.shape().clone())
}
