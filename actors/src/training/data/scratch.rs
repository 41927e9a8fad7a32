//! Room for what of a data set is not read where it lies: the numbers of a table, and blobs of the object store.
//!
//! Invariants:
//! 1. A data set takes no more memory and disk here than its [`Limits`] say. What is closed is given back.
//! 2. A file here has no name, so it goes with the process, however that ends.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use super::error::DataError;

/// Bytes of a data set that are held in memory: of its table's numbers, and as many of its blobs. What is beyond that
/// goes to the disk of each trainer.
pub(super) const MEMORY_BYTES_MAX: u64 = 256 << 20;
/// Bytes of a data set on the disk of each trainer, beside its own files: a small gzip file can otherwise expand
/// without limit.
pub(super) const DISK_BYTES_MAX: u64 = 64 << 30;
/// Bytes of a line of text: as many numbers as a sample may have ([`super::shape::FEATURES_MAX`]), in 60 characters
/// each.
pub(super) const LINE_BYTES_MAX: u64 = 64 << 20;
/// Samples of a table, at most: what is to know of each is in memory, its class among it.
pub(super) const TABLE_SAMPLES_MAX: usize = 1 << 28;

/// How much of a data set may be where. Constants outside tests.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub(super) memory_bytes: u64,
    pub(super) disk_bytes: u64,
    pub(super) line_bytes: u64,
    pub(super) samples: usize,
    /// Where files go; absent: where this process has its temporary ones.
    pub(super) folder: Option<PathBuf>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            memory_bytes: MEMORY_BYTES_MAX,
            disk_bytes: DISK_BYTES_MAX,
            line_bytes: LINE_BYTES_MAX,
            samples: TABLE_SAMPLES_MAX,
            folder: None,
        }
    }
}

/// The room of one data set. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Room {
    limits: Arc<Limits>,
    /// Bytes taken by blobs.
    memory: Arc<Mutex<u64>>,
    /// Bytes taken by files.
    disk: Arc<Mutex<u64>>,
}

/// Bytes that somebody has of a room, until this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    taken: Arc<Mutex<u64>>,
    limit: u64,
    bytes: u64,
}

impl Held {
    /// Takes so many more; says whether they were there.
    #[must_use]
    pub(super) fn grow(&mut self, bytes: u64) -> bool {
        let mut taken = self.taken.lock();
        match taken.checked_add(bytes) {
            Some(sum) if sum <= self.limit => {
                *taken = sum;
                self.bytes += bytes;
                true
            }
            _ => false,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        *self.taken.lock() -= self.bytes;
    }
}

impl Room {
    pub(super) fn new(limits: Limits) -> Self {
        Room {
            limits: Arc::new(limits),
            memory: Arc::default(),
            disk: Arc::default(),
        }
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Bytes of blobs that memory may take yet.
    pub(super) fn memory_left(&self) -> u64 {
        self.limits.memory_bytes.saturating_sub(*self.memory.lock())
    }

    /// Nothing of the memory yet.
    pub(super) fn memory(&self) -> Held {
        Held {
            taken: Arc::clone(&self.memory),
            limit: self.limits.memory_bytes,
            bytes: 0,
        }
    }

    /// Nothing of the disk yet.
    pub(super) fn disk(&self) -> Held {
        Held {
            taken: Arc::clone(&self.disk),
            limit: self.limits.disk_bytes,
            bytes: 0,
        }
    }

    /// The error of `file`, for which the disk's share of the data set does not suffice.
    pub(super) fn too_large(&self, file: &str) -> DataError {
        DataError::TooLarge {
            file: file.to_owned(),
            limit: self.limits.disk_bytes,
        }
    }

    /// An empty file without a name, for what `file` holds.
    pub(super) fn file(&self, file: &str) -> Result<File, DataError> {
        tempfile::tempfile_in(self.folder()).map_err(|source| self.failed(file, 0, source))
    }

    /// The error of a file of this room that cannot be written or read. `bytes` are in it, or should be.
    pub(super) fn failed(&self, file: &str, bytes: u64, source: io::Error) -> DataError {
        DataError::Scratch {
            file: file.to_owned(),
            folder: self.folder(),
            bytes,
            source,
        }
    }

    /// The folder that `TMPDIR` names, or else the working directory: that of a job's process is scratch space on the
    /// worker's disk, while `/tmp` is memory on many machines.
    fn folder(&self) -> PathBuf {
        if let Some(folder) = &self.limits.folder {
            return folder.clone();
        }
        match std::env::var_os("TMPDIR") {
            Some(folder) if !folder.is_empty() => folder.into(),
            _ => std::env::current_dir().unwrap_or_else(|_| std::env::temp_dir()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back_and_no_more_is_taken_than_there_is() {
        let room = Room::new(Limits {
            memory_bytes: 5,
            disk_bytes: 10,
            ..Limits::default()
        });
        let (mut one, mut two) = (room.disk(), room.clone().disk());
        assert!(one.grow(4) && two.grow(6) && !one.grow(1) && !two.grow(u64::MAX));
        drop(two);
        assert!(one.grow(6) && !one.grow(1));
        let mut blob = room.memory();
        assert!(blob.grow(3));
        assert_eq!(room.memory_left(), 2);
        drop(blob);
        assert_eq!(room.memory_left(), 5);
    }
}
