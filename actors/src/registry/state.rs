//! The registry's table.
//!
//! Invariants:
//! 1. A version never changes and is never given out again.
//! 2. Registering the same files of a model again is the same version.

use std::collections::BTreeMap;

use mobula_core::codec;
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, Table, Txn,
};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

/// Model name, 0, version → [`ModelVersion`].
const VERSIONS: Table = Table {
    module: ModuleId::REGISTRY,
    tag: 1,
};
/// Model name → its newest version.
const NEWEST: Table = Table {
    module: ModuleId::REGISTRY,
    tag: 2,
};
/// Model name, 0, digest → its version.
const BY_DIGEST: Table = Table {
    module: ModuleId::REGISTRY,
    tag: 3,
};

/// The largest command or question.
const PAYLOAD_BYTES_MAX: usize = 256 * 1024;

/// Versions that a model may have: a row has a KiB or two and 15 KiB at the most, so 150 MiB a
/// model at the very most.
const VERSIONS_MAX: u64 = 10_000;

/// Models: the bound on a list of all of them.
const MODELS_MAX: usize = 1_000;

/// The largest specification that is kept of a training job; ours have less than one KiB.
const TRAINING_JSON_BYTES_MAX: usize = 8 * 1024;

/// Metrics of a version, and the longest name of one in bytes.
const METRICS_MAX: usize = 64;
const METRIC_NAME_BYTES_MAX: usize = 64;

/// Versions in one answer: 4 MiB at the most, which the control API carries.
const PAGE_ROWS: usize = 256;

/// A change to the registry. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Adds a version. Answer: [`ModelVersion`].
    Register(NewVersion),
}

/// What a new version says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewVersion {
    /// The model's name.
    pub model: String,
    /// BLAKE3 of the version's file in the object store, which also is its name there.
    pub digest: String,
    /// Size of that file, in bytes.
    pub size_bytes: u64,
    /// BLAKE3 of weights and optimizer state, as the training job reported it.
    pub weights_blake3: String,
    /// BLAKE3 of the data set's source bytes.
    pub dataset_blake3: String,
    /// The training job.
    pub job: u64,
    /// What was measured on held-out data: `accuracy` …
    pub metrics: BTreeMap<String, f64>,
    /// How it was trained: the job's specification, as JSON text.
    pub training_json: String,
}

/// A registered version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelVersion {
    /// Counted from 1 within its model.
    pub version: u64,
    /// When it was registered, in milliseconds since the Unix epoch.
    pub registered_ms: u64,
    /// What it says about itself.
    pub description: NewVersion,
}

/// A question. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// The newest version of each model, by name, a page of them. Answer: `Vec<ModelVersion>`,
    /// empty after the last.
    List {
        /// Only models with a larger name.
        after: Option<String>,
    },
    /// The versions of a model, oldest first, a page of them. Answer: `Vec<ModelVersion>`, empty
    /// after the last.
    Versions {
        /// The model.
        model: String,
        /// Only larger ones; 0 for all.
        after: u64,
    },
    /// One version. Answer: [`ModelVersion`].
    Version {
        /// The model.
        model: String,
        /// Which; the newest if absent.
        version: Option<u64>,
    },
}

/// The registry's replicated part.
#[derive(Debug, Clone, Copy, Default)]
pub struct Registry;

fn version_key(model: &str, version: u64) -> Vec<u8> {
    [model.as_bytes(), &[0], &version.to_be_bytes()].concat()
}

fn digest_key(model: &str, digest: &str) -> Vec<u8> {
    [model.as_bytes(), &[0], digest.as_bytes()].concat()
}

/// One version of a model; the newest if `version` is absent.
pub fn find(
    reader: &dyn Reader,
    model: &str,
    version: Option<u64>,
) -> Result<ModelVersion, Rejection> {
    let newest: u64 = row::get(reader, NEWEST, model.as_bytes()).ok_or_else(|| {
        Rejection::not_found(format!(
            "no model is called `{model}`: see `mobula models list`"
        ))
    })?;
    let version = version.unwrap_or(newest);
    row::get(reader, VERSIONS, &version_key(model, version)).ok_or_else(|| {
        Rejection::not_found(format!(
            "model `{model}` has no version {version}: it has 1 to {newest}"
        ))
    })
}

