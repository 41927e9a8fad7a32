//! `mobula checkpoints`: what its commands share. Each has a file of its own.

mod list;
mod prune;
mod restore;
mod show;
mod verify;

use std::process::ExitCode;

use anyhow::{Context, bail};
use mobula::{Cluster, StorageLocation};
use mobula_actors::checkpoint::client::{self, Archive};
use mobula_actors::checkpoint::state::{Committed, JobCheckpoints};
use mobula_core::id::JobId;
use serde::Serialize;

use self::list::{list_job, list_jobs};
use self::prune::prune;
use self::restore::restore;
use self::show::show;
use self::verify::verify;
use crate::args::{CheckpointsCommand, StoreArguments, Target};
use crate::connect::connect;
use crate::head::read_config;

pub(crate) async fn run(target: &Target, command: CheckpointsCommand) -> anyhow::Result<ExitCode> {
    let cluster = connect(target).await?;
    match command {
        CheckpointsCommand::List { job: None, format } => list_jobs(&cluster, format.json).await?,
        CheckpointsCommand::List {
            job: Some(job),
            format,
        } => list_job(&cluster, job, format.json).await?,
        CheckpointsCommand::Show {
            job,
            step,
            store,
            format,
        } => {
            let known = known(&cluster, job).await?;
            let one = choose(job, &known, step)?;
            show(job, one, &archive(&cluster, &store).await?, format.json).await?;
        }
        CheckpointsCommand::Verify {
            job,
            step,
            store,
            format,
        } => {
            let known = known(&cluster, job).await?;
            let chosen = choose_all(job, &known, step)?;
            let archive = archive(&cluster, &store).await?;
            return verify(job, &chosen, &archive, format.json).await;
        }
        CheckpointsCommand::Restore {
            job,
            step,
            output,
            force,
            store,
            format,
        } => {
            let known = known(&cluster, job).await?;
            let candidates = choose_all(job, &known, step)?;
            let archive = archive(&cluster, &store).await?;
            restore(job, &candidates, &archive, output, force, format.json).await?;
        }
        CheckpointsCommand::Prune {
            job,
            keep,
            dry_run,
            format,
        } => prune(&cluster, job, keep, dry_run, format.json).await?,
        CheckpointsCommand::Pin { job, step, undo } => {
            client::pin(&cluster, job, step, !undo).await?;
            if undo {
                println!("the checkpoint of step {step} of {job} is kept as the job's policy says");
            } else {
                println!("the checkpoint of step {step} of {job} stays until it is unpinned");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What is known of a job that has checkpoints.
async fn known(cluster: &Cluster, job: JobId) -> anyhow::Result<JobCheckpoints> {
    let known = client::of_job(cluster, job).await?;
    if known.checkpoints.is_empty() && known.rejections.is_empty() {
        bail!("{job} has no checkpoints: `mobula checkpoints list` shows the jobs that have");
    }
    Ok(known)
}

/// The checkpoint of `step`, or the newest.
fn choose(job: JobId, known: &JobCheckpoints, step: Option<u64>) -> anyhow::Result<&Committed> {
    let steps = || {
        let steps = known.checkpoints.iter().map(|one| one.checkpoint.step);
        steps
            .map(|step| step.to_string())
            .collect::<Vec<_>>()
            .join(", ")
    };
    match step {
        None => known
            .checkpoints
            .first()
            .with_context(|| format!("all checkpoints of {job} were rejected")),
        Some(step) => known
            .checkpoints
            .iter()
            .find(|one| one.checkpoint.step == step)
            .with_context(|| {
                format!(
                    "{job} has no checkpoint of step {step}: there are those of {}",
                    steps()
                )
            }),
    }
}

/// The checkpoint of `step`, or all of them, newest first.
fn choose_all(
    job: JobId,
    known: &JobCheckpoints,
    step: Option<u64>,
) -> anyhow::Result<Vec<&Committed>> {
    match step {
        Some(step) => Ok(vec![choose(job, known, Some(step))?]),
        None => Ok(known.checkpoints.iter().collect()),
    }
}

/// The cluster's object store, from here.
pub(crate) async fn archive(cluster: &Cluster, store: &StoreArguments) -> anyhow::Result<Archive> {
    Ok(Archive::open(&location(cluster, store).await?)?)
}

/// Where the cluster's object store is, from here.
pub(crate) async fn location(
    cluster: &Cluster,
    store: &StoreArguments,
) -> anyhow::Result<StorageLocation> {
    let url = cluster.status().await?.storage_url;
    let s3 = read_config(store.config.as_deref())?.storage.s3;
    Ok(StorageLocation {
        url,
        endpoint: s3.endpoint,
        region: s3.region,
        allow_http: s3.allow_http,
        access_key_env: s3.access_key_env,
        secret_key_env: s3.secret_key_env,
    })
}

/// A checkpoint, as programs read it.
#[derive(Serialize)]
struct CheckpointJson<'a> {
    step: u64,
    number: u64,
    incarnation: u64,
    committed_ms: u64,
    size_bytes: u64,
    weights_blake3: Option<&'a str>,
    metric: Option<f64>,
    pinned: bool,
    manifest: &'a str,
    manifest_digest: &'a str,
}

impl<'a> From<&'a Committed> for CheckpointJson<'a> {
    fn from(one: &'a Committed) -> Self {
        let checkpoint = &one.checkpoint;
        CheckpointJson {
            step: checkpoint.step,
            number: one.number,
            incarnation: checkpoint.incarnation.0,
            committed_ms: one.committed_ms,
            size_bytes: checkpoint.size_bytes,
            weights_blake3: checkpoint.weights_blake3.as_deref(),
            metric: checkpoint.metric.map(|metric| metric.value()),
            pinned: one.is_pinned,
            manifest: &checkpoint.manifest_path,
            manifest_digest: &checkpoint.manifest_digest,
        }
    }
}
