//! `mobula checkpoints`.

use std::collections::BTreeMap;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use mobula::{Cluster, StorageLocation};
use mobula_actors::checkpoint::client::{self, Archive, Verdict};
use mobula_actors::checkpoint::safetensors::{self, Tensor};
use mobula_actors::checkpoint::state::{Committed, JobCheckpoints, JobSummary, Rejected};
use mobula_actors::training::resume::TRACE_KEY;
use mobula_core::clock::Clock;
use mobula_core::id::JobId;
use serde::Serialize;

use crate::args::{CheckpointsCommand, StoreArguments, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::head::read_config;
use crate::output::{age, or_dash, print_json, print_table};

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
            let chosen = match step {
                Some(step) => vec![choose(job, &known, Some(step))?],
                None => known.checkpoints.iter().collect(),
            };
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
            let candidates = match step {
                Some(step) => vec![choose(job, &known, Some(step))?],
                None => known.checkpoints.iter().collect(),
            };
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

/// The cluster's object store, from here.
pub(crate) async fn archive(cluster: &Cluster, store: &StoreArguments) -> anyhow::Result<Archive> {
    let url = cluster.status().await?.storage_url;
    let s3 = read_config(store.config.as_deref())?.storage.s3;
    let location = StorageLocation {
        url,
        endpoint: s3.endpoint,
        region: s3.region,
        allow_http: s3.allow_http,
        access_key_env: s3.access_key_env,
        secret_key_env: s3.secret_key_env,
    };
    Ok(Archive::open(&location)?)
}

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

#[derive(Serialize)]
struct JobJson<'a> {
    job: u64,
    visible: u32,
    pinned: u32,
    rejected: u32,
    size_bytes: u64,
    newest: Option<CheckpointJson<'a>>,
}

impl<'a> From<&'a JobSummary> for JobJson<'a> {
    fn from(job: &'a JobSummary) -> Self {
        JobJson {
            job: job.job.0,
            visible: job.visible,
            pinned: job.pinned,
            rejected: job.rejections,
            size_bytes: job.size_bytes,
            newest: job.newest.as_ref().map(CheckpointJson::from),
        }
    }
}

async fn list_jobs(cluster: &Cluster, json: bool) -> anyhow::Result<()> {
    let jobs = client::jobs(cluster).await?;
    if json {
        return print_json(&jobs.iter().map(JobJson::from).collect::<Vec<_>>());
    }
    let now = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = jobs
        .iter()
        .map(|job| {
            let newest = job.newest.as_ref();
            vec![
                job.job.to_string(),
                job.visible.to_string(),
                or_dash(newest.map(|newest| newest.checkpoint.step)),
                or_dash(newest.map(|newest| age(newest.committed_ms, now))),
                size(job.size_bytes),
                job.pinned.to_string(),
                job.rejections.to_string(),
            ]
        })
        .collect();
    print_table(
        &[
            "JOB",
            "CHECKPOINTS",
            "NEWEST STEP",
            "AGE",
            "SIZE",
            "PINNED",
            "REJECTED",
        ],
        &rows,
    );
    Ok(())
}

#[derive(Serialize)]
struct RejectedJson<'a> {
    step: u64,
    manifest_digest: &'a str,
    reason: &'a str,
    rejected_ms: u64,
}

impl<'a> From<&'a Rejected> for RejectedJson<'a> {
    fn from(rejected: &'a Rejected) -> Self {
        RejectedJson {
            step: rejected.step,
            manifest_digest: &rejected.manifest_digest,
            reason: &rejected.reason,
            rejected_ms: rejected.rejected_ms,
        }
    }
}

#[derive(Serialize)]
struct PolicyJson {
    keep_last: u32,
    keep_every: u32,
    keep_best: u32,
}

#[derive(Serialize)]
struct OneJobJson<'a> {
    job: u64,
    committed: u64,
    policy: PolicyJson,
    checkpoints: Vec<CheckpointJson<'a>>,
    rejections: Vec<RejectedJson<'a>>,
}

