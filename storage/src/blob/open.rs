//! From a URL to an object store.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::storage::StorageLocation;
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use serde::{Deserialize, Serialize};

use super::{BlobError, BlobErrorKind, BlobOperation};

/// A request may take this long: a chunk of 8 MiB over a line of 1 Mbit/s does.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(90);

/// Whoever does not take a connection within this time is called unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What an S3 store needs to know beyond its URL. What is left out comes from the usual `AWS_*`
/// variables, or from the machine's role.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3Options {
    /// URL of a server that is not Amazon's, such as a MinIO: `https://host:9000`.
    pub endpoint: Option<String>,
    /// The bucket's region.
    pub region: Option<String>,
    /// Whether the endpoint may be plain `http`: on a private network, or in tests.
    pub allow_http: bool,
    /// The key's public part.
    pub access_key_id: Option<String>,
    /// The key's secret part.
    pub secret_access_key: Option<String>,
    /// For temporary credentials.
    pub session_token: Option<String>,
}

impl S3Options {
    /// What `location` says, with the secrets from the environment variables that it names.
    #[must_use]
    pub fn of(location: &StorageLocation) -> Self {
        let secret = |variable: &str| {
            std::env::var(variable)
                .ok()
                .filter(|value| !value.is_empty())
        };
        S3Options {
            endpoint: location.endpoint.clone(),
            region: location.region.clone(),
            allow_http: location.allow_http,
            access_key_id: secret(&location.access_key_env),
            secret_access_key: secret(&location.secret_key_env),
            session_token: None,
        }
    }
}

impl fmt::Debug for S3Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Options")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("allow_http", &self.allow_http)
            .field("access_key_id", &self.access_key_id)
            .field(
                "secret_access_key",
                &self.secret_access_key.as_ref().map(|_| "<secret>"),
            )
            .field(
                "session_token",
                &self.session_token.as_ref().map(|_| "<secret>"),
            )
            .finish()
    }
}

pub(super) fn open(url: &str, s3: &S3Options) -> Result<Arc<dyn ObjectStore>, BlobError> {
    let refused =
        |kind, reason: String| BlobError::new(BlobOperation::Open, url, "", kind, reason, 0);
    let Some((scheme, rest)) = url.split_once("://") else {
        let reason = "a blob store is `file:///directory` or `s3://bucket/prefix`".to_owned();
        return Err(refused(BlobErrorKind::InvalidName, reason));
    };
    match scheme {
        "memory" => Ok(Arc::new(InMemory::new())),
        "file" => open_directory(Path::new(rest)).map_err(|(kind, reason)| refused(kind, reason)),
        "s3" if rest.contains('@') => Err(BlobError::new(
            BlobOperation::Open,
            "s3://…",
            "",
            BlobErrorKind::InvalidName,
            "credentials do not belong into the URL: set them in the options or environment".into(),
            0,
        )),
        "s3" => {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                let reason = "it names no bucket: expected `s3://bucket/prefix`".to_owned();
                return Err(refused(BlobErrorKind::InvalidName, reason));
            }
            let store = s3_builder(bucket, s3)
                .build()
                .map_err(|error| refused(BlobErrorKind::InvalidOptions, error.to_string()))?;
            let prefix = object_store::path::Path::parse(prefix)
                .map_err(|error| refused(BlobErrorKind::InvalidName, error.to_string()))?;
            Ok(Arc::new(PrefixStore::new(store, prefix)))
        }
        _ => {
            let reason = format!("the scheme `{scheme}` is not known: use `file` or `s3`");
            Err(refused(BlobErrorKind::InvalidName, reason))
        }
    }
}

fn open_directory(directory: &Path) -> Result<Arc<dyn ObjectStore>, (BlobErrorKind, String)> {
    if !directory.is_absolute() {
        let reason = "a file URL has three slashes and an absolute path".to_owned();
        return Err((BlobErrorKind::InvalidName, reason));
    }
    std::fs::create_dir_all(directory).map_err(|error| {
        let kind = match error.kind() {
            std::io::ErrorKind::PermissionDenied => BlobErrorKind::PermissionDenied,
            std::io::ErrorKind::StorageFull => BlobErrorKind::NoSpace,
            _ => BlobErrorKind::Failed,
        };
        (kind, error.to_string())
    })?;
    let store = LocalFileSystem::new_with_prefix(directory)
        .map_err(|error| (BlobErrorKind::Failed, error.to_string()))?;
    // Off by default: without it, what was acknowledged can be gone after a power cut.
    Ok(Arc::new(store.with_fsync(true)))
}

fn s3_builder(bucket: &str, options: &S3Options) -> AmazonS3Builder {
    let client = ClientOptions::new()
        .with_timeout(REQUEST_TIMEOUT)
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_allow_http(options.allow_http);
    let mut builder = AmazonS3Builder::from_env()
        .with_client_options(client)
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // Retries are counted in one place, `BlobStore::retrying`.
        .with_retry(RetryConfig {
            max_retries: 0,
            ..RetryConfig::default()
        });
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(key) = &options.access_key_id {
        builder = builder.with_access_key_id(key);
    }
    if let Some(secret) = &options.secret_access_key {
        builder = builder.with_secret_access_key(secret);
    }
    if let Some(token) = &options.session_token {
        builder = builder.with_token(token);
    }
    builder
}
