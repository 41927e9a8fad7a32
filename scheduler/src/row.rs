//! How the scheduler's tables look as bytes, and typed access to them.
//!
//! Invariants:
//! 1. A table's tag, and the first byte of each value (the row's version), never change meaning.
//! 2. Keys are big-endian numbers, so that key order is number order.
//! 3. A row that does not decode aborts: a replica that cannot read its state must not answer
//!    from it.
//! 4. Enums inside rows and commands are append-only: their position is their tag.

use mobula_core::codec;
use mobula_core::control::{ModuleId, Reader, Table, Txn};
use serde::Serialize;
use serde::de::DeserializeOwned;

const fn table(tag: u8) -> Table {
    Table {
        module: ModuleId::SCHEDULER,
        tag,
    }
}

/// Counters: ids that were given out, rows that are there.
pub(crate) const COUNTERS: Table = table(1);
/// Node id → `NodeRow`.
pub(crate) const NODES: Table = table(2);
/// Node name → node id.
pub(crate) const NODES_BY_NAME: Table = table(3);
/// Job id → `JobRow`.
pub(crate) const JOBS: Table = table(4);
/// Job id → `JobSpec`, which never changes.
pub(crate) const JOB_SPECS: Table = table(5);
/// Idempotency key → job id, as long as the job is kept.
pub(crate) const JOBS_BY_KEY: Table = table(6);
/// Counter, job id → nothing: ended jobs, oldest first.
pub(crate) const JOBS_FINISHED: Table = table(7);
/// Actor id → `ActorRow`.
pub(crate) const ACTORS: Table = table(8);
/// Actor id → `ActorSpec`, which never changes.
pub(crate) const ACTOR_SPECS: Table = table(9);
/// Job id, actor id → nothing.
pub(crate) const ACTORS_BY_JOB: Table = table(10);
/// Job id, name → actor id, while the actor has not ended.
pub(crate) const ACTORS_BY_NAME: Table = table(11);
/// Node id, actor id → `Lease`: what each node has given to whom.
pub(crate) const LEASES: Table = table(12);
/// Time from which it may be placed, actor id → nothing.
pub(crate) const PENDING: Table = table(13);
/// Counter, actor id → nothing: ended actors, oldest first.
pub(crate) const ACTORS_FINISHED: Table = table(14);
/// Group id → `GroupRow`.
pub(crate) const GROUPS: Table = table(15);
/// Session id → `SessionRow`.
pub(crate) const SESSIONS: Table = table(16);
/// Session id, sequence number → response.
pub(crate) const SESSION_RESPONSES: Table = table(17);
/// Last use, session id → nothing.
pub(crate) const SESSIONS_BY_AGE: Table = table(18);
/// Token id → `TokenRow`.
pub(crate) const TOKENS: Table = table(19);
/// Hash of the secret → token id.
pub(crate) const TOKENS_BY_HASH: Table = table(20);

/// Larger than any row: an actor's constructor argument is at most a quarter of it.
const ROW_BYTES_MAX: usize = 1024 * 1024;

/// Rows that one read of a long scan fetches.
const SCAN_ROWS: usize = 256;

/// The version of all rows that this code writes.
const VERSION: u8 = 1;

/// The row under `key`.
pub(crate) fn get<T: DeserializeOwned>(reader: &dyn Reader, table: Table, key: &[u8]) -> Option<T> {
    reader
        .get(table, key)
        .map(|bytes| from_bytes(table, &bytes))
}

/// Writes `row` under `key`.
pub(crate) fn put<T: Serialize>(txn: &mut dyn Txn, table: Table, key: &[u8], row: &T) {
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&codec::encode_plain(row));
    txn.put(table, key, bytes);
}

