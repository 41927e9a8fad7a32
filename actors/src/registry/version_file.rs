//! The file of a model version: all that a replica and a monitor need, named by its BLAKE3.
//!
//! Layout: eight bytes of magic, the format's version (u32, little-endian), then the encoded
//! [`VersionFile`]. In format 3 the length of that (u64, little-endian) stands before it, and its [`Population`] behind it. It is
//! stored as `models/<blake3>` and never changes.
//!
//! Invariants:
//! 1. The same content is the same bytes, hence the same name.
//! 2. Nothing of a file is believed before the hash of all of its bytes is verified.
//! 3. A file without a population is written in format 2, which releases before format 3 read too.

use std::collections::BTreeMap;

use bytes::Bytes;
use candle_core::Device;
use mobula_core::codec;
use mobula_storage::blob::{BlobError, BlobStore};
use serde::{Deserialize, Serialize};

use super::{hex, imported_file, merkle};
use crate::drift::sketches::Population;
use crate::drift::{Reference, ReferenceError};
use crate::training::data::SampleShape;
use crate::training::model::{Model, ModelError};
use crate::training::models::ModelSpec;
use crate::training::reference::ReferenceData;

/// Tells our files from others.
const MAGIC: &[u8; 8] = b"MOBULAMV";

/// The format of a file without a population.
const FORMAT: u32 = 2;

/// The format of a file with one, the newest.
const FORMAT_WITH_POPULATION: u32 = 3;

const HEADER_BYTES: usize = MAGIC.len() + size_of::<u32>();

/// The largest file: a replica holds it in memory twice while it loads. Enough for 64 Mi
/// parameters with their reference data.
pub const VERSION_FILE_BYTES_MAX: u64 = 320 << 20;

/// Where each version came from and what it is worth. The registry has the same, but a file must
/// be understood without one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The job that trained it.
    pub job: u64,
    /// The steps it was trained for.
    pub steps: u64,
    /// BLAKE3 of weights and optimizer state, in hex.
    pub weights_blake3: String,
    /// BLAKE3 of the data set's source bytes, in hex.
    pub dataset_blake3: String,
    /// What was measured on held-out data: `accuracy` …
    pub metrics: BTreeMap<String, f64>,
}

/// A model version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionFile {
    /// The model's name.
    pub model_name: String,
    /// What kind of network it is.
    pub model: ModelSpec,
    /// What the samples look like that it was trained on.
    pub samples: SampleShape,
    /// Its parameters, flat.
    pub parameters: Vec<f32>,
    /// The name of each class, in the order of the outputs.
    pub labels: Vec<String>,
    /// What it was trained on, for drift detection.
    pub reference: ReferenceData,
    /// Where it came from.
    pub provenance: Provenance,
    /// All rows of what it was trained on, where the reference is a sample of them; encoded behind the rest.
    #[serde(skip)]
    pub population: Option<Population>,
}

/// A version's file in the object store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredVersion {
    /// BLAKE3 of its bytes, in hex.
    pub digest: String,
    /// SHA-256 of its bytes, in hex: what signatures name it by.
    pub sha256: String,
    /// Its size.
    pub size_bytes: u64,
}

