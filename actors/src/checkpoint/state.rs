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
//! 5. A pinned checkpoint stays until it is unpinned, is rejected, or its job is forgotten.

use mobula_core::codec;
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, Table, Txn,
};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::{ErrorCode, Incarnation, JobId, Rejection};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::keep::{KeepPolicy, Metric, PINNED_MAX};

/// Checkpoints remembered of a job that has no policy of its own.
pub const CHECKPOINTS_PER_JOB: usize = 20;
/// Rejections remembered of a job: each is shown to people, and the oldest says least.
pub const REJECTIONS_PER_JOB: usize = 32;
/// Jobs remembered: at about 10 KiB a job 40 MiB, and 130 MiB if each keeps as much as it may.
pub const JOBS_MAX: u64 = 4096;
/// Jobs in one answer to [`CheckpointQuery::Jobs`]: some 100 KiB.
pub const JOBS_PER_PAGE: usize = 256;
/// The longest path, digest or reason that is kept, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

const JOBS: Table = Table {
    module: ModuleId::CHECKPOINT,
    tag: 1,
};
/// Jobs by the index of their last command, so that the quietest is found at once.
const BY_USE: Table = Table {
    module: ModuleId::CHECKPOINT,
    tag: 2,
};
const COUNT: Table = Table {
    module: ModuleId::CHECKPOINT,
    tag: 3,
};
const COUNT_KEY: &[u8] = b"jobs";

/// The largest command, question or row.
const PAYLOAD_BYTES_MAX: usize = 256 * 1024;

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
}

impl CheckpointCommand {
    /// The command as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    fn job(&self) -> JobId {
        match self {
            CheckpointCommand::Committed { job, .. }
            | CheckpointCommand::Rejected { job, .. }
            | CheckpointCommand::Forget { job }
            | CheckpointCommand::Fence { job, .. }
            | CheckpointCommand::Trim { job, .. }
            | CheckpointCommand::Keep { job, .. }
            | CheckpointCommand::Pin { job, .. }
            | CheckpointCommand::Prune { job, .. } => *job,
        }
    }
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckpointQuery {
    /// What is known of a job; answered with [`JobCheckpoints`], empty for an unknown job.
    List {
        /// The job.
        job: JobId,
    },
    /// The jobs of which something is known, by id, [`JOBS_PER_PAGE`] at most; answered with a list of
    /// [`JobSummary`].
    Jobs {
        /// Those behind this one.
        after: Option<JobId>,
    },
}

impl CheckpointQuery {
    /// The question as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }
}

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

