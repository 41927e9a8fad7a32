//! The writes of a run of commands, on top of the tables as they are.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use mobula_core::control::{Reader, Row, Table, Txn};

use super::hash::WritesHasher;
use super::{KEY_LIMIT_BYTES, VALUE_LIMIT_BYTES, abort_on_fault, read_base, row_key, scan_start};
use crate::engine::{Column, Read, WriteBatch};

/// Writes that are not in the engine yet; `None` is a deletion.
type Overlay = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// The writes of a run of commands, on top of `R`.
#[derive(Debug)]
pub struct ApplyBatch<R> {
    base: R,
    overlay: Overlay,
    size_bytes: usize,
    written: WritesHasher,
}

impl<R: Read> ApplyBatch<R> {
    /// A batch without writes. `base` is the engine, or a snapshot of it; nobody else may write
    /// tables while the batch is open.
    pub fn new(base: R) -> Self {
        ApplyBatch {
            base,
            overlay: Overlay::new(),
            size_bytes: 0,
            written: WritesHasher::default(),
        }
    }

    /// Starts a command.
    pub fn begin(&mut self) -> CommandTxn<'_, R> {
        CommandTxn {
            batch: self,
            writes: Overlay::new(),
        }
    }

    /// Roughly how many bytes the batch holds, so that the caller can bound it.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    /// Whether no committed command wrote anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.overlay.is_empty()
    }

    /// The BLAKE3 hash of what was committed since this was last asked, in order: equal for equal
    /// commands, however they are spread over batches.
    pub fn take_writes_hash(&mut self) -> [u8; 32] {
        std::mem::take(&mut self.written).finish()
    }

    /// Moves the writes into `target`, which should also carry the applied index.
    pub fn write_into(self, target: &mut WriteBatch) {
        for (key, value) in self.overlay {
            match value {
                Some(value) => target.put(Column::State, key, value),
                None => target.delete(Column::State, key),
            }
        }
    }
}

impl<R: Read> Reader for ApplyBatch<R> {
    fn get(&self, table: Table, key: &[u8]) -> Option<Vec<u8>> {
        let row_key = row_key(table, key);
        match self.overlay.get(&row_key) {
            Some(value) => value.clone(),
            None => read_base(&self.base, &row_key),
        }
    }

    fn scan(&self, table: Table, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Vec<Row> {
        layered_scan(&self.base, &[&self.overlay], table, prefix, after, limit)
    }
}

/// One command's view and writes. Dropping it discards the writes.
#[derive(Debug)]
pub struct CommandTxn<'a, R> {
    batch: &'a mut ApplyBatch<R>,
    writes: Overlay,
}

impl<R: Read> CommandTxn<'_, R> {
    /// Keeps the command's writes.
    pub fn commit(self) {
        for (key, value) in self.writes {
            self.batch.size_bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            self.batch.written.update(&key, value.as_deref());
            self.batch.overlay.insert(key, value);
        }
    }

    /// Forgets the command's writes, as a drop does; this says so.
    pub fn discard(self) {}
}

impl<R: Read> Reader for CommandTxn<'_, R> {
    fn get(&self, table: Table, key: &[u8]) -> Option<Vec<u8>> {
        match self.writes.get(&row_key(table, key)) {
            Some(value) => value.clone(),
            None => self.batch.get(table, key),
        }
    }

    fn scan(&self, table: Table, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Vec<Row> {
        let layers = [&self.batch.overlay, &self.writes];
        layered_scan(&self.batch.base, &layers, table, prefix, after, limit)
    }
}

impl<R: Read> Txn for CommandTxn<'_, R> {
    fn put(&mut self, table: Table, key: &[u8], value: Vec<u8>) {
        assert!(
            key.len() <= KEY_LIMIT_BYTES,
            "a table key has {} bytes",
            key.len()
        );
        assert!(
            value.len() <= VALUE_LIMIT_BYTES,
            "a table row has {} bytes",
            value.len()
        );
        self.writes.insert(row_key(table, key), Some(value));
    }

    fn delete(&mut self, table: Table, key: &[u8]) {
        // There is no such row.
        if key.len() > KEY_LIMIT_BYTES {
            return;
        }
        self.writes.insert(row_key(table, key), None);
    }
}

/// Merges the base with the layers over it; a later layer hides the earlier ones.
pub(super) fn layered_scan<R: Read>(
    base: &R,
    layers: &[&Overlay],
    table: Table,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Vec<Row> {
    let mut rows = Vec::new();
    if limit == 0 {
        return rows;
    }
    let row_prefix = row_key(table, prefix);
    let start = scan_start(table, prefix, after);
    let mut changed: BTreeMap<&[u8], Option<&[u8]>> = BTreeMap::new();
    for layer in layers {
        let range = (Bound::Included(start.as_slice()), Bound::Unbounded);
        let within = layer.range::<[u8], _>(range);
        for (key, value) in within.take_while(|(key, _)| key.starts_with(&row_prefix)) {
            changed.insert(key, value.as_deref());
        }
    }
    let mut changed = changed.into_iter().peekable();
    let mut push = |key: &[u8], value: &[u8]| {
        rows.push((key[2..].to_vec(), value.to_vec()));
        rows.len() == limit
    };
    let mut full = false;
    let visited = base.visit(Column::State, &start, &mut |key, value| {
        if !key.starts_with(&row_prefix) {
            return ControlFlow::Break(());
        }
        let mut hidden = false;
        while let Some((changed_key, changed_value)) =
            changed.next_if(|(changed_key, _)| *changed_key <= key)
        {
            hidden = changed_key == key;
            if let Some(changed_value) = changed_value {
                full = push(changed_key, changed_value);
                if full {
                    return ControlFlow::Break(());
                }
            }
        }
        if !hidden {
            full = push(key, value);
        }
        if full {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    visited.unwrap_or_else(|error| abort_on_fault(&error));
    for (key, value) in changed {
        if full {
            break;
        }
        if let Some(value) = value {
            full = push(key, value);
        }
    }
    rows
}
