//! What NVIDIA's driver says of a machine's GPUs: which there are ([`gpus`]), how busy they are and what of their memory
//! is taken ([`Monitor`]).
//!
//! Invariants:
//! 1. The driver's library, NVML, is loaded at run time, and nothing of CUDA is needed to build. A machine without it has
//!    no GPUs, which is no error: a line of the debug log says so, once.
//! 2. A GPU is named by its UUID, which means the same device in every process. NVML shows every process all GPUs,
//!    whatever `CUDA_VISIBLE_DEVICES` says, so whoever watches says which.
//! 3. What a GPU does not say is absent, and so is what it said long ago: no figure stands for another.
//! 4. How GPUs are used is asked by one thread of each monitor, one call after the other. Whoever reads the figures never
//!    waits for the driver.

mod monitor;
mod nvml;
#[cfg(test)]
mod stand_in;

pub use monitor::Monitor;
pub use nvml::{Gpu, Memory, Usage, gpus};
