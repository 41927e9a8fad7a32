//! `mobula models`: what its commands share. Each has a file of its own.

pub(crate) mod name;

mod alias;
mod bundle;
mod card;
mod lineage;
mod list;
mod promote;
mod register;
mod verify;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::bail;
use mobula::Cluster;
use mobula_actors::registry::client;
use mobula_actors::registry::provenance::{CheckpointOrigin, Parent, missing};
use mobula_actors::registry::search::{Selector, VersionView};
use mobula_actors::registry::stages::Stage;
use mobula_actors::registry::version_file::fetch;
use mobula_actors::storage::open_blobs;
use serde::Serialize;

use self::name::VersionName;
use crate::args::{ModelsCommand, StoreArguments, Target};
use crate::connect::connect;
use crate::output::print_json;

pub(crate) async fn run(target: &Target, command: ModelsCommand) -> anyhow::Result<ExitCode> {
    // It needs no cluster.
    if let ModelsCommand::VerifyBundle {
        folder,
        public_key,
        signature,
        format,
    } = &command
    {
        bundle::verify_bundle(folder, public_key, signature.as_deref(), format.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = connect(target).await?;
    match command {
        ModelsCommand::List(format) => list::list(&cluster, format.json).await?,
        ModelsCommand::Show { model, format } => list::show(&cluster, &model, format.json).await?,
        ModelsCommand::Search(arguments) => list::search(&cluster, arguments).await?,
        ModelsCommand::Register(arguments) => register::register(&cluster, arguments).await?,
        ModelsCommand::Promote {
            version,
            to,
            signing,
            format,
        } => {
            let to = to.map(Stage::from);
            promote::promote(&cluster, &version, to, signing, format.json).await?;
        }
        ModelsCommand::Archive {
            version,
            signing,
            format,
        } => {
            let to = Some(Stage::Archived);
            promote::promote(&cluster, &version, to, signing, format.json).await?;
        }
        ModelsCommand::Alias {
            version,
            alias,
            remove,
            format,
        } => alias::alias(&cluster, &version, &alias, remove, format.json).await?,
        ModelsCommand::Tag {
            version,
            tag,
            remove,
            format,
        } => alias::tag(&cluster, &version, &tag, remove, format.json).await?,
        ModelsCommand::Policy {
            model,
            risk,
            signatures,
            keys,
            format,
        } => {
            promote::policy(&cluster, &model, risk, signatures, &keys, format.json).await?;
        }
        ModelsCommand::Lineage {
            version,
            data,
            job,
            format,
        } => lineage::lineage(&cluster, version, data, job, format.json).await?,
        ModelsCommand::Card { version, out } => {
            card::card(&cluster, &version, out.as_deref()).await?;
        }
        ModelsCommand::Verify {
            version,
            store,
            format,
        } => return verify::verify(&cluster, &version, &store, format.json).await,
        ModelsCommand::Export {
            version,
            folder,
            key,
            store,
            format,
        } => {
            let key = key.as_deref();
            bundle::export(&cluster, &version, &folder, key, &store, format.json).await?;
        }
        ModelsCommand::VerifyBundle { .. } => unreachable!("it is answered above"),
    }
    Ok(ExitCode::SUCCESS)
}

/// One version, which must be said: the newest is another one tomorrow.
async fn one_version(cluster: &Cluster, name: &VersionName) -> anyhow::Result<VersionView> {
    let model = &name.model;
    if name.selector == Selector::Newest {
        bail!("say which version of `{model}`, as `{model}:1`: see `mobula models show {model}`");
    }
    Ok(client::view(cluster, model, name.selector.clone()).await?)
}

/// The bytes of a version's file, verified.
async fn file_of(
    cluster: &Cluster,
    version: &VersionView,
    store: &StoreArguments,
) -> anyhow::Result<Vec<u8>> {
    let location = crate::checkpoints::location(cluster, store).await?;
    let description = &version.version.description;
    let blobs = open_blobs(&location)?;
    let bytes = fetch(&blobs, &description.digest, description.size_bytes).await?;
    Ok(bytes.to_vec())
}

/// `digits:3`.
fn name_of(version: &VersionView) -> String {
    let model = &version.version.description.model;
    format!("{model}:{}", version.version.version)
}

/// A version as `--json` prints it.
#[derive(Serialize)]
pub(crate) struct VersionJson<'a> {
    model: &'a str,
    version: u64,
    /// BLAKE3 of the version's file.
    digest: &'a str,
    size_bytes: u64,
    weights_blake3: &'a str,
    dataset_blake3: &'a str,
    job: u64,
    metrics: &'a BTreeMap<String, f64>,
    registered_ms: u64,
    /// The job's specification.
    training: Option<serde_json::Value>,
    stage: &'static str,
    stage_since_ms: u64,
    aliases: &'a [String],
    tags: &'a BTreeMap<String, String>,
    endpoints: &'a [String],
    provenance: Option<ProvenanceJson<'a>>,
    /// What production needs and the version lacks.
    missing: Vec<&'static str>,
}

/// Where a version came from, as `--json` prints it.
#[derive(Serialize)]
struct ProvenanceJson<'a> {
    sha256: Option<&'a str>,
    code: Option<&'a str>,
    code_blake3: Option<&'a str>,
    environment: &'a BTreeMap<String, String>,
    seed: Option<u64>,
    /// What the weights began as: `seed`, or a checkpoint's manifest.
    parent: Option<&'a str>,
    parent_digest: Option<&'a str>,
    checkpoint: Option<&'a str>,
    checkpoint_digest: Option<&'a str>,
    run_record: Option<&'a str>,
}

impl<'a> From<&'a VersionView> for VersionJson<'a> {
    fn from(view: &'a VersionView) -> Self {
        let version = &view.version;
        let description = &version.description;
        let digest = |of: &'a CheckpointOrigin| of.digest.as_str();
        let provenance = view.provenance.as_ref().map(|provenance| {
            let (parent, parent_digest) = match &provenance.parent {
                None => (None, None),
                Some(Parent::Seed) => (Some("seed"), None),
                Some(Parent::Checkpoint(of)) => (Some(of.manifest.as_str()), Some(digest(of))),
            };
            let code = provenance.code.as_ref();
            let checkpoint = provenance.checkpoint.as_ref();
            ProvenanceJson {
                sha256: provenance.sha256.as_deref(),
                code: code.map(|code| code.reference.as_str()),
                code_blake3: code.map(|code| code.blake3.as_str()),
                environment: &provenance.environment,
                seed: provenance.seed,
                parent,
                parent_digest,
                checkpoint: checkpoint.map(|of| of.manifest.as_str()),
                checkpoint_digest: checkpoint.map(digest),
                run_record: provenance.run_record.as_deref(),
            }
        });
        VersionJson {
            model: &description.model,
            version: version.version,
            digest: &description.digest,
            size_bytes: description.size_bytes,
            weights_blake3: &description.weights_blake3,
            dataset_blake3: &description.dataset_blake3,
            job: description.job,
            metrics: &description.metrics,
            registered_ms: version.registered_ms,
            training: serde_json::from_str(&description.training_json).ok(),
            stage: view.standing.stage.as_str(),
            stage_since_ms: view.standing.since_ms,
            aliases: &view.aliases,
            tags: &view.standing.tags,
            endpoints: &view.endpoints,
            provenance,
            missing: missing(version, view.provenance.as_ref()),
        }
    }
}

fn print_versions_json(versions: &[VersionView]) -> anyhow::Result<()> {
    print_json(&versions.iter().map(VersionJson::from).collect::<Vec<_>>())
}
