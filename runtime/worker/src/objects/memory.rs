//! Files that exist in memory only, and have no name.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// How much is copied at once.
pub(crate) const COPY_BYTES: usize = 1024 * 1024;

/// One arena's memory. Clones are the same memory.
#[derive(Debug, Clone)]
pub(crate) struct Memory(Arc<File>);

impl Memory {
    /// Memory of `size_bytes`, whose size is fixed from now on.
    pub(crate) fn new(size_bytes: u64) -> io::Result<Memory> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("mobula-objects", flags)?);
        file.set_len(size_bytes)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok(Memory(Arc::new(file)))
    }

    /// A descriptor through which it can be written.
    pub(crate) fn writable(&self) -> io::Result<OwnedFd> {
        self.0.as_fd().try_clone_to_owned()
    }

    /// A descriptor through which it can only be read.
    pub(crate) fn readable(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(path, flags, Mode::empty())?)
    }

    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }

    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
}

/// A block of an arena.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) memory: Memory,
    pub(crate) offset: u64,
    pub(crate) size_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_reader_can_neither_write_nor_change_the_size() {
        let memory = Memory::new(4096).unwrap();
        memory.write_at(b"here", 100).unwrap();
        let mut reader = File::from(memory.readable().unwrap());
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!((bytes.len(), &bytes[100..104]), (4096, &b"here"[..]));
        assert!(reader.write(b"x").is_err());
        let writer = File::from(memory.writable().unwrap());
        assert!(writer.set_len(10).is_err(), "a smaller file kills readers");
        let mut back = [0; 4];
        memory.read_at(&mut back, 100).unwrap();
        assert_eq!(&back, b"here");
    }
}
