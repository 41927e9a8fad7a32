//! Saving: chunks first, the manifest last.
//!
//! `AlreadyExists` for a chunk counts as a hit only when the parent's manifest names that chunk:
//! retention keeps the newest committed checkpoint, so nobody sweeps it meanwhile. Any other chunk
//! that is there already may be old enough to be swept before our manifest names it, or damaged: it
//! is written again, which its name allows, and so is young and whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::{self, TryStreamExt};
use mobula_core::id::{Incarnation, JobId};

use super::chunk::{self, CHUNK_BYTES_DEFAULT, ChunkRef};
use super::manifest::MANIFEST_LIMIT_BYTES;
use super::{CheckpointHandle, InvalidManifest, Manifest, ManifestRef, Section};
use crate::blob::{BlobError, BlobErrorKind, BlobStore, PutOutcome};
use crate::digest::Digest;

/// Chunks on their way at once: at the usual size, 32 MiB beyond what the caller holds anyway.
const UPLOADS_MAX: usize = 4;

/// The longest that a save may take from its first chunk to its manifest. A sweep deletes chunks
/// that nothing names when they are twice as old.
pub const SAVE_TIME_MAX: Duration = Duration::from_secs(30 * 60);

/// How often the manifest is created when it is said to exist and then is not found: an S3 conflict
/// between two of our own tries looks like that.
const MANIFEST_TRIES: u32 = 3;

/// What to save, and as what.
#[derive(Debug, Clone)]
pub struct SaveRequest {
    /// The job.
    pub job: JobId,
    /// The step after which the state was taken.
    pub step: u64,
    /// The incarnation of the actor that saves.
    pub incarnation: Incarnation,
    /// The newest committed checkpoint, whose chunks need not be sent again. It must be one that
    /// retention keeps until this save is committed.
    pub parent: Option<CheckpointHandle>,
    /// The named parts of the bytes.
    pub sections: Vec<Section>,
    /// What the writer wants to find again.
    pub metadata: BTreeMap<String, String>,
}

/// A checkpoint that is in the store, and how it came there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The checkpoint; it counts once its reference is committed through the replicated state.
    pub handle: CheckpointHandle,
    /// Bytes of chunks that were sent.
    pub uploaded_bytes: u64,
    /// Bytes of chunks that the parent or this very checkpoint had already.
    pub reused_bytes: u64,
}

/// Why a checkpoint was not saved. Whatever was written of it is invisible.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The store failed; trying again with the same request can help where the error says so.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// Another checkpoint is there under this job, step and incarnation: whoever runs this is not
    /// alone, and must stop.
    #[error(
        "`{path}` exists and is another checkpoint (its digest is {found}, ours {ours}): another \
         writer has this incarnation; stop this one"
    )]
    Fenced {
        /// The manifest's name.
        path: String,
        /// The digest of what is there.
        found: Digest,
        /// The digest of what was to be written.
        ours: Digest,
    },
    /// The store says that the manifest exists, and that it does not.
    #[error("`{path}` could be neither created nor read in {tries} tries; try again later")]
    Undecided {
        /// The manifest's name.
        path: String,
        /// How often it was tried.
        tries: u32,
    },
    /// The request contradicts itself.
    #[error(transparent)]
    Invalid(#[from] InvalidManifest),
    /// Its first chunks may be swept before its manifest names them.
    #[error(
        "the upload took {took_s} s, the limit is {} s: the store is too slow for a state of this \
         size, or this process was suspended; try again",
        SAVE_TIME_MAX.as_secs()
    )]
    TooSlow {
        /// How long it took, in seconds.
        took_s: u64,
    },
    /// There are too many chunks for one manifest.
    #[error(
        "the manifest would have {size_bytes} bytes, the limit is {limit_bytes}; use larger chunks"
    )]
    ManifestTooLarge {
        /// Its size.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
}

/// Saves checkpoints into one store.
#[derive(Debug, Clone)]
pub struct CheckpointWriter {
    blobs: BlobStore,
    chunk_bytes: usize,
}

impl CheckpointWriter {
    /// A writer into `blobs`, with chunks of the usual size.
    #[must_use]
    pub fn new(blobs: BlobStore) -> Self {
        CheckpointWriter {
            blobs,
            chunk_bytes: CHUNK_BYTES_DEFAULT,
        }
    }

