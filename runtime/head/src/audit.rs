//! The audit log: one record of each call that changed something, or would have (I19).
//!
//! A record is written by the apply of the command that the call has put into the log, in the same
//! batch: so it exists exactly when the command took effect or was refused by its module, survives
//! changes of leaders, and a repeated command, which the session answers, makes no second one. What
//! the heads decide themselves (placement, expired leases, reports of workers) are no calls and have
//! no records.
//!
//! What is refused before it reaches the log (no valid token, a caller without the right) and what is
//! refused there for want of a valid token or session has no record either: anybody could fill the log
//! with it. It is counted, as `mobula_api_requests` by method and code.
//!
//! The records form a chain: each holds the hash of the one before and of itself, so a record that
//! was changed, added or taken out is found by whoever reads all of them. The oldest ones go when there
//! are [`RECORDS_MAX`]; the hash of the last one that went stays, as the anchor of those that are left.
//!
//! Invariants:
//! 1. Sequence numbers begin at 1 and have no gaps.
//! 2. A record names ids and names, never a payload: no token, secret, argument or result.
//! 3. A record has at most [`TEXT_BYTES_MAX`] bytes of each text.

use mobula_core::codec;
use mobula_core::control::{ApplyContext, ModuleId, Origin, Reader, Table, Txn};
use mobula_core::error::Rejection;
use mobula_core::id::SessionId;
use serde::{Deserialize, Serialize};

pub use crate::api::{ends_of, record_of};

/// Records, by sequence number.
const RECORDS: Table = Table {
    module: ModuleId::HEADS,
    tag: 3,
};

/// Where the chain begins and ends: one row.
const ENDS: Table = Table {
    module: ModuleId::HEADS,
    tag: 4,
};

const ENDS_KEY: &[u8] = b"ends";

/// Records that are kept: at some 300 bytes each 15 MiB, which a snapshot carries. Whoever wants more
/// lets `mobula audit --follow --json` write them into a file.
pub const RECORDS_MAX: u64 = 50_000;

/// The longest text in a record; a longer one is cut.
pub const TEXT_BYTES_MAX: usize = 256;

/// Above the longest stored record.
const ROW_BYTES_MAX: usize = 8 * 1024;

/// Records of one page.
pub const PAGE_RECORDS: usize = 1_000;

/// The hash of a record and all before it.
pub type ChainHash = [u8; 32];

/// What a call was and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// Its number.
    pub sequence: u64,
    /// The entry of the log that it belongs to.
    pub index: u64,
    /// Log time, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// In whose name: a token's name, or a certificate's.
    pub principal: String,
    /// The method of the control API.
    pub call: String,
    /// What it was about.
    pub subject: String,
    /// Empty if it was done; otherwise why it was refused.
    pub refused: String,
    /// The session of its stamp; 0 without one.
    pub session: u64,
    /// The number of its stamp within the session.
    pub stamp: u64,
}

impl AuditRecord {
    /// The hash of this record behind `before`.
    #[must_use]
    pub fn chained(&self, before: &ChainHash) -> ChainHash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(before);
        hasher.update(&codec::encode_plain(self));
        *hasher.finalize().as_bytes()
    }
}

/// A record as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredRecord {
    /// The record.
    pub record: AuditRecord,
    /// [`AuditRecord::chained`] behind the one before.
    pub hash: ChainHash,
}

/// Where the chain begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ends {
    /// The first record that is kept; with `next` equal, none is.
    pub first: u64,
    /// The hash before it: of the last record that was dropped, zeros if none was.
    pub anchor: ChainHash,
    /// The number of the record that comes next.
    pub next: u64,
    /// The hash of the last record.
    pub last_hash: ChainHash,
}

/// Where the chain begins and ends now.
pub(crate) fn ends(reader: &dyn Reader) -> Ends {
    let stored = reader.get(ENDS, ENDS_KEY);
    stored.map_or(
        Ends {
            first: 1,
            next: 1,
            ..Ends::default()
        },
        |bytes| decoded(&bytes),
    )
}

fn decoded<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> T {
    codec::decode(bytes, ROW_BYTES_MAX)
        .unwrap_or_else(|error| panic!("a row of the audit log is not what was written: {error}"))
}

