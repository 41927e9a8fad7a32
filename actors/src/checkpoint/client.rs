//! Checkpoints as people and programs outside of a job see them: the table through the head, the bytes
//! straight from the object store.
//!
//! Invariants:
//! 1. Nothing here changes a bit that is stored. What is pruned is hidden; the sweep removes it.
//! 2. What is handed out was verified byte by byte.

use std::path::Path;

use bytes::Bytes;
use mobula::{Cluster, StorageLocation};
use mobula_core::JobId;
use mobula_core::control::ModuleId;
use mobula_storage::blob::{BlobError, BlobStore};
use mobula_storage::checkpoint::{Checkpoint, CheckpointReader, LoadError, Manifest};
use mobula_storage::digest::ParseDigestError;

use super::checkpointer::{RESTORE_BYTES_MAX, reference};
use super::preemptions::JobPreemptions;
use super::state::{CheckpointCommand, CheckpointQuery, CheckpointRef, JobCheckpoints, JobSummary};
use crate::ask;
use crate::storage::open_blobs;
use crate::training::data::Files;
use crate::training::job_log::JobLog;
use crate::training::record::{RecordError, RunRecord};
use crate::training::start_from::{StartError, StartFrom};
use crate::training::state::TrainState;

/// All jobs that have checkpoints, by id.
pub async fn jobs(cluster: &Cluster) -> mobula::Result<Vec<JobSummary>> {
    let mut jobs: Vec<JobSummary> = Vec::new();
    loop {
        let after = jobs.last().map(|last| last.job);
        let query = CheckpointQuery::Jobs { after };
        let page: Vec<JobSummary> =
            ask::query(cluster, ModuleId::CHECKPOINT, "list checkpoints", &query).await?;
        if page.is_empty() {
            return Ok(jobs);
        }
        jobs.extend(page);
    }
}

/// What is known of a job's checkpoints; nothing for an unknown job.
pub async fn of_job(cluster: &Cluster, job: JobId) -> mobula::Result<JobCheckpoints> {
    let query = CheckpointQuery::List { job };
    ask::query(cluster, ModuleId::CHECKPOINT, "list checkpoints", &query).await
}

/// What a job's drivers did about notices that their machines would be taken away; nothing for an unknown job.
pub async fn preemptions(cluster: &Cluster, job: JobId) -> mobula::Result<JobPreemptions> {
    let query = CheckpointQuery::Preemptions { job };
    ask::query(cluster, ModuleId::CHECKPOINT, "list preemptions", &query).await
}

/// Keeps the checkpoint of a step whatever the job's policy says, or no more.
pub async fn pin(cluster: &Cluster, job: JobId, step: u64, is_pinned: bool) -> mobula::Result<()> {
    let command = CheckpointCommand::Pin {
        job,
        step,
        is_pinned,
    };
    ask::apply(cluster, ModuleId::CHECKPOINT, "pin a checkpoint", &command).await?;
    Ok(())
}

/// Hides all but the newest `keep` (at least one) and the pinned.
pub async fn prune(cluster: &Cluster, job: JobId, keep: u32) -> mobula::Result<()> {
    let command = CheckpointCommand::Prune { job, keep };
    ask::apply(cluster, ModuleId::CHECKPOINT, "prune checkpoints", &command).await?;
    Ok(())
}

/// Why the object store cannot be used from here.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It is a folder of another machine.
    #[error(
        "the cluster keeps its checkpoints in {url}, a folder that is not on this machine: run this \
         where the head runs, or keep checkpoints in S3"
    )]
    Elsewhere {
        /// The store's URL.
        url: String,
    },
    /// It cannot be opened.
    #[error(transparent)]
    Store(#[from] BlobError),
}

/// What came of looking at a checkpoint.
#[derive(Debug)]
pub enum Verdict {
    /// Every byte of it is as it was saved.
    Whole,
    /// It can never be restored, for this reason.
    Damaged(String),
    /// It could not be looked at, for this reason.
    Unknown(String),
}

/// The checkpoints in an object store, to be read only.
#[derive(Debug, Clone)]
pub struct Archive {
    blobs: BlobStore,
    reader: CheckpointReader,
}

impl Archive {
    /// Opens the store at `location`, with the secrets of this process's environment.
    pub fn open(location: &StorageLocation) -> Result<Self, ArchiveError> {
        if let Some(folder) = location.url.strip_prefix("file://")
            && !Path::new(folder).is_dir()
        {
            let url = location.url.clone();
            return Err(ArchiveError::Elsewhere { url });
        }
        Ok(Archive::over(open_blobs(location)?))
    }

    /// The checkpoints in `blobs`.
    #[must_use]
    pub fn over(blobs: BlobStore) -> Self {
        Archive {
            reader: CheckpointReader::new(blobs.clone(), RESTORE_BYTES_MAX),
            blobs,
        }
    }

    /// What a checkpoint consists of, verified.
    pub async fn manifest(&self, checkpoint: &CheckpointRef) -> Result<Manifest, LoadError> {
        self.reader.manifest(&verified_reference(checkpoint)?).await
    }

    /// A checkpoint, verified byte by byte.
    pub async fn load(&self, checkpoint: &CheckpointRef) -> Result<Checkpoint, LoadError> {
        self.reader.load(&verified_reference(checkpoint)?).await
    }

    /// The record of a run that `digest`, in hex, names.
    pub async fn record(&self, digest: &str) -> Result<RunRecord, RecordError> {
        RunRecord::from_bytes(&self.record_bytes(digest).await?)
    }

    /// The bytes of that record, verified.
    pub(crate) async fn record_bytes(&self, digest: &str) -> Result<Bytes, RecordError> {
        let digest = digest
            .parse()
            .map_err(|error: ParseDigestError| RecordError::Malformed(error.to_string()))?;
        RunRecord::fetch_bytes(&self.blobs, &digest).await
    }

    /// The store that they are in.
    pub(crate) fn blobs(&self) -> &BlobStore {
        &self.blobs
    }

    /// Where a run's data is: in this store, or on this machine. To be read on a thread that may wait.
    #[must_use]
    pub fn files(&self, runtime: tokio::runtime::Handle) -> Files {
        Files::with_store(self.blobs.clone(), runtime)
    }

    /// The weights that a job began with.
    pub async fn start(
        &self,
        from: &StartFrom,
        initial: &mut TrainState,
    ) -> Result<(), StartError> {
        let open = || Ok(self.blobs.clone());
        from.load(initial, open, JobLog::Silent).await
    }

    /// Reads all of a checkpoint and says whether it is whole.
    pub async fn verify(&self, checkpoint: &CheckpointRef) -> Verdict {
        match self.load(checkpoint).await {
            Ok(_) => Verdict::Whole,
            Err(error) if error.condemns_the_checkpoint() => Verdict::Damaged(error.to_string()),
            Err(error) => Verdict::Unknown(error.to_string()),
        }
    }
}

fn verified_reference(
    checkpoint: &CheckpointRef,
) -> Result<mobula_storage::checkpoint::ManifestRef, LoadError> {
    reference(checkpoint).map_err(|error| LoadError::Damaged {
        path: checkpoint.manifest_path.clone(),
        reason: error.to_string(),
    })
}
