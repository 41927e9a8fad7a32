//! Saving: chunks first, the manifest last.
//!
//! `AlreadyExists` for a chunk counts as a hit only when the parent's manifest names that chunk:
//! retention keeps the newest committed checkpoint, so nobody sweeps it meanwhile. Any other chunk
//! that is there already may be old enough to be swept before our manifest names it, or damaged: it
//! is written again, which its name allows, and so is young and whole. A sweep that looked at it just
//! before may delete it all the same: [`confirming`](super::confirming) sees to that.
//!
//! A save has three parts, so that several who hold equal bytes can share its middle: who leads it
//! calls [`CheckpointWriter::prepare`], everybody uploads a share of the missing pieces, and who leads
//! it calls [`CheckpointWriter::finish`]. [`CheckpointWriter::save`] does all of it alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, TryStreamExt};
use mobula_core::id::{Incarnation, JobId};
use tokio::time::Instant;

use super::chunk::{self, CHUNK_BYTES_DEFAULT, ChunkRef, Piece, Survey};
use super::manifest::MANIFEST_LIMIT_BYTES;
use super::once::{self, Creation};
use super::pace::Pace;
use super::{CheckpointHandle, CheckpointSource, InvalidManifest, Manifest, ManifestRef, Section};
use crate::blob::{BlobError, BlobStore, PutOutcome};
use crate::digest::Digest;

/// Chunks on their way at once: at the usual size, 32 MiB beyond what the caller holds anyway.
const UPLOADS_MAX: usize = 4;

/// The longest that a save may take from its first chunk to its manifest. A sweep deletes chunks
/// that nothing names when they are twice as old.
pub const SAVE_TIME_MAX: Duration = Duration::from_secs(30 * 60);

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
         size, a sweep of the store was waited for that did not end, or this process was suspended; \
         try again",
        SAVE_TIME_MAX.as_secs()
    )]
    TooSlow {
        /// How long it took, in seconds.
        took_s: u64,
    },
    /// The bytes are not those that were prepared: whoever uploads holds another state, or its memory is
    /// damaged. Nothing of it was written.
    #[error(
        "the {length} bytes from {offset} on have the hash {found} here and {expected} where the save \
         was prepared: this copy of the state differs; compare the workers' digests"
    )]
    Differs {
        /// Where they begin.
        offset: u64,
        /// How many.
        length: u64,
        /// Their hash where the save was prepared.
        expected: Digest,
        /// Their hash here.
        found: Digest,
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

/// A save that has begun: nothing of it is visible.
#[derive(Clone)]
pub struct Prepared {
    manifest: Manifest,
    manifest_bytes: Bytes,
    missing: Vec<Piece>,
    /// Whatever a sweep takes away meanwhile is read once more.
    source: Arc<dyn CheckpointSource>,
    begun: Instant,
}

impl fmt::Debug for Prepared {
    // Without the bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared")
            .field("manifest", &self.manifest)
            .field("missing", &self.missing)
            .field("begun", &self.begun)
            .finish_non_exhaustive()
    }
}

impl Prepared {
    /// The pieces that must be in the store before the manifest is.
    #[must_use]
    pub fn missing(&self) -> &[Piece] {
        &self.missing
    }

    /// The hash of all bytes together.
    #[must_use]
    pub fn state_blake3(&self) -> Digest {
        self.manifest.state_blake3
    }
}

/// Saves checkpoints into one store. Clones share a limit of the rate.
#[derive(Debug, Clone)]
pub struct CheckpointWriter {
    blobs: BlobStore,
    chunk_bytes: usize,
    pace: Option<Arc<Pace>>,
}

