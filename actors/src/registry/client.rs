//! What jobs and the command line ask the registry.

use mobula::Cluster;
use mobula_core::control::ModuleId;
use serde::de::DeserializeOwned;

use super::envelope::Envelope;
use super::events::{EventPage, EventProof};
use super::keys::{KeyRecord, PublicKey, Role};
use super::provenance::Provenance;
use super::search::{Filter, ModelView, Page, Selector, VersionView};
use super::stages::{ModelState, Policy, SignedEdge, StageChange};
use super::state::{Command, ModelVersion, NewVersion, Query};
use super::version_file::{StoredVersion, VersionFile, VersionFileError};
use super::versions::IMPORTED;
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
/// `training_json` is the job's specification; of `origin`, the SHA-256 is filled in here.
pub async fn publish(
    cluster: &Cluster,
    file: &VersionFile,
    training_json: String,
    origin: Provenance,
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
    let command = Command::RegisterRun {
        version: new,
        provenance: Box::new(Provenance {
            sha256: Some(stored.sha256),
            ..origin
        }),
    };
    Ok(change(cluster, "register a model", &command).await?)
}

/// Registers an imported version whose file is stored; `new` is given its name and size, and `origin` its SHA-256.
pub async fn register_imported(
    cluster: &Cluster,
    stored: StoredVersion,
    new: NewVersion,
    origin: Provenance,
) -> mobula::Result<ModelVersion> {
    let command = Command::RegisterRun {
        version: NewVersion {
            digest: stored.digest,
            size_bytes: stored.size_bytes,
            job: IMPORTED,
            ..new
        },
        provenance: Box::new(Provenance {
            sha256: Some(stored.sha256),
            ..origin
        }),
    };
    change(cluster, "register a model", &command).await
}

/// Applies a command, and decodes its answer.
async fn change<A: DeserializeOwned>(
    cluster: &Cluster,
    operation: &str,
    command: &Command,
) -> mobula::Result<A> {
    let answer = ask::apply(cluster, ModuleId::REGISTRY, operation, command).await?;
    ask::answer(&answer)
}

/// Adds a version; the same files of a model again are the same version.
pub async fn register(cluster: &Cluster, new: NewVersion) -> mobula::Result<ModelVersion> {
    change(cluster, "register a model", &Command::Register(new)).await
}

/// Everything that a question brings page by page; `after` asks for what comes behind the last row.
async fn all_pages<T: DeserializeOwned>(
    cluster: &Cluster,
    what: &str,
    after: impl Fn(Option<&T>) -> Query,
) -> mobula::Result<Vec<T>> {
    let mut rows = Vec::new();
    loop {
        let query = after(rows.last());
        let page: Vec<T> = ask::query(cluster, ModuleId::REGISTRY, what, &query).await?;
        if page.is_empty() {
            return Ok(rows);
        }
        rows.extend(page);
    }
}

/// The newest version of every model, by name.
pub async fn list(cluster: &Cluster) -> mobula::Result<Vec<ModelVersion>> {
    let after = |last: Option<&ModelVersion>| Query::List {
        after: last.map(|last| last.description.model.clone()),
    };
    all_pages(cluster, "list models", after).await
}

/// All versions of a model, oldest first.
pub async fn versions(cluster: &Cluster, model: &str) -> mobula::Result<Vec<ModelVersion>> {
    let after = |last: Option<&ModelVersion>| Query::Versions {
        model: model.to_owned(),
        after: last.map_or(0, |last| last.version),
    };
    all_pages(cluster, "look up a model", after).await
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

/// One version with all that is known of it.
pub async fn view(
    cluster: &Cluster,
    model: &str,
    selector: Selector,
) -> mobula::Result<VersionView> {
    let query = Query::View {
        model: model.to_owned(),
        selector,
    };
    ask::query(cluster, ModuleId::REGISTRY, "look up a model", &query).await
}

/// A model, without its versions.
pub async fn model(cluster: &Cluster, model: &str) -> mobula::Result<ModelView> {
    let query = Query::Model {
        model: model.to_owned(),
    };
    ask::query(cluster, ModuleId::REGISTRY, "look up a model", &query).await
}

/// The versions that a filter lets through, at most `limit`, by model and number.
pub async fn search(
    cluster: &Cluster,
    filter: &Filter,
    limit: usize,
) -> mobula::Result<Vec<VersionView>> {
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let query = Query::Search {
            filter: filter.clone(),
            after,
        };
        let page: Page = ask::query(cluster, ModuleId::REGISTRY, "search models", &query).await?;
        found.extend(page.found);
        after = page.next;
        if after.is_none() || found.len() >= limit {
            found.truncate(limit);
            return Ok(found);
        }
    }
}