async fn list_job(cluster: &Cluster, job: JobId, json: bool) -> anyhow::Result<()> {
    let known = known(cluster, job).await?;
    if json {
        return print_json(&OneJobJson {
            job: job.0,
            committed: known.committed_count,
            policy: PolicyJson {
                keep_last: known.policy.last,
                keep_every: known.policy.every,
                keep_best: known.policy.best,
            },
            checkpoints: known.checkpoints.iter().map(CheckpointJson::from).collect(),
            rejections: known.rejections.iter().map(RejectedJson::from).collect(),
        });
    }
    let now = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = known
        .checkpoints
        .iter()
        .map(|one| {
            let checkpoint = &one.checkpoint;
            vec![
                checkpoint.step.to_string(),
                one.number.to_string(),
                age(one.committed_ms, now),
                size(checkpoint.size_bytes),
                or_dash(checkpoint.metric.map(|m| format!("{:.4}", m.value()))),
                (if one.is_pinned { "yes" } else { "-" }).to_owned(),
                or_dash(checkpoint.weights_blake3.as_deref().map(short)),
            ]
        })
        .collect();
    print_table(
        &[
            "STEP", "NUMBER", "AGE", "SIZE", "METRIC", "PINNED", "WEIGHTS",
        ],
        &rows,
    );
    for rejected in &known.rejections {
        println!(
            "rejected {} ago: step {}: {}",
            age(rejected.rejected_ms, now),
            rejected.step,
            rejected.reason
        );
    }
    Ok(())
}

#[derive(Serialize)]
struct ContentsJson<'a> {
    #[serde(flatten)]
    checkpoint: CheckpointJson<'a>,
    job: u64,
    parent: Option<String>,
    state_blake3: String,
    chunks: usize,
    tensors: Vec<Tensor>,
    metadata: &'a BTreeMap<String, String>,
}

async fn show(job: JobId, one: &Committed, archive: &Archive, json: bool) -> anyhow::Result<()> {
    let manifest = archive.manifest(&one.checkpoint).await?;
    let tensors = safetensors::tensors(&manifest);
    if json {
        return print_json(&ContentsJson {
            checkpoint: one.into(),
            job: job.0,
            parent: manifest.parent.map(|parent| parent.to_string()),
            state_blake3: manifest.state_blake3.to_string(),
            chunks: manifest.chunks.len(),
            tensors,
            metadata: &manifest.metadata,
        });
    }
    let checkpoint = &one.checkpoint;
    println!("job         {job}");
    println!("step        {}", checkpoint.step);
    println!(
        "number      {} (incarnation {})",
        one.number, checkpoint.incarnation
    );
    println!(
        "age         {}",
        age(one.committed_ms, SystemClock.now_ms())
    );
    println!(
        "size        {} in {} chunks",
        size(manifest.total_bytes),
        manifest.chunks.len()
    );
    println!("pinned      {}", if one.is_pinned { "yes" } else { "no" });
    println!(
        "weights     {}",
        or_dash(checkpoint.weights_blake3.as_deref())
    );
    println!("manifest    {}", checkpoint.manifest_path);
    println!("digest      {}", checkpoint.manifest_digest);
    println!("parent      {}", or_dash(manifest.parent));
    for (key, value) in &manifest.metadata {
        // Long, and for programs.
        if key != safetensors::SHAPES_KEY && key != TRACE_KEY {
            println!("{key:<11} {value}");
        }
    }
    let rows: Vec<Vec<String>> = tensors
        .iter()
        .map(|tensor| {
            vec![
                tensor.name.clone(),
                tensor.dtype.to_owned(),
                format!("{:?}", tensor.shape),
                size(tensor.size_bytes),
            ]
        })
        .collect();
    println!();
    print_table(&["TENSOR", "TYPE", "SHAPE", "SIZE"], &rows);
    Ok(())
}

#[derive(Serialize)]
struct VerdictJson<'a> {
    step: u64,
    manifest: &'a str,
    size_bytes: u64,
    verdict: &'static str,
    reason: Option<String>,
}

