//! Where a log stands: what is compacted, applied, promised and last, as it is kept beside the entries
//! and read from there at the start.

use raft::eraftpb::{ConfState, Entry, HardState};

use super::{RaftLogError, decode_stored, key};
use crate::engine::{Column, Engine};

/// An index and its term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct LogPoint {
    /// The index.
    pub index: u64,
    /// The term of the entry there.
    pub term: u64,
}

impl LogPoint {
    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.index.to_be_bytes());
        bytes[8..].copy_from_slice(&self.term.to_be_bytes());
        bytes
    }

    pub(super) fn from_bytes(what: &str, bytes: &[u8]) -> Result<Self, RaftLogError> {
        let bytes: [u8; 16] = bytes.try_into().map_err(|_| RaftLogError::Damaged {
            what: what.to_owned(),
            reason: format!("has {} bytes and not 16", bytes.len()),
        })?;
        let word = |at: usize| {
            u64::from_be_bytes(bytes[at..at + 8].try_into().expect("the slice has 8 bytes"))
        };
        Ok(LogPoint {
            index: word(0),
            term: word(8),
        })
    }
}

/// Everything about the log that is small, as it is on disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Position {
    pub(crate) truncated: LogPoint,
    pub(crate) last: LogPoint,
    pub(crate) applied: LogPoint,
    pub(crate) hard_state: HardState,
    pub(crate) conf_state: ConfState,
    /// Counts the batches, so that two writers are noticed.
    pub(crate) version: u64,
}

impl Position {
    pub(super) fn first_index(&self) -> u64 {
        self.truncated.index + 1
    }
}

/// Reads where the log in `engine` stands, and checks invariant 2.
pub(super) fn read_position<E: Engine>(engine: &E) -> Result<Position, RaftLogError> {
    let meta = |key: &[u8]| engine.get(Column::Meta, key);
    let point = |what: &str, key: &[u8]| match meta(key)? {
        Some(bytes) => LogPoint::from_bytes(what, &bytes),
        None => Ok(LogPoint::default()),
    };
    let truncated = point("the compacted index", key::TRUNCATED)?;
    let applied = point("the applied index", key::APPLIED)?;
    let hard_state: HardState = decode_stored(
        "the hard state",
        &meta(key::HARD_STATE)?.unwrap_or_default(),
    )?;
    let conf_state: ConfState = decode_stored(
        "the membership",
        &meta(key::CONF_STATE)?.unwrap_or_default(),
    )?;
    let last = match engine.last(Column::Log)? {
        Some((_, bytes)) => {
            let entry: Entry = decode_stored("the last entry", &bytes)?;
            LogPoint {
                index: entry.index,
                term: entry.term,
            }
        }
        None => truncated,
    };
    let ordered = [
        ("compacted", truncated.index),
        ("applied", applied.index),
        ("committed", hard_state.commit),
        ("last", last.index),
    ];
    for pair in ordered.windows(2) {
        let [(lower_name, lower), (upper_name, upper)] = pair else {
            continue;
        };
        if lower > upper {
            return Err(RaftLogError::Damaged {
                what: format!("its {lower_name} index {lower}"),
                reason: format!("is above its {upper_name} index {upper}"),
            });
        }
    }
    Ok(Position {
        truncated,
        last,
        applied,
        hard_state,
        conf_state,
        version: 0,
    })
}
