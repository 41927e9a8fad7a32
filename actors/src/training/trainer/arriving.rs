//! A state on its way to a trainer.
//!
//! Invariants:
//! 1. What has arrived is in order and without gaps.
//! 2. What came behind a gap waits until the gap is filled, and no longer than the order lasts with which it came.
//! 3. What was asked for under an earlier order, or for an earlier state, is told from what is awaited now, though as many
//!    bytes are here.

use std::collections::BTreeMap;

/// A state on its way here.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    /// Its first bytes.
    bytes: Vec<u8>,
    /// Parts behind a gap, by their first byte.
    aside: BTreeMap<u64, Vec<u8>>,
    /// Grows with every order of parts and every state.
    order: u64,
}

impl Arriving {
    /// How many of its first bytes are here.
    pub(super) fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Another state begins.
    pub(super) fn clear(&mut self) {
        self.bytes = Vec::new();
        self.begin_order();
    }

    /// Another order begins. Answers its number.
    pub(super) fn begin_order(&mut self) -> u64 {
        self.aside.clear();
        self.order += 1;
        self.order
    }

    /// Whether what came under `order`, which began when `length` bytes were here, is awaited still.
    pub(super) fn awaits(&self, order: u64, length: u64) -> bool {
        (order, length) == (self.order, self.length())
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
        let bytes = std::mem::take(&mut self.bytes);
        self.clear();
        bytes
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
        arriving.begin_order();
        arriving.extend(&[0]);
        assert_eq!(arriving.take(), [0u8]);
    }

    #[test]
    fn what_an_order_brings_that_was_broken_off_is_not_awaited() {
        let mut arriving = Arriving::default();
        arriving.extend(&[0, 1]);
        let first = arriving.begin_order();
        assert!(arriving.awaits(first, 2));
        // Another state, of which as many bytes are here.
        arriving.clear();
        arriving.extend(&[5, 6]);
        assert!(!arriving.awaits(first, 2));
        let second = arriving.begin_order();
        let third = arriving.begin_order();
        assert!(!arriving.awaits(second, 2) && arriving.awaits(third, 2));
        arriving.extend(&[7]);
        assert!(!arriving.awaits(third, 2), "the driver sent something");
        arriving.take();
        assert!(!arriving.awaits(third, 0));
    }
}
