//! Where a checkpoint's bytes come from while it is saved.

use std::ops::Range;

use bytes::Bytes;

/// Bytes that do not change while a checkpoint is made of them, read piece by piece: so a state of
/// many gigabytes is never encoded in one block of memory.
pub trait CheckpointSource: Send + Sync + 'static {
    /// How many there are.
    fn length_bytes(&self) -> u64;

    /// Those of `range`, which lies within the length. Called more than once for the same range, on
    /// threads that may compute.
    fn read(&self, range: Range<u64>) -> Bytes;
}

impl CheckpointSource for Bytes {
    fn length_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, range: Range<u64>) -> Bytes {
        let at = |offset: u64| usize::try_from(offset).expect("the bytes are in memory");
        self.slice(at(range.start)..at(range.end))
    }
}
