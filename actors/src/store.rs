//! The cluster's object store, as actors and drivers reach it.

use mobula::StorageLocation;
use mobula_storage::blob::{BlobError, BlobStore, S3Options};

/// Opens the store that the head names. Secrets are not in that: each machine has them in the
/// environment, under the names that it gives.
pub fn open_store(location: &StorageLocation) -> Result<BlobStore, BlobError> {
    let secret = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let options = S3Options {
        endpoint: location.endpoint.clone(),
        region: location.region.clone(),
        allow_http: location.allow_http,
        access_key_id: secret(&location.access_key_env),
        secret_access_key: secret(&location.secret_key_env),
        session_token: None,
    };
    BlobStore::open(&location.url, &options)
}
