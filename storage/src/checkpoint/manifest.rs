//! What a checkpoint consists of, as JSON that a person can read.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use mobula_core::id::{Incarnation, JobId};
use serde::{Deserialize, Serialize};

use super::ChunkRef;
use crate::digest::Digest;

/// The format of manifests; a reader knows exactly one.
const FORMAT: u32 = 1;

/// The largest manifest: some 150 000 chunks, 1.2 TB at the usual chunk size.
pub(super) const MANIFEST_LIMIT_BYTES: u64 = 16 * 1024 * 1024;

/// The folder of all manifests.
pub(super) const MANIFEST_FOLDER: &str = "manifest";

/// A named part of a checkpoint's bytes, such as one tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// Its name, unique in the checkpoint.
    pub name: String,
    /// Where it begins.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

/// Everything about a checkpoint but its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The manifest's own format.
    pub format: u32,
    /// The job.
    pub job: JobId,
    /// The step after which the state was taken.
    pub step: u64,
    /// The incarnation of the actor that wrote it.
    pub incarnation: Incarnation,
    /// The digest of the manifest that the run continued from.
    pub parent: Option<Digest>,
    /// The length of all chunks together.
    pub total_bytes: u64,
    /// The hash of all bytes together.
    pub state_blake3: Digest,
    /// The chunks, in order.
    pub chunks: Vec<ChunkRef>,
    /// The named parts.
    pub sections: Vec<Section>,
    /// What the writer wants to find again: fingerprint, seed, metrics.
    pub metadata: BTreeMap<String, String>,
}

/// A manifest that contradicts itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the manifest is not valid: {reason}")]
pub struct InvalidManifest {
    reason: String,
}

fn invalid(reason: impl Into<String>) -> InvalidManifest {
    InvalidManifest {
        reason: reason.into(),
    }
}

/// Where a manifest is, and what it must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestRef {
    /// Its name in the store.
    pub path: String,
    /// The hash of its bytes.
    pub digest: Digest,
}

/// What a manifest's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ManifestName {
    /// The job.
    pub job: JobId,
    /// The step.
    pub step: u64,
    /// The writer's incarnation.
    pub incarnation: Incarnation,
}

/// The name of a manifest: sorted by step within its job, and different for each incarnation.
#[must_use]
pub fn manifest_path(job: JobId, step: u64, incarnation: Incarnation) -> String {
    format!("{}/{step:012}-{}.json", job_folder(job), incarnation.0)
}

pub(super) fn job_folder(job: JobId) -> String {
    format!("{MANIFEST_FOLDER}/{job}")
}

impl ManifestName {
    /// Reads a manifest's name; `None` for any other name.
    #[must_use]
    pub fn parse(path: &str) -> Option<Self> {
        let (job, file) = path
            .strip_prefix(MANIFEST_FOLDER)?
            .strip_prefix('/')?
            .split_once('/')?;
        let (step, incarnation) = file.strip_suffix(".json")?.split_once('-')?;
        let name = ManifestName {
            job: job.parse().ok()?,
            step: step.parse().ok()?,
            incarnation: Incarnation(incarnation.parse().ok()?),
        };
        (name.path() == path).then_some(name)
    }

    /// The name itself.
    #[must_use]
    pub fn path(&self) -> String {
        manifest_path(self.job, self.step, self.incarnation)
    }
}

impl Manifest {
    /// The current format.
    pub(super) const FORMAT: u32 = FORMAT;

    /// Its name in the store.
    #[must_use]
    pub fn path(&self) -> String {
        manifest_path(self.job, self.step, self.incarnation)
    }

    /// The part called `name`.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// Its bytes: the same for the same manifest, because fields and maps are ordered.
    pub(super) fn to_bytes(&self) -> Bytes {
        serde_json::to_vec_pretty(self)
            .expect("a manifest holds only strings and numbers")
            .into()
    }

    /// Reads and checks a manifest.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, InvalidManifest> {
        let manifest: Manifest =
            serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks that its parts fit each other.
    pub(super) fn check(&self) -> Result<(), InvalidManifest> {
        if self.format != FORMAT {
            let format = self.format;
            return Err(invalid(format!(
                "its format is {format}, this binary reads {FORMAT}"
            )));
        }
        let sum = self
            .chunks
            .iter()
            .try_fold(0_u64, |sum, chunk| sum.checked_add(chunk.length));
        if sum != Some(self.total_bytes) {
            let total = self.total_bytes;
            return Err(invalid(format!(
                "its chunks do not add up to {total} bytes"
            )));
        }
        let mut names = BTreeSet::new();
        for Section {
            name,
            offset,
            length,
        } in &self.sections
        {
            if !names.insert(name) {
                return Err(invalid(format!("two sections are called `{name}`")));
            }
            let end = offset.checked_add(*length);
            if end.is_none_or(|end| end > self.total_bytes) {
                return Err(invalid(format!(
                    "section `{name}` ends behind the last byte"
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let part = Digest::of(b"part");
        Manifest {
            format: FORMAT,
            job: JobId(3),
            step: 40,
            incarnation: Incarnation(17),
            parent: Some(Digest::of(b"parent")),
            total_bytes: 12,
            state_blake3: part,
            chunks: vec![
                ChunkRef {
                    blake3: part,
                    length: 8,
                },
                ChunkRef {
                    blake3: part,
                    length: 4,
                },
            ],
            sections: vec![Section {
                name: "w".to_owned(),
                offset: 4,
                length: 8,
            }],
            metadata: BTreeMap::from([("seed".to_owned(), "7".to_owned())]),
        }
    }

    #[test]
    fn a_manifest_survives_the_round_trip_and_has_one_spelling() {
        let bytes = manifest().to_bytes();
        let read = Manifest::from_bytes(&bytes).unwrap();
        assert_eq!(read, manifest());
        assert_eq!(read.to_bytes(), bytes);
        assert_eq!(read.section("w").unwrap().offset, 4);
        assert_eq!(read.section("v"), None);
    }

    #[test]
    fn names_sort_by_step_and_parse_back() {
        let path = manifest().path();
        assert_eq!(path, "manifest/job-3/000000000040-17.json");
        let name = ManifestName {
            job: JobId(3),
            step: 40,
            incarnation: Incarnation(17),
        };
        assert_eq!(ManifestName::parse(&path), Some(name));
        for other in [
            "manifest/job-3/40-17.json",
            "manifest/job-3/000000000040-17.json.tmp",
            "manifest/job-3/x.json",
            "chunks/0",
        ] {
            assert_eq!(ManifestName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn contradictions_are_refused_with_their_reason() {
        let check = |change: &dyn Fn(&mut Manifest), expect: &str| {
            let mut manifest = manifest();
            change(&mut manifest);
            let error = Manifest::from_bytes(&manifest.to_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.contains(expect), "{error}");
        };
        check(&|m| m.format = 2, "format is 2");
        check(&|m| m.total_bytes = 13, "do not add up");
        check(&|m| m.chunks[0].length = u64::MAX, "do not add up");
        check(&|m| m.sections[0].offset = 5, "behind the last byte");
        check(&|m| m.sections[0].length = u64::MAX, "behind the last byte");
        check(&|m| m.sections.push(m.sections[0].clone()), "two sections");
        assert!(Manifest::from_bytes(b"{}").is_err());
    }
}
