//! The tables of the replicated modules, kept in [`Column::State`]: core's `Reader` and `Txn` over
//! an engine.
//!
//! A row's key is `[module][table tag]` and then the module's own key, so that a table is a
//! contiguous range and all tables together are one ordered list.
//!
//! Invariants:
//! 1. A command's writes reach the batch as a whole, or not at all: [`CommandTxn::commit`], or drop.
//! 2. A command sees its own writes, those of earlier commands of the batch, and below them the
//!    engine.
//! 3. Equal rows have an equal [`state_hash`], on every replica and every engine; equal commands have
//!    equal [`ApplyBatch::take_writes_hash`]es.
//! 4. A fault of the store ends the process: a replica that cannot read its state must not answer.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

use mobula_core::control::{Reader, Row, Table, Txn};

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

fn row_key(table: Table, key: &[u8]) -> Vec<u8> {
    assert!(
        key.len() <= KEY_LIMIT_BYTES,
        "a table key has {} bytes",
        key.len()
    );
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
            value.len() <= VALUE_LIMIT_BYTES,
            "a table row has {} bytes",
            value.len()
        );
        self.writes.insert(row_key(table, key), Some(value));
    }

    fn delete(&mut self, table: Table, key: &[u8]) {
        self.writes.insert(row_key(table, key), None);
    }
}

