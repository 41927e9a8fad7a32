//! The engine on disk: RocksDB, set up for a head that is small when idle and never lies about
//! what is durable.
//!
//! Why these settings:
//! * `TolerateCorruptedTailRecords`: a torn last record (power cut in the middle of a write that
//!   nobody was told about) is cut off; damage anywhere else refuses to open. RocksDB's default
//!   stops silently at the first bad record, and so may drop acknowledged entries behind it.
//! * `track_and_verify_wals_in_manifest` and paranoid checks: a missing or shortened log file is an
//!   error and not an empty log.
//! * Small, shared memory bounds: the head holds control state, not bulk data.

use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType,
    DBRawIterator, DBRecoveryMode, LogLevel, Options, WriteOptions,
};

use super::{Column, Durability, Engine, EngineError, Read, Row, Visitor, WriteBatch, WriteOp};

/// How much the store may use. [`RocksOptions::small`] is what a head runs with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RocksOptions {
    /// Cache of uncompressed blocks, indexes and filters, over all columns.
    pub block_cache_bytes: usize,
    /// Unflushed writes, over all columns.
    pub write_buffers_bytes: usize,
    /// Write-ahead log files, beyond which the oldest buffers are flushed.
    pub wal_bytes_max: u64,
    /// Open table files. Each costs a descriptor and its index.
    pub open_files_max: i32,
}

impl RocksOptions {
    /// About 40 MiB when fully used: an idle head stays far below its 100 MiB.
    #[must_use]
    pub fn small() -> Self {
        RocksOptions {
            block_cache_bytes: 16 << 20,
            write_buffers_bytes: 16 << 20,
            wal_bytes_max: 64 << 20,
            open_files_max: 256,
        }
    }
}

/// A store in a directory of its own. Clones are the same store.
#[derive(Clone)]
pub struct RocksEngine {
    db: Arc<DB>,
    path: PathBuf,
}

impl std::fmt::Debug for RocksEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RocksEngine")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl RocksEngine {
    /// Opens the store in `path`, creating it and the directory where they are missing.
    pub fn open(path: impl Into<PathBuf>, options: &RocksOptions) -> Result<Self, EngineError> {
        let path = path.into();
        std::fs::create_dir_all(&path).map_err(|error| {
            let reason = error.to_string();
            match error.kind() {
                std::io::ErrorKind::PermissionDenied => EngineError::PermissionDenied {
                    path: path.clone(),
                    reason,
                },
                std::io::ErrorKind::StorageFull => EngineError::NoSpace {
                    path: path.clone(),
                    reason,
                },
                _ => EngineError::Io {
                    path: path.clone(),
                    operation: "creating the data directory",
                    reason,
                },
            }
        })?;
        let cache = Cache::new_lru_cache(options.block_cache_bytes);
        let columns = Column::ALL
            .map(|column| ColumnFamilyDescriptor::new(column.name(), column_options(&cache)));
        let db = DB::open_cf_descriptors(&database_options(options), &path, columns)
            .map_err(|error| typed(&path, "opening", &error))?;
        Ok(RocksEngine {
            db: Arc::new(db),
            path,
        })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a copy of the store as it is now into `target`, a directory that must not exist yet.
    /// Table files are hard links where `target` is on the same disk, so this is quick and small.
    pub fn checkpoint_to(&self, target: &Path) -> Result<(), EngineError> {
        rocksdb::checkpoint::Checkpoint::new(&self.db)
            .and_then(|checkpoint| checkpoint.create_checkpoint(target))
            .map_err(|error| typed(target, "writing a copy of the store", &error))
    }

    fn column(&self, column: Column) -> &ColumnFamily {
        self.db
            .cf_handle(column.name())
            .expect("every column was opened with the store")
    }

    fn fault(&self, operation: &'static str, error: &rocksdb::Error) -> EngineError {
        typed(&self.path, operation, error)
    }
}

fn database_options(options: &RocksOptions) -> Options {
    let mut database = Options::default();
    database.create_if_missing(true);
    database.create_missing_column_families(true);
    database.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    database.set_track_and_verify_wals_in_manifest(true);
    database.set_paranoid_checks(true);
    database.set_db_write_buffer_size(options.write_buffers_bytes);
    database.set_max_total_wal_size(options.wal_bytes_max);
    database.set_max_open_files(options.open_files_max);
    // One flush and one compaction at a time: the log is short and the tables are small.
    database.set_max_background_jobs(2);
    // RocksDB's own text log: a few small files, warnings only; no statistics thread work.
    database.set_log_level(LogLevel::Warn);
    database.set_max_log_file_size(1 << 20);
    database.set_keep_log_file_num(4);
    database.set_stats_dump_period_sec(0);
    database.set_stats_persist_period_sec(0);
    database
}

