//! The tables that hold what is known of checkpoints: a row a job, the jobs by their last use, and how many
//! there are.
//!
//! Invariants:
//! 1. Each row of jobs has one row by use, at its `used_index`, and the count is that of both.
//! 2. What is recorded of a job's preemptions goes with its row ([`preemptions`]).
//! 3. There are at most [`JOBS_MAX`]: one more makes the job that was quiet for longest be forgotten.

use mobula_core::JobId;
use mobula_core::codec;
use mobula_core::control::{ApplyContext, ModuleId, Reader, Table, Txn};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::command::PAYLOAD_BYTES_MAX;
use super::preemptions;
use super::state::{JobCheckpoints, JobSummary};

/// Jobs remembered: at about 10 KiB a job 40 MiB, and 130 MiB if each keeps as much as it may.
pub const JOBS_MAX: u64 = 4096;
/// Jobs in one answer to [`CheckpointQuery::Jobs`](super::state::CheckpointQuery::Jobs): some 100 KiB.
pub const JOBS_PER_PAGE: usize = 256;

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

/// A job's row.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) known: JobCheckpoints,
    /// The index of the last command that used it; 0 where there is no row yet.
    pub(super) used_index: u64,
}

/// Writes a row that is there already, without counting it as a use of the job.
pub(super) fn rewrite(txn: &mut dyn Txn, job: JobId, row: &Row) {
    txn.put(JOBS, &job.to_key(), codec::encode_plain(row));
}

/// Writes a row, and counts it as a use of the job.
pub(super) fn store(context: &ApplyContext, txn: &mut dyn Txn, job: JobId, mut row: Row) {
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
    preemptions::forget(txn, job);
}

/// Removes a job; `used_index` is its row's.
pub(super) fn remove(txn: &mut dyn Txn, job: JobId, used_index: u64) {
    txn.delete(BY_USE, &used_index.to_be_bytes());
    txn.delete(JOBS, &job.to_key());
    preemptions::forget(txn, job);
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
pub(super) fn summaries(reader: &dyn Reader, after: Option<JobId>) -> Vec<JobSummary> {
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

/// A job's row.
pub(super) fn load(reader: &dyn Reader, job: JobId) -> Option<Row> {
    reader
        .get(JOBS, &job.to_key())
        .map(|bytes| decode_row(&bytes))
}

fn decode_row<T: DeserializeOwned>(bytes: &[u8]) -> T {
    codec::decode(bytes, PAYLOAD_BYTES_MAX).expect("only this module writes these rows")
}
