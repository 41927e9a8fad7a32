//! Objects on disk: written when memory is short, checked when they are read back.
//!
//! Nothing here is meant to outlive the agent, so nothing is synced; the digests are in memory.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use mobula_core::object::ObjectId;

use super::memory::{Block, COPY_BYTES};

/// Where objects go, and how much of the disk they may take.
#[derive(Debug, Clone)]
pub(crate) struct SpillDir {
    path: PathBuf,
}

/// Why an object does not come back from disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreError {
    #[error("its file on disk cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("its file on disk is not what was written there: the BLAKE3 digest differs")]
    Corrupt,
}

impl SpillDir {
    /// Opens the directory, and removes what an agent before this one left in it.
    pub(crate) fn open(path: PathBuf) -> io::Result<SpillDir> {
        for entry in fs::read_dir(&path)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(SpillDir { path })
    }

    /// What the disk has left, in bytes.
    pub(crate) fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.path).map_or(0, |disk| disk.f_bavail * disk.f_frsize)
    }

    pub(crate) fn file_of(&self, object: ObjectId) -> PathBuf {
        self.path.join(object.to_string())
    }

    /// Writes an object; answers its digest. Blocks.
    pub(crate) fn write(&self, object: ObjectId, block: &Block) -> io::Result<blake3::Hash> {
        let path = self.file_of(object);
        let written = write(&path, block);
        if written.is_err() {
            // Half a file is of no use to anybody.
            let _ = fs::remove_file(&path);
        }
        written
    }

    /// Reads an object back. Blocks.
    pub(crate) fn read(
        &self,
        object: ObjectId,
        digest: blake3::Hash,
        block: &Block,
    ) -> Result<(), RestoreError> {
        let mut file = File::open(self.file_of(object))?;
        let mut hasher = blake3::Hasher::new();
        for_each_part(block.size_bytes, |at, bytes| {
            file.read_exact(bytes)?;
            hasher.update(bytes);
            block.memory.write_at(bytes, block.offset + at)
        })?;
        match hasher.finalize() == digest {
            true => Ok(()),
            false => Err(RestoreError::Corrupt),
        }
    }

    pub(crate) fn remove(&self, object: ObjectId) {
        if let Err(error) = fs::remove_file(self.file_of(object)) {
            tracing::warn!(%object, %error, "an object's file stays on disk until the next start");
        }
    }
}

fn write(path: &Path, block: &Block) -> io::Result<blake3::Hash> {
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let mut hasher = blake3::Hasher::new();
    for_each_part(block.size_bytes, |at, bytes| {
        block.memory.read_at(bytes, block.offset + at)?;
        hasher.update(bytes);
        file.write_all(bytes)
    })?;
    Ok(hasher.finalize())
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
    use mobula_core::object::ProcessId;

    #[test]
    fn what_comes_back_is_what_was_written_or_an_error() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("left"), "over").unwrap();
        let spill = SpillDir::open(directory.path().to_owned()).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        let object = ObjectId {
            owner: ProcessId(1),
            sequence: 2,
        };
        let size_bytes = COPY_BYTES as u64 + 77;
        let memory = Memory::new(2 * size_bytes).unwrap();
        let bytes: Vec<u8> = (0..size_bytes).map(|n| (n % 251) as u8).collect();
        let block = |offset| Block {
            memory: memory.clone(),
            offset,
            size_bytes,
        };
        memory.write_at(&bytes, 0).unwrap();
        let digest = spill.write(object, &block(0)).unwrap();
        spill.read(object, digest, &block(size_bytes)).unwrap();
        let mut back = vec![0; bytes.len()];
        memory.read_at(&mut back, size_bytes).unwrap();
        assert!(back == bytes);

        let mut flipped = fs::read(spill.file_of(object)).unwrap();
        flipped[COPY_BYTES] ^= 1;
        fs::write(spill.file_of(object), &flipped).unwrap();
        assert!(matches!(
            spill.read(object, digest, &block(0)),
            Err(RestoreError::Corrupt)
        ));
        fs::write(spill.file_of(object), &flipped[1..]).unwrap();
        assert!(matches!(
            spill.read(object, digest, &block(0)),
            Err(RestoreError::Read(_))
        ));
        spill.remove(object);
        assert!(spill.free_bytes() > 0);
    }
}
