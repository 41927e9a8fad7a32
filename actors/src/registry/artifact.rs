//! A version's file, whichever kind it is.

use bytes::Bytes;
use mobula_storage::blob::BlobStore;

use super::imported_file::{self, ImportedFile};
use super::version_file::{VersionFile, VersionFileError, fetch};

/// What a version is made of.
#[derive(Debug, Clone, PartialEq)]
pub enum Artifact {
    /// It was trained here.
    Trained(Box<VersionFile>),
    /// It was made elsewhere.
    Imported(ImportedFile),
}

impl Artifact {
    /// Loads the file of this name, and verifies all of it.
    pub async fn load(
        blobs: &BlobStore,
        digest: &str,
        size_bytes: u64,
    ) -> Result<Self, VersionFileError> {
        Self::from_bytes(&fetch(blobs, digest, size_bytes).await?)
    }

    /// The version that verified `bytes` spell.
    pub fn from_bytes(bytes: &Bytes) -> Result<Self, VersionFileError> {
        if imported_file::is_imported(bytes) {
            return ImportedFile::from_bytes(bytes).map(Artifact::Imported);
        }
        VersionFile::from_bytes(bytes).map(|file| Artifact::Trained(Box::new(file)))
    }
}
