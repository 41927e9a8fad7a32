//! What every engine must do, run over all of them.

use super::*;

const S: Column = Column::State;

fn over_both(check: impl Fn(&dyn Fn() -> Box<dyn Checked>)) {
    check(&|| Box::new(MemoryEngine::new()));
    check(&|| {
        let dir = tempfile::tempdir().unwrap();
        let engine = RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap();
        Box::new(OnDisk { engine, _dir: dir })
    });
}

/// An engine without its associated type, so that one suite can take both.
trait Checked: Read {
    fn put(&self, rows: &[(&[u8], &[u8])]) {
        let mut batch = WriteBatch::new();
        for (key, value) in rows {
            batch.put(S, *key, *value);
        }
        self.apply(batch);
    }
    fn apply(&self, batch: WriteBatch);
    fn moment(&self) -> Box<dyn Read + Send>;
}

struct OnDisk {
    engine: RocksEngine,
    _dir: tempfile::TempDir,
}

impl Read for OnDisk {
    fn get(&self, column: Column, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        self.engine.get(column, key)
    }
    fn visit(
        &self,
        column: Column,
        from: &[u8],
        visitor: &mut Visitor<'_>,
    ) -> Result<(), EngineError> {
        self.engine.visit(column, from, visitor)
    }
    fn last(&self, column: Column) -> Result<Option<Row>, EngineError> {
        self.engine.last(column)
    }
}

impl Checked for OnDisk {
    fn apply(&self, batch: WriteBatch) {
        self.engine.write(batch, Durability::Buffered).unwrap();
    }
    fn moment(&self) -> Box<dyn Read + Send> {
        Box::new(self.engine.snapshot())
    }
}

impl Checked for MemoryEngine {
    fn apply(&self, batch: WriteBatch) {
        self.write(batch, Durability::Buffered).unwrap();
    }
    fn moment(&self) -> Box<dyn Read + Send> {
        Box::new(self.snapshot())
    }
}

fn keys(rows: &[Row]) -> Vec<&[u8]> {
    rows.iter().map(|(key, _)| key.as_slice()).collect()
}

#[test]
fn what_is_put_is_got_and_what_is_deleted_is_gone() {
    over_both(|open| {
        let engine = open();
        assert_eq!(engine.get(S, b"a").unwrap(), None);
        engine.put(&[(b"a", b"1"), (b"", b"empty key"), (b"empty value", b"")]);
        assert_eq!(engine.get(S, b"a").unwrap().unwrap(), b"1");
        assert_eq!(engine.get(S, b"").unwrap().unwrap(), b"empty key");
        assert_eq!(engine.get(S, b"empty value").unwrap().unwrap(), b"");
        assert_eq!(
            engine.get(Column::Meta, b"a").unwrap(),
            None,
            "columns are apart"
        );
        let mut batch = WriteBatch::new();
        batch.delete(S, b"a");
        batch.delete(S, b"never there");
        engine.apply(batch);
        assert_eq!(engine.get(S, b"a").unwrap(), None);
    });
}

#[test]
fn operations_of_a_batch_apply_in_order() {
    over_both(|open| {
        let engine = open();
        engine.put(&[(b"a", b"old"), (b"b", b"old")]);
        let mut batch = WriteBatch::new();
        batch.delete_range(S, b"a", b"z");
        batch.put(S, b"a", b"new");
        batch.put(S, b"c", b"new");
        batch.delete(S, b"c");
        engine.apply(batch);
        assert_eq!(
            engine.scan(S, b"", b"", 9).unwrap(),
            [(b"a".to_vec(), b"new".to_vec())]
        );
    });
}

#[test]
fn a_range_is_deleted_up_to_but_without_its_end() {
    over_both(|open| {
        let engine = open();
        engine.put(&[(b"a", b""), (b"b", b""), (b"c", b"")]);
        let mut batch = WriteBatch::new();
        batch.delete_range(S, b"a", b"c");
        batch.delete_range(S, b"z", b"a");
        engine.apply(batch);
        assert_eq!(keys(&engine.scan(S, b"", b"", 9).unwrap()), [b"c"]);
    });
}

