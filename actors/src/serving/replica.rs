//! A replica: one copy of a model version that answers batches.
//!
//! Invariants:
//! 1. It answers with the version that it was created for: the file is verified before the first
//!    answer, and a replica that cannot load it does not start.
//! 2. It has no state of its own, so it may be started again anywhere at any time.
//! 3. The model computes on a thread of its own, and has answered once before the replica is ready. Replicas of one version
//!    in one process share it.
//! 4. On the device of its endpoint it answers with the bits that a CPU answers with; where that device is not to be had it does
//!    not start.

use std::time::Instant;

use mobula::{ActorContext, ContextExt, StorageLocation};
use mobula_core::id::Incarnation;
use serde::{Deserialize, Serialize};

use super::executor::{Executor, ExecutorError};
use super::memory_use::memory_percent;
use super::model_cache::{MODELS, Used};
use super::predictor::{Answered, Predictor};
use super::rows::{BATCH_BYTES_MAX, Batch, ROWS_MAX};
use crate::device::ComputeDevice;
use crate::registry::artifact::Artifact;
use crate::registry::version_file::VersionFileError;
use crate::storage::open_blobs;

pub use super::predictor::{PredictorError, classes_of, classified};

/// What a model says about rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inference {
    /// The outputs.
    pub outputs: Batch,
    /// How long the model took.
    pub computed_ns: u64,
    /// How much of the memory that the replica's process may have is in use, in percent, if it knows.
    pub memory_percent: Option<u8>,
    /// The energy of each row's logits, for a monitor; none where the model's logits are not seen.
    pub energies: Vec<f32>,
}

/// A row that gets no answer of the model, whatever it is batched with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedRow {
    /// Its place in the batch, from 0.
    pub row: u64,
    /// What is wrong with it, and what to do.
    pub reason: String,
}

/// Why a replica gave no answer. The same call fails again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum InferError {
    /// The values are not whole rows.
    #[error("{values} values are not whole rows of {row_values}, and at least one")]
    RowCount {
        /// Values given.
        values: u64,
        /// Values of a row.
        row_values: u64,
    },
    /// There are too many rows, or none.
    #[error("{rows} rows, expected 1 to {ROWS_MAX}")]
    Rows {
        /// Rows given.
        rows: u64,
    },
    /// The model refused.
    #[error("the model failed: {0}")]
    Model(String),
    /// Some rows are no input for the model. Nothing was computed; the others would be answered.
    #[error("{} rows are refused", .0.len())]
    RowsRefused(Vec<RefusedRow>),
    /// The model failed on some rows, each of them alone as well; the others would be answered.
    #[error("the model failed on {} rows", .0.len())]
    RowsFailed(Vec<RefusedRow>),
    /// The outputs do not fit into one answer; fewer rows may be answered.
    #[error(
        "the outputs have {size_bytes} bytes, the limit is {limit_bytes}: send fewer rows, or smaller ones"
    )]
    OutputsTooLarge {
        /// What they have.
        size_bytes: u64,
        /// What one answer holds.
        limit_bytes: u64,
    },
}

impl InferError {
    /// For outputs of so many bytes.
    #[must_use]
    pub fn too_large(size_bytes: u64) -> Self {
        InferError::OutputsTooLarge {
            size_bytes,
            limit_bytes: BATCH_BYTES_MAX as u64,
        }
    }
}

/// Why a replica does not start.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The version's file is not to be had.
    #[error(transparent)]
    File(#[from] VersionFileError),
    /// It is no model.
    #[error(transparent)]
    Model(#[from] PredictorError),
    /// The thread that computes.
    #[error("the thread that computes: {0}")]
    Thread(String),
}

impl From<ExecutorError> for ReplicaError {
    fn from(error: ExecutorError) -> Self {
        ReplicaError::Thread(error.to_string())
    }
}

/// Builds a version's model apart from the threads that read and write.
async fn load(
    storage: &StorageLocation,
    digest: &str,
    size_bytes: u64,
    device: ComputeDevice,
) -> Result<Predictor, ReplicaError> {
    let blobs = open_blobs(storage).map_err(VersionFileError::from)?;
    let artifact = Artifact::load(&blobs, digest, size_bytes).await?;
    let building = tokio::task::spawn_blocking(move || Predictor::new(&artifact, device));
    let built = building.await;
    Ok(built.map_err(|error| ReplicaError::Thread(error.to_string()))??)
}

/// Answers for one model version.
pub struct Replica {
    model: Executor<Used<'static, Predictor>>,
    device: ComputeDevice,
}

#[mobula::actor(name = "mobula.replica")]
impl Replica {
    /// Loads and verifies the version's file. When the object store is out of reach it fails after
    /// some tries; its supervisor starts it again, with growing pauses.
    pub async fn new(
        ctx: &ActorContext,
        model: String,
        version: u64,
        digest: String,
        size_bytes: u64,
        device: ComputeDevice,
    ) -> Result<Self, ReplicaError> {
        let storage = ctx.storage();
        // Replicas of one process are all on one device: whoever needs a GPU has a process of its own.
        let loading = load(storage, &digest, size_bytes, device);
        let loaded = MODELS.get(&digest, size_bytes, loading).await?;
        let replica = Replica {
            model: Executor::start(loaded)?,
            device,
        };
        tracing::info!(model, version, digest, %device, "a replica is ready");
        Ok(replica)
    }

    /// Answers rows that are computed at once.
    ///
    /// # Panics
    /// If the model does not come back from a batch, or the replica's GPU answers nothing any more: then the actor ends, with its
    /// process where it has one of its own, so that it is started anew and the router asks other replicas meanwhile.
    pub async fn infer(&self, rows: Batch) -> Result<Inference, InferError> {
        let size_bytes = rows.size_bytes();
        let compute = move |model: &Used<'static, Predictor>| {
            let started = Instant::now();
            let answered = model.infer(rows)?;
            let computed_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            Ok((answered, computed_ns))
        };
        let computed = match self.device {
            ComputeDevice::Cpu => self.model.run_batch(size_bytes, compute).await,
            // A GPU may answer nothing any more, whatever it did before.
            _ => self.model.run(compute).await,
        };
        let answer = match computed {
            Ok(answer) => answer.map(|(Answered { outputs, energies }, computed_ns)| Inference {
                outputs,
                computed_ns,
                memory_percent: memory_percent(),
                energies,
            }),
            Err(error @ ExecutorError::Hangs { .. }) => panic!("the model hangs: {error}"),
            Err(error) => Err(InferError::Model(error.to_string())),
        };
        if let Err(InferError::Model(reason)) = &answer
            && self.device != ComputeDevice::Cpu
            && !matches!(self.model.run(|model| model.is_sound()).await, Ok(true))
        {
            panic!("the GPU answers nothing any more: {reason}");
        }
        answer
    }

    /// Answers which start of it runs.
    pub fn ping(&self, ctx: &ActorContext) -> Incarnation {
        ctx.incarnation()
    }

    /// Leaves a node that will be taken away: another replica answers meanwhile.
    #[mobula(notice)]
    async fn leave(&mut self, ctx: &ActorContext, deadline_ms: u64) {
        if let Err(error) = ctx.yield_now().await {
            tracing::warn!(%error, deadline_ms, "a replica could not leave its node early");
        }
    }
}
