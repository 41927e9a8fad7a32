//! Versions: what each one is, and how it is registered.
//!
//! Invariants:
//! 1. A version never changes and is never given out again.
//! 2. Registering the same files of a model again is the same version.

use std::collections::BTreeMap;

use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::JobId;
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::events::{self, Event};
use super::policy::data;
use super::provenance::Provenance;
use super::tables::{BY_DIGEST, NEWEST, PROVENANCE, VERSIONS, named_key, version_key};

/// Versions that a model may have: a row has a KiB or two and 15 KiB at the most, so 150 MiB a
/// model at the very most.
const VERSIONS_MAX: u64 = 10_000;

/// Models: the bound on a list of all of them.
const MODELS_MAX: usize = 1_000;

/// The largest specification that is kept of a training job; ours have less than one KiB.
pub(super) const TRAINING_JSON_BYTES_MAX: usize = 8 * 1024;

/// Metrics of a version, and the longest name of one in bytes.
const METRICS_MAX: usize = 64;
const METRIC_NAME_BYTES_MAX: usize = 64;

/// The job of versions that no job trained: that of the system, which trains nothing.
pub const IMPORTED: u64 = JobId::SYSTEM.0;

/// What a new version says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewVersion {
    /// The model's name.
    pub model: String,
    /// BLAKE3 of the version's file in the object store, which also is its name there.
    pub digest: String,
    /// Size of that file, in bytes.
    pub size_bytes: u64,
    /// BLAKE3 of weights and optimizer state, as the training job reported it; of an imported version, of the file that
    /// holds its weights.
    pub weights_blake3: String,
    /// BLAKE3 of the data set's source bytes; empty for an imported version of which nobody said it.
    pub dataset_blake3: String,
    /// The training job; [`IMPORTED`] if there was none.
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

impl ModelVersion {
    /// Whether it was made elsewhere.
    #[must_use]
    pub fn is_imported(&self) -> bool {
        self.description.job == IMPORTED
    }
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

/// Adds a version, with where it came from if that is known.
pub(super) fn register(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    new: NewVersion,
    provenance: Option<&Provenance>,
) -> Result<ModelVersion, Rejection> {
    check(&new)?;
    if let Some(provenance) = provenance {
        provenance.check()?;
    }
    let by_digest = named_key(&new.model, &new.digest);
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
    if let Some(provenance) = provenance {
        row::put(txn, PROVENANCE, &version_key(&model, version), provenance);
    }
    data::note_version(txn, &row);
    let event = Event::Registered {
        model: &model,
        version,
        digest: &row.description.digest,
        dataset_blake3: &row.description.dataset_blake3,
        job: row.description.job,
    };
    events::append(txn, context, &event);
    Ok(row)
}

fn check(new: &NewVersion) -> Result<(), Rejection> {
    crate::name::check("a model", &new.model)?;
    let digests = [
        ("digest", &new.digest),
        ("weights_blake3", &new.weights_blake3),
        ("dataset_blake3", &new.dataset_blake3),
    ];
    let is_unknown =
        |field, value: &str| field == "dataset_blake3" && value.is_empty() && new.job == IMPORTED;
    for (field, value) in digests {
        if !is_unknown(field, value) {
            check_digest(field, value)?;
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

/// Refuses what is no digest of 32 bytes. Lower case only: a file's name is its digest, letter by letter.
pub(super) fn check_digest(field: &str, value: &str) -> Result<(), Rejection> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if value.len() == 64 && value.bytes().all(is_digit) {
        return Ok(());
    }
    let shown: String = value.chars().take(80).collect();
    Err(Rejection::invalid(format!(
        "{field} is `{shown}`: expected 64 lower-case hexadecimal digits"
    )))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::registry::provenance;
    use crate::registry::state::tests::World;

    pub(in crate::registry) fn new_version(digest: char) -> NewVersion {
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

    #[test]
    fn versions_count_up_and_the_same_files_are_the_same_version() {
        let mut world = World::default();
        assert_eq!(world.register(new_version('1')).unwrap().version, 1);
        assert_eq!(world.register(new_version('2')).unwrap().version, 2);
        assert_eq!(world.register(new_version('1')).unwrap().version, 1);
        assert_eq!(find(&world.tables, "digits", None).unwrap().version, 2);
    }

    #[test]
    fn bad_names_and_digests_are_refused() {
        let mut world = World::default();
        let bad_name = NewVersion {
            model: "../x".into(),
            ..new_version('1')
        };
        assert!(
            world
                .register(bad_name)
                .unwrap_err()
                .message
                .contains("cannot name a model")
        );
        for digest in ['z', 'A'] {
            let error = world.register(new_version(digest)).unwrap_err();
            assert!(error.message.contains("lower-case hexadecimal"), "{error}");
        }
    }

    #[test]
    fn only_an_imported_version_may_leave_its_data_unsaid() {
        let mut world = World::default();
        let of = |job| NewVersion {
            dataset_blake3: String::new(),
            job,
            ..new_version('1')
        };
        let error = world.register(of(3)).unwrap_err();
        assert!(error.message.contains("dataset_blake3 is"), "{error}");
        let imported = world.register(of(IMPORTED)).unwrap();
        assert!(imported.is_imported());
        assert!(provenance::missing(&imported, None).contains(&"dataset"));
        assert!(!world.register(new_version('2')).unwrap().is_imported());
    }

    #[test]
    fn nothing_of_a_version_is_unbounded() {
        let mut world = World::default();
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
            let error = world.register(new).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
            assert!(error.message.len() < 300, "{error}");
        }
    }
}
