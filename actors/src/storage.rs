//! From what a process of the cluster knows to the object store that it shares with the others.

use mobula::StorageLocation;
use mobula_storage::blob::{BlobError, BlobStore, S3Options};

/// Opens the cluster's object store. The secrets come from this machine's own environment, under
/// the names that the cluster agreed on.
pub(crate) fn open_blobs(storage: &StorageLocation) -> Result<BlobStore, BlobError> {
    let own = |name: &str| match name {
        "" => None,
        name => std::env::var(name).ok(),
    };
    let options = S3Options {
        endpoint: storage.endpoint.clone(),
        region: storage.region.clone(),
        allow_http: storage.allow_http,
        access_key_id: own(&storage.access_key_env),
        secret_access_key: own(&storage.secret_key_env),
        session_token: None,
    };
    BlobStore::open(&storage.url, &options)
}