/// Changes a version's stage.
pub async fn stage(cluster: &Cluster, stage: StageChange) -> mobula::Result<VersionView> {
    change(cluster, "change a stage", &Command::Stage(stage)).await
}

/// The latest signed change of a version's stage.
pub async fn signed(
    cluster: &Cluster,
    model: &str,
    version: u64,
) -> mobula::Result<Option<SignedEdge>> {
    let query = Query::Signed {
        model: model.to_owned(),
        version,
    };
    ask::query(cluster, ModuleId::REGISTRY, "look up a model", &query).await
}

/// Makes an alias name a version, or nothing.
pub async fn alias(
    cluster: &Cluster,
    model: &str,
    alias: &str,
    version: Option<u64>,
    expected_revision: u64,
) -> mobula::Result<ModelState> {
    let command = Command::Alias {
        model: model.to_owned(),
        alias: alias.to_owned(),
        version,
        expected_revision,
    };
    change(cluster, "set an alias", &command).await
}

/// Gives a version a tag, or takes it away.
pub async fn tag(
    cluster: &Cluster,
    model: &str,
    version: u64,
    tag: &str,
    value: Option<String>,
) -> mobula::Result<VersionView> {
    let command = Command::Tag {
        model: model.to_owned(),
        version,
        tag: tag.to_owned(),
        value,
    };
    change(cluster, "tag a model", &command).await
}

/// Sets who decides about a model; a weaker policy has to be signed.
pub async fn set_policy(
    cluster: &Cluster,
    model: &str,
    policy: Policy,
    expected_revision: u64,
    envelope: Option<Envelope>,
) -> mobula::Result<ModelState> {
    let command = Command::SetPolicy {
        model: model.to_owned(),
        policy,
        expected_revision,
        envelope,
    };
    change(cluster, "set a policy", &command).await
}

/// All keys, by name.
pub async fn keys(cluster: &Cluster) -> mobula::Result<Vec<KeyRecord>> {
    let after = |last: Option<&KeyRecord>| Query::Keys {
        after: last.map(|last| last.id.clone()),
    };
    all_pages(cluster, "list keys", after).await
}

/// Adds a public key; with [`super::statement::key`], signed, once a key has the role `admin`.
pub async fn add_key(
    cluster: &Cluster,
    key: &PublicKey,
    roles: impl IntoIterator<Item = Role>,
    owner: &str,
    envelope: Option<Envelope>,
) -> mobula::Result<KeyRecord> {
    let spki = key.spki().to_vec();
    let roles = roles.into_iter().collect();
    let owner = owner.to_owned();
    let command = match envelope {
        None => Command::AddKey { spki, roles, owner },
        Some(envelope) => Command::EnrolKey {
            spki,
            roles,
            owner,
            envelope,
        },
    };
    change(cluster, "add a key", &command).await
}

/// Makes a key worthless for what is signed from now on; with [`super::statement::key`], signed, once a key has
/// the role `admin`.
pub async fn revoke_key(
    cluster: &Cluster,
    key: &str,
    reason: &str,
    envelope: Option<Envelope>,
) -> mobula::Result<KeyRecord> {
    let (key, reason) = (key.to_owned(), reason.to_owned());
    let command = match envelope {
        None => Command::RevokeKey { key, reason },
        Some(envelope) => Command::RevokeKeySigned {
            key,
            reason,
            envelope,
        },
    };
    change(cluster, "revoke a key", &command).await
}

/// Entries of the log from number `from` on, a page of them.
pub async fn events(cluster: &Cluster, from: u64) -> mobula::Result<EventPage> {
    let query = Query::Events { from };
    ask::query(
        cluster,
        ModuleId::REGISTRY,
        "read the registry's log",
        &query,
    )
    .await
}

/// One entry of the log, and the proof that it is there.
pub async fn proof(cluster: &Cluster, sequence: u64) -> mobula::Result<EventProof> {
    let query = Query::Proof { sequence };
    ask::query(
        cluster,
        ModuleId::REGISTRY,
        "read the registry's log",
        &query,
    )
    .await
}