/// A call that is over, as it is about to be recorded.
pub(crate) struct Call<'a> {
    pub(crate) origin: &'a Origin,
    pub(crate) subject: String,
    pub(crate) session: SessionId,
    pub(crate) stamp: u64,
    pub(crate) refused: Option<&'a Rejection>,
}

/// Records a call. To be called within the command that it belongs to.
pub(crate) fn append(txn: &mut dyn Txn, context: &ApplyContext, call: Call<'_>) {
    append_within(txn, context, call, RECORDS_MAX);
}

fn append_within(txn: &mut dyn Txn, context: &ApplyContext, call: Call<'_>, records_max: u64) {
    let mut ends = ends(txn);
    let refused = call
        .refused
        .map(|why| format!("{}: {}", why.code.as_str(), why.message));
    let record = AuditRecord {
        sequence: ends.next,
        index: context.index,
        time_ms: context.now_ms,
        principal: cut(&call.origin.principal),
        call: cut(&call.origin.call),
        subject: cut(&call.subject),
        refused: cut(&refused.unwrap_or_default()),
        session: call.session.0,
        stamp: call.stamp,
    };
    let hash = record.chained(&ends.last_hash);
    let stored = StoredRecord { record, hash };
    txn.put(
        RECORDS,
        &ends.next.to_be_bytes(),
        codec::encode_plain(&stored),
    );
    ends.next += 1;
    ends.last_hash = hash;
    // One goes for each that comes. By its number: a scan would walk over all that went before.
    if ends.next - ends.first > records_max {
        let key = ends.first.to_be_bytes();
        let oldest = txn.get(RECORDS, &key).expect("records have no gaps");
        ends.anchor = decoded::<StoredRecord>(&oldest).hash;
        txn.delete(RECORDS, &key);
        ends.first += 1;
    }
    txn.put(ENDS, ENDS_KEY, codec::encode_plain(&ends));
}

/// The beginning of a text, at a boundary of characters.
fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].to_owned()
}

/// Up to `limit` records from number `from` on.
pub(crate) fn page(reader: &dyn Reader, from: u64, limit: usize) -> Vec<StoredRecord> {
    let first = from.max(ends(reader).first);
    // Right before the first, so that nothing is walked over that was dropped.
    let after = (first - 1).to_be_bytes();
    let rows = reader.scan(RECORDS, &[], Some(&after), limit);
    rows.iter().map(|(_, value)| decoded(value)).collect()
}

/// What is wrong with a chain of records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The record is not what was hashed, or an earlier one is not.
    #[error(
        "record {sequence} does not have the hash that was stored with it: it, or the chain before it, \
         was changed"
    )]
    Hash {
        /// Its number.
        sequence: u64,
    },
    /// Another number was due.
    #[error("record {expected} is missing: the next one is {found}")]
    Gap {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// The chain ends too early, or with another hash.
    #[error("the chain ends with record {last}, and not as the head says that it does")]
    End {
        /// The last record.
        last: u64,
    },
}

/// Follows a chain record by record.
#[derive(Debug, Clone, Copy)]
pub struct Verifier {
    next: u64,
    hash: ChainHash,
}

impl Verifier {
    /// Begins before the first record that is kept.
    #[must_use]
    pub fn new(ends: &Ends) -> Self {
        Verifier {
            next: ends.first,
            hash: ends.anchor,
        }
    }

    /// The number that is due next.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes the next record.
    pub fn push(&mut self, stored: &StoredRecord) -> Result<(), Broken> {
        let sequence = stored.record.sequence;
        if sequence != self.next {
            return Err(Broken::Gap {
                expected: self.next,
                found: sequence,
            });
        }
        self.hash = stored.record.chained(&self.hash);
        if self.hash != stored.hash {
            return Err(Broken::Hash { sequence });
        }
        self.next += 1;
        Ok(())
    }

