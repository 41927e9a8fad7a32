//! Where bytes at rest are.

use serde::{Deserialize, Serialize};

/// An object store, without its secrets: each machine takes those from its own environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageLocation {
    /// `file:///…`, `s3://bucket/prefix` …
    pub url: String,
    /// Endpoint of an S3-compatible server.
    pub endpoint: Option<String>,
    /// Region.
    pub region: Option<String>,
    /// Whether the endpoint may be plain HTTP.
    pub allow_http: bool,
    /// The environment variable that holds the access key.
    pub access_key_env: String,
    /// The environment variable that holds the secret key.
    pub secret_key_env: String,
}
