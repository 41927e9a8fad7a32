//! Which parts of a piece of memory are taken: arithmetic only, the memory is elsewhere.
//!
//! Invariants:
//! 1. Blocks do not overlap, lie within the arena, and begin at multiples of [`ALIGN_BYTES`].
//! 2. Free neighbours are one range: an arena without blocks has one free range, all of it.

use std::collections::BTreeMap;

/// Blocks begin at multiples of this: a cache line, and what vector instructions like.
pub const ALIGN_BYTES: u64 = 64;

/// A range that is released although it is not taken. A defect of whoever does it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{size_bytes} bytes at {offset} are not a taken block of this arena")]
pub struct BadRelease {
    /// Where the range begins.
    pub offset: u64,
    /// Its size, in bytes.
    pub size_bytes: u64,
}

/// The free and taken parts of one arena.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arena {
    size_bytes: u64,
    used_bytes: u64,
    /// Size by offset.
    free: BTreeMap<u64, u64>,
}

impl Arena {
    /// An arena of `size_bytes`, all free. What does not make up a whole unit is not used.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        let size_bytes = size_bytes / ALIGN_BYTES * ALIGN_BYTES;
        let mut free = BTreeMap::new();
        if size_bytes > 0 {
            free.insert(0, size_bytes);
        }
        Arena {
            size_bytes,
            used_bytes: 0,
            free,
        }
    }

    /// Takes the first range that is large enough; answers its offset.
    pub fn allocate(&mut self, size_bytes: u64) -> Option<u64> {
        let size_bytes = block_bytes(size_bytes)?;
        let (offset, free_bytes) = self
            .free
            .iter()
            .find(|(_, free_bytes)| **free_bytes >= size_bytes)
            .map(|(offset, free_bytes)| (*offset, *free_bytes))?;
        self.free.remove(&offset);
        if free_bytes > size_bytes {
            self.free
                .insert(offset + size_bytes, free_bytes - size_bytes);
        }
        self.used_bytes += size_bytes;
        Some(offset)
    }

    /// Gives back a block of [`Arena::allocate`].
    pub fn release(&mut self, offset: u64, size_bytes: u64) -> Result<(), BadRelease> {
        let bad = BadRelease { offset, size_bytes };
        let size_bytes = block_bytes(size_bytes).ok_or_else(|| bad.clone())?;
        let end = offset.checked_add(size_bytes).ok_or_else(|| bad.clone())?;
        let before = self.free.range(..=offset).next_back();
        let after = self.free.range(offset..).next();
        let is_free_before = before.is_some_and(|(start, size)| start + size > offset);
        let is_free_after = after.is_some_and(|(start, _)| *start < end);
        if !offset.is_multiple_of(ALIGN_BYTES)
            || end > self.size_bytes
            || is_free_before
            || is_free_after
        {
            return Err(bad);
        }
        let (mut start, mut free_bytes) = (offset, size_bytes);
        if let Some((before, size)) = before
            && before + size == offset
        {
            (start, free_bytes) = (*before, size + free_bytes);
        }
        if let Some((after, size)) = after
            && *after == end
        {
            free_bytes += size;
            let after = *after;
            self.free.remove(&after);
        }
        self.free.insert(start, free_bytes);
        self.used_bytes -= size_bytes;
        Ok(())
    }

    /// Its size, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What is taken, in bytes.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Whether nothing is taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.used_bytes == 0
    }
}

/// The size of the block that holds so many bytes; an empty one takes a unit as well, so that no
/// two blocks share an offset. `None` beyond what a number holds.
#[must_use]
pub fn block_bytes(size_bytes: u64) -> Option<u64> {
    size_bytes.max(1).checked_next_multiple_of(ALIGN_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_taken_is_not_released() {
        let mut arena = Arena::new(1024 + 7);
        assert_eq!(arena.size_bytes(), 1024);
        let first = arena.allocate(100).unwrap();
        let second = arena.allocate(100).unwrap();
        assert_eq!((first, second, arena.used_bytes()), (0, 128, 256));
        assert!(arena.allocate(1000).is_none());
        assert!(arena.allocate(u64::MAX).is_none());
        for (offset, size_bytes) in [
            (64, 200),
            (1, 100),
            (256, 64),
            (960, 128),
            (u64::MAX, 1),
            (0, u64::MAX),
        ] {
            assert!(arena.release(offset, size_bytes).is_err(), "{offset}");
        }
        arena.release(first, 100).unwrap();
        assert!(arena.release(first, 100).is_err(), "twice");
        arena.release(second, 100).unwrap();
        assert!(arena.is_empty());
        assert_eq!(arena.allocate(1024), Some(0), "one range again");
    }

    proptest! {
        /// Against the simplest model: a list of the taken blocks.
        #[test]
        fn blocks_never_overlap_and_all_space_comes_back(
            steps in proptest::collection::vec((any::<bool>(), 1u64..5000, any::<prop::sample::Index>()), 1..200)
        ) {
            let mut arena = Arena::new(64 * 1024);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (is_release, size_bytes, index) in steps {
                if is_release && !taken.is_empty() {
                    let (offset, size_bytes) = taken.swap_remove(index.index(taken.len()));
                    arena.release(offset, size_bytes).unwrap();
                } else if let Some(offset) = arena.allocate(size_bytes) {
                    prop_assert_eq!(offset % ALIGN_BYTES, 0);
                    prop_assert!(offset + size_bytes <= arena.size_bytes());
                    for (other, other_bytes) in &taken {
                        prop_assert!(offset + size_bytes <= *other || other + other_bytes <= offset);
                    }
                    taken.push((offset, size_bytes));
                } else {
                    let largest = arena.free.values().max().copied().unwrap_or(0);
                    prop_assert!(largest < size_bytes.next_multiple_of(ALIGN_BYTES));
                }
                let used: u64 = taken.iter().map(|(_, size)| size.next_multiple_of(ALIGN_BYTES)).sum();
                prop_assert_eq!(arena.used_bytes(), used);
            }
            for (offset, size_bytes) in taken {
                arena.release(offset, size_bytes).unwrap();
            }
            prop_assert_eq!(arena, Arena::new(64 * 1024));
        }
    }
}