/// Why a version file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VersionFileError {
    /// The object store failed.
    #[error(transparent)]
    Store(#[from] BlobError),
    /// Larger than what is allowed.
    #[error(
        "the version file has {size_bytes} bytes, the limit is {limit_bytes}; use a smaller model"
    )]
    TooLarge {
        /// Its size.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The bytes are not those that were registered.
    #[error(
        "{path} is damaged: expected {expected_bytes} bytes with BLAKE3 {expected}, found \
         {found_bytes} bytes with {found}; train and register the model again"
    )]
    Damaged {
        /// The blob's name.
        path: String,
        /// The hash in its name.
        expected: String,
        /// The registered size.
        expected_bytes: u64,
        /// The hash of what is there.
        found: String,
        /// The size of what is there.
        found_bytes: u64,
    },
    /// Not a version file, or one of a newer format.
    #[error(
        "not a version file of format {FORMAT} or {FORMAT_WITH_POPULATION}: {0}; use the release that wrote it"
    )]
    Malformed(String),
    /// A version that was made elsewhere, where one is wanted that was trained here.
    #[error(
        "the version was imported: it has no training data, so it is neither watched for drift nor compared"
    )]
    Imported,
    /// Not the file of an imported version, or one of a newer layout.
    #[error("not the file of an imported version: {0}; use the release that wrote it")]
    MalformedImport(String),
    /// The parameters do not fit the network.
    #[error("the version's network cannot be built: {0}")]
    Model(#[from] ModelError),
    /// The reference data cannot be used.
    #[error("the version's reference data cannot be used: {0}")]
    Reference(#[from] ReferenceError),
}

impl VersionFile {
    /// The file's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let file = codec::encode_plain(self);
        match &self.population {
            None => {
                bytes.extend(FORMAT.to_le_bytes());
                bytes.extend(file);
            }
            Some(population) => {
                bytes.extend(FORMAT_WITH_POPULATION.to_le_bytes());
                bytes.extend((file.len() as u64).to_le_bytes());
                bytes.extend(file);
                bytes.extend(population.to_bytes());
            }
        }
        bytes
    }

    /// The version that verified `bytes` spell.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, VersionFileError> {
        let malformed = |reason: String| VersionFileError::Malformed(reason);
        if imported_file::is_imported(bytes) {
            return Err(VersionFileError::Imported);
        }
        let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(malformed(format!("it has {} bytes", bytes.len())));
        };
        let (magic, format) = header.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(malformed("it begins with other bytes".to_owned()));
        }
        let format = u32::from_le_bytes(format.try_into().expect("the header has four bytes left"));
        let limit = usize::try_from(VERSION_FILE_BYTES_MAX).unwrap_or(usize::MAX);
        let (body, population) = match format {
            FORMAT => (body, None),
            FORMAT_WITH_POPULATION => {
                let parts = body.split_first_chunk().and_then(|(length, parts)| {
                    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
                    parts.split_at_checked(length)
                });
                let (body, population) =
                    parts.ok_or_else(|| malformed("it is cut off".to_owned()))?;
                (
                    body,
                    Some(Population::from_bytes(population).map_err(malformed)?),
                )
            }
            _ => return Err(malformed(format!("it is of format {format}"))),
        };
        let file: Self =
            codec::decode(body, limit).map_err(|error| malformed(error.to_string()))?;
        let file = VersionFile { population, ..file };
        // Before anything is computed from the widths of its layers.
        file.model
            .check()
            .map_err(|error| malformed(error.to_string()))?;
        file.samples.check().map_err(malformed)?;
        Ok(file)
    }

    /// The network with its parameters. A user's own network can be built only by a program that it is
    /// linked into.
    pub fn build_model(&self) -> Result<Model, VersionFileError> {
        self.build_model_on(Device::Cpu)
    }

    /// The same, where it is to answer on `device`.
    pub fn build_model_on(&self, device: Device) -> Result<Model, VersionFileError> {
        let model = Model::on(device, &self.model, &self.samples, &self.parameters);
        Ok(model?)
    }

    /// The reference data as drift detection wants it.
    pub fn build_reference(&self) -> Result<Reference, VersionFileError> {
        let data = &self.reference;
        let rows = data.columns.first().map_or(0, Vec::len);
        let are_equal = data.columns.iter().all(|column| column.len() == rows);
        if !are_equal || data.columns.len() != data.feature_names.len() {
            return Err(VersionFileError::Malformed(
                "the columns of its reference data differ in length, or lack names".to_owned(),
            ));
        }
        let row_major: Vec<f32> = (0..rows)
            .flat_map(|row| data.columns.iter().map(move |column| column[row]))
            .collect();

        let sample = Reference::new(data.feature_names.clone(), &row_major, &data.predictions)?;
        Ok(match &self.population {
            Some(population) => sample.with_population(population.clone())?,
            None => sample,
        })
    }

    /// Stores the file under its name.
    pub async fn store(&self, blobs: &BlobStore) -> Result<StoredVersion, VersionFileError> {
        store_bytes(blobs, self.to_bytes()).await
    }

    /// Loads the file of this name, and verifies all of it.
    pub async fn load(
        blobs: &BlobStore,
        digest: &str,
        size_bytes: u64,
    ) -> Result<Self, VersionFileError> {
        Self::from_bytes(&fetch(blobs, digest, size_bytes).await?)
    }
}

