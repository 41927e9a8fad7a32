//! The file of a version that was made elsewhere: what other tools wrote, as they wrote it, with a description before it.
//!
//! Layout: eight bytes of magic, the layout's version (u32, little-endian), the length of the description in bytes (u32,
//! little-endian), the encoded [`Description`], and the files, one after the other in its order. It is stored as
//! `models/<blake3>` and never changes.
//!
//! Invariants:
//! 1. The same content is the same bytes, hence the same name.
//! 2. The files are the last bytes, unchanged: whoever has other tools can cut them out.

use std::collections::BTreeMap;

use bytes::Bytes;
use mobula_core::codec;
use mobula_storage::blob::BlobStore;
use serde::{Deserialize, Serialize};

use super::version_file::{StoredVersion, VersionFileError, store_bytes};
use crate::serving::encoder::WEIGHTS_FILE;
use crate::serving::oip::TensorMetadata;

/// Tells these files from others.
const MAGIC: &[u8; 8] = b"MOBULAIM";

/// The layout that this code writes.
const LAYOUT: u32 = 1;

const HEADER_BYTES: usize = MAGIC.len() + 2 * size_of::<u32>();

/// The largest description: some names and labels for each of a model's tensors.
const DESCRIPTION_BYTES_MAX: usize = 1 << 20;

/// How a model is written. Append-only: positions are tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelFormat {
    /// One file of the Open Neural Network Exchange.
    Onnx,
    /// An encoder of texts: the weights, the description of the network and the tokenizer, as Hugging Face has them.
    Encoder,
}

impl ModelFormat {
    /// What endpoints call it.
    #[must_use]
    pub fn platform(self) -> &'static str {
        match self {
            ModelFormat::Onnx => "mobula_onnx",
            ModelFormat::Encoder => "mobula_encoder",
        }
    }

    /// What the file with its weights is called.
    #[must_use]
    pub fn file_name(self) -> &'static str {
        match self {
            ModelFormat::Onnx => "model.onnx",
            ModelFormat::Encoder => WEIGHTS_FILE,
        }
    }
}

/// What a model takes and gives, as it was found when it was registered, and how much of it there is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// The model's name.
    pub model_name: String,
    /// How it is written.
    pub format: ModelFormat,
    /// The files and their sizes in bytes, in the order in which they follow.
    pub files: BTreeMap<String, u64>,
    /// The inputs, with the batch dimension if it has one.
    pub inputs: Vec<TensorMetadata>,
    /// The outputs.
    pub outputs: Vec<TensorMetadata>,
    /// Rows of a request, at most; 0 if the first dimension is no batch.
    pub max_batch_size: u32,
}

/// A version that was made elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportedFile {
    /// What it takes and gives.
    pub description: Description,
    /// The files, one after the other.
    content: Bytes,
}

