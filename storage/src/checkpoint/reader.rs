//! Loading: nothing is believed before it is verified, and a damaged checkpoint is passed over for
//! the next older one.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use mobula_core::id::JobId;

use super::manifest::{MANIFEST_LIMIT_BYTES, job_folder};
use super::{CheckpointHandle, ChunkRef, InvalidManifest, Manifest, ManifestName, ManifestRef};
use crate::blob::{BlobError, BlobErrorKind, BlobStore};
use crate::digest::Digest;

/// Chunks on their way at once: at the usual size, 32 MiB.
const DOWNLOADS_MAX: usize = 4;

/// Manifests of one job that a listing takes in; retention keeps far fewer.
const MANIFESTS_MAX: usize = 100_000;

/// Why a checkpoint was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Something the checkpoint consists of is not there.
    #[error("`{path}` is missing")]
    Missing {
        /// The blob's name.
        path: String,
    },
    /// Something the checkpoint consists of is not what it must be.
    #[error("`{path}` is damaged: {reason}")]
    Damaged {
        /// The blob's name.
        path: String,
        /// How it differs.
        reason: String,
    },
    /// The checkpoint holds more than the caller allows.
    #[error("`{path}` holds {total_bytes} bytes, the limit here is {limit_bytes}")]
    TooLarge {
        /// The manifest's name.
        path: String,
        /// The checkpoint's length.
        total_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The store cannot be read now.
    #[error(transparent)]
    Blob(BlobError),
}

impl LoadError {
    /// Whether the checkpoint itself is unusable, now and later: an older one should be tried.
    #[must_use]
    pub fn condemns_the_checkpoint(&self) -> bool {
        matches!(self, LoadError::Missing { .. } | LoadError::Damaged { .. })
    }

    fn of(path: &str, error: BlobError) -> Self {
        match error.kind() {
            BlobErrorKind::NotFound => LoadError::Missing {
                path: path.to_owned(),
            },
            BlobErrorKind::TooLarge => damaged(path, error.to_string()),
            _ => LoadError::Blob(error),
        }
    }
}

fn damaged(path: &str, reason: impl Into<String>) -> LoadError {
    LoadError::Damaged {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

/// A loaded checkpoint: exactly the bytes that were saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its manifest, and where that is.
    pub handle: CheckpointHandle,
    /// All its bytes.
    pub bytes: Bytes,
}

impl Checkpoint {
    /// The bytes of the section called `name`.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<Bytes> {
        let section = self.handle.manifest.section(name)?;
        let at = |offset: u64| usize::try_from(offset).expect("the bytes are in memory");
        Some(
            self.bytes
                .slice(at(section.offset)..at(section.offset + section.length)),
        )
    }
}

/// A checkpoint that was passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Which one.
    pub reference: ManifestRef,
    /// Why.
    pub reason: String,
}

/// What a restore found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The newest checkpoint that verified.
    pub checkpoint: Checkpoint,
    /// Those that should have been newer; each is worth an event.
    pub rejected: Vec<Rejected>,
}

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// None of the checkpoints can be used; start from the beginning, or mend the store.
    #[error("none of {} checkpoints can be used: {}", rejected.len(), reasons(rejected))]
    NoneUsable {
        /// All of them, newest first.
        rejected: Vec<Rejected>,
    },
    /// A checkpoint could not be read now. An older one would cost work for nothing: try again.
    #[error(transparent)]
    Load(LoadError),
}

fn reasons(rejected: &[Rejected]) -> String {
    let reasons: Vec<&str> = rejected.iter().map(|one| one.reason.as_str()).collect();
    if reasons.is_empty() {
        "there are none".to_owned()
    } else {
        reasons.join("; ")
    }
}

/// A manifest that is in the store, not yet read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredManifest {
    /// What its name says.
    pub name: ManifestName,
    /// When it was written, by the store's clock. Milliseconds since the Unix epoch.
    pub modified_ms: u64,
}

/// Loads checkpoints from one store.
#[derive(Debug, Clone)]
pub struct CheckpointReader {
    blobs: BlobStore,
    limit_bytes: u64,
}

impl CheckpointReader {
    /// A reader that holds at most `limit_bytes` of one checkpoint in memory.
    #[must_use]
    pub fn new(blobs: BlobStore, limit_bytes: u64) -> Self {
        CheckpointReader { blobs, limit_bytes }
    }

