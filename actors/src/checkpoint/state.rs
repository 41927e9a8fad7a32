//! The replicated table of committed checkpoints: one row a job, a bounded number of each.
//!
//! Invariants:
//! 1. A command of an incarnation below the highest seen for its job is refused as fenced.
//! 2. The newest visible step of a job never goes back, except that a checkpoint which failed
//!    verification is rejected by name and is then no longer visible.
//! 3. Two checkpoints of one step have the same weights: training is deterministic, so anything
//!    else is damage and is refused.
//! 4. A job keeps what its policy says ([`CHECKPOINTS_PER_JOB`] if it says nothing, [`KEPT_MAX`](super::keep::KEPT_MAX) at most)
//!    and [`REJECTIONS_PER_JOB`] rejections; of [`JOBS_MAX`] jobs the one that was quiet for longest is
//!    forgotten.
//! 5. What drivers did about notices is in [`preemptions`], fenced and forgotten like the rest.
//! 6. A pinned checkpoint stays until it is unpinned, is rejected, or its job is forgotten.

use mobula_core::codec;
use mobula_core::control::{Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, Txn};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::{ErrorCode, Incarnation, JobId, Rejection};
use serde::{Deserialize, Serialize};

use super::command::PAYLOAD_BYTES_MAX;
pub use super::command::{CheckpointCommand, CheckpointQuery, CheckpointRef};
use super::keep::{KeepPolicy, PINNED_MAX};
use super::preemptions;
pub use super::rows::{JOBS_MAX, JOBS_PER_PAGE};
use super::rows::{load, remove, rewrite, store, summaries};

/// Checkpoints remembered of a job that has no policy of its own.
pub const CHECKPOINTS_PER_JOB: usize = 20;
/// Rejections remembered of a job: each is shown to people, and the oldest says least.
pub const REJECTIONS_PER_JOB: usize = 32;
/// The longest path, digest or reason that is kept, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

/// A checkpoint that a restore refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// The checkpoint's step.
    pub step: u64,
    /// Its manifest's digest.
    pub manifest_digest: String,
    /// What was wrong with it.
    pub reason: String,
    /// When, in milliseconds since the Unix epoch.
    pub rejected_ms: u64,
}

/// A visible checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// Where it is and what it holds.
    pub checkpoint: CheckpointRef,
    /// When it was committed, in milliseconds since the Unix epoch.
    pub committed_ms: u64,
    /// Its number among all that the job committed, from 1.
    pub number: u64,
    /// Whether it stays whatever the policy says.
    pub is_pinned: bool,
}

/// What is known of a job, in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSummary {
    /// The job.
    pub job: JobId,
    /// How many checkpoints are visible.
    pub visible: u32,
    /// How many of them are pinned.
    pub pinned: u32,
    /// How many restores have refused, as far as is remembered.
    pub rejections: u32,
    /// The bytes of all that are visible, each counted in full.
    pub size_bytes: u64,
    /// The newest.
    pub newest: Option<Committed>,
}

/// What is known of a job's checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JobCheckpoints {
    /// The highest incarnation that was seen.
    pub incarnation: Incarnation,
    /// The visible checkpoints, newest step first.
    pub checkpoints: Vec<Committed>,
    /// What restores refused, newest first.
    pub rejections: Vec<Rejected>,
    /// What is kept while the job runs.
    pub policy: KeepPolicy,
    /// How many were committed ever.
    pub committed_count: u64,
}

impl JobCheckpoints {
    /// Reads the answer to [`CheckpointQuery::List`].
    pub fn decode(bytes: &[u8]) -> Result<Self, codec::DecodeError> {
        codec::decode(bytes, PAYLOAD_BYTES_MAX)
    }

    /// Whether hiding all but the newest `keep` and the pinned would hide anything.
    #[must_use]
    pub fn has_more_than(&self, keep: u32) -> bool {
        let mut rest = self.checkpoints.iter().skip(keep as usize);
        rest.any(|one| !one.is_pinned)
    }

    /// Hides all but the newest `keep`, at least one, and the pinned.
    fn hide_old(&mut self, keep: u32) {
        let policy = KeepPolicy {
            last: keep.max(1),
            every: 0,
            best: 0,
            larger_is_better: false,
        };
        policy.apply(&mut self.checkpoints);
    }

    fn fence(&mut self, job: JobId, incarnation: Incarnation) -> Result<(), Rejection> {
        if incarnation < self.incarnation && !is_planted(Mutant::CheckpointUnfenced) {
            return Err(Rejection::fenced(format!(
                "{job}: a checkpoint of incarnation {incarnation} is refused, incarnation {} has \
                 taken over: stop this driver",
                self.incarnation
            )));
        }
        self.incarnation = incarnation;
        Ok(())
    }

