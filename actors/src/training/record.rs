//! What a run was: all that its bits depend on, where it ran, and how its states went. With it the run can be
//! made once more and compared, and two runs can be told apart.
//!
//! A record is stored as `runs/<blake3>`, and named by the job's result.
//!
//! Invariants:
//! 1. A record's bytes depend on the run only, and its name on its bytes.
//! 2. Nothing of it is believed before its hash is verified.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;
use mobula_core::JobId;
use mobula_storage::blob::{BlobError, BlobStore};
use mobula_storage::digest::Digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::spec::TrainSpec;
use super::trace::StepTrace;
use crate::device::ComputeDevice;

/// The format that this code writes.
const FORMAT: u32 = 1;

/// The largest record: its trace is bounded, and a list of dependencies is some tens of KiB.
const RECORD_BYTES_MAX: u64 = 4 << 20;

/// What this binary was built from: `Cargo.lock` as it was then.
const LOCK_FILE: &str = include_str!("../../../Cargo.lock");

/// The program that ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramRecord {
    /// Mobula's version.
    pub version: String,
    /// BLAKE3 of the program's file; absent where that could not be read.
    pub blake3: Option<String>,
    /// The crates that it was built from, with their versions.
    pub dependencies: BTreeMap<String, BTreeSet<String>>,
}

/// The machine of the driver, and what the job's trainers computed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvironmentRecord {
    /// The processor, as it calls itself.
    pub cpu_model: String,
    /// The architecture and the vector instructions that were found.
    pub isa: Vec<String>,
    /// The operating system, and its kernel's release.
    pub os: String,
    /// What gradients were computed on. It decides no bit, so a run is made once more on any.
    #[serde(default)]
    pub device: ComputeDevice,
}

/// The data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRecord {
    /// As the job names it, as JSON.
    pub source: String,
    /// BLAKE3 of its bytes.
    pub blake3: String,
}

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The record's own format.
    pub format: u32,
    /// The job.
    pub job: JobId,
    /// What it was asked to do, every key with its value: hyperparameters and seed among them.
    pub spec: TrainSpec,
    /// What decides its bits, in one hash.
    pub fingerprint: String,
    /// The data.
    pub data: DataRecord,
    /// The program.
    pub program: ProgramRecord,
    /// Where its driver ended.
    pub environment: EnvironmentRecord,
    /// Steps taken.
    pub steps: u64,
    /// BLAKE3 of weights and optimizer state at the end.
    pub weights_blake3: String,
    /// Trainers that took part although their machines computed other bits than the driver's. Unless it is 0, the run
    /// need not be repeatable.
    #[serde(default)]
    pub trainers_mixed: u64,
    /// Its states, step by step, as text.
    pub trace: String,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] BlobError),
    /// It is not what was stored.
    #[error("the run's record `{path}` is damaged: its hash is {found}")]
    Damaged {
        /// Its name.
        path: String,
        /// The hash of what is there.
        found: String,
    },
    /// It is of another format.
    #[error("the run's record cannot be read: {0}; use the release that wrote it")]
    Malformed(String),
}

impl RunRecord {
    /// The record of a run that has ended with `weights_blake3`. Reads the program's file.
    #[must_use]
    pub fn new(
        job: JobId,
        spec: &TrainSpec,
        fingerprint: &[u8; 32],
        data_blake3: &str,
        trace: &StepTrace,
        steps: u64,
        weights_blake3: &str,
    ) -> Self {
        RunRecord {
            format: FORMAT,
            job,
            spec: spec.clone(),
            fingerprint: blake3::Hash::from_bytes(*fingerprint).to_hex().to_string(),
            data: DataRecord {
                source: serde_json::to_string(&spec.dataset)
                    .expect("plain numbers and strings always encode"),
                blake3: data_blake3.to_owned(),
            },
            program: ProgramRecord::of_this_process(),
            environment: EnvironmentRecord::of_this_machine(spec.device),
            steps,
            weights_blake3: weights_blake3.to_owned(),
            trainers_mixed: 0,
            trace: trace.to_text(),
        }
    }

