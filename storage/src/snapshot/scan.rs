//! From frames to rows: everything that can be checked without knowing what the rows are for.

use std::io;

use mobula_core::codec::{self, DecodeError};

use super::{
    End, FORMAT, FRAME_HEAD_BYTES, FRAME_LIMIT_BYTES, FRAME_TAIL_BYTES, Header, KIND_END,
    KIND_HEADER, KIND_ROWS, SnapshotError, SnapshotPlace, row_part_length,
};
use crate::raft_log::{LogPoint, decode_raft};
use crate::tables::{KEY_LIMIT_BYTES, RowHasher, VALUE_LIMIT_BYTES};

/// A row with its two lengths, at the most.
const ROW_BYTES_MAX: usize = KEY_LIMIT_BYTES + VALUE_LIMIT_BYTES + 8;

/// Takes frames in order, checks them, and shows the rows in them one by one. It holds a row at the
/// most: what becomes of the rows before the end frame was checked is the caller's care.
#[derive(Debug)]
pub struct SnapshotScan {
    limit_bytes: u64,
    offset: u64,
    place: Option<SnapshotPlace>,
    /// The start of a row whose rest is in the next frame.
    partial: Vec<u8>,
    hasher: RowHasher,
    row_count: u64,
    rows_bytes: u64,
    ended: bool,
}

impl SnapshotScan {
    /// Expects a stream with at most `limit_bytes` of rows.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        SnapshotScan {
            limit_bytes,
            offset: 0,
            place: None,
            partial: Vec::new(),
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

    /// Rows, and their bytes, that were shown so far.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.row_count, self.rows_bytes)
    }

    /// The hash of the rows that were shown so far; in the end it is the
    /// [state hash](crate::tables::state_hash).
    #[must_use]
    pub fn state_hash(&self) -> blake3::Hash {
        self.hasher.finish()
    }

    fn damaged(&self, reason: impl Into<String>) -> SnapshotError {
        SnapshotError::Damaged {
            offset: self.offset,
            reason: reason.into(),
        }
    }

    /// Takes one whole frame, and shows the rows that are complete with it to `take`.
    pub fn push_frame(
        &mut self,
        frame: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<(), SnapshotError> {
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
            (KIND_ROWS, true) => self.take_rows(payload, take)?,
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

    fn take_rows(
        &mut self,
        payload: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<(), SnapshotError> {
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
            take(key, value);
            self.row_count += 1;
            rest = after;
        }
        self.partial = rest.to_vec();
        if self.partial.len() > ROW_BYTES_MAX {
            return Err(self.damaged("a row is longer than any can be"));
        }
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

    /// Reads the next frame from `source`, with its checksum still to be checked.
    pub fn read_frame(&self, source: &mut impl io::Read) -> Result<Vec<u8>, SnapshotError> {
        let mut frame = vec![0; FRAME_HEAD_BYTES];
        self.read_part(source, &mut frame)?;
        let length = u32::from_le_bytes(frame[1..5].try_into().expect("the slice has 4 bytes"));
        let length = length as usize;
        if length > FRAME_LIMIT_BYTES {
            return Err(self.damaged(format!("a frame claims {length} bytes")));
        }
        frame.resize(FRAME_HEAD_BYTES + length + FRAME_TAIL_BYTES, 0);
        self.read_part(source, &mut frame[FRAME_HEAD_BYTES..])?;
        Ok(frame)
    }

    /// Reads all frames from `source`, up to and with the end frame.
    pub fn read_from(
        &mut self,
        source: &mut impl io::Read,
        take: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<(), SnapshotError> {
        while !self.ended {
            let frame = self.read_frame(source)?;
            self.push_frame(&frame, take)?;
        }
        Ok(())
    }

    fn read_part(&self, source: &mut impl io::Read, part: &mut [u8]) -> Result<(), SnapshotError> {
        source.read_exact(part).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged("the stream ends here"),
            _ => SnapshotError::Io(error),
        })
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
