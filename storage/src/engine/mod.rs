//! The ordered key-value store under the Raft log and the tables: one small trait, implemented by
//! RocksDB and, for tests and the simulator, by memory.
//!
//! Invariants:
//! 1. A [`WriteBatch`] is applied as a whole or not at all, and its operations in order.
//! 2. After a [`Durability::Synced`] write returns, that write and all before it survive a power
//!    cut. A [`Durability::Buffered`] write survives the end of the process, not a power cut; what
//!    a power cut leaves is always a prefix of the writes.
//! 3. A snapshot shows one moment, whatever is written afterwards.
//! 4. Keys are visited in byte order.
//!
//! One suite, [`conformance`](self) in the tests of this module, holds for both engines.

mod memory;
mod rocks;

#[cfg(test)]
mod conformance;

use std::ops::ControlFlow;
use std::path::PathBuf;

pub use memory::{DiskFault, MemoryEngine, MemorySnapshot};
pub use mobula_core::control::Row;
pub use rocks::{RocksEngine, RocksOptions, RocksSnapshot};

/// A separately ordered set of keys within one engine. All of them share one write-ahead log, so
/// one batch over several columns is atomic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Column {
    /// Raft entries, by index.
    Log,
    /// Hard state, membership, applied index: single keys of the Raft log.
    Meta,
    /// The tables of all replicated modules.
    State,
}

impl Column {
    /// All columns.
    pub const ALL: [Column; 3] = [Column::Log, Column::Meta, Column::State];

    /// The column's name on disk; never changes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Column::Log => "log",
            Column::Meta => "meta",
            Column::State => "state",
        }
    }
}

/// What must be true when a write returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// It and everything before it is on the disk.
    Synced,
    /// It is with the operating system: it can be lost in a power cut, with everything after it.
    Buffered,
}

/// Why the engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Another process has the directory open.
    #[error(
        "{path} is in use by another process ({reason}); stop that process, or give this one a \
         data directory of its own"
    )]
    Locked {
        /// The directory.
        path: PathBuf,
        /// What the store said.
        reason: String,
    },
    /// The disk is full.
    #[error(
        "no space is left on the disk of {path} ({reason}); free some space there and start \
         again: nothing that was acknowledged is lost"
    )]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// What the store said.
        reason: String,
    },
    /// The files do not hold what was written to them.
    #[error(
        "the store in {path} is damaged: {reason}; do not start on it again: move the directory \
         away and either restore a backup or, with other heads alive, join again with an empty one"
    )]
    Corrupted {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The user that runs this may not read or write there.
    #[error("no permission for {path} ({reason}); make its owner the user that runs this process")]
    PermissionDenied {
        /// The directory.
        path: PathBuf,
        /// What the store said.
        reason: String,
    },
    /// Any other failure of the disk or the store.
    #[error("{operation} failed in {path}: {reason}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the store said.
        reason: String,
    },
}

/// One change of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteOp {
    /// Sets a key.
    Put {
        /// Where.
        column: Column,
        /// The key.
        key: Vec<u8>,
        /// Its new value.
        value: Vec<u8>,
    },
    /// Removes a key.
    Delete {
        /// Where.
        column: Column,
        /// The key.
        key: Vec<u8>,
    },
    /// Removes every key in `from..to`.
    DeleteRange {
        /// Where.
        column: Column,
        /// The first key that goes.
        from: Vec<u8>,
        /// The first key after it that stays.
        to: Vec<u8>,
    },
}

/// Changes that become visible together, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteBatch {
    ops: Vec<WriteOp>,
    size_bytes: usize,
}

impl WriteBatch {
    /// A batch that changes nothing.
    #[must_use]
    pub fn new() -> Self {
        WriteBatch::default()
    }

    /// Sets `key`.
    pub fn put(&mut self, column: Column, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        let (key, value) = (key.into(), value.into());
        self.size_bytes += key.len() + value.len();
        self.ops.push(WriteOp::Put { column, key, value });
    }

    /// Removes `key`.
    pub fn delete(&mut self, column: Column, key: impl Into<Vec<u8>>) {
        let key = key.into();
        self.size_bytes += key.len();
        self.ops.push(WriteOp::Delete { column, key });
    }

    /// Removes every key in `from..to`.
    pub fn delete_range(
        &mut self,
        column: Column,
        from: impl Into<Vec<u8>>,
        to: impl Into<Vec<u8>>,
    ) {
        let (from, to) = (from.into(), to.into());
        self.size_bytes += from.len() + to.len();
        self.ops.push(WriteOp::DeleteRange { column, from, to });
    }

    /// The changes, in order.
    #[must_use]
    pub fn ops(&self) -> &[WriteOp] {
        &self.ops
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of keys and values in it.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }
}

/// Takes rows one by one, and says when it has seen enough.
pub type Visitor<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// Reads, either of the newest state (an engine) or of one moment (a snapshot).
pub trait Read {
    /// The value under `key`.
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError>;

    /// Shows the rows from key `from` on, in key order, until `visitor` breaks.
    fn visit(
        &self,
        column: Column,
        from: &[u8],
        visitor: &mut Visitor<'_>,
    ) -> Result<(), EngineError>;

    /// The row with the greatest key.
    fn last(&self, column: Column) -> Result<Option<Row>, EngineError>;

    /// Up to `limit` rows from key `from` on whose key starts with `prefix`.
    fn scan(
        &self,
        column: Column,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<Row>, EngineError> {
        let mut rows = Vec::new();
        if limit == 0 {
            return Ok(rows);
        }
        self.visit(column, from.max(prefix), &mut |key, value| {
            if !key.starts_with(prefix) {
                return ControlFlow::Break(());
            }
            rows.push((key.to_vec(), value.to_vec()));
            if rows.len() == limit {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        Ok(rows)
    }
}

/// An ordered store with atomic batches and snapshots.
pub trait Engine: Read + Send + Sync + 'static {
    /// A consistent view that may outlive the call and move to another thread.
    type Snapshot: Read + Send + Sync + 'static;

    /// Applies `batch`. After an error the state of the disk is unknown (a failed fsync may have
    /// dropped pages): the caller must not go on as if nothing had happened.
    fn write(&self, batch: WriteBatch, durability: Durability) -> Result<(), EngineError>;

    /// The state as it is now.
    fn snapshot(&self) -> Self::Snapshot;
}

impl<R: Read + ?Sized> Read for &R {
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        (**self).get(column, key)
    }

    fn visit(
        &self,
        column: Column,
        from: &[u8],
        visitor: &mut Visitor<'_>,
    ) -> Result<(), EngineError> {
        (**self).visit(column, from, visitor)
    }

    fn last(&self, column: Column) -> Result<Option<Row>, EngineError> {
        (**self).last(column)
    }
}

impl<R: Read + ?Sized> Read for std::sync::Arc<R> {
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        (**self).get(column, key)
    }

    fn visit(
        &self,
        column: Column,
        from: &[u8],
        visitor: &mut Visitor<'_>,
    ) -> Result<(), EngineError> {
        (**self).visit(column, from, visitor)
    }

    fn last(&self, column: Column) -> Result<Option<Row>, EngineError> {
        (**self).last(column)
    }
}

/// The first key after every key that starts with `prefix`; `None` when there is none.
#[must_use]
pub fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(byte) = end.pop() {
        if byte < u8::MAX {
            end.push(byte + 1);
            return Some(end);
        }
    }
    None
}
