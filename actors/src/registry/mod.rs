//! The model registry: immutable versions, each named by the digest of its file.
//!
//! * [`version_file`]: what a version consists of, as one verified file in the object store.
//! * [`state`]: the replicated table (pure).
//! * [`client`]: what jobs and the command line ask it, and how a job publishes a version.

pub mod client;
pub mod state;
pub mod version_file;

pub use state::{ModelVersion, NewVersion, Registry};
pub use version_file::{Provenance, VersionFile, VersionFileError};