    /// Whether the checkpoint is new; one that is there already is no error.
    fn admit(&self, job: JobId, new: &CheckpointRef) -> Result<bool, Rejection> {
        if self
            .rejections
            .iter()
            .any(|r| r.manifest_digest == new.manifest_digest)
        {
            return Err(precondition(format!(
                "{job}: the checkpoint {} was rejected before and stays hidden: save again",
                new.manifest_digest
            )));
        }
        let Some(newest) = self
            .checkpoints
            .first()
            .map(|committed| &committed.checkpoint)
        else {
            return Ok(true);
        };
        if new.step > newest.step || is_planted(Mutant::CheckpointGoesBack) {
            return Ok(true);
        }
        if new.step < newest.step {
            return Err(precondition(format!(
                "{job}: a checkpoint of step {} would hide the one of step {}: reject that first \
                 if it is damaged",
                new.step, newest.step
            )));
        }
        let same_manifest = new.manifest_digest == newest.manifest_digest;
        if same_manifest || new.weights_blake3 == newest.weights_blake3 {
            return Ok(false);
        }
        Err(precondition(format!(
            "{job}: step {} was committed with weights {}, and now comes with {}: one of the two \
             is damaged, compare the workers' digests",
            new.step,
            newest.weights_blake3.as_deref().unwrap_or("unknown"),
            new.weights_blake3.as_deref().unwrap_or("unknown"),
        )))
    }
}

/// The module that the head runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckpointModule;

