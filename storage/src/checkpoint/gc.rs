//! Sweeping: removing checkpoints that nobody keeps, and chunks that nothing names.
//!
//! How the owner of the tables uses it: [`Sweeper::list`], *then* read the tables, then
//! [`Sweeper::plan`] with what they keep and what they may still come to keep, then
//! [`Sweeper::sweep`].
//!
//! Invariants:
//! 1. A sweep first reads every kept manifest; if one cannot be read, nothing is deleted. One that
//!    is not there any more names nothing.
//! 2. Chunks are listed before manifests, and both before the tables are read, so whatever was
//!    committed in between still protects its chunks.
//! 3. The plan is stored before the first blob is looked at again and deleted, is marked as over only
//!    when the store has acknowledged all of it, and stays for a while: savers read it
//!    ([`confirming`](super::confirming) says why), and a sweep that died can be looked into.
//! 4. Manifests go before chunks, so that no visible manifest ever misses a chunk.
//! 5. Nothing younger than the plan's age is deleted, and what was renewed since the plan is
//!    spared. The age must be at least twice [`SAVE_TIME_MAX`](super::SAVE_TIME_MAX), which the
//!    writer keeps to.
//! 6. A sweep asks for no deletion later than [`SWEEP_TIME_MAX`] after it stored its plan, and what it
//!    stored is no other sweep's: savers count from then.
//! 7. A store is swept by one cluster, the first that claimed it: another one's tables do not know
//!    what is kept there.
//!
//! Only the leader may sweep, one sweep at a time; that is the caller's to ensure.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};

use bytes::Bytes;
use tokio::time::Instant;

use super::chunk::{CHUNK_FOLDER, digest_of_path};
use super::manifest::{MANIFEST_FOLDER, MANIFEST_LIMIT_BYTES};
use super::once::{self, Creation};
use super::plans::{self, GcPlan, PLAN_BLOBS_MAX, PLAN_BYTES_MAX, PLANS_KEPT, SWEEP_TIME_MAX};
use super::{CheckpointReader, LoadError, Manifest, ManifestName, ManifestRef};
use crate::blob::{BlobError, BlobErrorKind, BlobInfo, BlobStore};
use crate::digest::Digest;

/// Blobs that one sweep takes in: some 300 MB of names. A store with more is swept by its owner's
/// lifecycle rules, not from here.
const BLOBS_MAX: usize = 2_000_000;

/// Who sweeps the store.
const OWNER_PATH: &str = "gc/owner";

/// The longest id of a cluster, and room to show what else might be there.
const OWNER_BYTES_MAX: u64 = 256;

/// What a sweep did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GcReport {
    /// Blobs that were deleted.
    pub deleted: usize,
    /// Their size.
    pub deleted_bytes: u64,
    /// Blobs that were written again since the plan, and so spared.
    pub spared: usize,
}

/// What there is in a store.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    chunks: Vec<BlobInfo>,
    manifests: Vec<(ManifestName, BlobInfo)>,
}

impl Stored {
    /// The names of all manifests.
    pub fn manifests(&self) -> impl Iterator<Item = ManifestName> + '_ {
        self.manifests.iter().map(|(name, _)| *name)
    }

    /// How many blobs that is.
    #[must_use]
    pub fn blob_count(&self) -> usize {
        self.chunks.len() + self.manifests.len()
    }
}

/// What the tables say about the checkpoints in a store, and about other chunks there.
#[derive(Debug, Clone, Default)]
pub struct Kept {
    /// Every checkpoint of every job that is visible.
    pub committed: Vec<ManifestRef>,
    /// Those that are not, and may still become so.
    pub may_be_committed: BTreeSet<ManifestName>,
    /// Chunks that no manifest names, and the tables do.
    pub chunks: BTreeSet<Digest>,
}

