//! The prediction log: what an endpoint answered, as Parquet files in the cluster's object store.
//!
//! 1. Nothing is logged of an endpoint without a policy, and of its inputs only the features that the policy names.
//! 2. What waits to be written is bounded by the policy; what does not fit is shed and counted. The log delays no answer.
//! 3. Whether a request is logged depends on its id alone (without one, on its rows): whoever knows the share and the
//!    id can tell, and a request that is sent again is logged again or not again.
//! 4. A file is complete or absent, and is never changed. Any number of them can be listed and deleted.

pub mod files;
pub mod policy;
pub(super) mod rows;
pub(super) mod tap;

use serde::{Deserialize, Serialize};

pub use files::Pages;
pub use policy::{LogPolicy, LoggedFeatures};

/// Where the files of all endpoints are, in the object store.
const PREFIX: &str = "predictions";

/// What became of the rows that a monitor saw. All numbers are since it started, or since the policy was set.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LogStatus {
    /// Rows in files.
    pub rows: u64,
    /// Rows that wait to be in one.
    pub rows_waiting: u64,
    /// Rows of requests that are not in the sample.
    pub rows_sampled_out: u64,
    /// Rows that were given up: the object store was too slow, or refused.
    pub rows_shed: u64,
    /// Files written.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Features that the policy names and the version does not have.
    pub unknown_features: u64,
    /// Why a file could not be written, the last time that this was so.
    pub last_error: Option<String>,
}

/// The folder of an endpoint's files.
#[must_use]
pub fn folder(endpoint: &str) -> String {
    format!("{PREFIX}/{endpoint}")
}
