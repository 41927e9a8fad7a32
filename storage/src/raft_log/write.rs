//! One batch of changes to the log, the state beside it, and, through [`LogWrite::batch_mut`], the
//! tables: what must become true together.

use mobula_core::mutant::{Mutant, is_planted};
use raft::eraftpb::{ConfState, Entry, HardState};

use super::{LogPoint, Position, RaftLogError, encode_raft, entry_key, key};
use crate::engine::{Column, WriteBatch};

/// An open batch of a log; see [`super::RaftLog::begin`].
#[derive(Debug)]
pub struct LogWrite {
    batch: WriteBatch,
    position: Position,
}

impl LogWrite {
    pub(super) fn new(position: Position) -> Self {
        LogWrite {
            batch: WriteBatch::new(),
            position,
        }
    }

    /// Appends `entries`, which must follow each other and begin in or right behind the log; what
    /// the log held from there on is replaced.
    pub fn append(&mut self, entries: &[Entry]) -> Result<(), RaftLogError> {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return Ok(());
        };
        let contiguous = entries
            .windows(2)
            .all(|pair| pair[1].index == pair[0].index + 1);
        let (first_index, last_index) = (self.position.first_index(), self.position.last.index);
        if !contiguous || first.index < first_index || first.index > last_index + 1 {
            return Err(RaftLogError::Gap {
                index: first.index,
                first_index,
                last_index,
            });
        }
        for entry in entries {
            self.batch
                .put(Column::Log, entry_key(entry.index), encode_raft(entry));
        }
        if last_index > last.index && !is_planted(Mutant::LogTailKept) {
            let (from, to) = (entry_key(last.index + 1), entry_key(last_index + 1));
            self.batch.delete_range(Column::Log, from, to);
        }
        self.position.last = LogPoint {
            index: last.index,
            term: last.term,
        };
        Ok(())
    }

    /// Sets term, vote and commit.
    pub fn set_hard_state(&mut self, hard_state: &HardState) {
        self.position.hard_state = hard_state.clone();
        self.batch
            .put(Column::Meta, key::HARD_STATE, encode_raft(hard_state));
    }

    /// Raises the stored commit, where it is lower.
    pub fn raise_commit(&mut self, commit: u64) {
        if commit > self.position.hard_state.commit {
            let raised = HardState {
                commit,
                ..self.position.hard_state.clone()
            };
            self.set_hard_state(&raised);
        }
    }

    /// Sets the membership, after a change to it was applied.
    pub fn set_conf_state(&mut self, conf_state: &ConfState) {
        self.position.conf_state = conf_state.clone();
        self.batch
            .put(Column::Meta, key::CONF_STATE, encode_raft(conf_state));
    }

    /// Says that everything up to `applied` is in the tables. Put their changes into
    /// [`LogWrite::batch_mut`] of the same batch. The stored commit follows, so that no crash can
    /// leave it below.
    pub fn set_applied(&mut self, applied: LogPoint) {
        self.position.applied = applied;
        self.batch
            .put(Column::Meta, key::APPLIED, applied.to_bytes());
        self.raise_commit(applied.index);
    }

    /// Replaces the whole log by a snapshot's place and membership. Its rows go into
    /// [`LogWrite::batch_mut`] of the same batch.
    pub fn reset_to(&mut self, point: LogPoint, conf_state: &ConfState) {
        // Also below the old start: nothing may be left of another history.
        self.batch
            .delete_range(Column::Log, entry_key(0), entry_key(u64::MAX));
        self.set_truncated(point);
        self.position.last = point;
        self.set_conf_state(conf_state);
        self.set_applied(point);
        if self.position.hard_state.term < point.term {
            let raised = HardState {
                term: point.term,
                vote: 0,
                ..self.position.hard_state.clone()
            };
            self.set_hard_state(&raised);
        }
    }

    pub(super) fn truncate_to(&mut self, point: LogPoint) {
        let from = entry_key(self.position.first_index());
        self.batch
            .delete_range(Column::Log, from, entry_key(point.index + 1));
        self.set_truncated(point);
    }

    fn set_truncated(&mut self, point: LogPoint) {
        self.position.truncated = point;
        self.batch
            .put(Column::Meta, key::TRUNCATED, point.to_bytes());
    }

    /// The batch itself, for rows of the tables.
    pub fn batch_mut(&mut self) -> &mut WriteBatch {
        &mut self.batch
    }

    /// Whether it would change nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Bytes of keys and values in it.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.batch.size_bytes()
    }

    pub(super) fn finish(self) -> (WriteBatch, Position) {
        let Position {
            truncated,
            last,
            applied,
            hard_state,
            ..
        } = &self.position;
        assert!(
            truncated.index <= applied.index
                && applied.index <= hard_state.commit
                && hard_state.commit <= last.index,
            "a batch would leave compacted {} applied {} commit {} last {} out of order",
            truncated.index,
            applied.index,
            hard_state.commit,
            last.index
        );
        (self.batch, self.position)
    }
}
