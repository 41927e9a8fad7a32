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

use std::io;
use std::ops::ControlFlow;

use mobula_core::codec::{self, DecodeError};
use raft::eraftpb::ConfState;
use serde::{Deserialize, Serialize};

use crate::engine::{Column, Durability, Engine, EngineError, Read, WriteBatch};
use crate::raft_log::{LogPoint, RaftLog, RaftLogError, decode_raft, encode_raft};
use crate::tables::RowHasher;

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

fn row_part_length(part: &[u8]) -> u32 {
    u32::try_from(part.len()).expect("table keys and values are at most 4 MiB")
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

/// Takes frames in order, verifies them, and in the end installs all of them at once.
#[derive(Debug)]
pub struct SnapshotInstall {
    limit_bytes: u64,
    offset: u64,
    place: Option<SnapshotPlace>,
    /// The start of a row whose rest is in the next frame.
    partial: Vec<u8>,
    rows: WriteBatch,
    hasher: RowHasher,
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
        rows.delete_range(Column::State, [], [u8::MAX; 8]);
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
        log.commit(write, Durability::Synced)?;
        Ok(place)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::MemoryEngine;
    use crate::tables::state_hash;

    const LIMIT: u64 = 64 << 20;

    fn place(index: u64) -> SnapshotPlace {
        let conf_state = ConfState {
            voters: vec![1, 2, 3],
            ..ConfState::default()
        };
        SnapshotPlace {
            applied: LogPoint { index, term: 4 },
            conf_state,
        }
    }

    /// Rows of many sizes, some larger than a frame, some empty.
    fn filled() -> MemoryEngine {
        let engine = MemoryEngine::new();
        let mut batch = WriteBatch::new();
        for number in 0..3000_u32 {
            let value = vec![number as u8; (number as usize * 7919) % 2000];
            batch.put(Column::State, number.to_be_bytes(), value);
        }
        // A pattern whose period does not divide a frame: no two frames are equal.
        let large: Vec<u8> = (0..FRAME_LIMIT_BYTES * 2 + 5)
            .map(|at| (at % 251) as u8)
            .collect();
        batch.put(Column::State, b"large", large);
        batch.put(Column::State, b"empty", b"");
        engine.write(batch, Durability::Synced).unwrap();
        engine
    }

    fn frames(engine: &MemoryEngine, index: u64) -> Vec<Vec<u8>> {
        let mut export = SnapshotExport::new(engine.snapshot(), place(index));
        let mut frames = Vec::new();
        while let Some(frame) = export.next_frame().unwrap() {
            assert!(frame.len() <= FRAME_LIMIT_BYTES + FRAME_HEAD_BYTES + FRAME_TAIL_BYTES);
            frames.push(frame);
        }
        frames
    }

    #[test]
    fn what_is_exported_is_installed_with_its_place_in_the_log() {
        let source = filled();
        let mut bytes = Vec::new();
        SnapshotExport::new(source.snapshot(), place(9))
            .write_to(&mut bytes)
            .unwrap();
        let target = MemoryEngine::new();
        let mut batch = WriteBatch::new();
        batch.put(Column::State, b"what was here before", b"");
        batch.put(Column::State, [0xff; 3], b"");
        target.write(batch, Durability::Synced).unwrap();
        let log = RaftLog::open(target.clone()).unwrap();
        let mut install = SnapshotInstall::new(LIMIT);
        install.read_from(&mut bytes.as_slice()).unwrap();
        assert_eq!(install.install(&log).unwrap(), place(9));
        target.crash();
        assert_eq!(state_hash(&target).unwrap(), state_hash(&source).unwrap());
        let log = RaftLog::open(target).unwrap();
        assert_eq!(log.applied(), place(9).applied);
        assert_eq!(log.conf_state(), place(9).conf_state);
    }

    #[test]
    fn an_export_shows_the_moment_it_began() {
        let engine = filled();
        let log = RaftLog::open(engine.clone()).unwrap();
        let export = log.export();
        let before = state_hash(&engine).unwrap();
        let mut batch = WriteBatch::new();
        batch.delete(Column::State, b"large");
        engine.write(batch, Durability::Synced).unwrap();
        let mut bytes = Vec::new();
        export.write_to(&mut bytes).unwrap();
        let mut install = SnapshotInstall::new(LIMIT);
        install.read_from(&mut bytes.as_slice()).unwrap();
        assert_eq!(install.hasher.finish(), before);
    }

    #[test]
    fn an_empty_state_is_a_snapshot_too() {
        let frames = frames(&MemoryEngine::new(), 3);
        assert_eq!(frames.len(), 2);
        let mut install = SnapshotInstall::new(LIMIT);
        for frame in &frames {
            install.push_frame(frame).unwrap();
        }
        install
            .install(&RaftLog::open(MemoryEngine::new()).unwrap())
            .unwrap();
    }

    #[test]
    fn a_flipped_bit_in_any_frame_is_noticed() {
        let frames = frames(&filled(), 9);
        for damaged in 0..frames.len() {
            for at in [0, 2, FRAME_HEAD_BYTES, frames[damaged].len() - 1] {
                let mut install = SnapshotInstall::new(LIMIT);
                let result = frames.iter().enumerate().try_for_each(|(number, frame)| {
                    let mut frame = frame.clone();
                    if number == damaged {
                        frame[at] ^= 0x10;
                    }
                    install.push_frame(&frame)
                });
                assert!(
                    matches!(result, Err(SnapshotError::Damaged { .. })),
                    "{damaged} {at}"
                );
                assert!(!install.is_complete());
            }
        }
    }

    #[test]
    fn a_lost_repeated_or_swapped_frame_is_noticed() {
        let original = frames(&filled(), 9);
        for number in 0..original.len() {
            let mut lost = original.clone();
            lost.remove(number);
            let mut repeated = original.clone();
            repeated.insert(number, original[number].clone());
            let mut swapped = original.clone();
            swapped.swap(number, (number + 1) % original.len());
            for stream in [lost, repeated, swapped] {
                let mut install = SnapshotInstall::new(LIMIT);
                let all = stream
                    .iter()
                    .try_for_each(|frame| install.push_frame(frame));
                assert!(all.is_err() || !install.is_complete(), "frame {number}");
            }
        }
    }

    #[test]
    fn a_cut_stream_says_where_it_ends() {
        let mut bytes = Vec::new();
        SnapshotExport::new(filled().snapshot(), place(9))
            .write_to(&mut bytes)
            .unwrap();
        for length in [0, 3, 40, bytes.len() / 2, bytes.len() - 1] {
            let error = SnapshotInstall::new(LIMIT)
                .read_from(&mut &bytes[..length])
                .unwrap_err();
            assert!(
                error.to_string().contains("the stream ends here"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_snapshot_over_the_limit_or_behind_the_log_is_refused() {
        let mut bytes = Vec::new();
        SnapshotExport::new(filled().snapshot(), place(9))
            .write_to(&mut bytes)
            .unwrap();
        let small = SnapshotInstall::new(1000).read_from(&mut bytes.as_slice());
        assert!(matches!(
            small,
            Err(SnapshotError::TooLarge { limit_bytes: 1000 })
        ));
        let log = RaftLog::open(MemoryEngine::new()).unwrap();
        for expect_stale in [false, true] {
            let mut install = SnapshotInstall::new(LIMIT);
            install.read_from(&mut bytes.as_slice()).unwrap();
            let result = install.install(&log);
            assert_eq!(
                matches!(result, Err(SnapshotError::Stale { .. })),
                expect_stale
            );
        }
    }
}
