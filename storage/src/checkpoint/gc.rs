//! Sweeping: removing checkpoints that nobody keeps, and chunks that nothing names.
//!
//! Invariants:
//! 1. A sweep first reads every kept manifest; if one cannot be read, nothing is deleted.
//! 2. Chunks are listed before manifests, so whatever was committed in between still protects its
//!    chunks.
//! 3. The plan is stored before anything is deleted, and removed last: a sweep that died can be
//!    looked into.
//! 4. Manifests go before chunks, so that no visible manifest ever misses a chunk.
//! 5. Nothing younger than the plan's age is deleted, and what was renewed since the plan is
//!    spared. The age must be at least twice the longest upload.
//!
//! Only the leader may sweep, one sweep at a time; that is the caller's to ensure.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::chunk::{CHUNK_FOLDER, digest_of_path};
use super::manifest::{MANIFEST_FOLDER, MANIFEST_LIMIT_BYTES};
use super::{CheckpointReader, LoadError, Manifest, ManifestName, ManifestRef};
use crate::blob::{BlobError, BlobErrorKind, BlobInfo, BlobStore};
use crate::digest::Digest;

/// Blobs that one sweep takes in: some 300 MB of names. A store with more is swept by its owner's
/// lifecycle rules, not from here.
const BLOBS_MAX: usize = 2_000_000;

/// What a sweep would delete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcPlan {
    /// When it was made. Milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Nothing written after this is touched.
    pub older_than_ms: u64,
    /// Manifests that nobody keeps.
    pub manifests: Vec<String>,
    /// Chunks that no remaining manifest names.
    pub chunks: Vec<String>,
    /// How much that is.
    pub size_bytes: u64,
}

/// What a sweep did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GcReport {
    /// Blobs that were deleted.
    pub deleted: usize,
    /// Blobs that were written again since the plan, and so spared.
    pub spared: usize,
}

/// Why nothing was swept, or not all.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    /// A kept checkpoint's manifest cannot be read, so its chunks are not known.
    #[error("nothing is swept, because a kept checkpoint cannot be read: {0}")]
    KeptUnreadable(#[source] LoadError),
    /// The store failed. What is left goes with the next sweep.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// Sweeps one store.
#[derive(Debug, Clone)]
pub struct Sweeper {
    blobs: BlobStore,
}

impl Sweeper {
    /// A sweeper of `blobs`.
    #[must_use]
    pub fn new(blobs: BlobStore) -> Self {
        Sweeper { blobs }
    }

    /// Finds what may be deleted: `keep` names every checkpoint of every job that must stay.
    pub async fn plan(
        &self,
        keep: &[ManifestRef],
        now_ms: u64,
        age_min_ms: u64,
    ) -> Result<GcPlan, GcError> {
        let older_than_ms = now_ms.saturating_sub(age_min_ms);
        let is_old = |blob: &BlobInfo| blob.modified_ms < older_than_ms;
        let chunks = self.blobs.list(CHUNK_FOLDER, BLOBS_MAX).await?;
        let manifests = self.blobs.list(MANIFEST_FOLDER, BLOBS_MAX).await?;
        let kept_paths: BTreeSet<&str> = keep.iter().map(|kept| kept.path.as_str()).collect();
        let (old, young): (Vec<_>, Vec<_>) = manifests
            .iter()
            .filter(|blob| ManifestName::parse(&blob.path).is_some())
            .filter(|blob| !kept_paths.contains(blob.path.as_str()))
            .partition(|blob| is_old(blob));
        let mut named: BTreeSet<Digest> = BTreeSet::new();
        let reader = CheckpointReader::new(self.blobs.clone(), u64::MAX);
        for kept in keep {
            let manifest = reader
                .manifest(kept)
                .await
                .map_err(GcError::KeptUnreadable)?;
            named.extend(manifest.chunks.iter().map(|chunk| chunk.blake3));
        }
        for blob in young {
            // On its way to being committed. One that cannot be read names nothing that a reader
            // could use.
            match self.blobs.get(&blob.path, MANIFEST_LIMIT_BYTES).await {
                Ok(bytes) => {
                    let chunks = Manifest::from_bytes(&bytes).map(|manifest| manifest.chunks);
                    named.extend(chunks.unwrap_or_default().iter().map(|chunk| chunk.blake3));
                }
                Err(error) if error.kind() == BlobErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        let chunks: Vec<&BlobInfo> = chunks
            .iter()
            .filter(|blob| is_old(blob))
            .filter(|blob| {
                digest_of_path(&blob.path).is_some_and(|digest| !named.contains(&digest))
            })
            .collect();
        let paths = |blobs: &[&BlobInfo]| blobs.iter().map(|blob| blob.path.clone()).collect();
        Ok(GcPlan {
            created_ms: now_ms,
            older_than_ms,
            manifests: paths(&old),
            chunks: paths(&chunks),
            size_bytes: old.iter().chain(&chunks).map(|blob| blob.size_bytes).sum(),
        })
    }

    /// Deletes what `plan` lists, unless it was written again since. May be called again after an
    /// error.
    pub async fn sweep(&self, plan: &GcPlan) -> Result<GcReport, GcError> {
        let plan_bytes =
            serde_json::to_vec_pretty(plan).expect("a plan holds only strings and numbers");
        let plan_path = format!(
            "gc/{:016}-{}.json",
            plan.created_ms,
            Digest::of(&plan_bytes)
        );
        self.blobs
            .put_if_absent(&plan_path, plan_bytes.into())
            .await?;
        let mut report = GcReport::default();
        for path in plan.manifests.iter().chain(&plan.chunks) {
            match self.blobs.head(path).await? {
                Some(blob) if blob.modified_ms >= plan.older_than_ms => report.spared += 1,
                Some(_) => {
                    self.blobs.delete(path).await?;
                    report.deleted += 1;
                }
                None => {}
            }
        }
        self.blobs.delete(&plan_path).await?;
        Ok(report)
    }
}