fn register(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    new: NewVersion,
) -> Result<ModelVersion, Rejection> {
    check(&new)?;
    let by_digest = digest_key(&new.model, &new.digest);
    if let Some(version) = row::get::<u64>(txn, BY_DIGEST, &by_digest) {
        return find(txn, &new.model, Some(version));
    }
    let newest: u64 = row::get(txn, NEWEST, new.model.as_bytes()).unwrap_or(0);
    if newest >= VERSIONS_MAX {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "model `{}` has {VERSIONS_MAX} versions, the limit: use a new name",
                new.model
            ),
        ));
    }
    if newest == 0 && row::all::<u64>(txn, NEWEST, &[]).len() >= MODELS_MAX {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!("there are {MODELS_MAX} models, the limit: register under a known name"),
        ));
    }
    let version = newest + 1;
    let model = new.model.clone();
    let row = ModelVersion {
        version,
        registered_ms: context.now_ms,
        description: new,
    };
    row::put(txn, VERSIONS, &version_key(&model, version), &row);
    row::put(txn, NEWEST, model.as_bytes(), &version);
    row::put(txn, BY_DIGEST, &by_digest, &version);
    Ok(row)
}

fn check(new: &NewVersion) -> Result<(), Rejection> {
    crate::name::check("a model", &new.model)?;
    let digests = [
        ("digest", &new.digest),
        ("weights_blake3", &new.weights_blake3),
        ("dataset_blake3", &new.dataset_blake3),
    ];
    for (field, value) in digests {
        // Lower case only: a file's name is its digest, letter by letter.
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if value.len() != 64 || !value.bytes().all(is_digit) {
            let shown: String = value.chars().take(80).collect();
            return Err(Rejection::invalid(format!(
                "{field} is `{shown}`: expected 64 lower-case hexadecimal digits"
            )));
        }
    }
    let size = new.training_json.len();
    if size > TRAINING_JSON_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "training_json has {size} bytes, the limit is {TRAINING_JSON_BYTES_MAX}: register what \
             decides the training, not its course"
        )));
    }
    let longest = new.metrics.keys().map(String::len).max().unwrap_or(0);
    if new.metrics.len() > METRICS_MAX || longest > METRIC_NAME_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "{} metrics with names of up to {longest} bytes, the limits are {METRICS_MAX} and \
             {METRIC_NAME_BYTES_MAX}: register fewer, or shorten their names",
            new.metrics.len()
        )));
    }
    Ok(())
}

impl StateModule for Registry {
    fn id(&self) -> ModuleId {
        ModuleId::REGISTRY
    }

