//! Memory that processes share: the only unsafe code about objects.
//!
//! Invariants:
//! 1. A mapped file cannot shrink: the agent seals its size before it gives a descriptor away, so
//!    that no access past its end can kill this process.
//! 2. Bytes of a published block are not written until its agent has given it back, and no view of
//!    it is left in this process: a view is a plain, unchanging `&[u8]`.
//! 3. A block is written by whoever has allocated it, and by nobody else, before it is published.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{MmapOptions, MmapRaw};

/// One arena in this process's memory.
pub(crate) struct Mapping {
    map: MmapRaw,
    size_bytes: usize,
}

impl Mapping {
    /// Maps an arena to write in, with all of its pages there: the first write to each would
    /// otherwise stop for the kernel.
    pub(crate) fn writable(descriptor: &OwnedFd, size_bytes: usize) -> std::io::Result<Arc<Self>> {
        let map = MmapOptions::new()
            .len(size_bytes)
            .populate()
            .map_raw(descriptor)?;
        Ok(Arc::new(Mapping { map, size_bytes }))
    }

    /// Maps an arena to read in.
    pub(crate) fn readable(descriptor: &OwnedFd, size_bytes: usize) -> std::io::Result<Arc<Self>> {
        let map = MmapOptions::new()
            .len(size_bytes)
            .map_raw_read_only(descriptor)?;
        Ok(Arc::new(Mapping { map, size_bytes }))
    }

    /// Writes a block that the caller has allocated in this arena and not published.
    ///
    /// # Safety
    ///
    /// The mapping is writable, and nobody reads or writes `bytes.len()` bytes at `offset` in the
    /// meantime.
    pub(crate) unsafe fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(
            offset
                .checked_add(bytes.len())
                .is_some_and(|end| end <= self.size_bytes),
            "a block lies within its arena"
        );
        // SAFETY: the range lies within the mapping, as checked above; the caller promises that it
        // is writable and that nobody else uses it; `bytes` is no part of it for that reason.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.map.as_mut_ptr().add(offset),
                bytes.len(),
            );
        }
    }
}

/// A published block of an arena, read in place. The pin keeps the block as it is while it lives.
pub(crate) struct View<P> {
    mapping: Arc<Mapping>,
    offset: usize,
    size_bytes: usize,
    _pin: P,
}

impl<P: Send + Sync + 'static> View<P> {
    /// The bytes of a block, without a copy; `None` if it does not lie within the arena.
    ///
    /// # Safety
    ///
    /// The block is published, and nobody writes it while `pin` lives.
    pub(crate) unsafe fn bytes(
        mapping: Arc<Mapping>,
        offset: u64,
        size_bytes: u64,
        pin: P,
    ) -> Option<Bytes> {
        let offset = usize::try_from(offset).ok()?;
        let size_bytes = usize::try_from(size_bytes).ok()?;
        if offset.checked_add(size_bytes)? > mapping.size_bytes {
            return None;
        }
        Some(Bytes::from_owner(View {
            mapping,
            offset,
            size_bytes,
            _pin: pin,
        }))
    }
}

impl<P> AsRef<[u8]> for View<P> {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the range lies within the mapping, which lives as long as `self`; that nobody
        // writes it meanwhile is what the maker of the view promised.
        unsafe { std::slice::from_raw_parts(self.map_pointer().add(self.offset), self.size_bytes) }
    }
}

impl<P> View<P> {
    fn map_pointer(&self) -> *const u8 {
        self.mapping.map.as_ptr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn what_is_written_is_read_in_place_through_another_mapping() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let other: OwnedFd = File::try_clone(&file).unwrap().into();
        let writable = Mapping::writable(&file.into(), 8192).unwrap();
        let readable = Mapping::readable(&other, 8192).unwrap();
        // SAFETY: nobody else knows the file.
        unsafe { writable.write(4096, b"shared") };
        // SAFETY: it is not written again.
        let view = unsafe { View::bytes(Arc::clone(&readable), 4096, 6, "no pin") }.unwrap();
        assert_eq!(view, "shared");
        assert_eq!(view.as_ptr() as usize % 64, 0);
        // SAFETY: as above.
        unsafe {
            assert!(View::bytes(Arc::clone(&readable), 8192, 1, "no pin").is_none());
            assert!(View::bytes(readable, u64::MAX, 1, "no pin").is_none());
        }
    }
}
