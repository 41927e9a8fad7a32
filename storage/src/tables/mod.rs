//! The tables of the replicated modules, kept in [`Column::State`]: core's `Reader` and `Txn` over
//! an engine.
//!
//! A row's key is `[module][table tag]` and then the module's own key, so that a table is a
//! contiguous range and all tables together are one ordered list. `batch` holds what commands wrote and the
//! engine has not; `hash` is what replicas compare.
//!
//! Invariants:
//! 1. A command's writes reach the batch as a whole, or not at all: [`CommandTxn::commit`], or drop.
//! 2. A command sees its own writes, those of earlier commands of the batch, and below them the
//!    engine.
//! 3. Equal rows have an equal [`state_hash`], on every replica and every engine; equal commands have
//!    equal [`ApplyBatch::take_writes_hash`]es.
//! 4. A fault of the store ends the process: a replica that cannot read its state must not answer.

mod batch;
mod hash;

#[cfg(test)]
mod tests;

use mobula_core::control::{Reader, Row, Table};

use self::batch::layered_scan;
pub use self::batch::{ApplyBatch, CommandTxn};
pub(crate) use self::hash::RowHasher;
pub use self::hash::state_hash;
use crate::engine::{Column, EngineError, Read, WriteBatch, prefix_end};

/// The largest key of a row, without its table: keys are ids and names, not data.
pub const KEY_LIMIT_BYTES: usize = 4 * 1024;

/// The largest value of a row. An actor's spec with its constructor argument (256 KiB) fits; bulk
/// bytes have no business in the tables.
pub const VALUE_LIMIT_BYTES: usize = 4 * 1024 * 1024;

/// Ends the process over a fault of the store.
pub(crate) fn abort_on_fault(error: &EngineError) -> ! {
    tracing::error!(%error, "the replicated state cannot be read; this process ends");
    // Not a panic: a task that catches it would go on answering from a broken store.
    eprintln!("mobula: the replicated state cannot be read: {error}");
    std::process::abort();
}

/// The place of a row. One with a key beyond [`KEY_LIMIT_BYTES`] has never been put: whoever asks for it, in a query or in
/// a command, is told that it is not there.
fn row_key(table: Table, key: &[u8]) -> Vec<u8> {
    let mut row_key = Vec::with_capacity(2 + key.len());
    row_key.extend_from_slice(&[table.module.0, table.tag]);
    row_key.extend_from_slice(key);
    row_key
}

/// Where a scan begins: at the prefix, or right behind `after`.
fn scan_start(table: Table, prefix: &[u8], after: Option<&[u8]>) -> Vec<u8> {
    match after {
        Some(after) if after >= prefix => {
            let mut start = row_key(table, after);
            start.push(0); // The next key in byte order.
            start
        }
        _ => row_key(table, prefix),
    }
}

/// Reads of the tables as they are in `R`: an engine's snapshot, or the engine itself.
#[derive(Debug, Clone)]
pub struct TablesReader<R> {
    base: R,
}

impl<R: Read> TablesReader<R> {
    /// The tables in `base`.
    pub fn new(base: R) -> Self {
        TablesReader { base }
    }

    /// What it reads from.
    pub fn base(&self) -> &R {
        &self.base
    }

    /// What it reads from, given back.
    pub fn into_base(self) -> R {
        self.base
    }
}

impl<R: Read> Reader for TablesReader<R> {
    fn get(&self, table: Table, key: &[u8]) -> Option<Vec<u8>> {
        read_base(&self.base, &row_key(table, key))
    }

    fn scan(&self, table: Table, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Vec<Row> {
        layered_scan(&self.base, &[], table, prefix, after, limit)
    }
}

fn read_base<R: Read>(base: &R, row_key: &[u8]) -> Option<Vec<u8>> {
    base.get(Column::State, row_key)
        .unwrap_or_else(|error| abort_on_fault(&error))
}

/// Puts the removal of every row of one table into `batch`.
pub fn clear_table(batch: &mut WriteBatch, table: Table) {
    let from = row_key(table, &[]);
    let to = prefix_end(&from).unwrap_or_else(|| vec![u8::MAX; 3]);
    batch.delete_range(Column::State, from, to);
}
