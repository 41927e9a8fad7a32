//! Kernels for NVIDIA GPUs, with the bits of the CPU's.
//!
//! Invariants:
//! 1. **The CPU's order.** A kernel adds in the order in which the CPU's kernel of the same name does, with the same
//!    polynomials, rounds every operation once and fuses where the CPU fuses: results are equal in every bit, but for the
//!    sign and payload of a NaN. The number of blocks, the size of a tile and the model of the GPU do not show.
//! 2. **One source.** The `.cu` files that `nvcc` compiles for a GPU are those that the tests run on a CPU
//!    (`emulation.rs`), with the grids and arguments that a GPU gets.
//! 3. **Nothing without the feature.** Without `cuda` this folder is compiled for tests only.
//!
//! In reading order:
//!
//! * `source`: the kernels in CUDA C++, and what they need to run on a CPU.
//! * `call`, `calls`: which kernel, over which grid, with which arguments.
//! * [`digest`]: what AdamW says about what it wrote.
//! * `device` (with the feature): calls on candle's storage; what `cuda_fwd` of this crate's operations call.
//! * `check` (with the feature): every kernel against the CPU and against candle, for `cargo xtask gpu-check`.

mod call;
mod calls;
pub mod digest;

#[cfg(feature = "cuda")]
pub mod check;
#[cfg(feature = "cuda")]
pub mod device;

pub(crate) use calls::tokens::Dropping;

#[cfg(test)]
mod emulation;
#[cfg(test)]
mod tests;