    /// The record as JSON.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a record holds only strings and numbers")
    }

    /// Stores it; its digest, in hex. Doing so again changes nothing.
    pub async fn store(&self, blobs: &BlobStore) -> Result<String, BlobError> {
        let bytes = self.to_bytes();
        let digest = Digest::of(&bytes);
        blobs.put_if_absent(&path(&digest), bytes.into()).await?;
        Ok(digest.to_string())
    }

    /// Reads the record that `digest` names.
    pub async fn fetch(blobs: &BlobStore, digest: &Digest) -> Result<Self, RecordError> {
        RunRecord::from_bytes(&RunRecord::fetch_bytes(blobs, digest).await?)
    }

    /// The bytes of the record that `digest` names, verified.
    pub(crate) async fn fetch_bytes(
        blobs: &BlobStore,
        digest: &Digest,
    ) -> Result<Bytes, RecordError> {
        let path = path(digest);
        let bytes = blobs.get(&path, RECORD_BYTES_MAX).await?;
        let found = Digest::of(&bytes);
        if found != *digest {
            let found = found.to_string();
            return Err(RecordError::Damaged { path, found });
        }
        Ok(bytes)
    }

    /// Reads what [`RunRecord::to_bytes`] wrote, here or in another release.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let record: RunRecord = serde_json::from_slice(bytes)
            .map_err(|error| RecordError::Malformed(error.to_string()))?;
        if record.format != FORMAT {
            let format = record.format;
            return Err(RecordError::Malformed(format!("it is of format {format}")));
        }
        Ok(record)
    }

    /// Its states, step by step.
    pub fn trace(&self) -> Result<StepTrace, RecordError> {
        StepTrace::from_text(&self.trace).map_err(|error| RecordError::Malformed(error.to_string()))
    }

    /// What differs between two records but for their traces: key, value here, value there. Keys are paths
    /// as `spec.learning_rate`, in order.
    #[must_use]
    pub fn differences(&self, other: &RunRecord) -> Vec<(String, String, String)> {
        let flat = |record: &RunRecord| {
            let mut value = serde_json::to_value(record).expect("a record is JSON");
            if let Value::Object(fields) = &mut value {
                fields.remove("trace");
            }
            let mut leaves = BTreeMap::new();
            flatten("", &value, &mut leaves);
            leaves
        };
        let (ours, theirs) = (flat(self), flat(other));
        let keys: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
        let absent = || "-".to_owned();
        keys.into_iter()
            .filter(|key| ours.get(*key) != theirs.get(*key))
            .map(|key| {
                (
                    key.clone(),
                    ours.get(key).cloned().unwrap_or_else(absent),
                    theirs.get(key).cloned().unwrap_or_else(absent),
                )
            })
            .collect()
    }
}

fn path(digest: &Digest) -> String {
    format!("runs/{digest}")
}

/// Every leaf of `value` under its path; a list is one leaf.
fn flatten(path: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let path = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                flatten(&path, value, leaves);
            }
        }
        Value::String(text) => {
            leaves.insert(path.to_owned(), text.clone());
        }
        other => {
            leaves.insert(path.to_owned(), other.to_string());
        }
    }
}

impl ProgramRecord {
    fn of_this_process() -> Self {
        ProgramRecord {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            blake3: std::env::current_exe()
                .ok()
                .and_then(|path| hash_file(&path).ok()),
            dependencies: locked(LOCK_FILE),
        }
    }
}

fn hash_file(path: &Path) -> std::io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut hasher)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// The packages of a lock file, with their versions.
fn locked(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        version: String,
    }
    let lock: Lock = toml::from_str(text).expect("cargo wrote it, and a test reads it");
    let mut packages: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in lock.package {
        packages
            .entry(package.name)
            .or_default()
            .insert(package.version);
    }
    packages
}

impl EnvironmentRecord {
    fn of_this_machine(device: ComputeDevice) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let release = read("/proc/sys/kernel/osrelease");
        EnvironmentRecord {
            cpu_model: model_name(&read("/proc/cpuinfo")),
            isa: isa(),
            os: format!("{} {}", std::env::consts::OS, release.trim()),
            device,
        }
    }
}