impl StateModule for CheckpointModule {
    fn id(&self) -> ModuleId {
        ModuleId::CHECKPOINT
    }

    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        match CheckpointCommand::decode(payload)? {
            CheckpointCommand::Committed { job, checkpoint } => {
                commit(context, txn, job, checkpoint)?;
            }
            CheckpointCommand::Rejected {
                job,
                incarnation,
                step,
                manifest_digest,
                reason,
            } => {
                let rejected = Rejected {
                    step,
                    manifest_digest,
                    reason,
                    rejected_ms: context.now_ms,
                };
                reject(context, txn, job, incarnation, rejected)?;
            }
            CheckpointCommand::Forget { job } => forget(txn, job)?,
            CheckpointCommand::Trim { job, keep } => {
                // Forgotten meanwhile: nothing is kept of it.
                if let Some(mut row) = load(txn, job) {
                    row.known.hide_old(keep);
                    rewrite(txn, job, &row);
                }
            }
            CheckpointCommand::Keep {
                job,
                incarnation,
                policy,
            } => {
                policy
                    .check()
                    .map_err(|error| Rejection::invalid(error.to_string()))?;
                let mut row = load(txn, job).unwrap_or_default();
                row.known.fence(job, incarnation)?;
                row.known.policy = policy;
                policy.apply(&mut row.known.checkpoints);
                store(context, txn, job, row);
            }
            CheckpointCommand::Pin {
                job,
                step,
                is_pinned,
            } => pin(txn, job, step, is_pinned)?,
            CheckpointCommand::Prune { job, keep } => {
                let mut row = load(txn, job).ok_or_else(|| {
                    Rejection::not_found(format!("{job} has no checkpoints to prune"))
                })?;
                row.known.hide_old(keep);
                rewrite(txn, job, &row);
            }
            CheckpointCommand::Preempted {
                job,
                incarnation,
                steps,
            } => {
                let mut row = load(txn, job).unwrap_or_default();
                row.known.fence(job, incarnation)?;
                preemptions::record(txn, job, steps)?;
                store(context, txn, job, row);
            }
            CheckpointCommand::Fence { job, incarnation } => {
                let mut row = load(txn, job).unwrap_or_default();
                row.known.fence(job, incarnation)?;
                store(context, txn, job, row);
            }
        }
        Ok(Applied::changed(self.id(), Vec::new()))
    }

    fn query(&self, reader: &dyn Reader, _: u64, payload: &[u8]) -> Result<Vec<u8>, Rejection> {
        match CheckpointQuery::decode(payload)? {
            CheckpointQuery::List { job } => {
                let known = load(reader, job).map(|row| row.known).unwrap_or_default();
                Ok(codec::encode_plain(&known))
            }
            CheckpointQuery::Jobs { after } => Ok(codec::encode_plain(&summaries(reader, after))),
            CheckpointQuery::Preemptions { job } => {
                Ok(codec::encode_plain(&preemptions::load(reader, job)))
            }
        }
    }

    fn authorize_query(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let asked = match CheckpointQuery::decode(payload)? {
            CheckpointQuery::List { job } | CheckpointQuery::Preemptions { job } => Some(job),
            CheckpointQuery::Jobs { .. } => None,
        };
        match caller {
            Caller::Host { job: own, .. } if Some(*own) != asked && *own != JobId::SYSTEM => {
                let whose = asked.map_or_else(|| "all jobs".to_owned(), |job| job.to_string());
                Err(Rejection::new(
                    ErrorCode::PermissionDenied,
                    format!(
                        "a host of {own} may not see the checkpoints of {whose}: use a client token"
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    fn authorize(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let command = CheckpointCommand::decode(payload)?;
        let job = command.job();
        let allowed = match caller {
            Caller::Head => true,
            Caller::Host { job: own, .. } => *own == job,
            // What a job committed is the job's word; tidying up is the operator's.
            Caller::Client => matches!(
                command,
                CheckpointCommand::Forget { .. }
                    | CheckpointCommand::Pin { .. }
                    | CheckpointCommand::Prune { .. }
            ),
            Caller::Node(_) => false,
        };
        if allowed {
            return Ok(());
        }
        let (who, next) = match caller {
            Caller::Host { job: own, .. } => (
                format!("a host of {own}"),
                "a host speaks for its own job only",
            ),
            Caller::Client => (
                "a client".to_owned(),
                "only the job's own processes commit them",
            ),
            _ => (
                "a worker".to_owned(),
                "only the job's own processes commit them",
            ),
        };
        Err(Rejection::new(
            ErrorCode::PermissionDenied,
            format!("{who} may not change the checkpoints of {job}: {next}"),
        ))
    }
}

fn commit(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    job: JobId,
    checkpoint: CheckpointRef,
) -> Result<(), Rejection> {
    check_text("manifest path", &checkpoint.manifest_path)?;
    check_text("manifest digest", &checkpoint.manifest_digest)?;
    check_text(
        "weights hash",
        checkpoint.weights_blake3.as_deref().unwrap_or("-"),
    )?;
    let mut row = load(txn, job).unwrap_or_default();
    row.known.fence(job, checkpoint.incarnation)?;
    if row.known.admit(job, &checkpoint)? {
        row.known.committed_count += 1;
        let committed = Committed {
            checkpoint,
            committed_ms: context.now_ms,
            number: row.known.committed_count,
            is_pinned: false,
        };
        row.known.checkpoints.insert(0, committed);
        row.known.policy.apply(&mut row.known.checkpoints);
    }
    store(context, txn, job, row);
    Ok(())
}

fn reject(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    job: JobId,
    incarnation: Incarnation,
    rejected: Rejected,
) -> Result<(), Rejection> {
    check_text("manifest digest", &rejected.manifest_digest)?;
    check_text("reason", &rejected.reason)?;
    let mut row = load(txn, job)
        .ok_or_else(|| Rejection::not_found(format!("{job} has no checkpoint to reject")))?;
    row.known.fence(job, incarnation)?;
    let digest = &rejected.manifest_digest;
    if !row
        .known
        .rejections
        .iter()
        .any(|known| known.manifest_digest == *digest)
    {
        row.known
            .checkpoints
            .retain(|kept| kept.checkpoint.manifest_digest != *digest);
        row.known.rejections.insert(0, rejected);
        row.known.rejections.truncate(REJECTIONS_PER_JOB);
    }
    store(context, txn, job, row);
    Ok(())
}

fn pin(txn: &mut dyn Txn, job: JobId, step: u64, is_pinned: bool) -> Result<(), Rejection> {
    let mut row =
        load(txn, job).ok_or_else(|| Rejection::not_found(format!("{job} has no checkpoints")))?;
    let pinned = row.known.checkpoints.iter().filter(|one| one.is_pinned);
    let pinned_count = pinned.count();
    let steps: Vec<String> = row
        .known
        .checkpoints
        .iter()
        .map(|one| one.checkpoint.step.to_string())
        .collect();
    let Some(one) = row
        .known
        .checkpoints
        .iter_mut()
        .find(|one| one.checkpoint.step == step)
    else {
        return Err(Rejection::not_found(format!(
            "{job} has no checkpoint of step {step}: there are those of {}",
            steps.join(", ")
        )));
    };
    if is_pinned && !one.is_pinned && pinned_count >= PINNED_MAX {
        return Err(precondition(format!(
            "{job} has {pinned_count} pinned checkpoints, the limit is {PINNED_MAX}: unpin one first"
        )));
    }
    one.is_pinned = is_pinned;
    rewrite(txn, job, &row);
    Ok(())
}

fn forget(txn: &mut dyn Txn, job: JobId) -> Result<(), Rejection> {
    let row = load(txn, job)
        .ok_or_else(|| Rejection::not_found(format!("{job} has no checkpoints to forget")))?;
    remove(txn, job, row.used_index);
    Ok(())
}

fn check_text(what: &str, text: &str) -> Result<(), Rejection> {
    if (1..=TEXT_BYTES_MAX).contains(&text.len()) {
        return Ok(());
    }
    Err(Rejection::invalid(format!(
        "the {what} of a checkpoint has {} bytes, it may have 1 to {TEXT_BYTES_MAX}: shorten it",
        text.len()
    )))
}

fn precondition(message: String) -> Rejection {
    Rejection::new(ErrorCode::FailedPrecondition, message)
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
