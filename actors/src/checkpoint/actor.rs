//! The checkpointer: saves a job's state and finds it again.
//!
//! A save is: chunks, then the manifest, then a command through Raft. Only the last makes it
//! visible. The driver holds the bytes until it hears that, so nothing is lost with this actor.
//!
//! Invariants:
//! 1. A checkpoint is committed only after all of it is durable.
//! 2. Whether a failure may pass (the store is out of reach) is told apart from what stays (a newer
//!    driver has taken over), and only the first is worth waiting for.

use std::collections::BTreeMap;

use mobula::{ActorContext, Cluster, ContextExt};
use mobula_core::control::ModuleId;
use mobula_core::{ErrorCode, Incarnation, JobId};
use mobula_storage::blob::BlobError;
use mobula_storage::checkpoint::{
    CheckpointHandle, CheckpointReader, CheckpointWriter, LoadError, ManifestRef, RestoreError,
    SaveError, SaveRequest, Section,
};
use mobula_storage::digest::Digest;
use serde::{Deserialize, Serialize};

use super::state::{CheckpointCommand, CheckpointQuery, CheckpointRef, JobCheckpoints};
use crate::storage::open_blobs;

/// The largest state that is restored: it travels in one reply.
pub const STATE_BYTES_MAX: u64 = 8 * 1024 * 1024 - 64 * 1024;

/// A state to save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveOrder {
    /// Number of steps taken.
    pub step: u64,
    /// The driver's start: the fence.
    pub incarnation: Incarnation,
    /// The bytes.
    pub state: Vec<u8>,
    /// Named parts of the bytes: name, offset, length.
    pub sections: Vec<(String, u64, u64)>,
    /// BLAKE3 of weights and optimizer state, in hex.
    pub weights_blake3: String,
    /// What the driver wants to find again.
    pub metadata: BTreeMap<String, String>,
}

/// A checkpoint that was found and verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredState {
    /// Which one.
    pub checkpoint: CheckpointRef,
    /// Its bytes.
    pub state: Vec<u8>,
    /// What the driver left with it.
    pub metadata: BTreeMap<String, String>,
}

/// What a restore found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The newest checkpoint that verified, if there is one.
    pub restored: Option<RestoredState>,
    /// Newer ones that did not verify: step and reason.
    pub rejected: Vec<(u64, String)>,
}

/// Why a checkpoint was not saved or restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CheckpointError {
    /// The store or the head does not do it now; the same order may succeed later.
    #[error("{0}")]
    Unavailable(String),
    /// A newer driver has taken over: stop.
    #[error("fenced: {0}")]
    Fenced(String),
    /// It was refused for good.
    #[error("{0}")]
    Refused(String),
}

/// Writes and reads the checkpoints of one job.
pub struct Checkpointer {
    writer: CheckpointWriter,
    reader: CheckpointReader,
    cluster: Cluster,
    job: JobId,
    /// The newest one that is committed: its chunks need not be sent again.
    newest: Option<CheckpointHandle>,
}

#[mobula::actor(name = "mobula.checkpointer")]
impl Checkpointer {
    /// The checkpointer of the job that creates it.
    pub fn new(ctx: &ActorContext) -> Result<Self, BlobError> {
        let store = open_blobs(ctx.storage())?;
        Ok(Checkpointer {
            writer: CheckpointWriter::new(store.clone()),
            reader: CheckpointReader::new(store, STATE_BYTES_MAX),
            cluster: ctx.cluster(),
            job: ctx.job(),
            newest: None,
        })
    }

