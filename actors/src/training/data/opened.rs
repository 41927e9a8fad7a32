//! A data file that is open: its bytes are on this machine's disk, or in memory.
//!
//! Invariant: a file that was changed since it was opened is not read: what it holds is not what the digest of the
//! data set says. A file that was replaced by another of its name still is the old one here.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use super::error::DataError;
use super::scratch::Held;

/// Where the bytes of a data file are. Clones share them.
#[derive(Debug, Clone)]
pub(super) enum Bytes {
    Memory {
        bytes: ::bytes::Bytes,
        /// What they take of the memory for blobs, as long as somebody has them.
        _held: Option<Arc<Held>>,
    },
    File(Arc<OpenFile>),
}

/// A file of this machine that is read as it was when it was opened, or not at all.
#[derive(Debug)]
pub(super) struct OpenFile {
    file: File,
    as_opened: Version,
    /// What a copy takes of the disk, until it is closed. Nobody else can write to one.
    copy: Option<Held>,
}

/// What tells a file from itself after somebody wrote to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    size_bytes: u64,
    /// Seconds and nanoseconds. The time of the last change of its metadata would say more, and also differ for
    /// a file that was only renamed or replaced.
    modified: (i64, i64),
}

impl Version {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Version {
            size_bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

impl OpenFile {
    /// Opens the file at `path`.
    pub(super) fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        OpenFile::of(File::open(path)?, None)
    }

    /// A copy of a blob that is complete, and what it takes of the disk.
    pub(super) fn copy(file: File, held: Held) -> io::Result<Self> {
        OpenFile::of(file, Some(held))
    }

    fn of(file: File, copy: Option<Held>) -> io::Result<Self> {
        let as_opened = Version::of(&file)?;
        Ok(OpenFile {
            file,
            as_opened,
            copy,
        })
    }

    /// What was read, if the file is what it was.
    fn checked<T>(&self, file: &str, read: io::Result<T>) -> Result<T, DataError> {
        if self.copy.is_some() {
            return read.map_err(|source| unreadable(file, source));
        }
        // Behind the reading: what was written before it shows. A file that was cut is not just unreadable.
        match Version::of(&self.file) {
            Ok(version) if version != self.as_opened => Err(DataError::Changed {
                file: file.to_owned(),
            }),
            Ok(_) => read.map_err(|source| unreadable(file, source)),
            Err(source) => Err(unreadable(file, source)),
        }
    }
}

impl Bytes {
    /// How many there are.
    pub(super) fn size_bytes(&self) -> u64 {
        match self {
            Bytes::Memory { bytes, .. } => bytes.len() as u64,
            Bytes::File(open) => open.as_opened.size_bytes,
        }
    }

    /// Whether they are read from a file each time.
    pub(super) fn is_file(&self) -> bool {
        matches!(self, Bytes::File(_))
    }

    /// Fails if they were changed. `file` is how errors name them.
    pub(super) fn check(&self, file: &str) -> Result<(), DataError> {
        match self {
            Bytes::Memory { .. } => Ok(()),
            Bytes::File(open) => open.checked(file, Ok(())),
        }
    }

    /// Fills `buffer` from `offset` on. `file` is how errors name them.
    pub(super) fn read_at(
        &self,
        file: &str,
        buffer: &mut [u8],
        offset: u64,
    ) -> Result<(), DataError> {
        match self {
            Bytes::File(open) => open.checked(file, open.file.read_exact_at(buffer, offset)),
            Bytes::Memory { bytes, .. } => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let end = start.saturating_add(buffer.len());
                let part = bytes
                    .get(start..end)
                    .ok_or_else(|| unreadable(file, io::ErrorKind::UnexpectedEof.into()))?;
                buffer.copy_from_slice(part);
                Ok(())
            }
        }
    }

    /// Fills the beginning of `buffer` from `offset` on, and says how much of it: nothing at the end.
    fn read_some(&self, file: &str, buffer: &mut [u8], offset: u64) -> Result<usize, DataError> {
        match self {
            Bytes::File(open) => loop {
                match open.file.read_at(buffer, offset) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    read => return open.checked(file, read),
                }
            },
            Bytes::Memory { bytes, .. } => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = bytes.get(start..).unwrap_or_default();
                let count = rest.len().min(buffer.len());
                buffer[..count].copy_from_slice(&rest[..count]);
                Ok(count)
            }
        }
    }

    /// So many bytes from `offset` on, which must be there.
    pub(super) fn part(
        &self,
        file: &str,
        offset: u64,
        length: usize,
    ) -> Result<::bytes::Bytes, DataError> {
        let end = offset.checked_add(length as u64);
        // Nothing is made room for that is not there.
        if end.is_none_or(|end| end > self.size_bytes()) {
            return Err(unreadable(file, io::ErrorKind::UnexpectedEof.into()));
        }
        match self {
            Bytes::Memory { bytes, .. } => {
                Ok(bytes.slice(offset as usize..offset as usize + length))
            }
            Bytes::File(_) => {
                let mut buffer = vec![0; length];
                self.read_at(file, &mut buffer, offset)?;
                Ok(buffer.into())
            }
        }
    }

    /// The bytes one after the other, from `offset` on. Its errors are [`DataError`]s: see [`data_error`].
    pub(super) fn reader(&self, file: &str, offset: u64) -> Reader {
        Reader {
            bytes: self.clone(),
            file: file.to_owned(),
            at: offset,
        }
    }
}

/// Reads the bytes of a data file one after the other.
#[derive(Debug)]
pub(super) struct Reader {
    bytes: Bytes,
    file: String,
    at: u64,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.bytes.read_some(&self.file, buffer, self.at);
        let count = read.map_err(io::Error::other)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// What a [`Reader`] of `file` said.
pub(super) fn data_error(file: &str, error: io::Error) -> DataError {
    error
        .downcast::<DataError>()
        .unwrap_or_else(|source| unreadable(file, source))
}

pub(super) fn unreadable(file: &str, source: io::Error) -> DataError {
    DataError::Unreadable {
        file: file.to_owned(),
        source,
    }
}
