//! A state on its way to a trainer.
//!
//! Invariants:
//! 1. What has arrived is in order and without gaps.
//! 2. What came behind a gap waits until the gap is filled, and no longer than the order lasts with which it came.

use std::collections::BTreeMap;

/// A state on its way here.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    /// Its first bytes.
    bytes: Vec<u8>,
    /// Parts behind a gap, by their first byte.
    aside: BTreeMap<u64, Vec<u8>>,
}

impl Arriving {
    /// How many of its first bytes are here.
    pub(super) fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Another state begins.
    pub(super) fn clear(&mut self) {
        *self = Arriving::default();
    }

    /// Another order begins.
    pub(super) fn clear_aside(&mut self) {
        self.aside.clear();
    }

    /// Takes `bytes`, which follow what is here, and what waited for them.
    pub(super) fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        while let Some(part) = self.aside.remove(&self.length()) {
            self.bytes.extend_from_slice(&part);
        }
    }

    /// Takes a part that begins at `offset`, which may be behind a gap.
    pub(super) fn put(&mut self, offset: u64, part: Vec<u8>) {
        if offset == self.length() {
            self.extend(&part);
        } else {
            self.aside.insert(offset, part);
        }
    }

    /// All that is here without a gap; nothing is left.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(self).bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_behind_a_gap_wait_until_it_is_filled() {
        let mut arriving = Arriving::default();
        for (offset, part) in [(0, [0, 1]), (4, [4, 5]), (8, [8, 9]), (2, [2, 3])] {
            arriving.put(offset, part.to_vec());
        }
        assert_eq!(arriving.length(), 6);
        arriving.extend(&[6, 7]);
        assert_eq!(arriving.take(), (0..10).collect::<Vec<u8>>());
        assert_eq!(arriving.length(), 0);
        arriving.put(1, vec![1]);
        arriving.clear_aside();
        arriving.extend(&[0]);
        assert_eq!(arriving.take(), [0u8]);
    }
}