    /// The same with chunks of `chunk_bytes`, at least one.
    #[must_use]
    pub fn with_chunk_bytes(self, chunk_bytes: usize) -> Self {
        assert!(chunk_bytes > 0, "a chunk has at least one byte");
        CheckpointWriter {
            chunk_bytes,
            ..self
        }
    }

    /// Saves `bytes`. May be called again with the same request and bytes after any error or
    /// crash: it then finishes what was begun.
    pub async fn save(&self, request: SaveRequest, bytes: Bytes) -> Result<Saved, SaveError> {
        let begun = Instant::now();
        let chunk_bytes = self.chunk_bytes;
        let total_bytes = bytes.len() as u64;
        // Seconds of hashing for a large state: not on an executor thread.
        let chunks = tokio::task::spawn_blocking(move || chunk::cut(&bytes, chunk_bytes))
            .await
            .expect("hashing does not panic, and is not aborted");
        let parent = request.parent.as_ref();
        let manifest = Manifest {
            format: Manifest::FORMAT,
            job: request.job,
            step: request.step,
            incarnation: request.incarnation,
            parent: parent.map(|parent| parent.reference.digest),
            total_bytes,
            state_blake3: chunks.whole,
            chunks: chunks.refs,
            sections: request.sections,
            metadata: request.metadata,
        };
        manifest.check()?;
        let manifest_bytes = manifest.to_bytes();
        let size_bytes = manifest_bytes.len() as u64;
        if size_bytes > MANIFEST_LIMIT_BYTES {
            let limit_bytes = MANIFEST_LIMIT_BYTES;
            return Err(SaveError::ManifestTooLarge {
                size_bytes,
                limit_bytes,
            });
        }
        let pinned = parent
            .map(|parent| parent.manifest.chunks.as_slice())
            .unwrap_or_default();
        let missing = not_in(pinned, &manifest.chunks, &chunks.parts);
        let uploaded_bytes = missing.iter().map(|(chunk, _)| chunk.length).sum();
        self.upload(missing).await?;
        let took = begun.elapsed();
        if took > SAVE_TIME_MAX {
            let took_s = took.as_secs();
            return Err(SaveError::TooSlow { took_s });
        }
        let digest = Digest::of(&manifest_bytes);
        let reference = ManifestRef {
            path: manifest.path(),
            digest,
        };
        self.commit_manifest(&reference, manifest_bytes).await?;
        Ok(Saved {
            handle: CheckpointHandle {
                reference,
                manifest: Arc::new(manifest),
            },
            uploaded_bytes,
            reused_bytes: total_bytes - uploaded_bytes,
        })
    }

    async fn upload(&self, chunks: Vec<(ChunkRef, Bytes)>) -> Result<(), BlobError> {
        stream::iter(chunks.into_iter().map(Ok))
            .try_for_each_concurrent(UPLOADS_MAX, |(chunk, bytes)| async move {
                let path = chunk.path();
                match self.blobs.put_if_absent(&path, bytes.clone()).await? {
                    PutOutcome::Created => Ok(()),
                    PutOutcome::AlreadyExists => self.blobs.renew(&path, bytes).await,
                }
            })
            .await
    }

    async fn commit_manifest(&self, ours: &ManifestRef, bytes: Bytes) -> Result<(), SaveError> {
        for _ in 0..MANIFEST_TRIES {
            if self.blobs.put_if_absent(&ours.path, bytes.clone()).await? == PutOutcome::Created {
                return Ok(());
            }
            // Someone's, or our own with a lost reply: only its content tells.
            match self.blobs.get(&ours.path, MANIFEST_LIMIT_BYTES).await {
                Ok(found) if found == bytes => return Ok(()),
                Ok(found) => {
                    return Err(SaveError::Fenced {
                        path: ours.path.clone(),
                        found: Digest::of(&found),
                        ours: ours.digest,
                    });
                }
                Err(error) if error.kind() == BlobErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(SaveError::Undecided {
            path: ours.path.clone(),
            tries: MANIFEST_TRIES,
        })
    }
}

/// The chunks that are not pinned, each once.
fn not_in(pinned: &[ChunkRef], chunks: &[ChunkRef], parts: &[Bytes]) -> Vec<(ChunkRef, Bytes)> {
    let mut known: BTreeSet<Digest> = pinned.iter().map(|chunk| chunk.blake3).collect();
    chunks
        .iter()
        .zip(parts)
        .filter(|(chunk, _)| known.insert(chunk.blake3))
        .map(|(chunk, part)| (*chunk, part.clone()))
        .collect()
}