    /// Whether the chain ends as it should.
    pub fn finish(&self, ends: &Ends) -> Result<(), Broken> {
        if (self.next, self.hash) == (ends.next, ends.last_hash) {
            return Ok(());
        }
        Err(Broken::End {
            last: self.next.saturating_sub(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::error::ErrorCode;
    use mobula_scheduler::memory_txn::MemoryTables;

    fn record(tables: &mut MemoryTables, number: u64, records_max: u64) {
        let context = ApplyContext {
            index: 10 * number,
            term: 1,
            now_ms: 100 * number,
        };
        let origin = Origin {
            principal: "client-abc".to_owned(),
            call: "StopJob".to_owned(),
        };
        let why = Rejection::new(ErrorCode::NotFound, "é".repeat(TEXT_BYTES_MAX));
        let call = Call {
            origin: &origin,
            subject: format!("job-{number}"),
            session: SessionId(7),
            stamp: number,
            refused: (number == 2).then_some(&why),
        };
        append_within(tables, &context, call, records_max);
    }

    fn verified(tables: &MemoryTables, from: u64) -> Result<(), Broken> {
        let ends = ends(tables);
        let mut verifier = Verifier::new(&ends);
        for stored in page(tables, from, 1_000) {
            verifier.push(&stored)?;
        }
        verifier.finish(&ends)
    }

    #[test]
    fn records_are_numbered_chained_and_cut() {
        let mut tables = MemoryTables::default();
        assert_eq!(verified(&tables, 0), Ok(()), "an empty log");
        for number in 1..=3 {
            record(&mut tables, number, 100);
        }
        let found = page(&tables, 2, 1);
        let second = &found[0].record;
        assert_eq!(
            (second.sequence, second.index, second.time_ms),
            (2, 20, 200)
        );
        assert_eq!((second.session, second.stamp), (7, 2));
        assert!(second.refused.starts_with("not_found: é"), "{second:?}");
        assert!(second.refused.len() <= TEXT_BYTES_MAX);
        assert_eq!(page(&tables, 1, 1)[0].record.refused, "");
        assert_eq!(page(&tables, 4, 1), []);
        assert_eq!(verified(&tables, 0), Ok(()));
    }

    #[test]
    fn the_oldest_records_go_and_their_hash_stays_as_the_anchor() {
        let mut tables = MemoryTables::default();
        for number in 1..=25 {
            record(&mut tables, number, 10);
        }
        let kept: Vec<u64> = page(&tables, 0, 100)
            .iter()
            .map(|stored| stored.record.sequence)
            .collect();
        assert_eq!(kept, (16..=25).collect::<Vec<u64>>());
        assert_ne!(ends(&tables).anchor, [0; 32]);
        assert_eq!(verified(&tables, 0), Ok(()));
    }

    #[test]
    fn a_record_that_was_changed_added_or_taken_out_is_found() {
        let mut tables = MemoryTables::default();
        for number in 1..=5 {
            record(&mut tables, number, 100);
        }
        let key = 3_u64.to_be_bytes();
        let third = tables.get(RECORDS, &key).unwrap();
        let mut changed: StoredRecord = decoded(&third);
        changed.record.principal = "somebody else".to_owned();
        tables.put(RECORDS, &key, codec::encode_plain(&changed));
        assert_eq!(verified(&tables, 0), Err(Broken::Hash { sequence: 3 }));
        // With a hash that fits the change, the one behind does not fit.
        let second: StoredRecord = decoded(&tables.get(RECORDS, &2_u64.to_be_bytes()).unwrap());
        changed.hash = changed.record.chained(&second.hash);
        tables.put(RECORDS, &key, codec::encode_plain(&changed));
        assert_eq!(verified(&tables, 0), Err(Broken::Hash { sequence: 4 }));
        tables.put(RECORDS, &key, third);
        assert_eq!(verified(&tables, 0), Ok(()));
        tables.delete(RECORDS, &key);
        let gap = Broken::Gap {
            expected: 3,
            found: 4,
        };
        assert_eq!(verified(&tables, 0), Err(gap));
        let mut tables = MemoryTables::default();
        for number in 1..=5 {
            record(&mut tables, number, 100);
        }
        tables.delete(RECORDS, &5_u64.to_be_bytes());
        assert_eq!(verified(&tables, 0), Err(Broken::End { last: 4 }));
    }
}
