//! `mobula checkpoints show`.

use std::collections::BTreeMap;

use mobula_actors::checkpoint::client::Archive;
use mobula_actors::checkpoint::safetensors::{self, Tensor};
use mobula_actors::checkpoint::state::Committed;
use mobula_actors::training::resume::TRACE_KEY;
use mobula_core::clock::Clock;
use mobula_core::id::JobId;
use serde::Serialize;

use super::CheckpointJson;
use crate::clock::SystemClock;
use crate::output::{age, or_dash, print_json, print_table, size};

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

pub(super) async fn show(
    job: JobId,
    one: &Committed,
    archive: &Archive,
    json: bool,
) -> anyhow::Result<()> {
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
