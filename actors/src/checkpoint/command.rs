//! What the table of checkpoints is told and asked.

use mobula_core::codec;
use mobula_core::{Incarnation, JobId, Rejection};
use serde::{Deserialize, Serialize};

use super::keep::{KeepPolicy, Metric};
use super::preemptions::PreemptionStep;

/// The largest command, question or row.
pub(super) const PAYLOAD_BYTES_MAX: usize = 256 * 1024;

/// Where a committed checkpoint is, and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRef {
    /// Number of steps taken when it was made.
    pub step: u64,
    /// The driver's start that made it.
    pub incarnation: Incarnation,
    /// Its manifest in the object store.
    pub manifest_path: String,
    /// BLAKE3 of the manifest, in hex.
    pub manifest_digest: String,
    /// Bytes of the saved state.
    pub size_bytes: u64,
    /// BLAKE3 of weights and optimizer state, in hex, where the job has such a hash.
    pub weights_blake3: Option<String>,
    /// What the job compares its checkpoints by, where it does.
    pub metric: Option<Metric>,
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckpointCommand {
    /// A checkpoint is durable: make it visible. The fence is the reference's incarnation.
    Committed {
        /// The job.
        job: JobId,
        /// The checkpoint.
        checkpoint: CheckpointRef,
    },
    /// A restore found a checkpoint damaged: hide it.
    Rejected {
        /// The job.
        job: JobId,
        /// The driver's start that tried to restore it.
        incarnation: Incarnation,
        /// The checkpoint's step.
        step: u64,
        /// Its manifest's digest.
        manifest_digest: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Forget everything about a job. Its bytes stay in the object store.
    Forget {
        /// The job.
        job: JobId,
    },
    /// A driver begins: older starts of it commit no more.
    Fence {
        /// The job.
        job: JobId,
        /// The driver's incarnation.
        incarnation: Incarnation,
    },
    /// Keep only the newest of a job that has ended.
    Trim {
        /// The job.
        job: JobId,
        /// How many, at least one.
        keep: u32,
    },
    /// A driver says what is to be kept of its job from now on.
    Keep {
        /// The job.
        job: JobId,
        /// The driver's incarnation.
        incarnation: Incarnation,
        /// What to keep.
        policy: KeepPolicy,
    },
    /// Keep a checkpoint, or no more, whatever the policy says.
    Pin {
        /// The job.
        job: JobId,
        /// The checkpoint's step.
        step: u64,
        /// Whether it is pinned from now on.
        is_pinned: bool,
    },
    /// Hide all but the newest and the pinned, now.
    Prune {
        /// The job.
        job: JobId,
        /// How many of the newest stay, at least one.
        keep: u32,
    },
    /// A driver says what it does about a notice, or what became of the driver before it.
    Preempted {
        /// The job.
        job: JobId,
        /// The incarnation of the driver that says it.
        incarnation: Incarnation,
        /// What happened since it said something last, oldest first.
        steps: Vec<PreemptionStep>,
    },
}

impl CheckpointCommand {
    /// The command as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    /// The command that [`encode`](Self::encode) wrote.
    pub(super) fn decode(payload: &[u8]) -> Result<Self, Rejection> {
        codec::decode(payload, PAYLOAD_BYTES_MAX)
            .map_err(|error| Rejection::invalid(format!("checkpoint command: {error}")))
    }

    /// Whose checkpoints it changes.
    pub(super) fn job(&self) -> JobId {
        match self {
            CheckpointCommand::Committed { job, .. }
            | CheckpointCommand::Rejected { job, .. }
            | CheckpointCommand::Forget { job }
            | CheckpointCommand::Fence { job, .. }
            | CheckpointCommand::Trim { job, .. }
            | CheckpointCommand::Keep { job, .. }
            | CheckpointCommand::Pin { job, .. }
            | CheckpointCommand::Prune { job, .. }
            | CheckpointCommand::Preempted { job, .. } => *job,
        }
    }
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckpointQuery {
    /// What is known of a job; answered with [`JobCheckpoints`](super::state::JobCheckpoints), empty for an unknown job.
    List {
        /// The job.
        job: JobId,
    },
    /// The jobs of which something is known, by id, [`JOBS_PER_PAGE`](super::state::JOBS_PER_PAGE) at most; answered with a list of
    /// [`JobSummary`](super::state::JobSummary).
    Jobs {
        /// Those behind this one.
        after: Option<JobId>,
    },
    /// What a job's drivers did about notices; answered with [`JobPreemptions`](super::preemptions::JobPreemptions),
    /// empty for an unknown job.
    Preemptions {
        /// The job.
        job: JobId,
    },
}

impl CheckpointQuery {
    /// The question as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    /// The question that [`encode`](Self::encode) wrote.
    pub(super) fn decode(payload: &[u8]) -> Result<Self, Rejection> {
        codec::decode(payload, PAYLOAD_BYTES_MAX)
            .map_err(|error| Rejection::invalid(format!("checkpoint question: {error}")))
    }
}