impl CheckpointWriter {
    /// A writer into `blobs`, with chunks of the usual size and as fast as the store is.
    #[must_use]
    pub fn new(blobs: BlobStore) -> Self {
        CheckpointWriter {
            blobs,
            chunk_bytes: CHUNK_BYTES_DEFAULT,
            pace: None,
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

    /// The same that sends at most `bytes_per_second` (at least one) over any longer time.
    #[must_use]
    pub fn with_rate_limit(self, bytes_per_second: u64) -> Self {
        CheckpointWriter {
            pace: Some(Arc::new(Pace::new(bytes_per_second))),
            ..self
        }
    }

    pub(super) fn blobs(&self) -> &BlobStore {
        &self.blobs
    }

    /// Saves `bytes`. May be called again with the same request and bytes after any error or
    /// crash: it then finishes what was begun.
    pub async fn save(&self, request: SaveRequest, bytes: Bytes) -> Result<Saved, SaveError> {
        self.save_from(request, Arc::new(bytes)).await
    }

    /// The same for bytes that are read piece by piece.
    pub async fn save_from(
        &self,
        request: SaveRequest,
        source: Arc<dyn CheckpointSource>,
    ) -> Result<Saved, SaveError> {
        let prepared = self.prepare(request, Arc::clone(&source)).await?;
        self.upload(source, prepared.missing()).await?;
        self.finish(prepared).await
    }

    /// Finds out what a save consists of and what of it the store lacks. Writes nothing.
    pub async fn prepare(
        &self,
        request: SaveRequest,
        source: Arc<dyn CheckpointSource>,
    ) -> Result<Prepared, SaveError> {
        let begun = Instant::now();
        let total_bytes = source.length_bytes();
        let survey = self.survey(&source).await;
        let parent = request.parent.as_ref();
        let manifest = Manifest {
            format: Manifest::FORMAT,
            job: request.job,
            step: request.step,
            incarnation: request.incarnation,
            parent: parent.map(|parent| parent.reference.digest),
            total_bytes,
            state_blake3: survey.whole,
            chunks: survey.pieces.iter().map(|piece| piece.chunk).collect(),
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
        let mut known: BTreeSet<Digest> = parent
            .map(|parent| parent.manifest.chunks.as_slice())
            .unwrap_or_default()
            .iter()
            .map(|chunk| chunk.blake3)
            .collect();
        // Those that the parent does not pin, each once.
        let missing = survey
            .pieces
            .into_iter()
            .filter(|piece| known.insert(piece.chunk.blake3))
            .collect();
        Ok(Prepared {
            manifest,
            manifest_bytes,
            missing,
            source,
            begun,
        })
    }

    /// Sends `pieces` of `source`, each verified before. Sending a piece again changes nothing.
    pub async fn upload(
        &self,
        source: Arc<dyn CheckpointSource>,
        pieces: &[Piece],
    ) -> Result<(), SaveError> {
        stream::iter(pieces.iter().copied().map(Ok))
            .try_for_each_concurrent(UPLOADS_MAX, |piece| {
                let source = Arc::clone(&source);
                async move {
                    let bytes = read_piece(source, piece).await?;
                    if let Some(pace) = &self.pace {
                        pace.admit(piece.chunk.length).await;
                    }
                    let path = piece.chunk.path();
                    match self.blobs.put_if_absent(&path, bytes.clone()).await? {
                        PutOutcome::Created => {}
                        PutOutcome::AlreadyExists => self.blobs.renew(&path, bytes).await?,
                    }
                    Ok(())
                }
            })
            .await
    }

    /// Saves `source` in chunks without a manifest, for whoever names them elsewhere at once: a sweep
    /// removes chunks that nothing names when they are twice as old as the longest save.
    pub async fn save_chunks(
        &self,
        source: Arc<dyn CheckpointSource>,
    ) -> Result<Vec<ChunkRef>, SaveError> {
        let begun = Instant::now();
        let pieces = self.survey(&source).await.pieces;
        let mut known = BTreeSet::new();
        let each_once: Vec<Piece> = pieces
            .iter()
            .filter(|piece| known.insert(piece.chunk.blake3))
            .copied()
            .collect();
        self.upload(Arc::clone(&source), &each_once).await?;
        self.confirm(&source, &each_once, begun).await?;
        Ok(pieces.into_iter().map(|piece| piece.chunk).collect())
    }

    /// Seconds of hashing for a large state: not on an executor thread.
    async fn survey(&self, source: &Arc<dyn CheckpointSource>) -> Survey {
        let (source, chunk_bytes) = (Arc::clone(source), self.chunk_bytes);
        tokio::task::spawn_blocking(move || chunk::survey(&*source, chunk_bytes))
            .await
            .expect("hashing does not panic, and is not aborted")
    }

    /// Makes the checkpoint visible. All missing pieces must have been uploaded.
    pub async fn finish(&self, prepared: Prepared) -> Result<Saved, SaveError> {
        let Prepared {
            manifest,
            manifest_bytes,
            missing,
            source,
            begun,
        } = prepared;
        self.confirm(&source, &missing, begun).await?;
        let reference = ManifestRef {
            path: manifest.path(),
            digest: Digest::of(&manifest_bytes),
        };
        self.commit_manifest(&reference, &manifest_bytes).await?;
        let uploaded_bytes = missing.iter().map(|piece| piece.chunk.length).sum();
        Ok(Saved {
            uploaded_bytes,
            reused_bytes: manifest.total_bytes - uploaded_bytes,
            handle: CheckpointHandle {
                reference,
                manifest: Arc::new(manifest),
            },
        })
    }

    async fn commit_manifest(&self, ours: &ManifestRef, bytes: &Bytes) -> Result<(), SaveError> {
        let path = ours.path.clone();
        match once::create(&self.blobs, &path, bytes, MANIFEST_LIMIT_BYTES).await? {
            Creation::Ours => Ok(()),
            Creation::Other(found) => Err(SaveError::Fenced {
                path,
                found: Digest::of(&found),
                ours: ours.digest,
            }),
            Creation::Undecided => Err(SaveError::Undecided {
                path,
                tries: once::TRIES,
            }),
        }
    }
}

/// Refuses to name what may be swept meanwhile.
pub(super) fn check_time(begun: Instant) -> Result<(), SaveError> {
    let took = begun.elapsed();
    if took > SAVE_TIME_MAX {
        let took_s = took.as_secs();
        return Err(SaveError::TooSlow { took_s });
    }
    Ok(())
}

/// A piece's bytes, if they are what was prepared.
async fn read_piece(source: Arc<dyn CheckpointSource>, piece: Piece) -> Result<Bytes, SaveError> {
    let (bytes, found) = tokio::task::spawn_blocking(move || {
        let bytes = source.read(piece.range());
        let found = Digest::of(&bytes);
        (bytes, found)
    })
    .await
    .expect("hashing does not panic, and is not aborted");
    if found == piece.chunk.blake3 {
        return Ok(bytes);
    }
    Err(SaveError::Differs {
        offset: piece.offset,
        length: piece.chunk.length,
        expected: piece.chunk.blake3,
        found,
    })
}
