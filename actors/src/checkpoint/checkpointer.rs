//! The checkpointer: saves a job's state and finds it again.
//!
//! A save is: chunks, then the manifest, then a command through Raft. Only the last makes it
//! visible. The bytes go from the process that holds the state to the object store and nowhere else.
//!
//! Invariants:
//! 1. A checkpoint is committed only after all of it is durable.
//! 2. Whether a failure may pass (the store is out of reach) is told apart from what stays (a newer
//!    driver has taken over), and only the first is worth waiting for.
//! 3. What does not verify is rejected by name, with its reason, and the one before it is tried.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use mobula_core::{Incarnation, JobId};
use mobula_storage::blob::{BlobError, BlobStore};
use mobula_storage::checkpoint::{
    CheckpointHandle, CheckpointReader, CheckpointSource, CheckpointWriter, LoadError, ManifestRef,
    RestoreError, SaveError, SaveRequest, Section,
};
use parking_lot::Mutex;

use super::keep::Metric;
use super::ledger::{CheckpointError, Ledger};
use super::sharing::{self, Helper, Uploaded};
use super::spread::Spread;
use super::state::{CheckpointCommand, CheckpointRef};

/// The largest state that is restored: it must fit in memory, once as bytes and once as values.
pub const RESTORE_BYTES_MAX: u64 = 16 << 30;

/// Characters of a reason that the head keeps.
const REASON_CHARS_MAX: usize = 250;

/// A state to save. Clones share it.
#[derive(Clone)]
pub struct SaveOrder {
    /// Number of steps taken.
    pub step: u64,
    /// The driver's start: the fence.
    pub incarnation: Incarnation,
    /// The bytes, which do not change any more.
    pub state: Arc<dyn CheckpointSource>,
    /// Named parts of the bytes: name, offset, length.
    pub sections: Vec<(String, u64, u64)>,
    /// BLAKE3 of weights and optimizer state, in hex.
    pub weights_blake3: String,
    /// What the job's checkpoints are compared by, if it is a finite number.
    pub metric: Option<f64>,
    /// What the driver wants to find again.
    pub metadata: BTreeMap<String, String>,
    /// Others who hold these bytes, and upload a share of them.
    pub helpers: Vec<Arc<dyn Helper>>,
    /// How long it is to take.
    pub spread: Spread,
}

/// What a save brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveReport {
    /// The checkpoint, which is visible now.
    pub checkpoint: CheckpointRef,
    /// What helpers uploaded of it, and how long it took to send.
    pub uploaded: Uploaded,
}

impl fmt::Debug for SaveOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the bytes.
        f.debug_struct("SaveOrder")
            .field("step", &self.step)
            .field("incarnation", &self.incarnation)
            .field("weights_blake3", &self.weights_blake3)
            .finish_non_exhaustive()
    }
}

/// A checkpoint that was found and verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoredState {
    /// Which one.
    pub checkpoint: CheckpointRef,
    /// Its bytes.
    pub state: Bytes,
    /// What the driver left with it.
    pub metadata: BTreeMap<String, String>,
}

/// What a restore found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RestoreReport {
    /// The newest checkpoint that verified, if there is one.
    pub restored: Option<RestoredState>,
    /// Newer ones that did not verify: step and reason.
    pub rejected: Vec<(u64, String)>,
}

type Open = Box<dyn Fn() -> Result<BlobStore, BlobError> + Send + Sync>;

/// Writes and reads the checkpoints of one job.
pub struct Checkpointer {
    open: Open,
    opened: OnceLock<(CheckpointWriter, CheckpointReader)>,
    ledger: Arc<dyn Ledger>,
    job: JobId,
    bytes_per_second: Option<u64>,
    /// The newest one that is committed: its chunks need not be sent again.
    newest: Mutex<Option<CheckpointHandle>>,
}

impl Checkpointer {
    /// The checkpointer of `job`, which opens its store when it first needs it: as long as that fails,
    /// saves fail as those of a store that is out of reach. `bytes_per_second` limits uploads.
    pub fn new(
        open: impl Fn() -> Result<BlobStore, BlobError> + Send + Sync + 'static,
        ledger: Arc<dyn Ledger>,
        job: JobId,
        bytes_per_second: Option<u64>,
    ) -> Self {
        Checkpointer {
            open: Box::new(open),
            opened: OnceLock::new(),
            ledger,
            job,
            bytes_per_second,
            newest: Mutex::new(None),
        }
    }

