//! `mobula checkpoints list`.

use mobula::Cluster;
use mobula_actors::checkpoint::client;
use mobula_actors::checkpoint::state::{JobSummary, Rejected};
use mobula_core::clock::Clock;
use mobula_core::id::JobId;
use serde::Serialize;

use super::{CheckpointJson, known};
use crate::clock::SystemClock;
use crate::output::{age, or_dash, print_json, print_table, size};

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

pub(super) async fn list_jobs(cluster: &Cluster, json: bool) -> anyhow::Result<()> {
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
    larger_is_better: bool,
}

#[derive(Serialize)]
struct OneJobJson<'a> {
    job: u64,
    committed: u64,
    policy: PolicyJson,
    checkpoints: Vec<CheckpointJson<'a>>,
    rejections: Vec<RejectedJson<'a>>,
}

pub(super) async fn list_job(cluster: &Cluster, job: JobId, json: bool) -> anyhow::Result<()> {
    let known = known(cluster, job).await?;
    if json {
        return print_json(&OneJobJson {
            job: job.0,
            committed: known.committed_count,
            policy: PolicyJson {
                keep_last: known.policy.last,
                keep_every: known.policy.every,
                keep_best: known.policy.best,
                larger_is_better: known.policy.larger_is_better,
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

fn short(digest: &str) -> String {
    digest.get(..12).unwrap_or(digest).to_owned()
}
