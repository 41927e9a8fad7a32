//! What jobs and the command line ask the registry.

use mobula::Cluster;
use mobula_core::control::ModuleId;

use super::state::{Command, ModelVersion, NewVersion, Query};
use super::version_file::{VersionFile, VersionFileError};
use crate::ask;
use crate::storage::open_blobs;

/// Why a version was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Its file was not stored. Publishing again is safe.
    #[error("the version's file: {0}")]
    File(#[from] VersionFileError),
    /// It was not registered. Publishing again is safe.
    #[error(transparent)]
    Register(#[from] mobula::Error),
}

/// Stores a version's file, then registers it. Doing so again is the same version.
/// `training_json` is the job's specification.
pub async fn publish(
    cluster: &Cluster,
    file: &VersionFile,
    training_json: String,
) -> Result<ModelVersion, PublishError> {
    let location = cluster.storage().ok_or_else(|| {
        mobula::Error::NotInCluster("only a process of the cluster can publish a model".to_owned())
    })?;
    let blobs = open_blobs(location).map_err(VersionFileError::from)?;
    let stored = file.store(&blobs).await?;
    let provenance = file.provenance.clone();
    let new = NewVersion {
        model: file.model_name.clone(),
        digest: stored.digest,
        size_bytes: stored.size_bytes,
        weights_blake3: provenance.weights_blake3,
        dataset_blake3: provenance.dataset_blake3,
        job: provenance.job,
        metrics: provenance.metrics,
        training_json,
    };
    Ok(register(cluster, new).await?)
}

/// Adds a version; the same files of a model again are the same version.
pub async fn register(cluster: &Cluster, new: NewVersion) -> mobula::Result<ModelVersion> {
    let command = Command::Register(new);
    let answer = ask::apply(cluster, ModuleId::REGISTRY, "register a model", &command).await?;
    ask::answer(&answer)
}

/// The newest version of every model, by name.
pub async fn list(cluster: &Cluster) -> mobula::Result<Vec<ModelVersion>> {
    let mut models: Vec<ModelVersion> = Vec::new();
    loop {
        let after = models.last().map(|last| last.description.model.clone());
        let query = Query::List { after };
        let page: Vec<ModelVersion> =
            ask::query(cluster, ModuleId::REGISTRY, "list models", &query).await?;
        if page.is_empty() {
            return Ok(models);
        }
        models.extend(page);
    }
}

/// All versions of a model, oldest first.
pub async fn versions(cluster: &Cluster, model: &str) -> mobula::Result<Vec<ModelVersion>> {
    let mut versions: Vec<ModelVersion> = Vec::new();
    loop {
        let query = Query::Versions {
            model: model.to_owned(),
            after: versions.last().map_or(0, |last| last.version),
        };
        let page: Vec<ModelVersion> =
            ask::query(cluster, ModuleId::REGISTRY, "look up a model", &query).await?;
        if page.is_empty() {
            return Ok(versions);
        }
        versions.extend(page);
    }
}

/// One version of a model; the newest if `version` is absent.
pub async fn version(
    cluster: &Cluster,
    model: &str,
    version: Option<u64>,
) -> mobula::Result<ModelVersion> {
    let query = Query::Version {
        model: model.to_owned(),
        version,
    };
    ask::query(cluster, ModuleId::REGISTRY, "look up a model", &query).await
}