    fn store(&self) -> Result<&(CheckpointWriter, CheckpointReader), CheckpointError> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened);
        }
        let unavailable = |error: BlobError| CheckpointError::Unavailable(error.to_string());
        let blobs = (self.open)().map_err(unavailable)?;
        let mut writer = CheckpointWriter::new(blobs.clone());
        if let Some(limit) = self.bytes_per_second {
            writer = writer.with_rate_limit(limit);
        }
        let reader = CheckpointReader::new(blobs, RESTORE_BYTES_MAX);
        Ok(self.opened.get_or_init(|| (writer, reader)))
    }

    /// Saves a state and makes it visible. May be called again after any failure.
    pub async fn save(&self, order: &SaveOrder) -> Result<SaveReport, CheckpointError> {
        let (writer, reader) = self.store()?;
        let section = |(name, offset, length): &(String, u64, u64)| Section {
            name: name.clone(),
            offset: *offset,
            length: *length,
        };
        let request = SaveRequest {
            job: self.job,
            step: order.step,
            incarnation: order.incarnation,
            parent: self.newest.lock().clone(),
            sections: order.sections.iter().map(section).collect(),
            metadata: order.metadata.clone(),
        };
        let state = Arc::clone(&order.state);
        let prepared = writer
            .prepare(request, Arc::clone(&state))
            .await
            .map_err(|error| save_error(&error))?;
        let missing = prepared.missing();
        let (helpers, spread) = (&order.helpers, &order.spread);
        let uploaded = sharing::upload(writer, &state, order.step, missing, helpers, spread)
            .await
            .map_err(|error| save_error(&error))?;
        let state_blake3 = prepared.state_blake3();
        let handle = match writer.finish(prepared).await {
            Ok(saved) => saved.handle,
            // A manifest of ours that was written before this process was started again names
            // another parent. If it holds the same state it is as good.
            Err(SaveError::Fenced { path, found, .. }) => {
                let found = ManifestRef {
                    path,
                    digest: found,
                };
                let manifest = reader
                    .manifest(&found)
                    .await
                    .map_err(|error| load_error(&error))?;
                if manifest.state_blake3 != state_blake3 {
                    return Err(CheckpointError::Fenced(format!(
                        "`{}` exists and holds another state: another driver has this incarnation",
                        found.path
                    )));
                }
                CheckpointHandle {
                    reference: found,
                    manifest: manifest.into(),
                }
            }
            Err(error) => return Err(save_error(&error)),
        };
        let checkpoint = CheckpointRef {
            step: order.step,
            incarnation: order.incarnation,
            manifest_path: handle.reference.path.clone(),
            manifest_digest: handle.reference.digest.to_string(),
            size_bytes: handle.manifest.total_bytes,
            weights_blake3: Some(order.weights_blake3.clone()),
            metric: order
                .metric
                .and_then(|metric| Metric::try_from(metric).ok()),
        };
        let committed = CheckpointCommand::Committed {
            job: self.job,
            checkpoint: checkpoint.clone(),
        };
        self.ledger.apply(&committed).await?;
        *self.newest.lock() = Some(handle);
        Ok(SaveReport {
            checkpoint,
            uploaded,
        })
    }

    /// The newest checkpoint that verifies. Those that do not are rejected for good, each with its
    /// reason.
    pub async fn restore(
        &self,
        incarnation: Incarnation,
    ) -> Result<RestoreReport, CheckpointError> {
        // First of all: what is read below must not change under a driver that was replaced.
        let fence = CheckpointCommand::Fence {
            job: self.job,
            incarnation,
        };
        self.ledger.apply(&fence).await?;
        let known = self.ledger.list(self.job).await?;
        let references: Vec<ManifestRef> = known
            .checkpoints
            .iter()
            .map(|committed| reference(&committed.checkpoint))
            .collect::<Result<_, _>>()?;
        if references.is_empty() {
            return Ok(RestoreReport::default());
        }
        let (_, reader) = self.store()?;
        let (found, rejected) = match reader.load_newest(&references).await {
            Ok(restored) => (Some(restored.checkpoint), restored.rejected),
            Err(RestoreError::NoneUsable { rejected }) => (None, rejected),
            Err(RestoreError::Load(error)) => return Err(load_error(&error)),
        };
        let mut report = RestoreReport::default();
        for (one, committed) in rejected.into_iter().zip(&known.checkpoints) {
            let step = committed.checkpoint.step;
            let rejection = CheckpointCommand::Rejected {
                job: self.job,
                incarnation,
                step,
                manifest_digest: one.reference.digest.to_string(),
                reason: one.reason.chars().take(REASON_CHARS_MAX).collect(),
            };
            self.ledger.apply(&rejection).await?;
            report.rejected.push((step, one.reason));
        }
        if let Some(found) = found {
            let checkpoint = known.checkpoints[report.rejected.len()].checkpoint.clone();
            report.restored = Some(RestoredState {
                checkpoint,
                state: found.bytes,
                metadata: found.handle.manifest.metadata.clone(),
            });
            *self.newest.lock() = Some(found.handle);
        }
        Ok(report)
    }

    /// Says to the table what of the job is to be kept while it runs.
    pub async fn keep(
        &self,
        incarnation: Incarnation,
        policy: super::keep::KeepPolicy,
    ) -> Result<(), CheckpointError> {
        let command = CheckpointCommand::Keep {
            job: self.job,
            incarnation,
            policy,
        };
        self.ledger.apply(&command).await
    }
}

/// Where a committed checkpoint's manifest is, and what it must be.
pub(super) fn reference(checkpoint: &CheckpointRef) -> Result<ManifestRef, CheckpointError> {
    let digest = checkpoint
        .manifest_digest
        .parse()
        .map_err(|error| CheckpointError::Refused(format!("committed checkpoint: {error}")))?;
    Ok(ManifestRef {
        path: checkpoint.manifest_path.clone(),
        digest,
    })
}

fn save_error(error: &SaveError) -> CheckpointError {
    let text = error.to_string();
    match error {
        // Also a full disk or a refused key: somebody can mend it while the job goes on.
        SaveError::Blob(_) | SaveError::Undecided { .. } | SaveError::TooSlow { .. } => {
            CheckpointError::Unavailable(text)
        }
        SaveError::Fenced { .. } => CheckpointError::Fenced(text),
        SaveError::Invalid(_) | SaveError::ManifestTooLarge { .. } | SaveError::Differs { .. } => {
            CheckpointError::Refused(text)
        }
    }
}

fn load_error(error: &LoadError) -> CheckpointError {
    match error {
        // What is gone by now can be written again.
        LoadError::Blob(_) | LoadError::Missing { .. } => {
            CheckpointError::Unavailable(error.to_string())
        }
        // What is damaged stays so under this incarnation's name: waiting would never end.
        LoadError::Damaged { .. } | LoadError::TooLarge { .. } => {
            CheckpointError::Refused(error.to_string())
        }
    }
}

#[cfg(test)]
#[path = "checkpointer_tests.rs"]
mod tests;