/// Decodes a row's value.
pub(crate) fn from_bytes<T: DeserializeOwned>(table: Table, bytes: &[u8]) -> T {
    let tag = table.tag;
    match bytes.split_first() {
        Some((&VERSION, body)) => match codec::decode(body, ROW_BYTES_MAX) {
            Ok(row) => row,
            Err(error) => panic!("scheduler table {tag} holds an unreadable row: {error}"),
        },
        Some((version, _)) => panic!(
            "scheduler table {tag} holds a row of version {version}, this binary reads {VERSION}: \
             start a binary at least as new as the one that wrote it"
        ),
        None => panic!("scheduler table {tag} holds an empty row"),
    }
}

/// Two numbers as one key.
pub(crate) fn pair(first: u64, second: u64) -> Vec<u8> {
    [first.to_be_bytes(), second.to_be_bytes()].concat()
}

/// The number at position `index` (counted in numbers) of a key made of numbers.
pub(crate) fn number_at(key: &[u8], index: usize) -> u64 {
    let bytes = key
        .get(index * 8..index * 8 + 8)
        .expect("keys are written by `pair` and `to_key`");
    u64::from_be_bytes(bytes.try_into().expect("the slice has eight bytes"))
}

/// All rows whose key starts with `prefix`, in key order, a page at a time.
pub(crate) fn scan<'a>(
    reader: &'a dyn Reader,
    table: Table,
    prefix: &[u8],
) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> + use<'a> {
    let prefix = prefix.to_vec();
    let mut last: Option<Vec<u8>> = None;
    let mut finished = false;
    std::iter::from_fn(move || {
        if finished {
            return None;
        }
        let rows = reader.scan(table, &prefix, last.as_deref(), SCAN_ROWS);
        finished = rows.len() < SCAN_ROWS;
        last = rows.last().map(|(key, _)| key.clone());
        Some(rows)
    })
    .flatten()
}

/// Counts and number sources, each one row in [`COUNTERS`]. Numbers are persisted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Counter {
    LastNode = 1,
    LastJob = 2,
    LastActor = 3,
    LastGroup = 4,
    LastSession = 5,
    LastFinished = 6,
    Nodes = 7,
    LiveJobs = 8,
    FinishedJobs = 9,
    LiveActors = 10,
    FinishedActors = 11,
    Sessions = 12,
    Tokens = 13,
    PendingActors = 14,
}

impl Counter {
    pub(crate) fn value(self, reader: &dyn Reader) -> u64 {
        get(reader, COUNTERS, &[self as u8]).unwrap_or(0)
    }

    fn set(self, txn: &mut dyn Txn, value: u64) {
        put(txn, COUNTERS, &[self as u8], &value);
    }

    /// One more; returns the new value.
    pub(crate) fn increment(self, txn: &mut dyn Txn) -> u64 {
        let value = self.value(txn) + 1;
        self.set(txn, value);
        value
    }

    /// One less; returns the new value.
    pub(crate) fn decrement(self, txn: &mut dyn Txn) -> u64 {
        let value = self
            .value(txn)
            .checked_sub(1)
            .expect("what is removed was counted before");
        self.set(txn, value);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_txn::MemoryTables;

    #[test]
    fn a_long_scan_pages_through_everything_once() {
        let mut tables = MemoryTables::default();
        for number in 0..1000u64 {
            put(&mut tables, JOBS, &pair(number % 2, number), &number);
        }
        let odd: Vec<u64> = scan(&tables, JOBS, &1u64.to_be_bytes())
            .map(|(key, _)| number_at(&key, 1))
            .collect();
        assert_eq!(odd, (0..1000).filter(|n| n % 2 == 1).collect::<Vec<_>>());
    }

    #[test]
    fn a_row_begins_with_its_version() {
        let mut tables = MemoryTables::default();
        put(&mut tables, JOBS, b"k", &7u8);
        assert_eq!(tables.get(JOBS, b"k").unwrap(), [1, 7]);
        assert_eq!(get::<u8>(&tables, JOBS, b"k"), Some(7));
    }

    #[test]
    #[should_panic(expected = "row of version 9")]
    fn a_row_of_another_version_aborts() {
        from_bytes::<u8>(JOBS, &[9, 7]);
    }
}
