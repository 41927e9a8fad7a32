//! `mobula checkpoints prune`.

use mobula::Cluster;
use mobula_actors::checkpoint::client;
use mobula_actors::checkpoint::state::Committed;
use mobula_core::id::JobId;
use serde::Serialize;

use super::known;
use crate::output::print_json;

#[derive(Serialize)]
struct PrunedJson {
    job: u64,
    dry_run: bool,
    hidden: Vec<u64>,
    kept: Vec<u64>,
}

pub(super) async fn prune(
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