/// Whether these bytes claim to be such a file.
#[must_use]
pub(super) fn is_imported(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

impl ImportedFile {
    /// A version of these files, whose sizes the description is given.
    #[must_use]
    pub fn new(mut description: Description, files: &BTreeMap<String, Bytes>) -> Self {
        description.files = files
            .iter()
            .map(|(name, bytes)| (name.clone(), bytes.len() as u64))
            .collect();
        let content: Vec<u8> = files
            .values()
            .flat_map(|bytes| bytes.iter().copied())
            .collect();
        ImportedFile {
            description,
            content: content.into(),
        }
    }

    /// One of its files.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<Bytes> {
        let mut begin = 0u64;
        for (known, size) in &self.description.files {
            let end = begin + size;
            if known == name {
                // The sizes add up to the content: `from_bytes` and `new` see to that.
                let range = usize::try_from(begin).ok()?..usize::try_from(end).ok()?;
                return Some(self.content.slice(range));
            }
            begin = end;
        }
        None
    }

    /// The file's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let description = codec::encode_plain(&self.description);
        let length = u32::try_from(description.len()).expect("a description is small");
        let mut bytes = MAGIC.to_vec();
        bytes.extend(LAYOUT.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(description);
        bytes.extend(&self.content);
        bytes
    }

    /// The version that verified `bytes` spell.
    pub fn from_bytes(bytes: &Bytes) -> Result<Self, VersionFileError> {
        let malformed = |reason: String| VersionFileError::MalformedImport(reason);
        if !is_imported(bytes) || bytes.len() < HEADER_BYTES {
            let size = bytes.len();
            return Err(malformed(format!(
                "it has {size} bytes and does not begin as one"
            )));
        }
        let number = |at: usize| {
            let bytes = &bytes[at..at + size_of::<u32>()];
            u32::from_le_bytes(bytes.try_into().expect("the header has four bytes there"))
        };
        let (layout, length) = (number(MAGIC.len()), number(MAGIC.len() + 4) as usize);
        if layout != LAYOUT {
            return Err(malformed(format!("it is of layout {layout}")));
        }
        let content = HEADER_BYTES + length;
        if length > DESCRIPTION_BYTES_MAX || content > bytes.len() {
            return Err(malformed(format!(
                "its description claims {length} bytes of {}, and may have {DESCRIPTION_BYTES_MAX}",
                bytes.len() - HEADER_BYTES
            )));
        }
        let description = &bytes[HEADER_BYTES..content];
        let description: Description = codec::decode(description, DESCRIPTION_BYTES_MAX)
            .map_err(|error| malformed(error.to_string()))?;
        let content = bytes.slice(content..);
        let mut sizes = description.files.values();
        let claimed = sizes.try_fold(0u64, |sum, size| sum.checked_add(*size));
        if claimed != Some(content.len() as u64) {
            return Err(malformed(format!(
                "its files claim {claimed:?} bytes, {} follow",
                content.len()
            )));
        }
        Ok(ImportedFile {
            description,
            content,
        })
    }

    /// Stores the file under its name.
    pub async fn store(&self, blobs: &BlobStore) -> Result<StoredVersion, VersionFileError> {
        store_bytes(blobs, self.to_bytes()).await
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::registry::artifact::Artifact;
    use crate::registry::version_file::VersionFile;
    use crate::serving::oip::Datatype;
    use mobula_storage::blob::S3Options;

    fn imported() -> ImportedFile {
        let tensor = |name: &str| TensorMetadata {
            name: name.to_owned(),
            datatype: Datatype::Fp32,
            shape: vec![-1, 2],
            labels: Vec::new(),
        };
        let description = Description {
            model_name: "m".into(),
            format: ModelFormat::Onnx,
            files: BTreeMap::new(),
            inputs: vec![tensor("x")],
            outputs: vec![tensor("y")],
            max_batch_size: 128,
        };
        let files = [("b", "second"), ("a", "first")];
        let files = files.map(|(name, text)| (name.to_owned(), Bytes::from(text)));
        ImportedFile::new(description, &files.into())
    }

    #[tokio::test]
    async fn what_was_stored_comes_back_file_by_file() {
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        let file = imported();
        let stored = file.store(&blobs).await.unwrap();
        let loaded = Artifact::load(&blobs, &stored.digest, stored.size_bytes).await;
        assert_eq!(loaded.unwrap(), Artifact::Imported(file.clone()));
        assert_eq!(file.file("b").unwrap(), "second");
        assert_eq!(file.file("a").unwrap(), "first");
        assert_eq!(file.file("c"), None);
        // Who wants what only a training leaves is told that there was none.
        let error = VersionFile::load(&blobs, &stored.digest, stored.size_bytes)
            .await
            .unwrap_err();
        assert!(matches!(error, VersionFileError::Imported), "{error}");
    }

    #[test]
    fn every_cut_and_every_false_size_is_refused() {
        let bytes = Bytes::from(imported().to_bytes());
        for length in 0..bytes.len() {
            assert!(
                ImportedFile::from_bytes(&bytes.slice(..length)).is_err(),
                "{length}"
            );
        }
        let longer = Bytes::from([&bytes[..], b"x"].concat());
        let error = ImportedFile::from_bytes(&longer).unwrap_err();
        assert!(error.to_string().contains("12 follow"), "{error}");
        let mut claims = bytes.to_vec();
        claims[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = ImportedFile::from_bytes(&claims.into()).unwrap_err();
        assert!(error.to_string().contains("4294967295 bytes of"), "{error}");
    }
}