    /// Saves a state and makes it visible. May be sent again after any failure.
    pub async fn save(&mut self, order: SaveOrder) -> Result<CheckpointRef, CheckpointError> {
        let size_bytes = order.state.len() as u64;
        let section = |(name, offset, length)| Section {
            name,
            offset,
            length,
        };
        let request = SaveRequest {
            job: self.job,
            step: order.step,
            incarnation: order.incarnation,
            parent: self.newest.clone(),
            sections: order.sections.into_iter().map(section).collect(),
            metadata: order.metadata,
        };
        let state = bytes::Bytes::from(order.state);
        let state_digest = Digest::of(&state);
        let handle = match self.writer.save(request, state).await {
            Ok(saved) => saved.handle,
            Err(SaveError::Fenced { path, found, .. }) => {
                let found = ManifestRef {
                    path,
                    digest: found,
                };
                self.adopt(found, state_digest).await?
            }
            Err(error) => return Err(save_error(&error)),
        };
        let checkpoint = CheckpointRef {
            step: order.step,
            incarnation: order.incarnation,
            manifest_path: handle.reference.path.clone(),
            manifest_digest: handle.reference.digest.to_string(),
            size_bytes,
            weights_blake3: Some(order.weights_blake3),
        };
        let (job, committed) = (self.job, checkpoint.clone());
        self.apply(&CheckpointCommand::Committed {
            job,
            checkpoint: committed,
        })
        .await?;
        self.newest = Some(handle);
        Ok(checkpoint)
    }

    /// The newest checkpoint that verifies. Those that do not are rejected for good, each with its
    /// reason.
    pub async fn restore(
        &mut self,
        incarnation: Incarnation,
    ) -> Result<RestoreReport, CheckpointError> {
        // First of all: what is read below must not change under a driver that was replaced.
        self.apply(&CheckpointCommand::Fence {
            job: self.job,
            incarnation,
        })
        .await?;
        let known = committed(&self.cluster, self.job).await?;
        let references: Vec<ManifestRef> = known
            .checkpoints
            .iter()
            .map(|committed| reference(&committed.checkpoint))
            .collect::<Result<_, _>>()?;
        if references.is_empty() {
            return Ok(RestoreReport::default());
        }
        let (found, rejected) = match self.reader.load_newest(&references).await {
            Ok(restored) => (Some(restored.checkpoint), restored.rejected),
            Err(RestoreError::NoneUsable { rejected }) => (None, rejected),
            Err(RestoreError::Load(error)) => return Err(load_error(&error)),
        };
        let mut report = RestoreReport::default();
        let steps: Vec<u64> = known
            .checkpoints
            .iter()
            .map(|c| c.checkpoint.step)
            .collect();
        for (one, step) in rejected.into_iter().zip(steps) {
            self.apply(&CheckpointCommand::Rejected {
                job: self.job,
                incarnation,
                step,
                manifest_digest: one.reference.digest.to_string(),
                reason: one.reason.chars().take(REASON_CHARS_MAX).collect(),
            })
            .await?;
            report.rejected.push((step, one.reason));
        }
        if let Some(found) = found {
            let checkpoint = known.checkpoints[report.rejected.len()].checkpoint.clone();
            report.restored = Some(RestoredState {
                checkpoint,
                state: found.bytes.to_vec(),
                metadata: found.handle.manifest.metadata.clone(),
            });
            self.newest = Some(found.handle);
        }
        Ok(report)
    }

    /// Leaves a node that will be taken away; what was begun is over by then, as calls are done
    /// one after the other.
    #[mobula(notice)]
    async fn leave(&mut self, ctx: &ActorContext, _deadline_ms: u64) {
        if let Err(error) = ctx.yield_now().await {
            // The notice may be withdrawn already; otherwise it goes down with its node and the
            // head starts it elsewhere.
            tracing::warn!(%error, "the checkpointer stays where it is");
        }
    }

