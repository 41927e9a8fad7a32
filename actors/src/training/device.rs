//! The device of a job's trainers: what of it is checked before the job begins, and how busy it is.
//!
//! Invariants:
//! 1. A program that cannot use the device says so when the job is submitted, not when it is placed.
//! 2. How busy a GPU is, is there to be looked at: nothing waits for who measures it, or fails where nobody can.

use mobula_gpu::Monitor;

use super::validation::{InvalidField, check};
use crate::device::ComputeDevice;

impl ComputeDevice {
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
    }
}
