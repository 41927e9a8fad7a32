//! A look at a Raft log from outside, without owning it: at what a power cut would leave of a store,
//! or at the entry that a view of the tables belongs to.

use raft::eraftpb::{ConfState, Entry, HardState};

use super::{LogPoint, RaftLogError, decode_stored, entry_key, key};
use crate::engine::{Column, Read};

/// What a store, or a view of one, says about its Raft log: for those who look at it from outside.
/// (The log's owner asks [`RaftLog`](super::RaftLog).)
#[derive(Debug, Clone, Copy)]
pub struct LogView<R> {
    base: R,
}

impl<R: Read> LogView<R> {
    /// Looks at the log in `base`.
    pub fn new(base: R) -> Self {
        LogView { base }
    }

    /// The last entry whose effect is in the tables.
    pub fn applied(&self) -> Result<LogPoint, RaftLogError> {
        match self.base.get(Column::Meta, key::APPLIED)? {
            Some(bytes) => LogPoint::from_bytes("the applied index", &bytes),
            None => Ok(LogPoint::default()),
        }
    }

    /// The stored term, vote and commit.
    pub fn hard_state(&self) -> Result<HardState, RaftLogError> {
        let stored = self.base.get(Column::Meta, key::HARD_STATE)?;
        decode_stored("the hard state", &stored.unwrap_or_default())
    }

    /// The membership.
    pub fn conf_state(&self) -> Result<ConfState, RaftLogError> {
        let stored = self.base.get(Column::Meta, key::CONF_STATE)?;
        decode_stored("the membership", &stored.unwrap_or_default())
    }

    /// The entry at `index`, where it is stored.
    pub fn entry(&self, index: u64) -> Result<Option<Entry>, RaftLogError> {
        let stored = self.base.get(Column::Log, &entry_key(index))?;
        stored
            .map(|bytes| decode_stored(&format!("entry {index}"), &bytes))
            .transpose()
    }
}