/// Stores the bytes of a version's file under their name.
pub(super) async fn store_bytes(
    blobs: &BlobStore,
    bytes: Vec<u8>,
) -> Result<StoredVersion, VersionFileError> {
    let size_bytes = bytes.len() as u64;
    if size_bytes > VERSION_FILE_BYTES_MAX {
        let limit_bytes = VERSION_FILE_BYTES_MAX;
        return Err(VersionFileError::TooLarge {
            size_bytes,
            limit_bytes,
        });
    }
    let digest = blake3::hash(&bytes).to_string();
    let sha256 = hex::encode(&merkle::hash(&bytes));
    blobs.renew(&path(&digest), bytes.into()).await?;
    Ok(StoredVersion {
        digest,
        sha256,
        size_bytes,
    })
}

/// The bytes of the file of this name, verified.
pub async fn fetch(
    blobs: &BlobStore,
    digest: &str,
    size_bytes: u64,
) -> Result<Bytes, VersionFileError> {
    if size_bytes > VERSION_FILE_BYTES_MAX {
        let limit_bytes = VERSION_FILE_BYTES_MAX;
        return Err(VersionFileError::TooLarge {
            size_bytes,
            limit_bytes,
        });
    }
    let path = path(digest);
    let bytes = blobs.get(&path, VERSION_FILE_BYTES_MAX).await?;
    let found = blake3::hash(&bytes).to_string();
    let found_bytes = bytes.len() as u64;
    if found != digest || found_bytes != size_bytes {
        return Err(VersionFileError::Damaged {
            path,
            expected: digest.to_owned(),
            expected_bytes: size_bytes,
            found,
            found_bytes,
        });
    }
    Ok(bytes)
}