    /// Reads and verifies a manifest.
    pub async fn manifest(&self, reference: &ManifestRef) -> Result<Manifest, LoadError> {
        let ManifestRef { path, digest } = reference;
        let bytes = self
            .blobs
            .get(path, MANIFEST_LIMIT_BYTES)
            .await
            .map_err(|error| LoadError::of(path, error))?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(damaged(
                path,
                format!("its hash is {found} and not {digest}"),
            ));
        }
        let manifest = Manifest::from_bytes(&bytes)
            .map_err(|error: InvalidManifest| damaged(path, error.to_string()))?;
        if manifest.path() != *path {
            return Err(damaged(
                path,
                format!("it calls itself `{}`", manifest.path()),
            ));
        }
        Ok(manifest)
    }

    /// Loads a checkpoint, verifying all of it.
    pub async fn load(&self, reference: &ManifestRef) -> Result<Checkpoint, LoadError> {
        let manifest = self.manifest(reference).await?;
        let total_bytes = manifest.total_bytes;
        if total_bytes > self.limit_bytes {
            let (path, limit_bytes) = (reference.path.clone(), self.limit_bytes);
            return Err(LoadError::TooLarge {
                path,
                total_bytes,
                limit_bytes,
            });
        }
        let capacity = usize::try_from(total_bytes).expect("the limit is what fits in memory");
        let mut joined = BytesMut::with_capacity(capacity);
        let mut parts = self.chunks(manifest.chunks.clone());
        while let Some(part) = parts.try_next().await? {
            joined.extend_from_slice(&part);
        }
        drop(parts);
        let bytes = joined.freeze();
        let found = hashed(bytes.clone()).await;
        if found != manifest.state_blake3 {
            let reason = format!(
                "its chunks join to {found} and not {}",
                manifest.state_blake3
            );
            return Err(damaged(&reference.path, reason));
        }
        let handle = CheckpointHandle {
            reference: reference.clone(),
            manifest: Arc::new(manifest),
        };
        Ok(Checkpoint { handle, bytes })
    }

    /// The bytes of `chunks`, in order, each verified; a few are fetched ahead.
    ///
    /// Owned and boxed: a closure over a borrow is not general enough for callers that must be
    /// `Send` for every lifetime, as methods of actors are.
    #[must_use]
    pub fn chunks(&self, chunks: Vec<ChunkRef>) -> BoxStream<'static, Result<Bytes, LoadError>> {
        let reader = self.clone();
        stream::iter(chunks)
            .map(move |chunk| {
                let reader = reader.clone();
                async move { reader.fetch(chunk).await }
            })
            .buffered(DOWNLOADS_MAX)
            .boxed()
    }

    async fn fetch(&self, chunk: ChunkRef) -> Result<Bytes, LoadError> {
        let path = chunk.path();
        let bytes = self
            .blobs
            .get(&path, chunk.length)
            .await
            .map_err(|error| LoadError::of(&path, error))?;
        if bytes.len() as u64 != chunk.length {
            let reason = format!("it has {} bytes and not {}", bytes.len(), chunk.length);
            return Err(damaged(&path, reason));
        }
        let found = hashed(bytes.clone()).await;
        if found != chunk.blake3 {
            return Err(damaged(&path, format!("its hash is {found}")));
        }
        Ok(bytes)
    }

    /// Loads the first of `references` that verifies. They come newest first, from the replicated
    /// state. An error that may pass (the store is out of reach, or the limit too low) ends the
    /// restore instead of falling back.
    pub async fn load_newest(&self, references: &[ManifestRef]) -> Result<Restored, RestoreError> {
        let mut rejected = Vec::new();
        for reference in references {
            match self.load(reference).await {
                Ok(checkpoint) => {
                    return Ok(Restored {
                        checkpoint,
                        rejected,
                    });
                }
                Err(error) if error.condemns_the_checkpoint() => {
                    tracing::warn!(path = %reference.path, %error, "a checkpoint is passed over");
                    let reason = error.to_string();
                    rejected.push(Rejected {
                        reference: reference.clone(),
                        reason,
                    });
                }
                Err(error) => return Err(RestoreError::Load(error)),
            }
        }
        Err(RestoreError::NoneUsable { rejected })
    }

    /// The manifests of a job that are in the store, newest step first. For when the replicated
    /// state is lost: whether they were ever committed, the store does not know.
    pub async fn list(&self, job: JobId) -> Result<Vec<StoredManifest>, BlobError> {
        let blobs = self.blobs.list(&job_folder(job), MANIFESTS_MAX).await?;
        let mut manifests: Vec<StoredManifest> = blobs
            .iter()
            .filter_map(|blob| {
                let name = ManifestName::parse(&blob.path)?;
                Some(StoredManifest {
                    name,
                    modified_ms: blob.modified_ms,
                })
            })
            .collect();
        manifests.sort_by_key(|manifest| std::cmp::Reverse(manifest.name));
        Ok(manifests)
    }

    /// The reference of a stored manifest, taking its bytes as they are: only as good as the store.
    pub async fn reference(&self, name: &ManifestName) -> Result<ManifestRef, LoadError> {
        let path = name.path();
        let bytes = self
            .blobs
            .get(&path, MANIFEST_LIMIT_BYTES)
            .await
            .map_err(|error| LoadError::of(&path, error))?;
        Ok(ManifestRef {
            digest: Digest::of(&bytes),
            path,
        })
    }
}

/// Hashes away from the executor: a chunk takes milliseconds, a whole state seconds.
async fn hashed(bytes: Bytes) -> Digest {
    tokio::task::spawn_blocking(move || Digest::of(&bytes))
        .await
        .expect("hashing does not panic, and is not aborted")
}
