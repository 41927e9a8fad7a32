//! Objects on disk: written when memory is short, checked when they are read back.
//!
//! All of them lie in one file that has no name, so the system takes it away with the agent, however
//! that ends. Nothing here is meant to outlive the agent: nothing is synced, the books and digests
//! are in memory.
//!
//! Invariants:
//! 1. Ranges of the file do not overlap, and what is released is given back to the disk.
//! 2. What does not get onto the disk as a whole leaves nothing there.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use mobula_core::arena::Arena;
use parking_lot::Mutex;
use rustix::fs::FallocateFlags;

use super::memory::{Block, COPY_BYTES};

/// Addresses within the file, far more than any disk has bytes: how much is taken is bounded by the
/// table, and holes take nothing. Below what the usual file systems allow.
const FILE_BYTES_MAX: u64 = 1 << 43;

/// What disks give and take back.
const SECTOR_BYTES: u64 = 4096;

/// The file that objects go to. Clones are the same file.
#[derive(Debug, Clone)]
pub(crate) struct SpillFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    ranges: Mutex<Arena>,
    free_bytes: u64,
}

/// Where an object is on disk, and what it must be when it comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OnDisk {
    pub(crate) offset: u64,
    pub(crate) size_bytes: u64,
    pub(crate) digest: blake3::Hash,
}

/// Why an object does not come back from disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    #[error("it cannot be read from disk: {0}")]
    Read(#[from] io::Error),
    #[error("what is on disk is not what was written there: the BLAKE3 digest differs")]
    Corrupt,
}

impl SpillFile {
    /// Makes the file, below the directory at `path`.
    pub(crate) fn open(path: &Path) -> io::Result<SpillFile> {
        let file = tempfile::tempfile_in(path)?;
        let free_bytes =
            rustix::fs::fstatvfs(&file).map_or(0, |disk| disk.f_bavail * disk.f_frsize);
        Ok(SpillFile(Arc::new(Inner {
            file,
            ranges: Mutex::new(Arena::new(FILE_BYTES_MAX)),
            free_bytes,
        })))
    }

    /// What the disk had left when the file was made, in bytes.
    pub(crate) fn free_bytes(&self) -> u64 {
        self.0.free_bytes
    }

    /// Writes an object. Blocks.
    pub(crate) fn write(&self, block: &Block) -> io::Result<OnDisk> {
        let size_bytes = block.size_bytes;
        let offset = taken_bytes(size_bytes)
            .and_then(|taken| self.0.ranges.lock().allocate(taken))
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let mut hasher = blake3::Hasher::new();
        let written = for_each_part(size_bytes, |at, bytes| {
            block.memory.read_at(bytes, block.offset + at)?;
            hasher.update(bytes);
            self.0.file.write_all_at(bytes, offset + at)
        });
        let on_disk = OnDisk {
            offset,
            size_bytes,
            digest: hasher.finalize(),
        };
        if let Err(error) = written {
            // Half an object is of no use to anybody.
            self.remove(on_disk);
            return Err(error);
        }
        Ok(on_disk)
    }

    /// Reads an object back. Blocks.
    pub(crate) fn read(&self, on_disk: OnDisk, block: &Block) -> Result<(), RestoreError> {
        let mut hasher = blake3::Hasher::new();
        for_each_part(on_disk.size_bytes, |at, bytes| {
            self.0.file.read_exact_at(bytes, on_disk.offset + at)?;
            hasher.update(bytes);
            block.memory.write_at(bytes, block.offset + at)
        })?;
        match hasher.finalize() == on_disk.digest {
            true => Ok(()),
            false => Err(RestoreError::Corrupt),
        }
    }

    /// An object is not needed on disk any more.
    pub(crate) fn remove(&self, on_disk: OnDisk) {
        let OnDisk {
            offset, size_bytes, ..
        } = on_disk;
        let Some(taken) = taken_bytes(size_bytes) else {
            return;
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(error) = rustix::fs::fallocate(&self.0.file, flags, offset, taken) {
            // The next object in its place uses it all the same.
            tracing::debug!(%error, "the disk does not take space back");
        }
        if let Err(error) = self.0.ranges.lock().release(offset, taken) {
            tracing::error!(%error, "a range of the file on disk is lost");
        }
    }
}

/// What an object of `size_bytes` takes, in whole sectors.
fn taken_bytes(size_bytes: u64) -> Option<u64> {
    size_bytes.max(1).checked_next_multiple_of(SECTOR_BYTES)
}

fn for_each_part(
    size_bytes: u64,
    mut part: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < size_bytes {
        let length = (size_bytes - at).min(COPY_BYTES as u64) as usize;
        part(at, &mut buffer[..length])?;
        at += length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::memory::Memory;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_comes_back_is_what_was_written_or_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let spill = SpillFile::open(directory.path()).unwrap();
        let names = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(names, 0, "it has no name");
        let size_bytes = COPY_BYTES as u64 + 77;
        let memory = Memory::new(2 * size_bytes).unwrap();
        let bytes: Vec<u8> = (0..size_bytes).map(|n| (n % 251) as u8).collect();
        let block = |offset| Block {
            memory: memory.clone(),
            offset,
            size_bytes,
        };
        memory.write_at(&bytes, 0).unwrap();
        let first = spill.write(&block(0)).unwrap();
        let on_disk = spill.write(&block(0)).unwrap();
        spill.read(on_disk, &block(size_bytes)).unwrap();
        let mut back = vec![0; bytes.len()];
        memory.read_at(&mut back, size_bytes).unwrap();
        assert!(back == bytes);

        let at = on_disk.offset + COPY_BYTES as u64;
        spill.0.file.write_all_at(&[255], at).unwrap();
        assert!(matches!(
            spill.read(on_disk, &block(0)),
            Err(RestoreError::Corrupt)
        ));
        spill.read(first, &block(0)).unwrap();
        spill.0.file.set_len(at).unwrap();
        assert!(matches!(
            spill.read(on_disk, &block(0)),
            Err(RestoreError::Read(_))
        ));
        spill.remove(first);
        spill.remove(on_disk);
        assert_eq!(
            spill.0.file.metadata().unwrap().blocks(),
            0,
            "all is given back"
        );
        assert_eq!(spill.write(&block(0)).unwrap().offset, 0, "and used again");
        assert!(spill.free_bytes() > 0);
    }
}
