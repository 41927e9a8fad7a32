//! From frames to tables: verified first, and then all at once.

use std::io;

use mobula_core::codec::{self, DecodeError};
use mobula_core::mutant::{Mutant, is_planted};

use super::{
    End, FORMAT, FRAME_HEAD_BYTES, FRAME_LIMIT_BYTES, FRAME_TAIL_BYTES, Header, KIND_END,
    KIND_HEADER, KIND_ROWS, SnapshotError, SnapshotPlace, row_part_length,
};
use crate::engine::{Column, Durability, Engine, WriteBatch};
use crate::raft_log::{LogPoint, LogWrite, RaftLog, decode_raft};
use crate::tables::RowHasher;

/// Takes frames in order, verifies them, and in the end installs all of them at once.
#[derive(Debug)]
pub struct SnapshotInstall {
    limit_bytes: u64,
    offset: u64,
    place: Option<SnapshotPlace>,
    /// The start of a row whose rest is in the next frame.
    partial: Vec<u8>,
    rows: WriteBatch,
    pub(super) hasher: RowHasher,
    row_count: u64,
    rows_bytes: u64,
    ended: bool,
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
            limit_bytes,
            offset: 0,
            place: None,
            partial: Vec::new(),
            rows,
            hasher: RowHasher::default(),
            row_count: 0,
            rows_bytes: 0,
            ended: false,
        }
    }

    /// Where the snapshot was taken, once its first frame was read.
    #[must_use]
    pub fn place(&self) -> Option<&SnapshotPlace> {
        self.place.as_ref()
    }

    /// Whether the end frame was read and everything before it verified.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.ended
    }

    fn damaged(&self, reason: impl Into<String>) -> SnapshotError {
        SnapshotError::Damaged {
            offset: self.offset,
            reason: reason.into(),
        }
    }

    /// Takes one whole frame.
    pub fn push_frame(&mut self, frame: &[u8]) -> Result<(), SnapshotError> {
        if self.ended {
            return Err(self.damaged("a frame follows the end"));
        }
        if frame.len() < FRAME_HEAD_BYTES + FRAME_TAIL_BYTES {
            return Err(self.damaged("a frame is cut"));
        }
        let (content, checksum) = frame.split_at(frame.len() - FRAME_TAIL_BYTES);
        if crc32fast::hash(content).to_le_bytes() != checksum {
            return Err(self.damaged("a frame's checksum is wrong"));
        }
        let (head, payload) = content.split_at(FRAME_HEAD_BYTES);
        if head[1..] != row_part_length(payload).to_le_bytes() {
            return Err(self.damaged("a frame's length is wrong"));
        }
        match (head[0], self.place.is_some()) {
            (KIND_HEADER, false) => self.take_header(payload)?,
            (KIND_ROWS, true) => self.take_rows(payload)?,
            (KIND_END, true) => self.take_end(payload)?,
            (kind, _) => return Err(self.damaged(format!("frame kind {kind} is not due here"))),
        }
        self.offset += frame.len() as u64;
        Ok(())
    }

    fn take_header(&mut self, payload: &[u8]) -> Result<(), SnapshotError> {
        let header: Header = self.decoded(codec::decode(payload, FRAME_LIMIT_BYTES))?;
        if header.format != FORMAT {
            let reason = format!(
                "its format is {}, this binary reads {FORMAT}",
                header.format
            );
            return Err(self.damaged(reason));
        }
        let conf_state =
            decode_raft(&header.conf_state).map_err(|error| self.damaged(error.to_string()))?;
        let applied = LogPoint {
            index: header.index,
            term: header.term,
        };
        self.place = Some(SnapshotPlace {
            applied,
            conf_state,
        });
        Ok(())
    }

    fn take_rows(&mut self, payload: &[u8]) -> Result<(), SnapshotError> {
        self.rows_bytes += payload.len() as u64;
        if self.rows_bytes > self.limit_bytes {
            return Err(SnapshotError::TooLarge {
                limit_bytes: self.limit_bytes,
            });
        }
        self.partial.extend_from_slice(payload);
        let bytes = std::mem::take(&mut self.partial);
        let mut rest = bytes.as_slice();
        while let Some((key, value, after)) = split_row(rest) {
            self.hasher.update(key, value);
            self.rows.put(Column::State, key, value);
            self.row_count += 1;
            rest = after;
        }
        self.partial = rest.to_vec();
        Ok(())
    }

    fn take_end(&mut self, payload: &[u8]) -> Result<(), SnapshotError> {
        let end: End = self.decoded(codec::decode(payload, FRAME_LIMIT_BYTES))?;
        if !self.partial.is_empty() {
            return Err(self.damaged("the last row is cut"));
        }
        if (end.row_count, end.rows_bytes) != (self.row_count, self.rows_bytes) {
            return Err(self.damaged(format!(
                "{} rows in {} bytes arrived of {} in {}",
                self.row_count, self.rows_bytes, end.row_count, end.rows_bytes
            )));
        }
        if end.state_hash != *self.hasher.finish().as_bytes() {
            return Err(self.damaged("the rows do not have the hash that was exported"));
        }
        self.ended = true;
        Ok(())
    }

    fn decoded<T>(&self, decoded: Result<T, DecodeError>) -> Result<T, SnapshotError> {
        decoded.map_err(|error| self.damaged(error.to_string()))
    }

    /// Reads all frames from `source`, up to and with the end frame.
    pub fn read_from(&mut self, source: &mut impl io::Read) -> Result<(), SnapshotError> {
        let mut frame = Vec::new();
        while !self.ended {
            frame.resize(FRAME_HEAD_BYTES, 0);
            self.read_part(source, &mut frame)?;
            let length = u32::from_le_bytes(frame[1..5].try_into().expect("the slice has 4 bytes"));
            let length = length as usize;
            if length > FRAME_LIMIT_BYTES {
                return Err(self.damaged(format!("a frame claims {length} bytes")));
            }
            frame.resize(FRAME_HEAD_BYTES + length + FRAME_TAIL_BYTES, 0);
            self.read_part(source, &mut frame[FRAME_HEAD_BYTES..])?;
            self.push_frame(&frame)?;
        }
        Ok(())
    }

    fn read_part(&self, source: &mut impl io::Read, part: &mut [u8]) -> Result<(), SnapshotError> {
        source.read_exact(part).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged("the stream ends here"),
            _ => SnapshotError::Io(error),
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
        let place = match self.place {
            Some(place) if self.ended => place,
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

/// Splits the first row off, or `None` when it is not all there yet.
fn split_row(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (key, rest) = split_part(bytes)?;
    let (value, rest) = split_part(rest)?;
    Some((key, value, rest))
}

fn split_part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}
