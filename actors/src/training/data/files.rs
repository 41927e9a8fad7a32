//! The bytes of data files: from this machine's disk, or from the cluster's object store.
//!
//! Invariant: files of this machine are read where they lie. A blob is held in memory where it fits beside the others
//! of its data set, and otherwise copied to this machine's disk first.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt;
use mobula_storage::blob::{BlobErrorKind, BlobStore};
use tokio::runtime::Handle;

use super::error::DataError;
use super::opened::{Bytes, OpenFile, unreadable};
use super::scratch::Room;

/// Files of one data set: each may be open as long as the data set is used.
pub const FILES_MAX: usize = 256;

/// How a name says that the object store has the file.
pub const STORE_PREFIX: &str = "store:";

/// How often the copy of a blob is begun: its connection may break in the middle.
const COPY_ATTEMPTS: u32 = 3;

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

    /// Opens a file. A blob takes its part of `room`.
    pub(super) fn open(&self, name: &str, room: &Room) -> Result<Bytes, DataError> {
        let Some(blob) = name.strip_prefix(STORE_PREFIX) else {
            return open_local(Path::new(name));
        };
        let Blobs::Store(store, runtime) = &self.blobs else {
            return open_local(self.copy_of(blob)?);
        };
        match runtime.block_on(store.get(blob, room.memory_left())) {
            Ok(bytes) => {
                let mut held = room.memory();
                let held = held.grow(bytes.len() as u64).then(|| Arc::new(held));
                Ok(Bytes::Memory { bytes, _held: held })
            }
            Err(error) if error.kind() == BlobErrorKind::TooLarge => {
                open_copy(store, runtime, blob, room)
            }
            Err(source) => Err(DataError::Store {
                file: blob.to_owned(),
                source,
            }),
        }
    }

    /// The file that has the copy of a blob.
    fn copy_of(&self, blob: &str) -> Result<&Path, DataError> {
        let copy = match &self.blobs {
            Blobs::Copies(copies) => copies.get(blob),
            Blobs::Store(..) | Blobs::None => None,
        };
        copy.map(PathBuf::as_path)
            .ok_or_else(|| DataError::NoStore {
                file: blob.to_owned(),
            })
    }
}

fn open_local(path: &Path) -> Result<Bytes, DataError> {
    match OpenFile::open(path) {
        Ok(file) => Ok(Bytes::File(Arc::new(file))),
        Err(source) => Err(unreadable(&path.display().to_string(), source)),
    }
}

/// Copies a blob to a file without a name.
fn open_copy(
    store: &BlobStore,
    runtime: &Handle,
    blob: &str,
    room: &Room,
) -> Result<Bytes, DataError> {
    let name = format!("{STORE_PREFIX}{blob}");
    let mut file = room.file(&name)?;
    let mut held = room.disk();
    let mut size_held = 0;
    let accept = |size_bytes: u64| {
        // All of it again where an earlier attempt had broken.
        let more = size_bytes.saturating_sub(size_held);
        if !held.grow(more) {
            return Err(room.too_large(&name));
        }
        size_held += more;
        Ok(())
    };
    let unwritable = |bytes: u64, source: io::Error| room.failed(&name, bytes, source);
    runtime.block_on(copy(store, blob, &mut file, accept, unwritable))?;
    let open = OpenFile::copy(file, held).map_err(|source| room.failed(&name, 0, source))?;
    Ok(Bytes::File(Arc::new(open)))
}

/// Copies a blob as it arrives to the beginning of `to`, an empty file. `accept` hears its size before anything is
/// written.
async fn copy(
    store: &BlobStore,
    blob: &str,
    to: &mut File,
    mut accept: impl FnMut(u64) -> Result<(), DataError>,
    unwritable: impl Fn(u64, io::Error) -> DataError,
) -> Result<(), DataError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match copy_once(store, blob, to, &mut accept, &unwritable).await {
            Err(error) if error.may_pass() && attempts < COPY_ATTEMPTS => {
                tracing::debug!(%error, attempts, "a blob is copied again");
                to.set_len(0).map_err(|source| unwritable(0, source))?;
                to.rewind().map_err(|source| unwritable(0, source))?;
            }
            outcome => return outcome,
        }
    }
}

async fn copy_once(
    store: &BlobStore,
    blob: &str,
    to: &mut File,
    accept: &mut impl FnMut(u64) -> Result<(), DataError>,
    unwritable: &impl Fn(u64, io::Error) -> DataError,
) -> Result<(), DataError> {
    let failed = |source| DataError::Store {
        file: blob.to_owned(),
        source,
    };
    let (info, mut bytes) = store.get_stream(blob).await.map_err(failed)?;
    accept(info.size_bytes)?;
    while let Some(part) = bytes.try_next().await.map_err(failed)? {
        to.write_all(&part)
            .map_err(|source| unwritable(info.size_bytes, source))?;
    }
    Ok(())
}
