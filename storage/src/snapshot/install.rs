//! From frames to tables: verified first, and then all at once.

use std::io;

use mobula_core::mutant::{Mutant, is_planted};

use super::scan::SnapshotScan;
use super::{SnapshotError, SnapshotPlace};
use crate::engine::{Column, Durability, Engine, WriteBatch};
use crate::raft_log::{LogWrite, RaftLog};

/// Takes frames in order, verifies them, and in the end installs all of them at once.
#[derive(Debug)]
pub struct SnapshotInstall {
    pub(super) scan: SnapshotScan,
    rows: WriteBatch,
}

impl SnapshotInstall {
    /// Expects a stream with at most `limit_bytes` of rows, all of which it will hold in memory.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        let mut rows = WriteBatch::new();
        // 256 modules at most, so this is above every row key.
        if !is_planted(Mutant::SnapshotKeepsOldRows) {
            rows.delete_range(Column::State, [], [u8::MAX; 8]);
        }
        SnapshotInstall {
            scan: SnapshotScan::new(limit_bytes),
            rows,
        }
    }

    /// Where the snapshot was taken, once its first frame was read.
    #[must_use]
    pub fn place(&self) -> Option<&SnapshotPlace> {
        self.scan.place()
    }

    /// Whether the end frame was read and everything before it verified.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.scan.is_complete()
    }

    /// Takes one whole frame.
    pub fn push_frame(&mut self, frame: &[u8]) -> Result<(), SnapshotError> {
        let rows = &mut self.rows;
        self.scan.push_frame(frame, &mut |key, value| {
            rows.put(Column::State, key, value);
        })
    }

    /// Reads all frames from `source`, up to and with the end frame.
    pub fn read_from(&mut self, source: &mut impl io::Read) -> Result<(), SnapshotError> {
        let rows = &mut self.rows;
        self.scan.read_from(source, &mut |key, value| {
            rows.put(Column::State, key, value);
        })
    }

    /// Makes the snapshot the state of `log` and its tables. The log must be behind it.
    ///
    /// # Panics
    /// If the stream is not complete.
    pub fn install<E: Engine>(self, log: &RaftLog<E>) -> Result<SnapshotPlace, SnapshotError> {
        let (write, place) = self.stage(log)?;
        log.commit(write, Durability::Synced)?;
        Ok(place)
    }

    /// The batch that makes the snapshot the state of `log` and its tables, for a caller that has
    /// more to write with it: a hard state, and the entries behind. The log must be behind it.
    ///
    /// # Panics
    /// If the stream is not complete.
    pub fn stage<E: Engine>(
        self,
        log: &RaftLog<E>,
    ) -> Result<(LogWrite, SnapshotPlace), SnapshotError> {
        let place = match self.scan.place() {
            Some(place) if self.scan.is_complete() => place.clone(),
            _ => panic!("a snapshot is installed after its end frame was verified"),
        };
        let applied = log.applied().index;
        if place.applied.index <= applied && !log.is_empty() {
            return Err(SnapshotError::Stale {
                snapshot: place.applied.index,
                applied,
            });
        }
        let mut write = log.begin();
        *write.batch_mut() = self.rows;
        write.reset_to(place.applied, &place.conf_state);
        Ok((write, place))
    }
}
