//! Cutting a checkpoint's bytes into chunks.

use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

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

/// A checkpoint's bytes, cut and hashed.
#[derive(Debug)]
pub(super) struct Chunks {
    pub(super) refs: Vec<ChunkRef>,
    pub(super) parts: Vec<Bytes>,
    pub(super) whole: Digest,
}

/// Cuts `bytes` into pieces of `chunk_bytes` (the last one shorter), and hashes each and all.
pub(super) fn cut(bytes: &Bytes, chunk_bytes: usize) -> Chunks {
    let parts: Vec<Bytes> = ranges(bytes.len(), chunk_bytes)
        .map(|range| bytes.slice(range))
        .collect();
    let refs = parts
        .iter()
        .map(|part| ChunkRef {
            blake3: Digest::of(part),
            length: part.len() as u64,
        })
        .collect();
    Chunks {
        refs,
        parts,
        whole: Digest::of(bytes),
    }
}

fn ranges(length: usize, chunk_bytes: usize) -> impl Iterator<Item = Range<usize>> {
    assert!(chunk_bytes > 0, "a chunk has at least one byte");
    (0..length)
        .step_by(chunk_bytes)
        .map(move |start| start..length.min(start + chunk_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_join_to_the_whole() {
        for (length, expected) in [(0, vec![]), (1, vec![1]), (8, vec![8]), (20, vec![8, 8, 4])] {
            let bytes = Bytes::from((0..length).map(|byte| byte as u8).collect::<Vec<u8>>());
            let chunks = cut(&bytes, 8);
            let lengths: Vec<u64> = chunks.refs.iter().map(|chunk| chunk.length).collect();
            assert_eq!(lengths, expected);
            assert_eq!(chunks.parts.concat(), bytes);
            assert_eq!(chunks.whole, Digest::of(&bytes));
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
