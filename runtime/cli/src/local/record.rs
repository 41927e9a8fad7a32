//! `cluster.json`: what runs in a local cluster. Other programs read it, so its fields are stable.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::process::start_time_of;
use crate::head::write_whole;

/// The record's name in the data directory.
pub(crate) const CLUSTER_FILE: &str = "cluster.json";

/// A local cluster.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ClusterRecord {
    /// The cluster's id.
    pub(crate) cluster_id: String,
    /// Where it keeps everything.
    pub(crate) data_dir: PathBuf,
    /// `ip:port` of the heads' control API.
    pub(crate) api_addresses: Vec<String>,
    /// The file with a client token.
    pub(crate) client_token_file: PathBuf,
    /// Its processes.
    pub(crate) processes: Vec<ProcessRecord>,
}

/// One process of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProcessRecord {
    /// `head` or `worker`.
    pub(crate) role: String,
    /// Its name: `head-1`, `worker-1` …
    pub(crate) name: String,
    /// Its process id.
    pub(crate) pid: u32,
    /// When it was started, in the kernel's clock ticks: tells it from a later process with the
    /// same id.
    pub(crate) start_time: u64,
    /// Where it listens: API and QUIC for a head, empty for a worker (its hosts listen).
    pub(crate) addresses: Vec<String>,
    /// What it prints.
    pub(crate) log: PathBuf,
}

impl ProcessRecord {
    /// Whether this very process still runs.
    pub(crate) fn is_alive(&self) -> bool {
        start_time_of(self.pid) == Some(self.start_time)
    }
}

impl ClusterRecord {
    /// Reads the record of a data directory; `None` where there is no cluster.
    pub(crate) fn read(data_dir: &Path) -> anyhow::Result<Option<ClusterRecord>> {
        let path = data_dir.join(CLUSTER_FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)
                .map(Some)
                .with_context(|| format!("{} is damaged: remove it", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
        }
    }

    /// Writes the record.
    pub(crate) fn write(&self) -> anyhow::Result<()> {
        write_whole(
            &self.data_dir.join(CLUSTER_FILE),
            &serde_json::to_value(self)?,
        )
    }
}
