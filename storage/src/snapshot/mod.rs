//! The tables as a stream of checked bytes: what a follower that is too far behind receives, and
//! what a backup file holds.
//!
//! The stream is a header frame (where in the log it was taken, and the membership), frames of
//! rows of at most [`FRAME_LIMIT_BYTES`], and an end frame with counts and the [state
//! hash](crate::tables::state_hash). Each frame is `kind u8, length u32, payload, crc32 of all that`,
//! little endian. The rows are one byte stream cut anywhere, so a row may span frames.
//!
//! Invariants:
//! 1. What an export shows is one moment: it reads from an engine's snapshot.
//! 2. Nothing of an installation is visible before the whole stream was verified; then tables, log
//!    start, membership, applied and commit index change in one synced batch.
//! 3. Memory: an exporter holds one frame and one row; an installer holds the rows, up to a bound
//!    that the caller sets, because one batch must hold them in the end.

mod export;
mod install;
mod scan;

#[cfg(test)]
mod tests;

use std::io;

use raft::eraftpb::ConfState;
use serde::{Deserialize, Serialize};

pub use export::SnapshotExport;
pub use install::SnapshotInstall;
pub use scan::SnapshotScan;

use crate::engine::EngineError;
use crate::raft_log::{LogPoint, RaftLogError};

/// The largest payload of a frame: small enough not to delay other traffic on its connection.
pub const FRAME_LIMIT_BYTES: usize = 1024 * 1024;

/// Kind and length before a payload.
const FRAME_HEAD_BYTES: usize = 5;

/// The checksum behind a payload.
const FRAME_TAIL_BYTES: usize = 4;

/// The format of the stream; a reader knows exactly one.
const FORMAT: u32 = 1;

const KIND_HEADER: u8 = 1;
const KIND_ROWS: u8 = 2;
const KIND_END: u8 = 3;

/// Where a snapshot was taken.
#[derive(Debug, Clone, PartialEq)]
pub struct SnapshotPlace {
    /// The last entry whose effect is in it.
    pub applied: LogPoint,
    /// The membership after that entry.
    pub conf_state: ConfState,
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    format: u32,
    index: u64,
    term: u64,
    conf_state: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
struct End {
    row_count: u64,
    rows_bytes: u64,
    state_hash: [u8; 32],
}

/// Why a snapshot was not read, or not installed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The store below failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The log refused or failed.
    #[error(transparent)]
    Log(#[from] RaftLogError),
    /// The stream is not what was exported: damaged, cut or mixed up. Fetch it again.
    #[error("the snapshot is damaged at byte {offset}: {reason}; nothing of it was installed")]
    Damaged {
        /// Bytes of the stream before the frame.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// It holds more than the caller allows.
    #[error("the snapshot holds more than {limit_bytes} bytes of rows, the limit here")]
    TooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// It is older than what is here.
    #[error("the snapshot ends at entry {snapshot}, this log has applied {applied} already")]
    Stale {
        /// The snapshot's index.
        snapshot: u64,
        /// What is applied here.
        applied: u64,
    },
    /// Reading or writing the stream failed.
    #[error("the snapshot stream failed: {0}")]
    Io(#[from] io::Error),
}

fn row_part_length(part: &[u8]) -> u32 {
    u32::try_from(part.len()).expect("table keys and values are at most 4 MiB")
}

/// A frame of a `kind` that the stream itself does not know, for what stands around it in a file.
///
/// # Panics
/// If the kind is one of the stream's own, or the payload longer than [`FRAME_LIMIT_BYTES`].
#[must_use]
pub fn frame_around(kind: u8, payload: &[u8]) -> Vec<u8> {
    assert!(kind > KIND_END && payload.len() <= FRAME_LIMIT_BYTES);
    frame(kind, payload)
}

/// The payload of a [`frame_around`] of this `kind`, if `frame` is one and undamaged.
#[must_use]
pub fn payload_around(kind: u8, frame: &[u8]) -> Option<&[u8]> {
    let (content, checksum) = frame.split_last_chunk::<FRAME_TAIL_BYTES>()?;
    let (head, payload) = content.split_first_chunk::<FRAME_HEAD_BYTES>()?;
    let is_whole = crc32fast::hash(content).to_le_bytes() == *checksum
        && head[1..] == row_part_length(payload).to_le_bytes();
    (is_whole && head[0] == kind).then_some(payload)
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a payload is at most one frame long");
    let mut frame = Vec::with_capacity(FRAME_HEAD_BYTES + payload.len() + FRAME_TAIL_BYTES);
    frame.push(kind);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    let checksum = crc32fast::hash(&frame);
    frame.extend_from_slice(&checksum.to_le_bytes());
    frame
}