/// Why nothing was swept, or not all.
#[derive(Debug, thiserror::Error)]
pub enum GcError {
    /// Another cluster keeps its checkpoints here.
    #[error(
        "the store is that of cluster `{owner}`: give each cluster a bucket, prefix or folder of \
         its own (`storage.url`); if cluster `{owner}` is no more, delete `{OWNER_PATH}` there"
    )]
    Foreign {
        /// Its id.
        owner: String,
    },
    /// A kept checkpoint's manifest cannot be read, so its chunks are not known.
    #[error("nothing is swept, because a kept checkpoint cannot be read: {0}")]
    KeptUnreadable(#[source] LoadError),
    /// Something else is in the store where the plan was to be.
    #[error(
        "nothing is swept: what is stored as `{path}` is not the plan that was to be there; the next \
         sweep makes another"
    )]
    NotOurs {
        /// Its name.
        path: String,
    },
    /// The store says that the plan exists, and that it does not.
    #[error(
        "nothing is swept: `{path}` could be neither created nor read in {tries} tries; the next \
         sweep makes another"
    )]
    Undecided {
        /// Its name.
        path: String,
        /// How often it was tried.
        tries: u32,
    },
    /// The store kept a request until the sweep's time was over. What is left goes with the next sweep.
    #[error(
        "the store did not answer within the {} s that a sweep may take: `{path}` may be deleted or \
         not; the next sweep goes on",
        SWEEP_TIME_MAX.as_secs()
    )]
    OutOfTime {
        /// What was to be deleted.
        path: String,
    },
    /// The store failed. What is left goes with the next sweep.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// What became of a blob that was to be deleted.
enum Removal {
    Deleted { size_bytes: u64 },
    Spared,
    WasGone,
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

    /// Makes `cluster_id` the cluster that sweeps this store, unless another one does.
    pub async fn claim(&self, cluster_id: &str) -> Result<(), GcError> {
        let ours = cluster_id.to_owned().into_bytes();
        self.blobs.put_if_absent(OWNER_PATH, ours.into()).await?;
        let owner = self.blobs.get(OWNER_PATH, OWNER_BYTES_MAX).await?;
        if owner == cluster_id.as_bytes() {
            return Ok(());
        }
        Err(GcError::Foreign {
            owner: String::from_utf8_lossy(&owner).into_owned(),
        })
    }

    /// What there is now.
    pub async fn list(&self) -> Result<Stored, GcError> {
        let chunks = self.blobs.list(CHUNK_FOLDER, BLOBS_MAX).await?;
        let manifests = self.blobs.list(MANIFEST_FOLDER, BLOBS_MAX).await?;
        Ok(Stored {
            chunks,
            manifests: manifests
                .into_iter()
                .filter_map(|blob| Some((ManifestName::parse(&blob.path)?, blob)))
                .collect(),
        })
    }

