//! What a worker is started with, and the bounds it keeps.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use mobula_core::label::Labels;
use mobula_core::resource::Resources;

use crate::error::WorkerError;
use crate::notices::Cloud;

/// Most actors at a time on one worker: as many as may live in a cluster. At about 2 KiB of
/// bookkeeping each this is 256 MiB.
pub(crate) const ACTORS_MAX: usize = 1 << 17;

/// A host process that has not said hello by then is given up: a healthy one needs milliseconds,
/// and a program on a cold network disk some seconds.
pub(crate) const HOST_HELLO_MS_MAX: u64 = 30_000;

/// How long a host may take to end by itself when its last actor has ended.
pub(crate) const HOST_SHUTDOWN_MS: u64 = 5_000;

/// How much longer than its grace a stop may take before the agent kills: the host enforces the
/// grace itself, and this covers the messages in between.
pub(crate) const STOP_MARGIN_MS: u64 = 2_000;

/// Less memory for objects than this holds not one arena of usual size.
pub(crate) const OBJECT_STORE_BYTES_MIN: u64 = 1 << 20;

/// What a worker is started with.
#[derive(Clone)]
pub struct WorkerOptions {
    /// The node's name: unique in its cluster, 1 to 63 of `a-z 0-9 - _ .`.
    pub name: String,
    /// Where the worker keeps its identity, cached programs, sockets and logs.
    pub data_dir: PathBuf,
    /// Addresses (`host:port`) of the heads' control API; any of them will do.
    pub head_api: Vec<String>,
    /// A worker join token: needed at the first start only.
    pub token: Option<String>,
    /// The IP of this machine at which its hosts take calls.
    pub listen_ip: IpAddr,
    /// Labels of the node, beside `arch`, `os` and `gpu`, which are found out.
    pub labels: Labels,
    /// What to offer instead of what is found.
    pub resources: ResourceOverride,
    /// While this file exists, the machine is about to be taken away; see [`crate::notices`].
    pub notice_file: Option<PathBuf>,
    /// How often to look for that file, in milliseconds.
    pub notice_poll_ms: u64,
    /// The cloud whose metadata service is asked, and where that answers.
    pub cloud: Option<(Cloud, String)>,
    /// The grace of a notice that names no deadline, in milliseconds.
    pub default_grace_ms: u64,
    /// Whether SIGTERM to this process is a preemption notice. Off where the worker is embedded in
    /// a process that has its own handling.
    pub sigterm_is_notice: bool,
    /// Memory for objects that hosts share, in bytes; absent: 30 % of what the node offers.
    pub object_store_bytes: Option<u64>,
    /// Disk for objects that this memory has no room for, in bytes; absent: half of what is free
    /// when the worker starts.
    pub object_spill_bytes: Option<u64>,
    /// How long a process of actors may be stopped (SIGSTOP, job control) on a machine that is well
    /// before it is killed and its actors are started again, in milliseconds; 0: for ever. Looked at
    /// once a second.
    pub stopped_process_limit_ms: u64,
    /// The `mobula` binary for built-in actors; absent: this process's own binary.
    pub builtin_program: Option<PathBuf>,
}

impl WorkerOptions {
    /// Options of a worker that listens on loopback, offers what it finds, takes SIGTERM as a notice
    /// of 30 s, and lets a process be stopped for as long.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        data_dir: impl Into<PathBuf>,
        head_api: Vec<String>,
    ) -> Self {
        WorkerOptions {
            name: name.into(),
            data_dir: data_dir.into(),
            head_api,
            token: None,
            listen_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            labels: Labels::new(),
            resources: ResourceOverride::default(),
            notice_file: None,
            notice_poll_ms: 500,
            cloud: None,
            default_grace_ms: 30_000,
            sigterm_is_notice: true,
            object_store_bytes: None,
            object_spill_bytes: None,
            stopped_process_limit_ms: 30_000,
            builtin_program: None,
        }
    }

    /// Checks what can be checked without touching the world.
    pub(crate) fn check(&self) -> Result<(), WorkerError> {
        let is_plain =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
        if self.name.is_empty() || self.name.len() > 63 || !self.name.bytes().all(is_plain) {
            return Err(WorkerError::BadOption {
                option: "name",
                reason: format!("`{}`: use 1 to 63 of a-z, 0-9, `-`, `_` and `.`", self.name),
            });
        }
        if self.head_api.is_empty() {
            return Err(WorkerError::BadOption {
                option: "head_api",
                reason: "no address: name at least one head's control API (host:port)".to_owned(),
            });
        }
        if let Some(bytes) = self.object_store_bytes
            && bytes < OBJECT_STORE_BYTES_MIN
        {
            return Err(WorkerError::BadOption {
                option: "object_store_bytes",
                reason: format!("{bytes} is too little: use {OBJECT_STORE_BYTES_MIN} or more"),
            });
        }
        if self.notice_poll_ms == 0 {
            return Err(WorkerError::BadOption {
                option: "notice_poll_ms",
                reason: "0 would spin: use 100 or more".to_owned(),
            });
        }
        Ok(())
    }
}

impl fmt::Debug for WorkerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // All but the token, which is a secret.
        f.debug_struct("WorkerOptions")
            .field("name", &self.name)
            .field("data_dir", &self.data_dir)
            .field("head_api", &self.head_api)
            .field("token", &self.token.as_ref().map(|_| "redacted"))
            .field("listen_ip", &self.listen_ip)
            .field("labels", &self.labels)
            .field("resources", &self.resources)
            .field("notice_file", &self.notice_file)
            .field("cloud", &self.cloud)
            .finish_non_exhaustive()
    }
}

/// What to offer instead of what is found; absent fields are found out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResourceOverride {
    /// CPU cores, in thousandths.
    pub cpu_milli: Option<u64>,
    /// Memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// GPUs, in thousandths.
    pub gpu_milli: Option<u64>,
    /// Named resources, in thousandths; there are none to find.
    pub custom: std::collections::BTreeMap<String, u64>,
}

impl ResourceOverride {
    /// `found`, with what is set here in its place.
    #[must_use]
    pub fn apply(&self, found: Resources) -> Resources {
        Resources {
            cpu_milli: self.cpu_milli.unwrap_or(found.cpu_milli),
            memory_bytes: self.memory_bytes.unwrap_or(found.memory_bytes),
            gpu_milli: self.gpu_milli.unwrap_or(found.gpu_milli),
            custom: self.custom.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_not_printed_and_bad_names_are_refused() {
        let mut options = WorkerOptions::new("w-1", "/data", vec!["127.0.0.1:1".into()]);
        options.token = Some("secret".into());
        assert!(!format!("{options:?}").contains("secret"));
        assert!(options.check().is_ok());
        options.name = "a/b".into();
        assert!(
            options
                .check()
                .unwrap_err()
                .to_string()
                .contains("use 1 to 63")
        );
    }
}
