//! Programs and other files, addressed by what they hold: `artifacts/<blake3>`.
//!
//! Invariants:
//! 1. An artifact's name is the hash of its bytes; a fetch verifies it before the file appears.
//! 2. A fetched file appears under its name whole and executable, or not at all. Any number of
//!    fetches of one artifact may run at once, in one process or many.
//! 3. Large files are never in memory as a whole.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use futures::stream::{self, Stream, TryStreamExt};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::blob::{BlobError, BlobErrorKind, BlobStore, StreamError};
use crate::digest::Digest;

/// How often a download is begun anew when its connection breaks in the middle.
const FETCH_TRIES: u32 = 3;

/// What identifies an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ArtifactId {
    /// The hash of its bytes.
    pub blake3: Digest,
    /// Its size.
    pub size_bytes: u64,
}

impl ArtifactId {
    /// Its name in the store.
    #[must_use]
    pub fn path(&self) -> String {
        format!("artifacts/{}", self.blake3)
    }
}

/// Why an artifact was not stored or fetched.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A local file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is larger than what is allowed here.
    #[error("the artifact has {size_bytes} bytes, the limit is {limit_bytes}; strip or split it")]
    TooLarge {
        /// Its size.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The file was written to while it was being stored.
    #[error("{} changed while it was read; store it again when it is complete", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// What the store gave is not the artifact.
    #[error("`{path}` in the store is damaged: {reason}; delete it there and upload it again")]
    Damaged {
        /// The blob's name.
        path: String,
        /// How it differs.
        reason: String,
    },
}

fn file_error(path: &Path) -> impl Fn(std::io::Error) -> ArtifactError {
    let path = path.to_path_buf();
    move |source| ArtifactError::File {
        path: path.clone(),
        source,
    }
}

/// The artifacts in one store.
#[derive(Debug, Clone)]
pub struct ArtifactStore {
    blobs: BlobStore,
    limit_bytes: u64,
}

impl ArtifactStore {
    /// The artifacts in `blobs`, each at most `limit_bytes` large.
    #[must_use]
    pub fn new(blobs: BlobStore, limit_bytes: u64) -> Self {
        ArtifactStore { blobs, limit_bytes }
    }

    fn check_size(&self, size_bytes: u64) -> Result<(), ArtifactError> {
        let limit_bytes = self.limit_bytes;
        if size_bytes > limit_bytes {
            return Err(ArtifactError::TooLarge {
                size_bytes,
                limit_bytes,
            });
        }
        Ok(())
    }

    /// Whether the store has it, by name and size; a fetch verifies the rest.
    pub async fn contains(&self, id: &ArtifactId) -> Result<bool, ArtifactError> {
        let found = self.blobs.head(&id.path()).await?;
        Ok(found.is_some_and(|blob| blob.size_bytes == id.size_bytes))
    }

    /// Stores bytes that are in memory.
    pub async fn put_bytes(&self, bytes: Bytes) -> Result<ArtifactId, ArtifactError> {
        self.check_size(bytes.len() as u64)?;
        let id = ArtifactId {
            blake3: Digest::of(&bytes),
            size_bytes: bytes.len() as u64,
        };
        if !self.contains(&id).await? {
            self.blobs.renew(&id.path(), bytes).await?;
        }
        Ok(id)
    }

    /// Stores a file. It is read twice: to learn its name, and to send it, if the store lacks it.
    pub async fn put_file(&self, path: &Path) -> Result<ArtifactId, ArtifactError> {
        let metadata = tokio::fs::metadata(path).await.map_err(file_error(path))?;
        self.check_size(metadata.len())?;
        let id = identify(path).await?;
        if self.contains(&id).await? {
            return Ok(id);
        }
        let parts = Box::pin(file_parts(path, id));
        match self.blobs.renew_in_parts(&id.path(), parts).await {
            Ok(()) => Ok(id),
            Err(StreamError::Blob(error)) => Err(error.into()),
            Err(StreamError::Source(error)) => Err(error),
        }
    }

    /// Stores what arrives as `parts`, which must be the artifact `id`: an upload over the network.
    /// It is spooled into a file in `spool`, because it is not known to be right before its end.
    pub async fn put_stream<S>(
        &self,
        id: &ArtifactId,
        parts: S,
        spool: &Path,
    ) -> Result<(), ArtifactError>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Unpin,
    {
        self.check_size(id.size_bytes)?;
        let file = TemporaryFile::create(spool, id).await?;
        let parts = parts.map_err(file_error(&file.path));
        write_verified(id, parts, &file.path).await?;
        self.put_file(&file.path).await.map(drop)
    }