fn column_options(cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_bloom_filter(10.0, false);
    let mut column = Options::default();
    column.set_block_based_table_factory(&blocks);
    column.set_compression_type(DBCompressionType::Lz4);
    // Smaller than RocksDB's 64 MiB, so that the shared bound above is what rules.
    column.set_write_buffer_size(8 << 20);
    column.set_max_write_buffer_number(2);
    column
}

/// RocksDB's errors are texts behind a coarse kind; whoever reads ours should learn what to do.
fn typed(path: &Path, operation: &'static str, error: &rocksdb::Error) -> EngineError {
    typed_reason(path, operation, error.as_ref().to_owned())
}

fn typed_reason(path: &Path, operation: &'static str, reason: String) -> EngineError {
    let path = path.to_path_buf();
    let says = |part: &str| reason.contains(part);
    if says("No space left on device") || says("Disk quota exceeded") {
        EngineError::NoSpace { path, reason }
    } else if says("LOCK:") && (says("temporarily unavailable") || says("lock hold by current")) {
        EngineError::Locked { path, reason }
    } else if says("Permission denied") || says("Read-only file system") {
        EngineError::PermissionDenied { path, reason }
    } else if says("Corruption") {
        EngineError::Corrupted { path, reason }
    } else {
        EngineError::Io {
            path,
            operation,
            reason,
        }
    }
}

fn visit_rows(
    mut iterator: DBRawIterator<'_>,
    from: &[u8],
    visitor: &mut Visitor<'_>,
) -> Result<(), rocksdb::Error> {
    iterator.seek(from);
    while let Some((key, value)) = iterator.item() {
        if visitor(key, value).is_break() {
            return Ok(());
        }
        iterator.next();
    }
    // The end of the rows and a fault look alike until one asks.
    iterator.status()
}

fn last_row(mut iterator: DBRawIterator<'_>) -> Result<Option<Row>, rocksdb::Error> {
    iterator.seek_to_last();
    if let Some((key, value)) = iterator.item() {
        return Ok(Some((key.to_vec(), value.to_vec())));
    }
    iterator.status().map(|()| None)
}

impl Read for RocksEngine {
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        self.db
            .get_cf(self.column(column), key)
            .map_err(|error| self.fault("reading", &error))
    }

    fn visit(
        &self,
        column: Column,
        from: &[u8],
        visitor: &mut Visitor<'_>,
    ) -> Result<(), EngineError> {
        visit_rows(self.db.raw_iterator_cf(self.column(column)), from, visitor)
            .map_err(|error| self.fault("reading", &error))
    }

    fn last(&self, column: Column) -> Result<Option<Row>, EngineError> {
        last_row(self.db.raw_iterator_cf(self.column(column)))
            .map_err(|error| self.fault("reading", &error))
    }
}

impl Engine for RocksEngine {
    type Snapshot = RocksSnapshot;

    fn write(&self, batch: WriteBatch, durability: Durability) -> Result<(), EngineError> {
        let mut target = rocksdb::WriteBatch::with_capacity_bytes(batch.size_bytes());
        for op in batch.ops() {
            match op {
                WriteOp::Put { column, key, value } => {
                    target.put_cf(self.column(*column), key, value);
                }
                WriteOp::Delete { column, key } => target.delete_cf(self.column(*column), key),
                // RocksDB refuses a range whose end lies before its start.
                WriteOp::DeleteRange { column, from, to } if from < to => {
                    target.delete_range_cf(self.column(*column), from, to);
                }
                WriteOp::DeleteRange { .. } => {}
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(durability == Durability::Synced);
        self.db
            .write_opt(target, &options)
            .map_err(|error| self.fault("writing", &error))
    }

    fn snapshot(&self) -> RocksSnapshot {
        RocksSnapshot::of(self.clone())
    }
}

/// One moment of a [`RocksEngine`]; it keeps the store open.
pub struct RocksSnapshot {
    // Borrows from `engine`, and is dropped before it: see `of` and `drop`.
    snapshot: ManuallyDrop<rocksdb::Snapshot<'static>>,
    engine: RocksEngine,
}

impl std::fmt::Debug for RocksSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RocksSnapshot")
            .field("path", &self.engine.path)
            .finish_non_exhaustive()
    }
}

