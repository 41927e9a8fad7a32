//! Cutting a checkpoint's bytes into chunks.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::CheckpointSource;
use crate::digest::Digest;

/// The usual size of a chunk: large enough that a request's overhead is small, small enough that a
/// few in flight fit in memory and an unchanged region is found again.
pub const CHUNK_BYTES_DEFAULT: usize = 8 * 1024 * 1024;

/// One chunk, as a manifest names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRef {
    /// The hash of its bytes, and so its name.
    pub blake3: Digest,
    /// Its length, in bytes.
    pub length: u64,
}

impl ChunkRef {
    /// Its name in the store.
    #[must_use]
    pub fn path(&self) -> String {
        chunk_path(&self.blake3)
    }
}

/// The folder of all chunks.
pub(super) const CHUNK_FOLDER: &str = "chunks";

pub(super) fn chunk_path(digest: &Digest) -> String {
    format!("{CHUNK_FOLDER}/{digest}")
}

/// The digest that a chunk's name claims.
pub(super) fn digest_of_path(path: &str) -> Option<Digest> {
    path.strip_prefix(CHUNK_FOLDER)?
        .strip_prefix('/')?
        .parse()
        .ok()
}

/// One piece of a checkpoint's bytes, and where it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// What it is.
    pub chunk: ChunkRef,
    /// Its first byte.
    pub offset: u64,
}

impl Piece {
    /// Where it lies.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.chunk.length
    }
}

/// Deals pieces out to `parts` savers that hold equal bytes, so that each has about as much to send.
/// Which piece goes where depends on nothing but their order.
///
/// # Panics
/// If there is no part.
#[must_use]
pub fn split_pieces(pieces: &[Piece], parts: usize) -> Vec<Vec<Piece>> {
    assert!(parts > 0, "somebody must save");
    let mut shares: Vec<(u64, Vec<Piece>)> = vec![(0, Vec::new()); parts];
    for piece in pieces {
        let (bytes, share) = shares
            .iter_mut()
            .min_by_key(|(bytes, _)| *bytes)
            .expect("there is a part");
        *bytes += piece.chunk.length;
        share.push(*piece);
    }
    shares.into_iter().map(|(_, share)| share).collect()
}

/// A checkpoint's bytes, cut and hashed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Survey {
    pub(super) pieces: Vec<Piece>,
    pub(super) whole: Digest,
}

/// Cuts the bytes of `source` into pieces of `chunk_bytes` (the last one shorter), and hashes each
/// and all. Holds one piece at a time.
pub(super) fn survey(source: &dyn CheckpointSource, chunk_bytes: usize) -> Survey {
    let mut whole = blake3::Hasher::new();
    let pieces = ranges(source.length_bytes(), chunk_bytes as u64)
        .map(|range| {
            let bytes = source.read(range.clone());
            whole.update(&bytes);
            Piece {
                chunk: ChunkRef {
                    blake3: Digest::of(&bytes),
                    length: bytes.len() as u64,
                },
                offset: range.start,
            }
        })
        .collect();
    Survey {
        pieces,
        whole: whole.finalize().into(),
    }
}

fn ranges(length: u64, chunk_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    assert!(chunk_bytes > 0, "a chunk has at least one byte");
    (0..length.div_ceil(chunk_bytes)).map(move |index| {
        let start = index * chunk_bytes;
        start..length.min(start + chunk_bytes)
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn survey_of(length: usize) -> (Bytes, Survey) {
        let bytes = Bytes::from((0..length).map(|byte| byte as u8).collect::<Vec<u8>>());
        let survey = survey(&bytes, 8);
        (bytes, survey)
    }

    #[test]
    fn the_pieces_join_to_the_whole() {
        for (length, expected) in [(0, vec![]), (1, vec![1]), (8, vec![8]), (20, vec![8, 8, 4])] {
            let (bytes, survey) = survey_of(length);
            let lengths: Vec<u64> = survey.pieces.iter().map(|p| p.chunk.length).collect();
            assert_eq!(lengths, expected);
            let parts: Vec<Bytes> = survey
                .pieces
                .iter()
                .map(|p| bytes.read(p.range()))
                .collect();
            assert_eq!(parts.concat(), bytes);
            assert_eq!(survey.whole, Digest::of(&bytes));
        }
    }

    #[test]
    fn every_piece_goes_to_one_saver_and_all_have_about_as_much() {
        let (_, survey) = survey_of(8 * 10 + 3);
        for parts in [1, 2, 3, 4, 11, 20] {
            let shares = split_pieces(&survey.pieces, parts);
            let mut all: Vec<Piece> = shares.concat();
            all.sort_by_key(|piece| piece.offset);
            assert_eq!(all, survey.pieces);
            let bytes = shares
                .iter()
                .map(|share| share.iter().map(|piece| piece.chunk.length).sum::<u64>());
            let (least, most) = (bytes.clone().min().unwrap(), bytes.max().unwrap());
            assert!(most - least <= 8, "{parts} parts: {least} to {most} bytes");
        }
    }

    #[test]
    fn a_name_gives_its_digest_back() {
        let digest = Digest::of(b"chunk");
        assert_eq!(digest_of_path(&chunk_path(&digest)), Some(digest));
        assert_eq!(digest_of_path("chunks/readme"), None);
        assert_eq!(digest_of_path("other/name"), None);
    }
}
