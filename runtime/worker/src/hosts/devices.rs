//! Which GPU each host process may see. The leader counts thousandths; which device they are on is
//! the agent's choice, because only it knows when a process has really let go of one.
//!
//! Invariants:
//! 1. What is taken from a device never exceeds 1000 thousandths.
//! 2. Whole GPUs are taken whole; a share is packed onto the fullest device that still has room, so
//!    that whole devices stay free.

/// A part of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    index: usize,
    milli: u64,
}

#[derive(Debug)]
struct Device {
    id: String,
    free_milli: u64,
}

/// The devices of this machine.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    devices: Vec<Device>,
}

impl Devices {
    /// All free.
    pub(crate) fn new(ids: Vec<String>) -> Devices {
        let devices = ids
            .into_iter()
            .map(|id| Device {
                id,
                free_milli: 1000,
            })
            .collect();
        Devices { devices }
    }

    /// Takes `milli` thousandths, or nothing where that much is not free in the right shape.
    pub(crate) fn take(&mut self, milli: u64) -> Option<Vec<Share>> {
        let whole = usize::try_from(milli / 1000).ok()?;
        let part = milli % 1000;
        let free = |index: usize| self.devices[index].free_milli;
        let mut shares: Vec<Share> = (0..self.devices.len())
            .filter(|index| free(*index) == 1000)
            .take(whole)
            .map(|index| Share { index, milli: 1000 })
            .collect();
        if shares.len() < whole {
            return None;
        }
        if part > 0 {
            let index = (0..self.devices.len())
                .filter(|index| free(*index) >= part)
                .filter(|index| shares.iter().all(|share| share.index != *index))
                .min_by_key(|index| free(*index))?;
            shares.push(Share { index, milli: part });
        }
        for share in &shares {
            self.devices[share.index].free_milli -= share.milli;
        }
        Some(shares)
    }

    /// Whether `milli` could be taken if every device were free.
    pub(crate) fn could_ever_take(&self, milli: u64) -> bool {
        milli.div_ceil(1000) <= self.devices.len() as u64
    }

    /// Gives shares back.
    pub(crate) fn give_back(&mut self, shares: &[Share]) {
        for share in shares {
            let device = &mut self.devices[share.index];
            device.free_milli = (device.free_milli + share.milli).min(1000);
        }
    }

    /// What `CUDA_VISIBLE_DEVICES` should say for these shares.
    pub(crate) fn visible(&self, shares: &[Share]) -> String {
        let ids: Vec<&str> = shares
            .iter()
            .map(|s| self.devices[s.index].id.as_str())
            .collect();
        ids.join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_devices_stay_whole_and_shares_are_packed() {
        let mut devices = Devices::new(vec!["a".into(), "b".into(), "c".into()]);
        let quarter = devices.take(250).unwrap();
        assert_eq!(devices.visible(&quarter), "a");
        let half = devices.take(500).unwrap();
        assert_eq!(devices.visible(&half), "a", "packed onto the same device");
        let two = devices.take(2000).unwrap();
        assert_eq!(devices.visible(&two), "b,c");
        assert_eq!(devices.take(300), None, "a has only 250 left");
        devices.give_back(&two);
        let mixed = devices.take(1250).unwrap();
        assert_eq!(devices.visible(&mixed), "b,a");
        assert!(devices.could_ever_take(3000) && !devices.could_ever_take(3001));
    }
}
