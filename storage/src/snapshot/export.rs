//! From tables to frames.

use std::io;
use std::ops::ControlFlow;

use mobula_core::codec;
use mobula_core::mutant::{Mutant, is_planted};

use super::{
    End, FORMAT, FRAME_LIMIT_BYTES, Header, KIND_END, KIND_HEADER, KIND_ROWS, SnapshotError,
    SnapshotPlace, frame, row_part_length,
};
use crate::engine::{Column, Engine, EngineError, Read};
use crate::raft_log::{RaftLog, encode_raft};
use crate::tables::RowHasher;

/// Turns the tables of one moment into frames. An iterator would hide the errors: call
/// [`SnapshotExport::next_frame`] until it gives `None`.
#[derive(Debug)]
pub struct SnapshotExport<R> {
    base: R,
    place: SnapshotPlace,
    state: ExportState,
    buffer: Vec<u8>,
    hasher: RowHasher,
    row_count: u64,
    rows_bytes: u64,
}

#[derive(Debug)]
enum ExportState {
    Header,
    /// Rows from this key on.
    Rows(Vec<u8>),
    /// Every row is in the buffer.
    Drain,
    Done,
}

impl<E: Engine> RaftLog<E> {
    /// Starts an export of what is applied now. To be called by the log's writer, between batches;
    /// the export itself may then run on another thread.
    #[must_use]
    pub fn export(&self) -> SnapshotExport<E::Snapshot> {
        let place = SnapshotPlace {
            applied: self.applied(),
            conf_state: self.conf_state(),
        };
        SnapshotExport::new(self.engine().snapshot(), place)
    }
}

impl<R: Read> SnapshotExport<R> {
    /// An export of the tables in `base`, a snapshot of an engine taken at `place`.
    pub fn new(base: R, place: SnapshotPlace) -> Self {
        SnapshotExport {
            base,
            place,
            state: ExportState::Header,
            buffer: Vec::new(),
            hasher: RowHasher::default(),
            row_count: 0,
            rows_bytes: 0,
        }
    }

    /// Where it was taken.
    pub fn place(&self) -> &SnapshotPlace {
        &self.place
    }

    /// The next frame, or `None` behind the end frame.
    pub fn next_frame(&mut self) -> Result<Option<Vec<u8>>, EngineError> {
        match std::mem::replace(&mut self.state, ExportState::Done) {
            ExportState::Header => {
                self.state = ExportState::Rows(Vec::new());
                let header = Header {
                    format: FORMAT,
                    index: self.place.applied.index,
                    term: self.place.applied.term,
                    conf_state: encode_raft(&self.place.conf_state),
                };
                Ok(Some(frame(KIND_HEADER, &codec::encode_plain(&header))))
            }
            ExportState::Rows(from) => {
                self.state = self.fill(&from)?;
                self.next_rows()
            }
            ExportState::Drain => {
                self.state = ExportState::Drain;
                self.next_rows()
            }
            ExportState::Done => Ok(None),
        }
    }

    fn next_rows(&mut self) -> Result<Option<Vec<u8>>, EngineError> {
        if self.buffer.is_empty() {
            self.state = ExportState::Done;
            let end = End {
                row_count: self.row_count,
                rows_bytes: self.rows_bytes,
                state_hash: *self.hasher.finish().as_bytes(),
            };
            return Ok(Some(frame(KIND_END, &codec::encode_plain(&end))));
        }
        let rest = self
            .buffer
            .split_off(self.buffer.len().min(FRAME_LIMIT_BYTES));
        let payload = std::mem::replace(&mut self.buffer, rest);
        Ok(Some(frame(KIND_ROWS, &payload)))
    }

    /// Reads rows until a frame is full; says from where to go on.
    fn fill(&mut self, from: &[u8]) -> Result<ExportState, EngineError> {
        if self.buffer.len() >= FRAME_LIMIT_BYTES {
            return Ok(ExportState::Rows(from.to_vec()));
        }
        let mut next = None;
        let SnapshotExport {
            base,
            buffer,
            hasher,
            row_count,
            rows_bytes,
            ..
        } = self;
        base.visit(Column::State, from, &mut |key, value| {
            if buffer.len() >= FRAME_LIMIT_BYTES {
                next = Some(key.to_vec());
                return ControlFlow::Break(());
            }
            // The table of sessions' answers.
            if is_planted(Mutant::SnapshotWithoutSessions) && key.starts_with(&[1, 17]) {
                return ControlFlow::Continue(());
            }
            hasher.update(key, value);
            let before = buffer.len();
            for part in [key, value] {
                buffer.extend_from_slice(&row_part_length(part).to_le_bytes());
                buffer.extend_from_slice(part);
            }
            *row_count += 1;
            *rows_bytes += (buffer.len() - before) as u64;
            ControlFlow::Continue(())
        })?;
        Ok(next.map_or(ExportState::Drain, ExportState::Rows))
    }

    /// Writes all frames to `target` and flushes it.
    pub fn write_to(mut self, target: &mut impl io::Write) -> Result<(), SnapshotError> {
        while let Some(frame) = self.next_frame()? {
            target.write_all(&frame)?;
        }
        Ok(target.flush()?)
    }
}
