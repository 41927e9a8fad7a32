//! Batches against plain maps, and hashes that tell rows apart.

use std::collections::BTreeMap;

use mobula_core::control::{ModuleId, Txn};
use proptest::prelude::*;

use super::*;
use crate::engine::{Durability, Engine, MemoryEngine};

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
fn what_is_asked_for_under_a_key_that_no_row_may_have_is_not_there() {
    let mut batch = ApplyBatch::new(engine_with(&[b"a"]));
    let long = vec![b'x'; KEY_LIMIT_BYTES + 1];
    let mut command = batch.begin();
    assert_eq!(command.get(T, &long), None);
    assert_eq!(command.scan(T, &long, None, 9), []);
    assert_eq!(
        keys(&command.scan(T, b"", Some(&long), 9)),
        Vec::<&[u8]>::new()
    );
    command.delete(T, &long);
    command.commit();
    assert!(batch.is_empty());
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
