//! An engine in memory, for tests and the simulator: it forgets what was not synced when told to.
//!
//! A handle is cheap to clone and every clone is the same store, so a test can keep one across a
//! "restart". Snapshots share the maps until the next write copies what it changes.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Column, Durability, Engine, EngineError, Read, Row, Visitor, WriteBatch, WriteOp};

/// How many unsynced batches are remembered one by one; past that, the oldest count as written
/// back by the operating system, as they would in a real one after a while.
const UNSYNCED_BATCHES_MAX: usize = 4096;

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Clone, Default)]
struct Columns {
    log: Arc<Map>,
    meta: Arc<Map>,
    state: Arc<Map>,
}

impl Columns {
    fn map(&self, column: Column) -> &Map {
        match column {
            Column::Log => &self.log,
            Column::Meta => &self.meta,
            Column::State => &self.state,
        }
    }

    fn map_mut(&mut self, column: Column) -> &mut Map {
        Arc::make_mut(match column {
            Column::Log => &mut self.log,
            Column::Meta => &mut self.meta,
            Column::State => &mut self.state,
        })
    }

    fn apply(&mut self, batch: &WriteBatch) {
        for op in batch.ops() {
            match op {
                WriteOp::Put { column, key, value } => {
                    self.map_mut(*column).insert(key.clone(), value.clone());
                }
                WriteOp::Delete { column, key } => {
                    self.map_mut(*column).remove(key);
                }
                WriteOp::DeleteRange { column, from, to } if from < to => {
                    let map = self.map_mut(*column);
                    let keys: Vec<_> = map
                        .range(from.clone()..to.clone())
                        .map(|(key, _)| key.clone())
                        .collect();
                    for key in keys {
                        map.remove(&key);
                    }
                }
                WriteOp::DeleteRange { .. } => {}
            }
        }
    }
}

/// How the disk fails, once it does. Every write fails from then on, until [`MemoryEngine::mend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFault {
    /// The disk is full: nothing of the batch is written.
    Full,
    /// The sync fails, and what was to be synced is lost.
    SyncLost,
    /// The sync fails after all, and everything has reached the disk nevertheless: the writer dies
    /// between its write and whatever it meant to do next.
    SyncKept,
}

#[derive(Debug, Default)]
struct Inner {
    current: Columns,
    durable: Columns,
    unsynced: std::collections::VecDeque<WriteBatch>,
    /// After how many more writes the disk fails, and how.
    fault: Option<(usize, DiskFault)>,
}

impl Inner {
    fn fail(&mut self, batch: WriteBatch, fault: DiskFault) -> EngineError {
        if fault == DiskFault::Full {
            return EngineError::NoSpace {
                path: PathBuf::from("memory"),
                reason: "the test has filled this disk".to_owned(),
            };
        }
        if fault == DiskFault::SyncKept {
            self.unsynced.push_back(batch);
            for batch in std::mem::take(&mut self.unsynced) {
                self.durable.apply(&batch);
            }
            // Whoever writes on all the same writes to a dead disk.
            self.fault = Some((0, DiskFault::SyncLost));
        }
        EngineError::Io {
            path: PathBuf::from("memory"),
            operation: "syncing the log",
            reason: "the test has broken this disk".to_owned(),
        }
    }
}

/// The store in memory.
#[derive(Debug, Clone, Default)]
pub struct MemoryEngine {
    inner: Arc<Mutex<Inner>>,
}

impl MemoryEngine {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        MemoryEngine::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// A power cut: every write after the last synced one is gone.
    pub fn crash(&self) {
        self.crash_keeping(0);
    }

    /// A power cut in which the first `kept` unsynced batches happened to reach the disk. Returns
    /// how many were lost.
    pub fn crash_keeping(&self, kept: usize) -> usize {
        let mut inner = self.lock();
        let unsynced = std::mem::take(&mut inner.unsynced);
        for batch in unsynced.iter().take(kept) {
            inner.durable.apply(batch);
        }
        inner.current = inner.durable.clone();
        unsynced.len().saturating_sub(kept)
    }

    /// How many batches a power cut could lose now.
    #[must_use]
    pub fn unsynced_batches(&self) -> usize {
        self.lock().unsynced.len()
    }

    /// Lets `count` more writes succeed; the ones after it find the disk full.
    pub fn fill_disk_after(&self, count: usize) {
        self.fail_after(count, DiskFault::Full);
    }

