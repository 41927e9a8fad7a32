//! Where a trainer computes gradients: on its CPU, or on a GPU that it was placed on.
//!
//! Invariants:
//! 1. The device decides how fast a gradient is there, and not one bit of it: it is no part of a job's fingerprint, and a
//!    run on one device is replayed on the other to the same hash. So kernels of GPUs keep the CPU's order
//!    (`actors/src/kernels/cuda/mod.rs`).
//! 2. Only trainers open a device; drivers, and whoever replays or serves, compute on the CPU.
//! 3. A program that cannot use the device says so when the job is submitted, not when it is placed.
//! 4. How busy a GPU is, is there to be looked at: nothing waits for who measures it, or fails where nobody can.

use std::fmt;

use candle_core::Device;
use mobula_gpu::Monitor;
use serde::{Deserialize, Serialize};

use super::validation::{InvalidField, check};

/// What a job's trainers compute gradients on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDevice {
    /// The CPU.
    #[default]
    Cpu,
    /// An NVIDIA GPU for each trainer. The program must be built with the feature `cuda`.
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

/// Why a trainer cannot compute where it should.
#[derive(Debug, thiserror::Error)]
#[error(
    "the GPU that this trainer was placed on cannot be used: {0}; see that the worker's driver is at least as new as the \
     toolkit that the program was built with, or leave `device` out of the job to train on CPUs, with the same bits"
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

    /// Refuses what this program cannot use.
    pub(super) fn check(self) -> Result<(), InvalidField> {
        check(
            "device",
            self,
            self.is_built_in(),
            "the program that trains was built without support for GPUs".to_owned(),
            "build it with `--features cuda` (docs/gpu.md), or leave the key out to train on CPUs, with the same bits",
        )
    }

    /// GPUs that a trainer needs. A whole one: two trainers on one would only wait for each other.
    #[must_use]
    pub fn gpus(self) -> f64 {
        match self {
            Self::Cpu => 0.0,
            Self::Cuda => 1.0,
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

/// The GPU that a trainer computes on, watched as long as this lives.
pub(super) struct WatchedGpu(Monitor);

impl WatchedGpu {
    /// What [`ComputeDevice::open`] opens; nothing where that is the CPU.
    pub(super) fn of(device: ComputeDevice) -> Self {
        let visible = match device {
            ComputeDevice::Cpu => None,
            ComputeDevice::Cuda => std::env::var("CUDA_VISIBLE_DEVICES").ok(),
        };
        WatchedGpu(Monitor::start(visible.as_deref().and_then(first_visible)))
    }

    /// The share of the last moments in which it computed, from 0 to 1, if the driver says so.
    pub(super) fn utilization(&self) -> Option<f64> {
        let latest = self.0.latest();
        latest.into_values().find_map(|gpu| gpu.utilization)
    }
}

/// The first device of a list as agents make it for their hosts. They name GPUs by UUID, as NVML does, which heeds no such
/// list itself.
fn first_visible(devices: &str) -> Option<String> {
    let first = devices.split(',').next()?.trim();
    (!first.is_empty()).then(|| first.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gpu_that_is_watched_is_the_one_that_is_opened() {
        for (devices, first) in [
            ("GPU-aa", Some("GPU-aa")),
            ("GPU-bb,GPU-aa", Some("GPU-bb")),
            ("", None),
        ] {
            assert_eq!(first_visible(devices).as_deref(), first, "{devices}");
        }
        assert_eq!(WatchedGpu::of(ComputeDevice::Cpu).utilization(), None);
    }

    #[test]
    fn a_device_that_the_program_was_not_built_for_is_refused_with_what_to_do() {
        assert!(ComputeDevice::Cpu.check().is_ok());
        assert!(ComputeDevice::Cpu.open().unwrap().is_cpu());
        let checked = ComputeDevice::Cuda.check();
        if cfg!(feature = "cuda") {
            return checked.unwrap();
        }
        let error = checked.unwrap_err().to_string();
        assert!(
            error.starts_with("device is cuda: the program that trains was built without"),
            "{error}"
        );
        assert!(error.contains("--features cuda"), "{error}");
        let error = ComputeDevice::Cuda.open().unwrap_err().to_string();
        assert!(error.contains("cannot be used"), "{error}");
    }
}
