//! The keys, their types and their defaults. `cluster-configs/` shows each with its reason.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::label::Labels;

/// A whole configuration file; every section may be left out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The head.
    pub head: HeadConfig,
    /// The object store.
    pub storage: StorageConfig,
    /// Raft.
    pub raft: RaftConfig,
    /// The worker.
    pub worker: WorkerConfig,
    /// Leases and bounds.
    pub limits: LimitsConfig,
    /// Tokens.
    pub tokens: TokensConfig,
}

/// `[head]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HeadConfig {
    /// Where Raft's log, the tables and the cluster's CA are kept.
    pub data_dir: String,
    /// `ip:port` of the gRPC control API.
    pub api_listen: String,
    /// `ip:port` of the cluster's QUIC endpoint.
    pub cluster_listen: String,
    /// The head's name; left out, one is made up at its first start.
    pub name: Option<String>,
    /// `ip:port` of the control APIs of a group's heads, which a new head joins at its first
    /// start; empty: it begins a cluster of its own.
    pub join: Vec<String>,
    /// The file that holds the head token to join with.
    pub join_token_file: Option<String>,
}

impl Default for HeadConfig {
    fn default() -> Self {
        HeadConfig {
            data_dir: "/var/lib/mobula/head".into(),
            api_listen: "127.0.0.1:7100".into(),
            cluster_listen: "127.0.0.1:7101".into(),
            name: None,
            join: Vec::new(),
            join_token_file: None,
        }
    }
}

/// `[storage]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorageConfig {
    /// `file:///path` or `s3://bucket/prefix`.
    pub url: String,
    /// What S3 needs beyond the URL.
    pub s3: S3Config,
    /// When checkpoints that nobody keeps are removed.
    pub sweep: SweepConfig,
}

impl Default for StorageConfig {
    fn default() -> Self {
        StorageConfig {
            url: "file:///var/lib/mobula/store".into(),
            s3: S3Config::default(),
            sweep: SweepConfig::default(),
        }
    }
}

/// `[storage.sweep]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SweepConfig {
    /// How often, in minutes; 0: never.
    pub interval_minutes: u64,
    /// How old something is at least before it is removed, in minutes.
    pub age_minutes: u64,
}

impl Default for SweepConfig {
    fn default() -> Self {
        SweepConfig {
            interval_minutes: 60,
            age_minutes: 180,
        }
    }
}

/// `[storage.s3]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3Config {
    /// Endpoint of an S3-compatible server; left out for AWS itself.
    pub endpoint: Option<String>,
    /// Region.
    pub region: Option<String>,
    /// Whether the endpoint may be plain HTTP.
    pub allow_http: bool,
    /// The environment variable that holds the access key.
    pub access_key_env: String,
    /// The environment variable that holds the secret key.
    pub secret_key_env: String,
}

impl Default for S3Config {
    fn default() -> Self {
        S3Config {
            endpoint: None,
            region: None,
            allow_http: false,
            access_key_env: "AWS_ACCESS_KEY_ID".into(),
            secret_key_env: "AWS_SECRET_ACCESS_KEY".into(),
        }
    }
}

/// `[raft]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaftConfig {
    /// Length of a tick, in milliseconds.
    pub tick_ms: u64,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Ticks without a heartbeat before an election, at least; twice that at most.
    pub election_ticks: usize,
    /// Entries after which the log is compacted.
    pub compact_entries: u64,
    /// Bytes after which the log is compacted.
    pub compact_bytes: u64,
    /// Entries kept for followers that lag a little.
    pub keep_entries: u64,
}

impl Default for RaftConfig {
    fn default() -> Self {
        RaftConfig {
            tick_ms: 25,
            heartbeat_ticks: 3,
            election_ticks: 16,
            compact_entries: 10_000,
            compact_bytes: 64 * 1024 * 1024,
            keep_entries: 2_000,
        }
    }
}

/// `[worker]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// The node's name; left out: the machine's host name.
    pub name: Option<String>,
    /// Where its identity, artifacts, logs and sockets are kept.
    pub data_dir: String,
    /// `ip:port` of a head's control API.
    pub head_api: String,
    /// The file that holds the join token; needed at the first start only.
    pub token_file: Option<String>,
    /// IP at which its hosts take calls (a port given here must be 0: each host takes its own).
    pub listen: String,
    /// How long a process of actors may be stopped (SIGSTOP, job control) before it is killed and its actors are
    /// started again, in milliseconds; 0: for ever.
    pub stopped_process_limit_ms: u64,
    /// Labels for placement.
    pub labels: Labels,
    /// What it offers; what is left out is discovered.
    pub resources: ResourcesConfig,
    /// Memory for objects that its hosts share, in bytes; left out: 30 % of what it offers.
    pub object_store_bytes: Option<u64>,
    /// Disk for objects that this memory has no room for, in bytes; left out: half of what is free.
    pub object_spill_bytes: Option<u64>,
    /// Notices of preemption.
    pub preemption: PreemptionConfig,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        WorkerConfig {
            name: None,
            data_dir: "/var/lib/mobula/worker".into(),
            head_api: "127.0.0.1:7100".into(),
            token_file: None,
            listen: "127.0.0.1:0".into(),
            stopped_process_limit_ms: 30_000,
            labels: Labels::new(),
            resources: ResourcesConfig::default(),
            object_store_bytes: None,
            object_spill_bytes: None,
            preemption: PreemptionConfig::default(),
        }
    }
}

/// `[worker.resources]`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResourcesConfig {
    /// CPU cores.
    pub cpu: Option<f64>,
    /// Memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// GPUs.
    pub gpu: Option<f64>,
    /// Named resources of the operator's own.
    pub custom: BTreeMap<String, f64>,
}

/// `[worker.preemption]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PreemptionConfig {
    /// A file whose appearance is a notice.
    pub notice_file: Option<String>,
    /// Whose machine it is (`aws`, `gcp` or `azure`): its metadata service is asked for notices. Left out: none
    /// is asked.
    pub cloud: Option<String>,
    /// How often it is looked for, in milliseconds.
    pub poll_ms: u64,
    /// The grace of a notice that names none, in milliseconds.
    pub default_grace_ms: u64,
}

impl Default for PreemptionConfig {
    fn default() -> Self {
        PreemptionConfig {
            notice_file: None,
            cloud: None,
            poll_ms: 1_000,
            default_grace_ms: 30_000,
        }
    }
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// How long a worker counts as alive without renewing its lease, in milliseconds.
    pub lease_ms: u64,
    /// After which silence a worker is reported as suspect, in milliseconds.
    pub suspect_ms: u64,
    /// How often a worker renews its lease, in milliseconds.
    pub renew_ms: u64,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        LimitsConfig {
            lease_ms: 10_000,
            suspect_ms: 6_000,
            renew_ms: 1_000,
        }
    }
}

/// `[tokens]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokensConfig {
    /// How long the first worker token lives, in hours.
    pub worker_ttl_hours: u64,
    /// How long the first client token lives, in hours.
    pub client_ttl_hours: u64,
    /// How long a host's certificate lives, in hours; it is renewed at half of that.
    pub host_certificate_ttl_hours: u64,
}

impl Default for TokensConfig {
    fn default() -> Self {
        TokensConfig {
            worker_ttl_hours: 24,
            client_ttl_hours: 24 * 30,
            host_certificate_ttl_hours: 24,
        }
    }
}