    /// Lets `count` more writes succeed; the ones after it fail.
    pub fn fail_after(&self, count: usize, fault: DiskFault) {
        self.lock().fault = Some((count, fault));
    }

    /// Whether the disk fails, or will.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.lock().fault.is_some()
    }

    /// From now on the disk takes writes again.
    pub fn mend(&self) {
        self.lock().fault = None;
    }

    /// What a power cut would leave of it now.
    #[must_use]
    pub fn durable(&self) -> MemorySnapshot {
        MemorySnapshot {
            columns: self.lock().durable.clone(),
        }
    }
}

impl Read for MemoryEngine {
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.lock().current.map(column).get(key).cloned())
    }

    fn visit(
        &self,
        column: Column,
        from: &[u8],
        visitor: &mut Visitor<'_>,
    ) -> Result<(), EngineError> {
        // Over a snapshot, because the visitor may want to read from this engine too.
        self.snapshot().visit(column, from, visitor)
    }

    fn last(&self, column: Column) -> Result<Option<Row>, EngineError> {
        self.snapshot().last(column)
    }
}

impl Engine for MemoryEngine {
    type Snapshot = MemorySnapshot;

    fn write(&self, batch: WriteBatch, durability: Durability) -> Result<(), EngineError> {
        let mut inner = self.lock();
        match inner.fault {
            Some((0, fault)) => return Err(inner.fail(batch, fault)),
            Some((left, fault)) => inner.fault = Some((left - 1, fault)),
            None => {}
        }
        inner.current.apply(&batch);
        inner.unsynced.push_back(batch);
        let keep = match durability {
            Durability::Synced => 0,
            Durability::Buffered => UNSYNCED_BATCHES_MAX,
        };
        while inner.unsynced.len() > keep {
            let oldest = inner
                .unsynced
                .pop_front()
                .expect("the length is above zero");
            inner.durable.apply(&oldest);
        }
        Ok(())
    }

    fn snapshot(&self) -> MemorySnapshot {
        MemorySnapshot {
            columns: self.lock().current.clone(),
        }
    }
}

/// One moment of a [`MemoryEngine`].
#[derive(Debug, Clone)]
pub struct MemorySnapshot {
    columns: Columns,
}

impl Read for MemorySnapshot {
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.columns.map(column).get(key).cloned())
    }

    fn visit(
        &self,
        column: Column,
        from: &[u8],
        visitor: &mut Visitor<'_>,
    ) -> Result<(), EngineError> {
        let range = (Bound::Included(from), Bound::Unbounded);
        for (key, value) in self.columns.map(column).range::<[u8], _>(range) {
            if visitor(key, value).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, column: Column) -> Result<Option<Row>, EngineError> {
        let last = self.columns.map(column).last_key_value();
        Ok(last.map(|(key, value)| (key.clone(), value.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(engine: &MemoryEngine, key: &[u8], durability: Durability) -> Result<(), EngineError> {
        let mut batch = WriteBatch::new();
        batch.put(Column::State, key, b"");
        engine.write(batch, durability)
    }

    fn keys(base: &impl Read) -> Vec<Vec<u8>> {
        let rows = base.scan(Column::State, b"", b"", 10).unwrap();
        rows.into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn a_sync_that_fails_keeps_all_before_it_or_nothing_and_says_so_until_it_is_mended() {
        for (fault, left) in [
            (DiskFault::Full, vec![b"a".to_vec()]),
            (DiskFault::SyncLost, vec![b"a".to_vec()]),
            (
                DiskFault::SyncKept,
                vec![b"a".to_vec(), b"b".to_vec(), b"c".to_vec()],
            ),
        ] {
            let engine = MemoryEngine::new();
            engine.fail_after(2, fault);
            put(&engine, b"a", Durability::Synced).unwrap();
            put(&engine, b"b", Durability::Buffered).unwrap();
            assert_eq!(keys(&engine.durable()), [b"a".to_vec()]);
            assert!(put(&engine, b"c", Durability::Synced).is_err(), "{fault:?}");
            assert!(put(&engine, b"d", Durability::Synced).is_err(), "{fault:?}");
            engine.crash();
            assert_eq!(keys(&engine), left, "{fault:?}");
            engine.mend();
            put(&engine, b"e", Durability::Synced).unwrap();
        }
    }
}