    /// Makes `target` hold the artifact, executable. A file that is right already is left alone.
    pub async fn fetch(&self, id: &ArtifactId, target: &Path) -> Result<(), ArtifactError> {
        self.check_size(id.size_bytes)?;
        if identify(target).await.is_ok_and(|found| found == *id) {
            return Ok(());
        }
        let folder = target.parent().unwrap_or(Path::new("."));
        tokio::fs::create_dir_all(folder)
            .await
            .map_err(file_error(folder))?;
        let mut tries = 0;
        loop {
            tries += 1;
            match self.fetch_once(id, folder, target).await {
                Err(ArtifactError::Blob(error))
                    if error.retry_may_help() && tries < FETCH_TRIES =>
                {
                    tracing::debug!(%error, tries, "an artifact's download is begun anew");
                }
                result => return result,
            }
        }
    }

    async fn fetch_once(
        &self,
        id: &ArtifactId,
        folder: &Path,
        target: &Path,
    ) -> Result<(), ArtifactError> {
        let (_, parts) = self.blobs.get_stream(&id.path()).await?;
        let file = TemporaryFile::create(folder, id).await?;
        write_verified(id, parts.map_err(ArtifactError::Blob), &file.path).await?;
        tokio::fs::rename(&file.path, target)
            .await
            .map_err(file_error(target))
    }

    /// Removes an artifact that nothing needs any more.
    pub async fn delete(&self, id: &ArtifactId) -> Result<(), ArtifactError> {
        Ok(self.blobs.delete(&id.path()).await?)
    }
}

impl ArtifactError {
    /// Whether the store has no such artifact.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, ArtifactError::Blob(error) if error.kind() == BlobErrorKind::NotFound)
    }
}

/// Learns a file's id by reading it.
pub async fn identify(path: &Path) -> Result<ArtifactId, ArtifactError> {
    let owned = path.to_path_buf();
    let hashed = tokio::task::spawn_blocking(move || {
        let mut hasher = blake3::Hasher::new();
        let file = std::fs::File::open(owned)?;
        hasher.update_reader(file)?;
        Ok(ArtifactId {
            blake3: hasher.finalize().into(),
            size_bytes: hasher.count(),
        })
    });
    hashed
        .await
        .expect("hashing does not panic, and is not aborted")
        .map_err(file_error(path))
}

/// A file as upload parts; it ends with an error when it is no longer the file that `id` names.
fn file_parts(path: &Path, id: ArtifactId) -> impl Stream<Item = Result<Bytes, ArtifactError>> {
    struct Reading {
        path: PathBuf,
        file: Option<tokio::fs::File>,
        hasher: blake3::Hasher,
    }
    let start = Reading {
        path: path.to_path_buf(),
        file: None,
        hasher: blake3::Hasher::new(),
    };
    stream::try_unfold(start, move |mut reading| async move {
        let path = reading.path.clone();
        let file = match &mut reading.file {
            Some(file) => file,
            None => {
                let file = tokio::fs::File::open(&path)
                    .await
                    .map_err(file_error(&path))?;
                reading.file.insert(file)
            }
        };
        let mut part = BytesMut::with_capacity(BlobStore::part_bytes());
        let mut rest = file.take(BlobStore::part_bytes() as u64);
        while rest.read_buf(&mut part).await.map_err(file_error(&path))? > 0 {}
        if part.is_empty() {
            return if Digest::from(reading.hasher.finalize()) == id.blake3 {
                Ok(None)
            } else {
                Err(ArtifactError::Changed { path })
            };
        }
        reading.hasher.update(&part);
        Ok(Some((part.freeze(), reading)))
    })
}

/// Writes `parts` to `path` and to the disk, if together they are the artifact.
async fn write_verified<S>(id: &ArtifactId, mut parts: S, path: &Path) -> Result<(), ArtifactError>
where
    S: Stream<Item = Result<Bytes, ArtifactError>> + Unpin,
{
    let damaged = |reason: String| ArtifactError::Damaged {
        path: id.path(),
        reason,
    };
    let mut options = tokio::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .open(path)
        .await
        .map_err(file_error(path))?;
    let mut hasher = blake3::Hasher::new();
    while let Some(part) = parts.try_next().await? {
        hasher.update(&part);
        if hasher.count() > id.size_bytes {
            return Err(damaged(format!("it has more than {} bytes", id.size_bytes)));
        }
        file.write_all(&part).await.map_err(file_error(path))?;
    }
    if hasher.count() != id.size_bytes {
        return Err(damaged(format!(
            "it has {} bytes and not {}",
            hasher.count(),
            id.size_bytes
        )));
    }
    let found = Digest::from(hasher.finalize());
    if found != id.blake3 {
        return Err(damaged(format!("its hash is {found}")));
    }
    file.flush().await.map_err(file_error(path))?;
    file.sync_all().await.map_err(file_error(path))
}

/// A file that is removed when it is dropped, unless it was renamed before.
struct TemporaryFile {
    path: PathBuf,
}