/// A job's row.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Row {
    known: JobCheckpoints,
    used_index: u64,
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
        match read_command(payload)? {
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
            CheckpointCommand::Fence { job, incarnation } => {
                let mut row = load(txn, job).unwrap_or_default();
                row.known.fence(job, incarnation)?;
                store(context, txn, job, row);
            }
        }
        Ok(Applied::changed(self.id(), Vec::new()))
    }

    fn query(&self, reader: &dyn Reader, _: u64, payload: &[u8]) -> Result<Vec<u8>, Rejection> {
        match read_query(payload)? {
            CheckpointQuery::List { job } => {
                let known = load(reader, job).map(|row| row.known).unwrap_or_default();
                Ok(codec::encode_plain(&known))
            }
            CheckpointQuery::Jobs { after } => Ok(codec::encode_plain(&summaries(reader, after))),
        }
    }

    fn authorize_query(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let asked = match read_query(payload)? {
            CheckpointQuery::List { job } => Some(job),
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
        let command = read_command(payload)?;
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

fn read_query(payload: &[u8]) -> Result<CheckpointQuery, Rejection> {
    codec::decode(payload, PAYLOAD_BYTES_MAX)
        .map_err(|error| Rejection::invalid(format!("checkpoint question: {error}")))
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

/// Writes a row that is there already, without counting it as a use of the job.
fn rewrite(txn: &mut dyn Txn, job: JobId, row: &Row) {
    txn.put(JOBS, &job.to_key(), codec::encode_plain(row));
}

fn store(context: &ApplyContext, txn: &mut dyn Txn, job: JobId, mut row: Row) {
    if row.used_index == 0 {
        let count = count(txn);
        if count >= JOBS_MAX {
            forget_quietest(txn);
        } else {
            txn.put(COUNT, COUNT_KEY, (count + 1).to_be_bytes().to_vec());
        }
    } else {
        txn.delete(BY_USE, &row.used_index.to_be_bytes());
    }
    // Raft indices begin at 1, so 0 means that the row is new.
    row.used_index = context.index;
    txn.put(
        BY_USE,
        &row.used_index.to_be_bytes(),
        codec::encode_plain(&job),
    );
    rewrite(txn, job, &row);
}

/// Makes room for one more job; the count stays as it is.
fn forget_quietest(txn: &mut dyn Txn) {
    let quietest = txn.scan(BY_USE, &[], None, 1);
    let (key, value) = quietest
        .first()
        .expect("the count says that there are jobs");
    let job: JobId = decode_row(value);
    txn.delete(BY_USE, key);
    txn.delete(JOBS, &job.to_key());
}

fn remove(txn: &mut dyn Txn, job: JobId, used_index: u64) {
    txn.delete(BY_USE, &used_index.to_be_bytes());
    txn.delete(JOBS, &job.to_key());
    let rest = count(txn).saturating_sub(1);
    txn.put(COUNT, COUNT_KEY, rest.to_be_bytes().to_vec());
}

fn count(reader: &dyn Reader) -> u64 {
    reader.get(COUNT, COUNT_KEY).map_or(0, |bytes| {
        u64::from_be_bytes(bytes.try_into().expect("eight bytes are stored"))
    })
}

/// What is known of a job; none if nothing is.
pub(super) fn known(reader: &dyn Reader, job: JobId) -> Option<JobCheckpoints> {
    load(reader, job).map(|row| row.known)
}

/// What is known of every job, by its id.
pub(super) fn all_known(reader: &dyn Reader) -> impl Iterator<Item = (JobId, JobCheckpoints)> + '_ {
    mobula_core::row::scan(reader, JOBS, &[]).map(|(key, value)| {
        let job = JobId(mobula_core::row::number_at(&key, 0));
        (job, decode_row::<Row>(&value).known)
    })
}

/// The jobs behind `after`, in short.
fn summaries(reader: &dyn Reader, after: Option<JobId>) -> Vec<JobSummary> {
    all_known(reader)
        .filter(|(job, _)| after.is_none_or(|after| *job > after))
        .take(JOBS_PER_PAGE)
        .map(|(job, known)| {
            let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
            let checkpoints = &known.checkpoints;
            JobSummary {
                job,
                visible: count(checkpoints.len()),
                pinned: count(checkpoints.iter().filter(|one| one.is_pinned).count()),
                rejections: count(known.rejections.len()),
                size_bytes: checkpoints
                    .iter()
                    .map(|one| one.checkpoint.size_bytes)
                    .fold(0, u64::saturating_add),
                newest: checkpoints.first().cloned(),
            }
        })
        .collect()
}

fn load(reader: &dyn Reader, job: JobId) -> Option<Row> {
    reader
        .get(JOBS, &job.to_key())
        .map(|bytes| decode_row(&bytes))
}

fn decode_row<T: DeserializeOwned>(bytes: &[u8]) -> T {
    codec::decode(bytes, PAYLOAD_BYTES_MAX).expect("only this module writes these rows")
}

fn read_command(payload: &[u8]) -> Result<CheckpointCommand, Rejection> {
    codec::decode(payload, PAYLOAD_BYTES_MAX)
        .map_err(|error| Rejection::invalid(format!("checkpoint command: {error}")))
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
