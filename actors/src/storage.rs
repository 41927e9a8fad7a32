//! From what a process of the cluster knows to the object store that it shares with the others.

use mobula::StorageLocation;
use mobula_storage::blob::{BlobError, BlobStore, S3Options};

/// Opens the cluster's object store, with the secrets of this machine's own environment.
pub fn open_blobs(storage: &StorageLocation) -> Result<BlobStore, BlobError> {
    BlobStore::open(&storage.url, &S3Options::of(storage))
}
