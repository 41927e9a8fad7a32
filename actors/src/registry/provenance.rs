//! Where a version came from, beyond what its [`NewVersion`] says: what a promotion to production asks for.
//!
//! Invariant: what is not known is absent, never made up; an absent field keeps a version out of production
//! and is named.

use std::collections::BTreeMap;

use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

use super::versions::{ModelVersion, NewVersion, check_digest};

/// The longest text of a field, in bytes.
const TEXT_BYTES_MAX: usize = 512;

/// Facts about the environment: a processor, its instructions, a system.
const ENVIRONMENT_MAX: usize = 16;

/// The program that trained a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Code {
    /// What it calls itself, with its version.
    pub reference: String,
    /// BLAKE3 of the program's file, in hex.
    pub blake3: String,
}

/// A checkpoint, as the object store names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointOrigin {
    /// Its manifest.
    pub manifest: String,
    /// BLAKE3 of the manifest, in hex.
    pub digest: String,
}

/// What the weights began as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Parent {
    /// Drawn from the seed.
    Seed,
    /// Another job's weights.
    Checkpoint(CheckpointOrigin),
}

/// Where a version came from. Every field may be absent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Provenance {
    /// SHA-256 of the version's file, in hex: what other tools than ours name it by.
    pub sha256: Option<String>,
    /// The program.
    pub code: Option<Code>,
    /// The machine that decided its bits: processor, instructions, system. Empty: not known.
    pub environment: BTreeMap<String, String>,
    /// The seed of everything random.
    pub seed: Option<u64>,
    /// What the weights began as.
    pub parent: Option<Parent>,
    /// The checkpoint that it is.
    pub checkpoint: Option<CheckpointOrigin>,
    /// BLAKE3 of the run's record in the object store, in hex.
    pub run_record: Option<String>,
}

impl Provenance {
    /// Refuses what is not bounded, and digests that are none.
    pub(super) fn check(&self) -> Result<(), Rejection> {
        let digests = [
            ("sha256", &self.sha256),
            ("run_record", &self.run_record),
            (
                "code.blake3",
                &self.code.as_ref().map(|code| code.blake3.clone()),
            ),
        ];
        for (field, value) in digests {
            if let Some(value) = value {
                check_digest(field, value)?;
            }
        }
        let parent = match &self.parent {
            Some(Parent::Checkpoint(checkpoint)) => Some(checkpoint),
            _ => None,
        };
        for checkpoint in [parent, self.checkpoint.as_ref()].into_iter().flatten() {
            check_digest("a checkpoint's digest", &checkpoint.digest)?;
            check_text("a manifest's name", &checkpoint.manifest)?;
        }
        if let Some(code) = &self.code {
            check_text("code.reference", &code.reference)?;
        }
        if self.environment.len() > ENVIRONMENT_MAX {
            return Err(Rejection::invalid(format!(
                "environment has {} facts, the limit is {ENVIRONMENT_MAX}: leave some out",
                self.environment.len()
            )));
        }
        for (name, value) in &self.environment {
            check_text("a fact's name", name)?;
            check_text("a fact of the environment", value)?;
        }
        Ok(())
    }
}

fn check_text(what: &str, text: &str) -> Result<(), Rejection> {
    if !text.is_empty() && text.len() <= TEXT_BYTES_MAX {
        return Ok(());
    }
    Err(Rejection::invalid(format!(
        "{what} has {} bytes: expected 1 to {TEXT_BYTES_MAX}",
        text.len()
    )))
}

/// What production needs and this version lacks, by name.
#[must_use]
pub fn missing(version: &ModelVersion, provenance: Option<&Provenance>) -> Vec<&'static str> {
    let none = Provenance::default();
    let provenance = provenance.unwrap_or(&none);
    let NewVersion {
        metrics,
        training_json,
        dataset_blake3,
        ..
    } = &version.description;
    let hyperparameters: Option<serde_json::Map<String, serde_json::Value>> =
        serde_json::from_str(training_json).ok();
    [
        ("artifact_sha256", provenance.sha256.is_none()),
        ("dataset", dataset_blake3.is_empty()),
        ("code", provenance.code.is_none()),
        ("environment", provenance.environment.is_empty()),
        (
            "hyperparameters",
            hyperparameters.is_none_or(|map| map.is_empty()),
        ),
        ("seed", provenance.seed.is_none()),
        ("parent_checkpoint", provenance.parent.is_none()),
        ("run_record", provenance.run_record.is_none()),
        ("metrics", metrics.is_empty()),
    ]
    .into_iter()
    .filter_map(|(field, is_missing)| is_missing.then_some(field))
    .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::registry::versions::tests::new_version;

    /// Nothing is missing.
    pub(in crate::registry) fn complete() -> Provenance {
        Provenance {
            sha256: Some("5".repeat(64)),
            code: Some(Code {
                reference: "mobula 0.1.0".to_owned(),
                blake3: "6".repeat(64),
            }),
            environment: [("os".to_owned(), "linux".to_owned())].into(),
            seed: Some(7),
            parent: Some(Parent::Seed),
            checkpoint: None,
            run_record: Some("7".repeat(64)),
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let version = ModelVersion {
            version: 1,
            registered_ms: 0,
            description: NewVersion {
                training_json: r#"{"steps":3}"#.to_owned(),
                ..new_version('1')
            },
        };
        assert_eq!(missing(&version, Some(&complete())), Vec::<&str>::new());
        let without = |change: fn(&mut Provenance)| {
            let mut provenance = complete();
            change(&mut provenance);
            missing(&version, Some(&provenance))
        };
        assert_eq!(without(|p| p.sha256 = None), ["artifact_sha256"]);
        assert_eq!(without(|p| p.code = None), ["code"]);
        assert_eq!(without(|p| p.environment.clear()), ["environment"]);
        assert_eq!(without(|p| p.seed = None), ["seed"]);
        assert_eq!(without(|p| p.parent = None), ["parent_checkpoint"]);
        assert_eq!(without(|p| p.run_record = None), ["run_record"]);
        let mut bare = version;
        bare.description.training_json = "{}".to_owned();
        bare.description.metrics.clear();
        assert_eq!(
            missing(&bare, Some(&complete())),
            ["hyperparameters", "metrics"]
        );
        assert_eq!(missing(&bare, None).len(), 8);
    }

    #[test]
    fn nothing_of_it_is_unbounded() {
        complete().check().unwrap();
        let refused = |change: fn(&mut Provenance)| {
            let mut provenance = complete();
            change(&mut provenance);
            provenance.check().unwrap_err().message
        };
        let digest = refused(|p| p.sha256 = Some("5".repeat(63)));
        assert!(digest.contains("sha256 is"), "{digest}");
        let manifest = refused(|p| {
            p.parent = Some(Parent::Checkpoint(CheckpointOrigin {
                manifest: "x".repeat(513),
                digest: "5".repeat(64),
            }));
        });
        assert!(manifest.contains("513 bytes"), "{manifest}");
        let facts = refused(|p| {
            p.environment = (0..17).map(|n| (n.to_string(), "a".to_owned())).collect();
        });
        assert!(facts.contains("17 facts"), "{facts}");
    }
}
