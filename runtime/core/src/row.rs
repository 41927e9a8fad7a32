//! Typed rows of replicated tables: a version byte, then the encoded value.
//!
//! Invariants:
//! 1. The first byte of a row is its version; code that meets a newer one stops.
//! 2. A row that does not decode panics: a replica that cannot read its state must not answer
//!    from it.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec;
use crate::control::{Reader, Table, Txn};

/// Larger than any row: bulk bytes have no business in the tables.
pub const ROW_BYTES_MAX: usize = 1024 * 1024;

/// The version of all rows that this code writes.
const VERSION: u8 = 1;

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
    txn.put(table, key, bytes);
}

/// All rows whose key starts with `prefix`, in key order. For tables with a small bound.
pub fn all<T: DeserializeOwned>(
    reader: &dyn Reader,
    table: Table,
    prefix: &[u8],
) -> Vec<(Vec<u8>, T)> {
    let mut rows = Vec::new();
    let mut after: Option<Vec<u8>> = None;
    loop {
        let page = reader.scan(table, prefix, after.as_deref(), SCAN_ROWS);
        let Some((last, _)) = page.last() else {
            return rows;
        };
        after = Some(last.clone());
        rows.extend(page.into_iter().map(|(key, bytes)| {
            let row = from_bytes(table, &bytes);
            (key, row)
        }));
    }
}

fn from_bytes<T: DeserializeOwned>(table: Table, bytes: &[u8]) -> T {
    let (version, value) = bytes.split_first().expect("a row has a version byte");
    assert_eq!(
        *version, VERSION,
        "a row of {table:?} is of a newer version than this binary"
    );
    codec::decode(value, ROW_BYTES_MAX)
        .unwrap_or_else(|error| panic!("a row of {table:?} is damaged: {error}"))
}