/// Merges the base with the layers over it; a later layer hides the earlier ones.
fn layered_scan<R: Read>(
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
struct WritesHasher {
    hasher: blake3::Hasher,
}

impl WritesHasher {
    fn update(&mut self, key: &[u8], value: Option<&[u8]>) {
        let length = |part: &[u8]| (part.len() as u64).to_le_bytes();
        self.hasher.update(&length(key));
        self.hasher.update(key);
        // A deletion is no length that a value can have.
        self.hasher.update(&value.map_or([u8::MAX; 8], length));
        self.hasher.update(value.unwrap_or_default());
    }

    fn finish(&self) -> [u8; 32] {
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

/// Puts the removal of every row of one table into `batch`.
pub fn clear_table(batch: &mut WriteBatch, table: Table) {
    let from = row_key(table, &[]);
    let to = prefix_end(&from).unwrap_or_else(|| vec![u8::MAX; 3]);
    batch.delete_range(Column::State, from, to);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Durability, Engine, MemoryEngine};
    use mobula_core::control::ModuleId;
    use proptest::prelude::*;

    const T: Table = Table {
        module: ModuleId::SCHEDULER,
        tag: 1,
    };
    const NEXT: Table = Table {
        module: ModuleId::SCHEDULER,
        tag: 2,
    };

    fn keys(rows: &[Row]) -> Vec<&[u8]> {
        rows.iter().map(|(key, _)| key.as_slice()).collect()
    }

    fn engine_with(rows: &[&[u8]]) -> MemoryEngine {
        let engine = MemoryEngine::new();
        let mut batch = WriteBatch::new();
        for key in rows {
            batch.put(Column::State, row_key(T, key), b"base");
        }
        engine.write(batch, Durability::Synced).unwrap();
        engine
    }

    #[test]
    fn a_command_sees_its_own_writes_and_those_of_earlier_commands() {
        let mut batch = ApplyBatch::new(engine_with(&[b"a", b"b", b"c"]));
        let mut first = batch.begin();
        first.put(T, b"b2", b"first".to_vec());
        first.delete(T, b"a");
        first.commit();
        let mut second = batch.begin();
        second.put(T, b"b", b"second".to_vec());
        second.delete(T, b"c");
        assert_eq!(second.get(T, b"b2").unwrap(), b"first");
        assert_eq!(second.get(T, b"a"), None);
        assert_eq!(keys(&second.scan(T, b"", None, 9)), [&b"b"[..], b"b2"]);
        assert_eq!(second.get(T, b"b").unwrap(), b"second");
    }

    #[test]
    fn a_rejected_command_leaves_nothing_behind() {
        let engine = engine_with(&[b"a"]);
        let mut batch = ApplyBatch::new(engine.clone());
        let mut rejected = batch.begin();
        rejected.put(T, b"x", Vec::new());
        rejected.delete(T, b"a");
        rejected.discard();
        assert!(batch.is_empty());
        assert_eq!(keys(&batch.scan(T, b"", None, 9)), [b"a"]);
        let mut target = WriteBatch::new();
        batch.write_into(&mut target);
        assert!(target.is_empty());
    }

    #[test]
    fn the_hash_of_writes_tells_commands_apart_and_not_how_they_are_batched() {
        type Write<'a> = (&'a [u8], Option<&'a [u8]>);
        let hashes = |batches: &[&[&[Write<'_>]]]| -> Vec<[u8; 32]> {
            let mut found = Vec::new();
            for commands in batches {
                let mut batch = ApplyBatch::new(engine_with(&[b"a"]));
                for command in *commands {
                    let mut txn = batch.begin();
                    for (key, value) in *command {
                        match value {
                            Some(value) => txn.put(T, key, value.to_vec()),
                            None => txn.delete(T, key),
                        }
                    }
                    txn.commit();
                    found.push(batch.take_writes_hash());
                }
            }
            found
        };
        let put: &[Write<'_>] = &[(b"ab", Some(b"c"))];
        let delete: &[Write<'_>] = &[(b"ab", None)];
        let empty: &[Write<'_>] = &[(b"ab", Some(b""))];
        let shifted: &[Write<'_>] = &[(b"a", Some(b"bc"))];
        assert_eq!(
            hashes(&[&[put, delete, empty, shifted]]),
            hashes(&[&[put], &[delete, empty], &[shifted]])
        );
        let all = hashes(&[&[put, delete, empty, shifted, &[]]]);
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        // What was thrown away does not count.
        let mut batch = ApplyBatch::new(engine_with(&[]));
        batch.begin().put(T, b"x", Vec::new());
        assert_eq!(batch.take_writes_hash(), all[4]);
    }

    #[test]
    fn a_scan_keeps_to_its_table_prefix_start_and_limit() {
        let engine = engine_with(&[b"a1", b"a2", b"a3", b"b"]);
        let mut batch = ApplyBatch::new(engine);
        let mut txn = batch.begin();
        txn.put(NEXT, b"a0", Vec::new());
        txn.put(T, b"a4", Vec::new());
        txn.commit();
        assert_eq!(
            keys(&batch.scan(T, b"a", None, 9)),
            [b"a1", b"a2", b"a3", b"a4"]
        );
        assert_eq!(keys(&batch.scan(T, b"a", Some(b"a2"), 9)), [b"a3", b"a4"]);
        assert_eq!(keys(&batch.scan(T, b"a", Some(b"0"), 1)), [b"a1"]);
        assert_eq!(batch.scan(T, b"a", Some(b"b"), 9), []);
        assert_eq!(batch.scan(T, b"a", None, 0), []);
        assert_eq!(keys(&batch.scan(NEXT, b"", None, 9)), [b"a0"]);
    }

    #[test]
    fn a_cleared_table_leaves_its_neighbours_alone() {
        let engine = engine_with(&[b"a", &[0xff, 0xff]]);
        let mut batch = WriteBatch::new();
        batch.put(Column::State, row_key(NEXT, b"n"), b"");
        engine.write(batch, Durability::Synced).unwrap();
        let mut batch = WriteBatch::new();
        clear_table(&mut batch, T);
        engine.write(batch, Durability::Synced).unwrap();
        let reader = TablesReader::new(engine.snapshot());
        assert_eq!(reader.scan(T, b"", None, 9), []);
        assert_eq!(keys(&reader.scan(NEXT, b"", None, 9)), [b"n"]);
    }

    #[test]
    fn the_state_hash_tells_rows_apart_that_join_to_the_same_bytes() {
        let hash = |rows: &[(&[u8], &[u8])]| {
            let engine = MemoryEngine::new();
            let mut batch = WriteBatch::new();
            for (key, value) in rows {
                batch.put(Column::State, *key, *value);
            }
            batch.put(Column::Meta, b"not", b"hashed");
            engine.write(batch, Durability::Synced).unwrap();
            state_hash(&engine).unwrap()
        };
        assert_ne!(hash(&[(b"ab", b"c")]), hash(&[(b"a", b"bc")]));
        assert_eq!(
            hash(&[(b"a", b"1"), (b"b", b"2")]),
            hash(&[(b"b", b"2"), (b"a", b"1")])
        );
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(u8, u8),
        Delete(u8),
        EndCommand(bool),
        Flush,
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..12u8, any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
            2 => (0..12u8).prop_map(Step::Delete),
            2 => any::<bool>().prop_map(Step::EndCommand),
            1 => Just(Step::Flush),
        ]
    }

    proptest! {
        /// Against a plain map: whatever is written, rejected or flushed, reads agree.
        #[test]
        fn reads_agree_with_a_plain_map(
            steps in proptest::collection::vec(any_step(), 0..60),
            after in proptest::option::of(0..12u8),
            limit in 0..14usize,
        ) {
            let engine = MemoryEngine::new();
            let mut batch = ApplyBatch::new(engine.clone());
            let mut committed: BTreeMap<u8, u8> = BTreeMap::new();
            let mut steps = steps.into_iter().peekable();
            while steps.peek().is_some() {
                let mut model = committed.clone();
                let mut txn = batch.begin();
                let mut keep = true;
                let mut flush = false;
                for step in steps.by_ref() {
                    match step {
                        Step::Put(key, value) => {
                            model.insert(key, value);
                            txn.put(T, &[key], vec![value]);
                        }
                        Step::Delete(key) => {
                            model.remove(&key);
                            txn.delete(T, &[key]);
                        }
                        Step::EndCommand(kept) => { keep = kept; break }
                        Step::Flush => { flush = true; break }
                    }
                }
                let expected: Vec<Row> = model
                    .iter()
                    .filter(|(key, _)| after.is_none_or(|after| **key > after))
                    .take(limit)
                    .map(|(key, value)| (vec![*key], vec![*value]))
                    .collect();
                let after = after.map(|after| [after]);
                let after = after.as_ref().map(|after| after.as_slice());
                prop_assert_eq!(txn.scan(T, b"", after, limit), expected);
                if keep {
                    txn.commit();
                    committed = model;
                } else {
                    txn.discard();
                }
                if flush {
                    let mut target = WriteBatch::new();
                    batch.write_into(&mut target);
                    engine.write(target, Durability::Synced).unwrap();
                    batch = ApplyBatch::new(engine.clone());
                }
                for key in 0..12u8 {
                    let expected = committed.get(&key).map(|value| vec![*value]);
                    prop_assert_eq!(batch.get(T, &[key]), expected);
                }
            }
        }
    }
}