fn model_name(cpuinfo: &str) -> String {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(target_arch = "x86_64")]
fn isa() -> Vec<String> {
    let found = [
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
    ];
    let found = found.into_iter().filter(|(_, is_there)| *is_there);
    std::iter::once("x86_64")
        .chain(found.map(|(name, _)| name))
        .map(str::to_owned)
        .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn isa() -> Vec<String> {
    vec![std::env::consts::ARCH.to_owned()]
}

#[cfg(test)]
mod tests {
    use mobula_storage::blob::S3Options;

    use super::*;
    use crate::training::state::TrainState;
    use crate::training::workload::Workload;

    fn record(spec: &TrainSpec) -> RunRecord {
        let workload = Workload::of(spec);
        let state = TrainState::initial(&workload);
        let trace = StepTrace::new(spec.steps, &state, workload.layout());
        let weights = state.weights_blake3();
        let digest = workload.split().train.digest();
        RunRecord::new(
            JobId(3),
            spec,
            &state.fingerprint,
            digest,
            &trace,
            300,
            &weights,
        )
    }

    #[tokio::test]
    async fn a_record_is_found_by_its_digest_and_damage_is_seen() {
        let record = record(&TrainSpec::digits_mlp("a"));
        assert!(record.program.dependencies.contains_key("serde"));
        assert!(record.program.blake3.is_some());
        assert!(!record.environment.isa.is_empty());
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        let digest = record.store(&blobs).await.unwrap();
        assert_eq!(record.store(&blobs).await.unwrap(), digest);
        let digest: Digest = digest.parse().unwrap();
        assert_eq!(RunRecord::fetch(&blobs, &digest).await.unwrap(), record);
        assert_eq!(record.trace().unwrap().known_steps(), 0);
        blobs.renew(&path(&digest), "{}".into()).await.unwrap();
        let error = RunRecord::fetch(&blobs, &digest).await.unwrap_err();
        assert!(matches!(error, RecordError::Damaged { .. }), "{error}");
    }

    #[test]
    fn differences_are_named_by_key() {
        let a = record(&TrainSpec::digits_mlp("a"));
        assert_eq!(a.differences(&a), []);
        let mut spec = TrainSpec::digits_mlp("a");
        spec.learning_rate = 0.25;
        let mut b = record(&spec);
        b.program.dependencies.remove("serde");
        let differences = a.differences(&b);
        let keys: Vec<&str> = differences.iter().map(|(key, ..)| key.as_str()).collect();
        assert_eq!(
            keys,
            [
                "fingerprint",
                "program.dependencies.serde",
                "spec.learning_rate"
            ]
        );
        assert_eq!(differences[2].2, "0.25");
        assert_eq!(differences[1].2, "-");
    }

    #[test]
    fn the_device_is_of_the_environment_and_not_of_what_decides_the_bits() {
        let on_cpus = record(&TrainSpec::digits_mlp("a"));
        let on_gpus = record(&TrainSpec {
            device: ComputeDevice::Cuda,
            ..TrainSpec::digits_mlp("a")
        });
        let differences = on_cpus.differences(&on_gpus);
        let keys: Vec<&str> = differences.iter().map(|(key, ..)| key.as_str()).collect();
        assert_eq!(keys, ["environment.device", "spec.device"]);
        // A record of before there was a choice.
        let mut old = serde_json::to_value(&on_cpus).unwrap();
        for part in ["environment", "spec"] {
            old[part].as_object_mut().unwrap().remove("device").unwrap();
        }
        assert_eq!(serde_json::from_value::<RunRecord>(old).unwrap(), on_cpus);
    }

    #[test]
    fn a_processor_says_its_name() {
        assert_eq!(
            model_name("vendor_id\t: X\nmodel name\t: Fast 9000\n"),
            "Fast 9000"
        );
        assert_eq!(model_name(""), "unknown");
    }
}
