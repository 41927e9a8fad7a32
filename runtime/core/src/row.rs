//! Typed rows of replicated tables: a version byte, then the encoded value.
//!
//! Invariants:
//! 1. The first byte of a row is its version; code that meets a newer one stops.
//! 2. A row that does not decode panics: a replica that cannot read its state must not answer
//!    from it.
//! 3. Numbers in keys are big-endian, so that key order is number order.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec;
use crate::control::{ModuleId, Reader, Table, Txn};

/// Larger than any row: bulk bytes have no business in the tables.
pub const ROW_BYTES_MAX: usize = 1024 * 1024;

/// The version of all rows that this code writes.
const VERSION: u8 = 2;

/// Rows that one read of a long scan fetches.
const SCAN_ROWS: usize = 256;

/// The row under `key`.
pub fn get<T: DeserializeOwned>(reader: &dyn Reader, table: Table, key: &[u8]) -> Option<T> {
    reader
        .get(table, key)
        .map(|bytes| from_bytes(table, &bytes))
}

/// Writes `row` under `key`.
pub fn put<T: Serialize>(txn: &mut dyn Txn, table: Table, key: &[u8], row: &T) {
    let mut bytes = vec![VERSION];
    bytes.extend(codec::encode_plain(row));
    // Whoever checks a command must bound all of it: a larger row is written and never read again.
    debug_assert!(
        bytes.len() <= ROW_BYTES_MAX,
        "a row of {table:?} has {} bytes, more than can be read back",
        bytes.len()
    );
    txn.put(table, key, bytes);
}

/// All rows whose key starts with `prefix`, decoded, in key order. For tables with a small bound.
pub fn all<T: DeserializeOwned>(
    reader: &dyn Reader,
    table: Table,
    prefix: &[u8],
) -> Vec<(Vec<u8>, T)> {
    scan(reader, table, prefix)
        .map(|(key, bytes)| {
            let row = from_bytes(table, &bytes);
            (key, row)
        })
        .collect()
}

/// All rows whose key starts with `prefix`, as bytes (see [`from_bytes`]), in key order and read a
/// page at a time.
pub fn scan<'a>(
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

/// Decodes a row's bytes.
pub fn from_bytes<T: DeserializeOwned>(table: Table, bytes: &[u8]) -> T {
    let Table {
        module: ModuleId(module),
        tag,
    } = table;
    match bytes.split_first() {
        Some((&VERSION, body)) => match codec::decode(body, ROW_BYTES_MAX) {
            Ok(row) => row,
            Err(error) => panic!("table {tag} of module {module} holds an unreadable row: {error}"),
        },
        Some((version, _)) => panic!(
            "table {tag} of module {module} holds a row of version {version}, this binary reads only \
             {VERSION}: start the release that wrote it, or begin with an empty data directory"
        ),
        None => panic!("table {tag} of module {module} holds an empty row"),
    }
}

/// Two numbers as one key.
#[must_use]
pub fn pair(first: u64, second: u64) -> Vec<u8> {
    [first.to_be_bytes(), second.to_be_bytes()].concat()
}

/// The number at position `index` (counted in numbers) of a key made of numbers.
#[must_use]
pub fn number_at(key: &[u8], index: usize) -> u64 {
    let bytes = key
        .get(index * 8..index * 8 + 8)
        .expect("a key of numbers is written by `pair` or from an id");
    u64::from_be_bytes(bytes.try_into().expect("the slice has eight bytes"))
}
