//! Hashes by which replicas compare their tables, and what a command wrote.

use std::ops::ControlFlow;

use crate::engine::{Column, EngineError, Read};

/// Feeds rows into a hash so that no two lists of rows look alike.
#[derive(Debug, Clone, Default)]
pub(crate) struct RowHasher {
    hasher: blake3::Hasher,
}

impl RowHasher {
    pub(crate) fn update(&mut self, key: &[u8], value: &[u8]) {
        self.hasher.update(&(key.len() as u64).to_le_bytes());
        self.hasher.update(key);
        self.hasher.update(&(value.len() as u64).to_le_bytes());
        self.hasher.update(value);
    }

    pub(crate) fn finish(&self) -> blake3::Hash {
        self.hasher.finalize()
    }
}

/// Feeds writes into a hash so that no two lists of them look alike.
#[derive(Debug, Clone, Default)]
pub(super) struct WritesHasher {
    hasher: blake3::Hasher,
}

impl WritesHasher {
    pub(super) fn update(&mut self, key: &[u8], value: Option<&[u8]>) {
        let length = |part: &[u8]| (part.len() as u64).to_le_bytes();
        self.hasher.update(&length(key));
        self.hasher.update(key);
        // A deletion is no length that a value can have.
        self.hasher.update(&value.map_or([u8::MAX; 8], length));
        self.hasher.update(value.unwrap_or_default());
    }

    pub(super) fn finish(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }
}

/// The BLAKE3 hash of all rows of all tables, in key order. It reads everything: for snapshots,
/// backups and comparisons between replicas, not for every entry.
pub fn state_hash<R: Read>(base: &R) -> Result<blake3::Hash, EngineError> {
    let mut hasher = RowHasher::default();
    base.visit(Column::State, &[], &mut |key, value| {
        hasher.update(key, value);
        ControlFlow::Continue(())
    })?;
    Ok(hasher.finish())
}