async fn verify(
    job: JobId,
    chosen: &[&Committed],
    archive: &Archive,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let mut verdicts = Vec::with_capacity(chosen.len());
    for one in chosen {
        let (verdict, reason) = match archive.verify(&one.checkpoint).await {
            Verdict::Whole => ("whole", None),
            Verdict::Damaged(reason) => ("damaged", Some(reason)),
            Verdict::Unknown(reason) => ("unknown", Some(reason)),
        };
        verdicts.push(VerdictJson {
            step: one.checkpoint.step,
            manifest: &one.checkpoint.manifest_path,
            size_bytes: one.checkpoint.size_bytes,
            verdict,
            reason,
        });
    }
    let bad = verdicts.iter().filter(|one| one.verdict != "whole").count();
    if json {
        print_json(&verdicts)?;
    } else {
        for one in &verdicts {
            match &one.reason {
                None => println!("step {}: whole, {} read", one.step, size(one.size_bytes)),
                Some(reason) => println!("step {}: {}: {reason}", one.step, one.verdict),
            }
        }
    }
    if bad == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "{bad} of {} checkpoints of {job} cannot be restored as they are; a job that restarts passes \
         over what is damaged",
        verdicts.len()
    );
    Ok(ExitCode::FAILURE)
}

#[derive(Serialize)]
struct RestoredJson<'a> {
    job: u64,
    step: u64,
    output: &'a Path,
    size_bytes: u64,
    weights_blake3: Option<&'a str>,
    manifest: &'a str,
    manifest_digest: &'a str,
    rejected: Vec<PassedOver>,
}

#[derive(Serialize)]
struct PassedOver {
    step: u64,
    reason: String,
}

async fn restore(
    job: JobId,
    candidates: &[&Committed],
    archive: &Archive,
    output: Option<PathBuf>,
    force: bool,
    json: bool,
) -> anyhow::Result<()> {
    let mut rejected = Vec::new();
    let mut found = None;
    for one in candidates {
        match archive.load(&one.checkpoint).await {
            Ok(checkpoint) => {
                found = Some((one, checkpoint));
                break;
            }
            Err(error) if error.condemns_the_checkpoint() => {
                let step = one.checkpoint.step;
                eprintln!("the checkpoint of step {step} is passed over: {error}");
                rejected.push(PassedOver {
                    step,
                    reason: error.to_string(),
                });
            }
            Err(error) => return Err(error.into()),
        }
    }
    let Some((one, checkpoint)) = found else {
        bail!(
            "none of {} checkpoints of {job} can be restored",
            candidates.len()
        );
    };
    let reference = &one.checkpoint;
    let output =
        output.unwrap_or_else(|| PathBuf::from(format!("{job}-{}.safetensors", reference.step)));
    let notes = BTreeMap::from([
        ("job".to_owned(), job.to_string()),
        ("step".to_owned(), reference.step.to_string()),
        ("manifest".to_owned(), reference.manifest_path.clone()),
        (
            "manifest_digest".to_owned(),
            reference.manifest_digest.clone(),
        ),
    ]);
    write_whole_file(&output, force, |file| {
        safetensors::write(&checkpoint, &notes, file)
    })?;
    if json {
        return print_json(&RestoredJson {
            job: job.0,
            step: reference.step,
            output: &output,
            size_bytes: std::fs::metadata(&output)?.len(),
            weights_blake3: reference.weights_blake3.as_deref(),
            manifest: &reference.manifest_path,
            manifest_digest: &reference.manifest_digest,
            rejected,
        });
    }
    println!(
        "step {} of {job}, verified, is in {} ({})",
        reference.step,
        output.display(),
        size(std::fs::metadata(&output)?.len())
    );
    println!("weights {}", or_dash(reference.weights_blake3.as_deref()));
    println!(
        "\nto begin another job with these weights, put this into its TOML file, and pin the \
         checkpoint\n(`mobula checkpoints pin {job} {}`) for as long as that job may begin:\n\n\
         [start_from]\nmanifest = \"{}\"\ndigest = \"{}\"",
        reference.step, reference.manifest_path, reference.manifest_digest
    );
    Ok(())
}

