//! Where a model is computed: on the CPU, or on a GPU that its actor was placed on.
//!
//! Invariants:
//! 1. The device decides how fast an answer or a gradient is there, and not one bit of it: it is no part of a job's fingerprint
//!    or of a version, and what one device computed, another one computes again. So kernels of GPUs keep the CPU's order
//!    (`actors/src/kernels/cuda/mod.rs`).
//! 2. Only trainers, and the replicas of endpoints that ask for it, open a device; drivers, monitors and whoever replays compute
//!    on the CPU.
//! 3. Placement goes by [`ComputeDevice::gpus`]: who opens a GPU has it for itself.

use std::fmt;

use candle_core::Device;
use serde::{Deserialize, Serialize};

/// What something is computed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDevice {
    /// The CPU.
    #[default]
    Cpu,
    /// An NVIDIA GPU for each trainer or replica. The program must be built with the feature `cuda`.
    Cuda,
}

impl fmt::Display for ComputeDevice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

/// Why something cannot be computed where it should.
#[derive(Debug, thiserror::Error)]
#[error(
    "the GPU that this process was placed on cannot be used: {0}; see that this program was built with `--features cuda` and \
     that the worker's driver is at least as new as the toolkit that it was built with, or leave the device out: CPUs \
     compute the same bits"
)]
pub struct DeviceError(#[source] candle_core::Error);

impl ComputeDevice {
    /// Whether this program can compute there, if the machine can.
    #[must_use]
    pub fn is_built_in(self) -> bool {
        match self {
            Self::Cpu => true,
            Self::Cuda => cfg!(feature = "cuda"),
        }
    }

    /// GPUs that a trainer or a replica needs. A whole one: two on one would only wait for each other.
    #[must_use]
    pub fn gpus(self) -> u32 {
        match self {
            Self::Cpu => 0,
            Self::Cuda => 1,
        }
    }

    /// The device itself. A process that was placed on a GPU sees no other, so it is the first.
    ///
    /// # Errors
    /// If there is no GPU, or the program was built without support for them.
    pub fn open(self) -> Result<Device, DeviceError> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => Device::new_cuda(0).map_err(DeviceError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_an_error_that_says_what_to_do() {
        assert!(ComputeDevice::Cpu.open().unwrap().is_cpu());
        let opened = ComputeDevice::Cuda.open();
        assert!(cfg!(feature = "cuda") || opened.is_err());
        if let Err(error) = opened {
            let error = error.to_string();
            assert!(error.contains("cannot be used"), "{error}");
            assert!(error.contains("leave the device out"), "{error}");
        }
    }
}