#[test]
fn scans_are_ordered_and_keep_to_prefix_start_and_limit() {
    over_both(|open| {
        let engine = open();
        engine.put(&[
            (b"b2", b""),
            (b"a", b""),
            (b"b1", b""),
            (b"b", b""),
            (b"c", b""),
        ]);
        engine.put(&[(&[0xff], b""), (&[0xff, 0xff], b"")]);
        assert_eq!(
            keys(&engine.scan(S, b"b", b"", 9).unwrap()),
            [&b"b"[..], b"b1", b"b2"]
        );
        assert_eq!(
            keys(&engine.scan(S, b"b", b"b1", 9).unwrap()),
            [b"b1", b"b2"]
        );
        assert_eq!(
            keys(&engine.scan(S, b"b", b"", 2).unwrap()),
            [&b"b"[..], b"b1"]
        );
        assert_eq!(engine.scan(S, b"b", b"c", 9).unwrap(), []);
        assert_eq!(engine.scan(S, b"b", b"", 0).unwrap(), []);
        assert_eq!(engine.scan(S, &[0xff], b"", 9).unwrap().len(), 2);
        assert_eq!(engine.scan(S, b"", b"", 99).unwrap().len(), 7);
        assert_eq!(engine.last(S).unwrap().unwrap().0, [0xff, 0xff]);
        assert_eq!(engine.last(Column::Log).unwrap(), None);
    });
}

#[test]
fn a_snapshot_shows_its_moment_on_another_thread_too() {
    over_both(|open| {
        let engine = open();
        engine.put(&[(b"a", b"then"), (b"b", b"then")]);
        let moment = engine.moment();
        engine.put(&[(b"a", b"now"), (b"c", b"now")]);
        let rows = std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    assert_eq!(moment.get(S, b"a").unwrap().unwrap(), b"then");
                    assert_eq!(moment.last(S).unwrap().unwrap().0, b"b");
                    moment.scan(S, b"", b"", 9).unwrap()
                })
                .join()
                .unwrap()
        });
        assert_eq!(keys(&rows), [b"a", b"b"]);
        assert_eq!(engine.get(S, b"a").unwrap().unwrap(), b"now");
    });
}

#[test]
fn a_snapshot_keeps_a_closed_store_readable() {
    let dir = tempfile::tempdir().unwrap();
    let engine = RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap();
    let mut batch = WriteBatch::new();
    batch.put(S, b"a", b"1");
    engine.write(batch, Durability::Synced).unwrap();
    let moment = engine.snapshot();
    drop(engine);
    assert_eq!(moment.get(S, b"a").unwrap().unwrap(), b"1");
}

#[test]
fn memory_forgets_unsynced_writes_in_a_crash_and_keeps_a_prefix() {
    let engine = MemoryEngine::new();
    let write = |key: &[u8], durability| {
        let mut batch = WriteBatch::new();
        batch.put(S, key, b"");
        engine.write(batch, durability).unwrap();
    };
    write(b"1", Durability::Buffered);
    write(b"2", Durability::Synced);
    write(b"3", Durability::Buffered);
    write(b"4", Durability::Buffered);
    assert_eq!(engine.unsynced_batches(), 2);
    assert_eq!(engine.crash_keeping(1), 1);
    assert_eq!(
        keys(&engine.scan(S, b"", b"", 9).unwrap()),
        [b"1", b"2", b"3"]
    );
    engine.crash();
    assert_eq!(
        keys(&engine.scan(S, b"", b"", 9).unwrap()),
        [b"1", b"2", b"3"]
    );
    engine.fill_disk_after(0);
    let error = engine.write(WriteBatch::new(), Durability::Synced);
    assert!(matches!(error, Err(EngineError::NoSpace { .. })));
}

#[test]
fn the_end_of_a_prefix_is_the_next_key_outside_it() {
    assert_eq!(prefix_end(b"ab"), Some(b"ac".to_vec()));
    assert_eq!(prefix_end(&[1, 0xff, 0xff]), Some(vec![2]));
    assert_eq!(prefix_end(&[0xff]), None);
}