/// Writes a file so that a reader sees all of it or nothing, and replaces none unasked.
fn write_whole_file(
    path: &Path,
    force: bool,
    write: impl FnOnce(&mut BufWriter<&std::fs::File>) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    if path.exists() && !force {
        bail!(
            "{} is there already: name another file with --output, or replace it with --force",
            path.display()
        );
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let cannot = || format!("{} cannot be written", path.display());
    let file = tempfile::NamedTempFile::new_in(folder).with_context(cannot)?;
    let mut writer = BufWriter::new(file.as_file());
    write(&mut writer).with_context(cannot)?;
    drop(writer);
    file.as_file().sync_all().with_context(cannot)?;
    file.persist(path).with_context(cannot)?;
    Ok(())
}

#[derive(Serialize)]
struct PrunedJson {
    job: u64,
    dry_run: bool,
    hidden: Vec<u64>,
    kept: Vec<u64>,
}

async fn prune(
    cluster: &Cluster,
    job: JobId,
    keep: u32,
    dry_run: bool,
    json: bool,
) -> anyhow::Result<()> {
    let before = known(cluster, job).await?.checkpoints;
    let steps = |checkpoints: &[Committed]| -> Vec<u64> {
        checkpoints.iter().map(|one| one.checkpoint.step).collect()
    };
    let kept = if dry_run {
        let (_, kept) = split(&before, keep);
        kept
    } else {
        client::prune(cluster, job, keep).await?;
        steps(&client::of_job(cluster, job).await?.checkpoints)
    };
    let hidden: Vec<u64> = steps(&before)
        .into_iter()
        .filter(|step| !kept.contains(step))
        .collect();
    if json {
        return print_json(&PrunedJson {
            job: job.0,
            dry_run,
            hidden,
            kept,
        });
    }
    let list = |steps: &[u64]| match steps {
        [] => "none".to_owned(),
        steps => {
            let steps: Vec<String> = steps.iter().map(u64::to_string).collect();
            steps.join(", ")
        }
    };
    let would = if dry_run { "would be " } else { "" };
    println!("{would}hidden: {}", list(&hidden));
    println!("{would}kept:   {}", list(&kept));
    if !dry_run && !hidden.is_empty() {
        println!("the leader's next sweeps remove their bytes (`mobula status`)");
    }
    Ok(())
}

/// The steps that pruning to `keep` hides, and those that stay.
fn split(checkpoints: &[Committed], keep: u32) -> (Vec<u64>, Vec<u64>) {
    let mut hidden = Vec::new();
    let mut kept = Vec::new();
    for (index, one) in checkpoints.iter().enumerate() {
        let stays = index < keep.max(1) as usize || one.is_pinned;
        let steps = if stays { &mut kept } else { &mut hidden };
        steps.push(one.checkpoint.step);
    }
    (hidden, kept)
}

fn short(digest: &str) -> String {
    digest.get(..12).unwrap_or(digest).to_owned()
}

/// A size for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (8 << 20, "8.0 MiB"),
            (3 << 40, "3.0 TiB"),
            (5000 << 40, "5000.0 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn a_file_is_replaced_only_when_asked_and_only_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        write_whole_file(&path, false, |file| std::io::Write::write_all(file, b"one")).unwrap();
        let error = write_whole_file(&path, false, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("--force"), "{error}");
        let failed = |_: &mut BufWriter<&std::fs::File>| Err(std::io::Error::other("no"));
        assert!(write_whole_file(&path, true, failed).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        write_whole_file(&path, true, |file| std::io::Write::write_all(file, b"two")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        let nowhere = dir.path().join("no/folder/out");
        let error = write_whole_file(&nowhere, false, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("cannot be written"), "{error}");
    }
}