    fn name(&self) -> &'static str {
        "registry"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let Command::Register(new) = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        let version = register(context, txn, new)?;
        let response = codec::encode_plain(&version);
        Ok(Applied::changed(self.id(), response))
    }

    fn query(
        &self,
        reader: &dyn Reader,
        _now_ms: u64,
        payload: &[u8],
    ) -> Result<Vec<u8>, Rejection> {
        Ok(match crate::payload::decode(payload, PAYLOAD_BYTES_MAX)? {
            Query::List { after } => {
                let after = after.as_deref().map(str::as_bytes);
                let newest = reader.scan(NEWEST, &[], after, PAGE_ROWS);
                let versions = newest.into_iter().map(|(model, _)| {
                    let model = String::from_utf8(model).expect("a model's name is ASCII");
                    find(reader, &model, None).expect("the newest version of a model exists")
                });
                codec::encode_plain(&versions.collect::<Vec<ModelVersion>>())
            }
            Query::Versions { model, after } => {
                find(reader, &model, None)?;
                let prefix = [model.as_bytes(), &[0]].concat();
                let after = version_key(&model, after);
                let rows = reader.scan(VERSIONS, &prefix, Some(&after), PAGE_ROWS);
                let versions = rows
                    .iter()
                    .map(|(_, bytes)| row::from_bytes(VERSIONS, bytes));
                codec::encode_plain(&versions.collect::<Vec<ModelVersion>>())
            }
            Query::Version { model, version } => {
                codec::encode_plain(&find(reader, &model, version)?)
            }
        })
    }

    fn authorize(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let Command::Register(new) = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        match caller {
            Caller::Client | Caller::Head => Ok(()),
            Caller::Host { job, .. } if job.0 == new.job => Ok(()),
            Caller::Host { .. } | Caller::Node(_) => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                "models are registered by clients, and by jobs that name themselves as their origin",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_scheduler::memory_txn::MemoryTables;

    fn new_version(digest: char) -> NewVersion {
        NewVersion {
            model: "digits".into(),
            digest: digest.to_string().repeat(64),
            size_bytes: 10,
            weights_blake3: "a".repeat(64),
            dataset_blake3: "b".repeat(64),
            job: 3,
            metrics: BTreeMap::from([("accuracy".to_owned(), 0.97)]),
            training_json: "{}".into(),
        }
    }

    fn apply(txn: &mut MemoryTables, new: NewVersion) -> Result<ModelVersion, Rejection> {
        let context = ApplyContext {
            index: 5,
            term: 1,
            now_ms: 7,
        };
        let payload = codec::encode_plain(&Command::Register(new));
        let applied = txn.apply(&Registry, &context, &payload)?;
        Ok(codec::decode(&applied.response, PAYLOAD_BYTES_MAX).unwrap())
    }

    #[test]
    fn versions_count_up_and_the_same_files_are_the_same_version() {
        let mut txn = MemoryTables::default();
        assert_eq!(apply(&mut txn, new_version('1')).unwrap().version, 1);
        assert_eq!(apply(&mut txn, new_version('2')).unwrap().version, 2);
        assert_eq!(apply(&mut txn, new_version('1')).unwrap().version, 1);
        assert_eq!(find(&txn, "digits", None).unwrap().version, 2);
    }

    #[test]
    fn what_does_not_exist_is_named_with_what_does() {
        let mut txn = MemoryTables::default();
        apply(&mut txn, new_version('1')).unwrap();
        let error = find(&txn, "digits", Some(9)).unwrap_err();
        assert_eq!(
            error.message,
            "model `digits` has no version 9: it has 1 to 1"
        );
        assert!(
            find(&txn, "faces", None)
                .unwrap_err()
                .message
                .contains("mobula models list")
        );
    }

    #[test]
    fn bad_names_and_digests_are_refused() {
        let mut txn = MemoryTables::default();
        let bad_name = NewVersion {
            model: "../x".into(),
            ..new_version('1')
        };
        assert!(
            apply(&mut txn, bad_name)
                .unwrap_err()
                .message
                .contains("cannot name a model")
        );
        for digest in ['z', 'A'] {
            let error = apply(&mut txn, new_version(digest)).unwrap_err();
            assert!(error.message.contains("lower-case hexadecimal"), "{error}");
        }
    }

    #[test]
    fn nothing_of_a_version_is_unbounded() {
        let mut txn = MemoryTables::default();
        let metric = |name: String| BTreeMap::from([(name, 1.0)]);
        let cases = [
            (
                NewVersion {
                    training_json: "x".repeat(8 * 1024 + 1),
                    ..new_version('1')
                },
                "training_json has 8193 bytes",
            ),
            (
                NewVersion {
                    metrics: metric("x".repeat(65)),
                    ..new_version('1')
                },
                "names of up to 65 bytes",
            ),
            (
                NewVersion {
                    dataset_blake3: "b".repeat(100_000),
                    ..new_version('1')
                },
                "dataset_blake3 is",
            ),
        ];
        for (new, expected) in cases {
            let error = apply(&mut txn, new).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
            assert!(error.message.len() < 300, "{error}");
        }
    }

    #[test]
    fn lists_come_in_pages_that_the_api_carries() {
        let mut txn = MemoryTables::default();
        let count = PAGE_ROWS as u64 + 10;
        for number in 0..count {
            let mut new = new_version('1');
            new.digest = format!("{number:064x}");
            new.training_json = "x".repeat(TRAINING_JSON_BYTES_MAX);
            apply(&mut txn, new.clone()).unwrap();
            new.model = format!("m{number:04}");
            apply(&mut txn, new).unwrap();
        }
        let ask = |query: &Query| -> Vec<ModelVersion> {
            let bytes = Registry
                .query(&txn, 0, &codec::encode_plain(query))
                .unwrap();
            assert!(bytes.len() < 4 << 20, "{} bytes", bytes.len());
            codec::decode(&bytes, 4 << 20).unwrap()
        };
        let versions = |after| {
            ask(&Query::Versions {
                model: "digits".into(),
                after,
            })
        };
        let first = versions(0);
        let last = first.last().unwrap().version;
        assert_eq!((first.len(), last), (PAGE_ROWS, PAGE_ROWS as u64));
        assert_eq!(versions(last).last().unwrap().version, count);
        assert_eq!(versions(count), []);
        let first = ask(&Query::List { after: None });
        let last = first.last().unwrap().description.model.clone();
        let rest = ask(&Query::List { after: Some(last) });
        assert_eq!(
            (first.len(), first.len() + rest.len()),
            (PAGE_ROWS, count as usize + 1)
        );
    }

    #[test]
    fn a_job_registers_what_came_of_itself_only() {
        use mobula_core::id::{JobId, NodeId};
        let payload = codec::encode_plain(&Command::Register(new_version('1')));
        let host = |job| Caller::Host {
            job: JobId(job),
            node: NodeId(1),
        };
        assert!(Registry.authorize(&host(3), &payload).is_ok());
        assert!(Registry.authorize(&Caller::Client, &payload).is_ok());
        let error = Registry.authorize(&host(4), &payload).unwrap_err();
        assert_eq!(error.code, ErrorCode::PermissionDenied);
    }
}
