//! What is logged of an endpoint's predictions, for how long: a row for each endpoint that has a log.
//!
//! Invariants:
//! 1. A policy is about one deployment of an endpoint: another one of the same name begins without.
//! 2. No feature of the inputs is logged unless the policy names it, and no request's id as it is unless it says so.

use mobula_core::control::{ModuleId, Reader, Table, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use crate::serving::state::{endpoints, find as find_endpoint};
use crate::units;

/// Endpoint → [`LogPolicyRow`].
const LOGS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 8,
};

/// One in a million, of which a share is made.
pub const MILLION: u32 = 1_000_000;

/// Features that a policy names.
pub const FEATURES_MAX: usize = 1_000;

/// Bytes of all their names: a policy is a command and a row.
const NAMES_BYTES_MAX: usize = 64 * 1024;

/// Rows of a file, at most.
pub const ROLL_ROWS_MAX: u32 = 1_000_000;

/// What waits in memory for a file, at most; of such there are at most three: one that fills, one that waits and one that is
/// written.
pub const ROLL_BYTES_MAX: u64 = 64 << 20;

/// The shortest time after which a file is written: many small files are slow to read.
pub const ROLL_MS_MIN: u64 = 1_000;

/// Files that can be kept by time alone. More come only of more rows.
const FILES_BY_TIME_MAX: u64 = 50_000;

/// Which features of the inputs are logged as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoggedFeatures {
    /// Those.
    Named(Vec<String>),
    /// All.
    All,
}

/// What is logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPolicy {
    /// Requests of a million that are logged.
    pub sample_per_million: u32,
    /// Features that are logged as they are.
    pub features: LoggedFeatures,
    /// Features of which only a keyed hash is logged, which tells equal values from others.
    pub hashed_features: Vec<String>,
    /// Whether requests' ids are logged as they are; else a keyed hash of them is.
    pub plain_ids: bool,
    /// The key of the hashes.
    pub key: [u8; 32],
    /// A file is written when it has so many rows,
    pub roll_rows: u32,
    /// when its rows take so many bytes in memory,
    pub roll_bytes: u64,
    /// or after this time, in milliseconds.
    pub roll_ms: u64,
    /// Files are deleted so long after they were written, in milliseconds.
    pub keep_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct LogPolicyRow {
    /// Which deployment of the endpoint it is about.
    deployed_ms: u64,
    policy: LogPolicy,
}

impl LogPolicy {
    fn check(&self) -> Result<(), Rejection> {
        let refuse = |text: String| Err(Rejection::invalid(text));
        if !(1..=MILLION).contains(&self.sample_per_million) {
            return refuse(format!(
                "{} of a million requests cannot be logged: give a share (`--sample`) of 0.000001 to 1",
                self.sample_per_million
            ));
        }
        let named: &[String] = match &self.features {
            LoggedFeatures::Named(names) => names,
            LoggedFeatures::All => &[],
        };
        let names = || named.iter().chain(&self.hashed_features);
        let bytes: usize = names().map(String::len).sum();
        if names().count() > FEATURES_MAX || bytes > NAMES_BYTES_MAX {
            return refuse(format!(
                "{} features with names of {bytes} bytes (`--features`, `--hash-features`): name at most {FEATURES_MAX}, of \
                 {NAMES_BYTES_MAX} bytes",
                names().count()
            ));
        }
        if let Some(both) = named
            .iter()
            .find(|name| self.hashed_features.contains(name))
        {
            return refuse(format!(
                "feature {both:?} is to be logged both as it is (`--features`) and hashed (`--hash-features`): choose one"
            ));
        }
        if !(1..=ROLL_ROWS_MAX).contains(&self.roll_rows)
            || !(1..=ROLL_BYTES_MAX).contains(&self.roll_bytes)
        {
            return refuse(format!(
                "files of {} rows (`--roll-rows`) and {} bytes (`--roll-bytes`): give 1 to {ROLL_ROWS_MAX} rows and 1 to \
                 {ROLL_BYTES_MAX} bytes",
                self.roll_rows, self.roll_bytes
            ));
        }
        if self.roll_ms < ROLL_MS_MIN || self.keep_ms / self.roll_ms.max(1) > FILES_BY_TIME_MAX {
            return refuse(format!(
                "a file each {} (`--roll-every`), kept for {} (`--keep`): write one at most each {}, and keep \
                 {FILES_BY_TIME_MAX} at the most",
                units::millis(self.roll_ms),
                units::millis(self.keep_ms),
                units::millis(ROLL_MS_MIN)
            ));
        }
        Ok(())
    }
}

/// The policy of an endpoint, if it has one.
pub(in crate::drift) fn find(
    reader: &dyn Reader,
    endpoint: &str,
) -> Result<Option<LogPolicy>, Rejection> {
    let deployed_ms = find_endpoint(reader, endpoint)?.deployed_ms;
    let row: Option<LogPolicyRow> = row::get(reader, LOGS, endpoint.as_bytes());
    Ok(row
        .filter(|row| row.deployed_ms == deployed_ms)
        .map(|row| row.policy))
}

/// Sets the policy of an endpoint, or removes it.
pub(in crate::drift) fn set(
    txn: &mut dyn Txn,
    endpoint: &str,
    policy: Option<LogPolicy>,
) -> Result<(), Rejection> {
    let Some(policy) = policy else {
        if find(txn, endpoint)?.is_none() {
            return Err(Rejection::new(
                ErrorCode::NotFound,
                format!("endpoint `{endpoint}` has no prediction log"),
            ));
        }
        txn.delete(LOGS, endpoint.as_bytes());
        return Ok(());
    };
    let deployed_ms = find_endpoint(txn, endpoint)?.deployed_ms;
    policy.check()?;
    forget_others(txn);
    let row = LogPolicyRow {
        deployed_ms,
        policy,
    };
    row::put(txn, LOGS, endpoint.as_bytes(), &row);
    Ok(())
}

/// Forgets the policies of endpoints that are no more, so that there are not more than endpoints.
fn forget_others(txn: &mut dyn Txn) {
    let living: Vec<String> = endpoints(txn)
        .into_iter()
        .map(|endpoint| endpoint.name)
        .collect();
    for (key, _) in row::all::<LogPolicyRow>(txn, LOGS, &[]) {
        if !living.iter().any(|name| name.as_bytes() == key) {
            txn.delete(LOGS, &key);
        }
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
