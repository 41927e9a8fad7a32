//! The bytes of data files: from this machine's disk, or from the cluster's object store.
//!
//! Invariant: a file is read whole or not at all, and never more of it than its limit.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mobula_storage::blob::{BlobErrorKind, BlobStore};
use tokio::runtime::Handle;

use super::Digests;
use super::array::{Bytes, OpenFile};
use super::error::DataError;

/// Bytes of one data file, compressed or not. It becomes about twice this in memory, which every
/// trainer holds; a small gzip file can otherwise expand without limit.
pub const FILE_BYTES_MAX: u64 = 256 << 20;
/// Files of one data set: their bytes together stay within what a machine may hold.
pub const FILES_MAX: usize = 256;

/// How a name says that the object store has the file.
pub const STORE_PREFIX: &str = "store:";

/// Where data files are read from.
#[derive(Debug, Clone, Default)]
pub struct Files {
    blobs: Blobs,
}

/// Where blobs are read from.
#[derive(Debug, Clone, Default)]
enum Blobs {
    /// From nowhere.
    #[default]
    None,
    /// From an object store, which is asked on this runtime.
    Store(BlobStore, Handle),
    /// From files of this machine, by the blobs' names.
    Copies(Arc<BTreeMap<String, PathBuf>>),
}

impl Files {
    /// Files of this machine only.
    #[must_use]
    pub fn local() -> Self {
        Files::default()
    }

    /// Also blobs of `store`. `runtime` is where it is asked; whoever reads must be on a thread that
    /// may wait.
    #[must_use]
    pub fn with_store(store: BlobStore, runtime: Handle) -> Self {
        Files {
            blobs: Blobs::Store(store, runtime),
        }
    }

    /// Also blobs that were copied to files of this machine, by their names.
    #[must_use]
    pub fn with_copies(copies: BTreeMap<String, PathBuf>) -> Self {
        Files {
            blobs: Blobs::Copies(Arc::new(copies)),
        }
    }

    /// All bytes of a file.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, DataError> {
        let bytes = match name.strip_prefix(STORE_PREFIX) {
            Some(blob) => self.read_blob(blob)?,
            None => read_local(name)?,
        };
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(DataError::TooLarge {
                file: name.to_owned(),
                limit: FILE_BYTES_MAX,
            });
        }
        Ok(bytes)
    }

    /// Bytes that are read in pieces as they are needed, and how many there are. They are hashed once; a
    /// local file may be larger than what is read whole.
    pub(super) fn open(
        &self,
        name: &str,
        digests: &mut Digests,
    ) -> Result<(Bytes, u64), DataError> {
        if name.starts_with(STORE_PREFIX) {
            let bytes = digests.add(self.read(name)?);
            let size_bytes = bytes.len() as u64;
            return Ok((Bytes::Memory(Arc::new(bytes)), size_bytes));
        }
        let unreadable = |source| DataError::Unreadable {
            file: name.to_owned(),
            source,
        };
        let mut file = OpenFile::open(name).map_err(unreadable)?;
        let size_bytes = digests.add_file(file.file()).map_err(unreadable)?;
        Ok((Bytes::File(file), size_bytes))
    }

    fn read_blob(&self, blob: &str) -> Result<Vec<u8>, DataError> {
        let unknown = || DataError::NoStore {
            file: blob.to_owned(),
        };
        let (store, runtime) = match &self.blobs {
            Blobs::None => return Err(unknown()),
            Blobs::Store(store, runtime) => (store, runtime),
            Blobs::Copies(copies) => return read_local(copies.get(blob).ok_or_else(unknown)?),
        };
        match runtime.block_on(store.get(blob, FILE_BYTES_MAX)) {
            Ok(bytes) => Ok(bytes.to_vec()),
            Err(error) if error.kind() == BlobErrorKind::TooLarge => Err(DataError::TooLarge {
                file: format!("{STORE_PREFIX}{blob}"),
                limit: FILE_BYTES_MAX,
            }),
            Err(source) => Err(DataError::Store {
                file: blob.to_owned(),
                source,
            }),
        }
    }
}

fn read_local(path: impl AsRef<Path>) -> Result<Vec<u8>, DataError> {
    let path = path.as_ref();
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|source| DataError::Unreadable {
            file: path.display().to_string(),
            source,
        })?;
    Ok(bytes)
}