    /// Finds what of `stored` may be deleted, at most `blobs_max` of it and no more than fits in a plan;
    /// `kept` must have been read from the tables after `stored` was listed.
    pub async fn plan(
        &self,
        stored: &Stored,
        kept: &Kept,
        now_ms: u64,
        age_min_ms: u64,
        blobs_max: usize,
    ) -> Result<GcPlan, GcError> {
        let blobs_max = blobs_max.min(PLAN_BLOBS_MAX);
        let older_than_ms = now_ms.saturating_sub(age_min_ms);
        let is_old = |blob: &BlobInfo| blob.modified_ms < older_than_ms;
        let kept_paths: BTreeSet<&str> = kept
            .committed
            .iter()
            .map(|kept| kept.path.as_str())
            .collect();
        let (dead, open): (Vec<_>, Vec<_>) = stored
            .manifests
            .iter()
            .filter(|(_, blob)| !kept_paths.contains(blob.path.as_str()))
            .partition(|(name, blob)| is_old(blob) && !kept.may_be_committed.contains(name));
        let mut named = kept.chunks.clone();
        let reader = CheckpointReader::new(self.blobs.clone(), u64::MAX);
        for kept in &kept.committed {
            match reader.manifest(kept).await {
                Ok(manifest) => named.extend(manifest.chunks.iter().map(|chunk| chunk.blake3)),
                // It names nothing, and nobody can restore it.
                Err(LoadError::Missing { path }) => {
                    tracing::warn!(path, "a committed checkpoint is not in the store any more");
                }
                Err(error) => return Err(GcError::KeptUnreadable(error)),
            }
        }
        for (_, blob) in open {
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
        let dead: Vec<&BlobInfo> = dead
            .into_iter()
            .map(|(_, blob)| blob)
            .take(blobs_max)
            .collect();
        let chunks: Vec<&BlobInfo> = stored
            .chunks
            .iter()
            .filter(|blob| is_old(blob))
            .filter(|blob| {
                digest_of_path(&blob.path).is_some_and(|digest| !named.contains(&digest))
            })
            // Where manifests are left over, so are all chunks: those go first.
            .take(blobs_max - dead.len())
            .collect();
        let paths = |blobs: &[&BlobInfo]| blobs.iter().map(|blob| blob.path.clone()).collect();
        Ok(GcPlan {
            created_ms: now_ms,
            older_than_ms,
            manifests: paths(&dead),
            chunks: paths(&chunks),
            size_bytes: dead.iter().chain(&chunks).map(|blob| blob.size_bytes).sum(),
        })
    }

    /// Deletes what `plan` lists, unless it was written again since, as far as the time goes; what is
    /// left goes with the next sweep. After an error make another plan.
    pub async fn sweep(&self, plan: &GcPlan) -> Result<GcReport, GcError> {
        self.forget_plans(plan.created_ms).await?;
        if plan.is_empty() {
            return Ok(GcReport::default());
        }
        // Before the plan is stored: savers count from then.
        let end = Instant::now() + SWEEP_TIME_MAX;
        let plan_path = self.announce(plan).await?;
        let mut report = GcReport::default();
        for path in plan.manifests.iter().chain(&plan.chunks) {
            if Instant::now() >= end {
                break;
            }
            let removal = tokio::time::timeout_at(end, self.remove(path, plan)).await;
            // The store may still carry out what was asked: the plan must not be marked as over.
            let removal = removal.map_err(|_| GcError::OutOfTime { path: path.clone() })?;
            let removal = match removal {
                Ok(removal) => removal,
                Err(error) => {
                    // A store that has answered does nothing any more: no save need wait for that.
                    if error.kind() != BlobErrorKind::Unreachable {
                        self.mark(&plan_path).await?;
                    }
                    return Err(error.into());
                }
            };
            match removal {
                Removal::Deleted { size_bytes } => {
                    report.deleted += 1;
                    report.deleted_bytes += size_bytes;
                }
                Removal::Spared => report.spared += 1,
                Removal::WasGone => {}
            }
        }
        self.mark(&plan_path).await?;
        Ok(report)
    }

    /// Stores `plan` for savers to read; answers its name.
    async fn announce(&self, plan: &GcPlan) -> Result<String, GcError> {
        // Savers count from when a plan was stored: what an earlier sweep stored will not do for this one. With a number
        // of its own it has another name, and what is there by that name this call has stored, though the reply was lost.
        let nonce = RandomState::new().hash_one(plan.created_ms);
        let (path, bytes) = plan.stored_as(nonce);
        match once::create(&self.blobs, &path, &bytes, PLAN_BYTES_MAX).await? {
            Creation::Ours => Ok(path),
            Creation::Other(_) => Err(GcError::NotOurs { path }),
            Creation::Undecided => Err(GcError::Undecided {
                path,
                tries: once::TRIES,
            }),
        }
    }

    /// Says that the sweep of the plan at `plan_path` is over.
    async fn mark(&self, plan_path: &str) -> Result<(), BlobError> {
        let mark = plans::mark_of(plan_path);
        self.blobs.put_if_absent(&mark, Bytes::new()).await?;
        Ok(())
    }

    async fn remove(&self, path: &str, plan: &GcPlan) -> Result<Removal, BlobError> {
        Ok(match self.blobs.head(path).await? {
            Some(blob) if blob.modified_ms >= plan.older_than_ms => Removal::Spared,
            Some(BlobInfo { size_bytes, .. }) => {
                self.blobs.delete(path).await?;
                Removal::Deleted { size_bytes }
            }
            None => Removal::WasGone,
        })
    }

    /// Removes the plans of sweeps that no save can meet any more, and their marks. Where that fails no other plan is
    /// stored, so there are never many.
    async fn forget_plans(&self, now_ms: u64) -> Result<(), GcError> {
        let kept_ms = u64::try_from(PLANS_KEPT.as_millis()).unwrap_or(u64::MAX);
        let kept_since_ms = now_ms.saturating_sub(kept_ms);
        for path in plans::stored_before(&self.blobs, kept_since_ms).await? {
            self.blobs.delete(&path).await?;
        }
        Ok(())
    }
}