fn path(digest: &str) -> String {
    format!("models/{digest}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::training::data::Dataset;
    use crate::training::reference::{population, reference_sample};
    use crate::training::spec::TrainSpec;
    use mobula_storage::blob::S3Options;

    /// An untrained version of the digits, with real reference data.
    pub(crate) fn digits(rows: usize) -> VersionFile {
        let spec = TrainSpec::digits_mlp("digits");
        let split = Dataset::digits()
            .unwrap()
            .split(spec.seed, spec.held_out_fraction);
        let samples = split.train.shape().clone();
        let model = Model::new(&spec.model, &samples, spec.seed).unwrap();
        VersionFile {
            model_name: spec.name.clone(),
            parameters: model.flat().to_vec(),
            samples,
            labels: (0..10).map(|class| class.to_string()).collect(),
            reference: reference_sample(&model, &split.train, rows, spec.seed).unwrap(),
            provenance: Provenance {
                job: 3,
                steps: 300,
                weights_blake3: "a".repeat(64),
                dataset_blake3: split.train.digest().to_owned(),
                metrics: BTreeMap::from([("accuracy".to_owned(), 0.97)]),
            },
            model: spec.model,
            population: None,
        }
    }

    /// The same, of which not only a sample is known.
    pub(crate) fn digits_with_population(rows: usize) -> VersionFile {
        let spec = TrainSpec::digits_mlp("digits");
        let digits_file = digits(rows);
        let train = Dataset::digits()
            .unwrap()
            .split(spec.seed, spec.held_out_fraction)
            .train;
        VersionFile {
            population: population(&train, &digits_file.reference, spec.seed).unwrap(),
            ..digits_file
        }
    }

    fn memory() -> BlobStore {
        BlobStore::open("memory://", &S3Options::default()).unwrap()
    }

    #[tokio::test]
    async fn a_stored_version_comes_back_with_its_model_and_reference() {
        let (blobs, version) = (memory(), digits(50));
        let stored = version.store(&blobs).await.unwrap();
        assert_eq!(version.store(&blobs).await.unwrap(), stored);
        let loaded = VersionFile::load(&blobs, &stored.digest, stored.size_bytes)
            .await
            .unwrap();
        assert_eq!(loaded, version);
        assert_eq!(loaded.build_model().unwrap().flat(), version.parameters);
        let reference = loaded.build_reference().unwrap();
        assert_eq!((reference.rows(), reference.columns().len()), (50, 64));
        let mut column = version.reference.columns[20].clone();
        column.sort_by(f32::total_cmp);
        assert_eq!(reference.columns()[20].sorted_values(), column);
    }

    #[test]
    fn a_population_is_a_newer_format_and_files_without_one_stay_as_they_were() {
        let format = |bytes: &[u8]| u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let (without, with) = (digits(1000), digits_with_population(1000));
        assert_eq!(
            (format(&without.to_bytes()), format(&with.to_bytes())),
            (2, 3)
        );
        let read = VersionFile::from_bytes(&with.to_bytes()).unwrap();
        assert_eq!(read, with);
        let reference = read.build_reference().unwrap();
        assert_eq!(
            (reference.rows(), reference.population().unwrap().rows()),
            (1000, 1438)
        );
        // A file of the one is none of the other.
        for (file, other) in [(&with, 2u32), (&without, 3)] {
            let mut bytes = file.to_bytes();
            bytes[8..12].copy_from_slice(&other.to_le_bytes());
            let error = VersionFile::from_bytes(&bytes).unwrap_err();
            assert!(matches!(error, VersionFileError::Malformed(_)), "{error}");
        }
        let cut = &with.to_bytes()[..with.to_bytes().len() - 1];
        let error = VersionFile::from_bytes(cut).unwrap_err();
        assert!(
            error.to_string().contains("training rows is cut off"),
            "{error}"
        );
        let mut damaged = with;
        damaged.population = Some(Population::new(&[0.0; 64], 7, 0));
        let error = damaged.build_reference().unwrap_err();
        assert!(error.to_string().contains("does not fit"), "{error}");
    }

    #[tokio::test]
    async fn a_flipped_byte_is_found() {
        let (blobs, version) = (memory(), digits(20));
        let stored = version.store(&blobs).await.unwrap();
        let mut bytes = version.to_bytes();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        blobs
            .renew(&path(&stored.digest), bytes.into())
            .await
            .unwrap();
        let error = VersionFile::load(&blobs, &stored.digest, stored.size_bytes)
            .await
            .unwrap_err();
        assert!(matches!(error, VersionFileError::Damaged { .. }), "{error}");
        let error = VersionFile::load(&blobs, &"0".repeat(64), 5)
            .await
            .unwrap_err();
        assert!(matches!(error, VersionFileError::Store(_)), "{error}");
    }

    #[test]
    fn what_is_not_a_version_file_is_refused() {
        let bytes = digits(20).to_bytes();
        for damaged in [
            vec![],
            b"MOBULAMX\x01\0\0\0".to_vec(),
            b"MOBULAMV\x01\0\0\0".to_vec(),
            bytes[..bytes.len() - 1].to_vec(),
            [bytes.as_slice(), &[0]].concat(),
        ] {
            let error = VersionFile::from_bytes(&damaged).unwrap_err();
            assert!(matches!(error, VersionFileError::Malformed(_)), "{error}");
        }
        let mut nameless = digits(20);
        nameless.reference.feature_names.truncate(32);
        let error = nameless.build_reference().unwrap_err();
        assert!(error.to_string().contains("lack names"), "{error}");
        let mut huge = digits(20);
        huge.model = ModelSpec::Mlp {
            hidden: vec![usize::MAX; 3],
        };
        let error = VersionFile::from_bytes(&huge.to_bytes()).unwrap_err();
        assert!(error.to_string().contains("hidden is"), "{error}");
        let mut short = digits(20);
        short.parameters.pop();
        let short = VersionFile::from_bytes(&short.to_bytes()).unwrap();
        let error = short.build_model().unwrap_err();
        assert!(error.to_string().contains("values where"), "{error}");
        let mut shapeless = digits(20);
        shapeless.samples = SampleShape::Classified {
            features: vec![usize::MAX; 2],
            classes: 10,
        };
        let error = VersionFile::from_bytes(&shapeless.to_bytes()).unwrap_err();
        assert!(error.to_string().contains("a dimension is"), "{error}");
    }
}
