//! Shares of GPUs: whole devices, or one share of one device.
//!
//! The numbers of devices are for counting only: they say that the shares fit. The worker's agent
//! packs by the same rule, and chooses the device itself when the process before has let go of it.
//!
//! Invariants:
//! 1. A share below one GPU lies on one device; whole GPUs are devices that nobody else uses.
//! 2. The choice is a function of what is free: shares go to the fullest device that takes them,
//!    whole GPUs to the lowest numbers, so that whole devices stay free as long as possible.

use mobula_core::Resources;
use serde::{Deserialize, Serialize};

/// One whole GPU, in thousandths.
pub const WHOLE_MILLI: u64 = 1000;

/// A part of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuShare {
    /// A number below the node's count of devices.
    pub device: u32,
    /// How much of it, in thousandths.
    pub milli: u32,
}

/// The devices of a node, all free. A part of a device at the end (a capacity that is no multiple
/// of 1000) is a device of that size.
pub(crate) fn devices(capacity: &Resources) -> Vec<u64> {
    // No machine has more; a capacity beyond is counted, but only this many devices are used.
    const DEVICES_MAX: u64 = 1024;
    let whole = (capacity.gpu_milli / WHOLE_MILLI).min(DEVICES_MAX);
    let rest = capacity.gpu_milli % WHOLE_MILLI;
    let whole = (0..whole).map(|_| WHOLE_MILLI);
    whole.chain((rest > 0).then_some(rest)).collect()
}

/// Chooses devices for `asked_milli` (below 1000, or a multiple of it) out of what is free of
/// each; `None` if no choice is possible.
pub(crate) fn allocate(free_milli: &[u64], asked_milli: u64) -> Option<Vec<GpuShare>> {
    let share = |device: usize, milli: u64| GpuShare {
        device: u32::try_from(device).expect("a node has few devices"),
        milli: u32::try_from(milli).expect("a share is at most one device"),
    };
    if asked_milli == 0 {
        return Some(Vec::new());
    }
    if asked_milli < WHOLE_MILLI {
        let fitting = free_milli
            .iter()
            .enumerate()
            .filter(|(_, free)| **free >= asked_milli);
        let (device, _) = fitting.min_by_key(|(device, free)| (**free, *device))?;
        return Some(vec![share(device, asked_milli)]);
    }
    let count = usize::try_from(asked_milli / WHOLE_MILLI).ok()?;
    let whole = free_milli
        .iter()
        .enumerate()
        .filter(|(_, free)| **free == WHOLE_MILLI);
    let chosen: Vec<GpuShare> = whole
        .take(count)
        .map(|(device, _)| share(device, WHOLE_MILLI))
        .collect();
    (chosen.len() == count).then_some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(free: &[u64], asked: u64, expect: Option<&[(u32, u32)]>) {
        let shares = allocate(free, asked);
        let shares: Option<Vec<(u32, u32)>> =
            shares.map(|s| s.iter().map(|share| (share.device, share.milli)).collect());
        assert_eq!(shares.as_deref(), expect, "{asked} of {free:?}");
    }

    #[test]
    fn shares_are_packed_and_whole_devices_kept_whole() {
        check(&[1000, 1000], 0, Some(&[]));
        check(&[1000, 1000], 500, Some(&[(0, 500)]));
        check(&[1000, 500], 500, Some(&[(1, 500)]));
        check(&[500, 400], 600, None);
        check(&[900, 1000, 1000], 2000, Some(&[(1, 1000), (2, 1000)]));
        check(&[900, 1000], 2000, None);
        check(&[], 100, None);
    }

    #[test]
    fn devices_come_from_the_capacity() {
        let capacity = Resources {
            gpu_milli: 2500,
            ..Resources::default()
        };
        assert_eq!(devices(&capacity), [1000, 1000, 500]);
        assert_eq!(devices(&Resources::default()), [0u64; 0]);
    }
}