    /// A manifest of ours that was written before this actor was started again names another
    /// parent. If it holds the same state it is as good.
    #[mobula(local)]
    async fn adopt(
        &self,
        found: ManifestRef,
        state: Digest,
    ) -> Result<CheckpointHandle, CheckpointError> {
        let manifest = self
            .reader
            .manifest(&found)
            .await
            .map_err(|error| load_error(&error))?;
        if manifest.state_blake3 != state {
            return Err(CheckpointError::Fenced(format!(
                "`{}` exists and holds another state: another driver has this incarnation",
                found.path
            )));
        }
        Ok(CheckpointHandle {
            reference: found,
            manifest: manifest.into(),
        })
    }

    #[mobula(local)]
    async fn apply(&self, command: &CheckpointCommand) -> Result<(), CheckpointError> {
        match self
            .cluster
            .apply(ModuleId::CHECKPOINT, command.encode())
            .await
        {
            Ok(_) => Ok(()),
            Err(error) => Err(head_error(&error)),
        }
    }
}

/// Characters of a reason that the head keeps.
const REASON_CHARS_MAX: usize = 250;

/// What the head knows of a job's checkpoints.
pub async fn committed(cluster: &Cluster, job: JobId) -> Result<JobCheckpoints, CheckpointError> {
    let query = CheckpointQuery::List { job }.encode();
    let answer = cluster
        .query(ModuleId::CHECKPOINT, query)
        .await
        .map_err(|error| head_error(&error))?;
    JobCheckpoints::decode(&answer)
        .map_err(|error| CheckpointError::Refused(format!("list of checkpoints: {error}")))
}

fn reference(checkpoint: &CheckpointRef) -> Result<ManifestRef, CheckpointError> {
    let digest = checkpoint
        .manifest_digest
        .parse()
        .map_err(|error| CheckpointError::Refused(format!("committed checkpoint: {error}")))?;
    Ok(ManifestRef {
        path: checkpoint.manifest_path.clone(),
        digest,
    })
}

fn head_error(error: &mobula::Error) -> CheckpointError {
    match error.code() {
        Some(ErrorCode::Fenced) => CheckpointError::Fenced(error.to_string()),
        // Also a session that the head forgot: every command here may be sent twice.
        Some(
            ErrorCode::Unavailable
            | ErrorCode::DeadlineExceeded
            | ErrorCode::Overloaded
            | ErrorCode::SessionExpired,
        ) => CheckpointError::Unavailable(error.to_string()),
        _ => CheckpointError::Refused(error.to_string()),
    }
}

fn save_error(error: &SaveError) -> CheckpointError {
    let text = error.to_string();
    match error {
        // Also a full disk or a refused key: somebody can mend it while the job goes on.
        SaveError::Blob(_) | SaveError::Undecided { .. } | SaveError::TooSlow { .. } => {
            CheckpointError::Unavailable(text)
        }
        SaveError::Fenced { .. } => CheckpointError::Fenced(text),
        SaveError::Invalid(_) | SaveError::ManifestTooLarge { .. } => {
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
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_waited_for() {
        let path = || "manifest/job-1/000000000010-7.json".to_owned();
        let damaged = LoadError::Damaged {
            path: path(),
            reason: "it is cut off".to_owned(),
        };
        let judged = load_error(&damaged);
        assert!(matches!(judged, CheckpointError::Refused(_)), "{judged}");
        let judged = load_error(&LoadError::Missing { path: path() });
        assert!(
            matches!(judged, CheckpointError::Unavailable(_)),
            "{judged}"
        );
        let refusal = |code| mobula::Error::Control {
            operation: "commit".to_owned(),
            code,
            message: "no".to_owned(),
            executed: mobula_core::error::Executed::Unknown,
        };
        for code in [
            ErrorCode::Unavailable,
            ErrorCode::Overloaded,
            ErrorCode::SessionExpired,
        ] {
            let judged = head_error(&refusal(code));
            assert!(
                matches!(judged, CheckpointError::Unavailable(_)),
                "{judged}"
            );
        }
        let judged = head_error(&refusal(ErrorCode::PermissionDenied));
        assert!(matches!(judged, CheckpointError::Refused(_)), "{judged}");
    }
}