impl TemporaryFile {
    /// A fresh, empty, executable file in `folder`.
    async fn create(folder: &Path, id: &ArtifactId) -> Result<Self, ArtifactError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".{}.{}-{number}.part", id.blake3, std::process::id());
        let path = folder.join(name);
        // A file of a dead process with our number may be in the way; `create` empties it.
        let mut options = tokio::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        options.mode(0o755);
        options.open(&path).await.map_err(file_error(&path))?;
        Ok(TemporaryFile { path })
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // Gone already after a rename; and a leftover does no harm but take space.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::blob::S3Options;

    const LIMIT: u64 = 64 << 20;

    fn in_memory() -> ArtifactStore {
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        ArtifactStore::new(blobs, LIMIT)
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at % 251) as u8).collect()
    }

    #[tokio::test]
    async fn a_stored_file_is_fetched_whole_and_executable() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::open(
            &format!("file://{}", dir.path().join("blobs").display()),
            &S3Options::default(),
        );
        let store = ArtifactStore::new(blobs.unwrap(), LIMIT);
        for length in [
            0,
            1,
            BlobStore::part_bytes(),
            BlobStore::part_bytes() * 2 + 17,
        ] {
            let source = dir.path().join("source");
            std::fs::write(&source, pattern(length)).unwrap();
            let id = store.put_file(&source).await.unwrap();
            assert_eq!(id.size_bytes, length as u64);
            assert_eq!(store.put_file(&source).await.unwrap(), id, "a second time");
            let target = dir.path().join("cache").join(id.blake3.to_string());
            store.fetch(&id, &target).await.unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), pattern(length));
            let mode = std::fs::metadata(&target).unwrap().permissions().mode();
            assert_eq!(mode & 0o500, 0o500);
        }
    }

    #[tokio::test]
    async fn fetches_at_once_all_succeed_and_leave_no_parts() {
        let dir = tempfile::tempdir().unwrap();
        let store = in_memory();
        let id = store.put_bytes(pattern(100_000).into()).await.unwrap();
        let target = dir.path().join("program");
        let fetches = (0..8).map(|_| store.fetch(&id, &target));
        for result in futures::future::join_all(fetches).await {
            result.unwrap();
        }
        assert_eq!(std::fs::read(&target).unwrap(), pattern(100_000));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_damaged_artifact_never_becomes_a_file_and_a_damaged_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = in_memory();
        let id = store.put_bytes(pattern(1000).into()).await.unwrap();
        let target = dir.path().join("program");
        std::fs::write(&target, b"something else").unwrap();
        store.fetch(&id, &target).await.unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), pattern(1000));
        std::fs::remove_file(&target).unwrap();
        let mut flipped = pattern(1000);
        flipped[500] ^= 1;
        for wrong in [flipped, pattern(999), pattern(1001)] {
            store.blobs.renew(&id.path(), wrong.into()).await.unwrap();
            let error = store.fetch(&id, &target).await.unwrap_err();
            assert!(matches!(error, ArtifactError::Damaged { .. }), "{error}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
        store.delete(&id).await.unwrap();
        assert!(store.fetch(&id, &target).await.unwrap_err().is_not_found());
    }

    #[tokio::test]
    async fn a_file_that_changes_while_it_is_sent_is_not_stored() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, pattern(1000)).unwrap();
        let id = identify(&source).await.unwrap();
        std::fs::write(&source, pattern(1001)).unwrap();
        let store = in_memory();
        let parts = Box::pin(file_parts(&source, id));
        let sent = store.blobs.renew_in_parts(&id.path(), parts).await;
        assert!(matches!(
            sent,
            Err(StreamError::Source(ArtifactError::Changed { .. }))
        ));
        assert!(!store.contains(&id).await.unwrap());
    }

    #[tokio::test]
    async fn an_upload_must_be_what_it_claims() {
        let dir = tempfile::tempdir().unwrap();
        let store = in_memory();
        let bytes = pattern(5000);
        let id = ArtifactId {
            blake3: Digest::of(&bytes),
            size_bytes: 5000,
        };
        let upload = |bytes: &[u8]| {
            let parts: Vec<_> = bytes
                .chunks(700)
                .map(|part| Ok(Bytes::copy_from_slice(part)))
                .collect();
            stream::iter(parts)
        };
        let short = store
            .put_stream(&id, upload(&bytes[..4000]), dir.path())
            .await;
        assert!(matches!(short, Err(ArtifactError::Damaged { .. })));
        assert!(!store.contains(&id).await.unwrap());
        store
            .put_stream(&id, upload(&bytes), dir.path())
            .await
            .unwrap();
        assert!(store.contains(&id).await.unwrap());
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "the spool is empty again"
        );
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused_before_it_is_read() {
        let store = ArtifactStore {
            limit_bytes: 10,
            ..in_memory()
        };
        let error = store.put_bytes(pattern(11).into()).await.unwrap_err();
        assert!(matches!(
            error,
            ArtifactError::TooLarge {
                size_bytes: 11,
                limit_bytes: 10
            }
        ));
    }
}