impl RocksSnapshot {
    fn of(engine: RocksEngine) -> Self {
        let snapshot = engine.db.snapshot();
        // SAFETY: the snapshot borrows the `DB` inside `engine.db`. That `DB` lives on the heap
        // behind an `Arc` which this value holds for as long as the snapshot exists (`drop` ends
        // the snapshot first), and which hands out no `&mut DB`, so the borrow stays valid wherever
        // this value is moved. The lifetime is never seen outside this type.
        let snapshot = unsafe {
            std::mem::transmute::<rocksdb::Snapshot<'_>, rocksdb::Snapshot<'static>>(snapshot)
        };
        RocksSnapshot {
            snapshot: ManuallyDrop::new(snapshot),
            engine,
        }
    }
}

impl Drop for RocksSnapshot {
    fn drop(&mut self) {
        // SAFETY: called once, here, and `snapshot` is not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.snapshot) };
    }
}

impl Read for RocksSnapshot {
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        self.snapshot
            .get_cf(self.engine.column(column), key)
            .map_err(|error| self.engine.fault("reading", &error))
    }

    fn visit(
        &self,
        column: Column,
        from: &[u8],
        visitor: &mut Visitor<'_>,
    ) -> Result<(), EngineError> {
        visit_rows(
            self.snapshot.raw_iterator_cf(self.engine.column(column)),
            from,
            visitor,
        )
        .map_err(|error| self.engine.fault("reading", &error))
    }

    fn last(&self, column: Column) -> Result<Option<Row>, EngineError> {
        last_row(self.snapshot.raw_iterator_cf(self.engine.column(column)))
            .map_err(|error| self.engine.fault("reading", &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_open_of_the_same_directory_says_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let _first = RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap();
        let error = RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap_err();
        assert!(matches!(error, EngineError::Locked { .. }), "{error}");
        assert!(
            error
                .to_string()
                .contains(&dir.path().display().to_string())
        );
    }

    #[test]
    fn a_store_with_a_damaged_manifest_does_not_open() {
        let dir = tempfile::tempdir().unwrap();
        drop(RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap());
        std::fs::write(dir.path().join("CURRENT"), b"nothing like a manifest name").unwrap();
        let error = RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap_err();
        assert!(matches!(error, EngineError::Corrupted { .. }), "{error}");
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_a_typed_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = RocksEngine::open(file.path().join("data"), &RocksOptions::small());
        assert!(matches!(error, Err(EngineError::Io { .. })), "{error:?}");
    }

    #[test]
    fn a_copy_of_the_store_opens_and_holds_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let engine = RocksEngine::open(dir.path().join("live"), &RocksOptions::small()).unwrap();
        let mut batch = WriteBatch::new();
        batch.put(Column::State, b"k", b"v");
        engine.write(batch, Durability::Synced).unwrap();
        let target = dir.path().join("copy");
        engine.checkpoint_to(&target).unwrap();
        let copy = RocksEngine::open(&target, &RocksOptions::small()).unwrap();
        assert_eq!(copy.get(Column::State, b"k").unwrap().unwrap(), b"v");
        assert!(
            engine.checkpoint_to(&target).is_err(),
            "an existing directory is never written"
        );
    }

    #[test]
    fn what_rocksdb_says_about_a_full_disk_is_recognised() {
        // The texts below are RocksDB's own, as `IOStatus` prints them.
        let dir = Path::new("/data");
        let cases = [
            (
                "IO error: No space left on device: While appending to file: /data/1.log",
                "space",
            ),
            (
                "IO error: While lock file: /data/LOCK: Resource temporarily unavailable",
                "in use",
            ),
            (
                "IO error: Permission denied: While open a file: /data/LOCK",
                "permission",
            ),
            ("Corruption: block checksum mismatch", "damaged"),
        ];
        for (text, expect) in cases {
            let error = typed_reason(dir, "testing", text.to_owned());
            assert!(error.to_string().contains(expect), "{text} became {error}");
        }
    }
}
