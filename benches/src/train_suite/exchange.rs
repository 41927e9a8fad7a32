//! Leaves a network's first weights, its data and our losses for the peer: raw little-endian values beside a
//! description in JSON.

use std::path::Path;

use serde_json::{Value, json};

use crate::network::{
    BETA1, BETA2, Batches, Description, EPSILON, LEARNING_RATE, Layer, Network, WEIGHT_DECAY,
};
use crate::steps::COMPARED_STEPS;
use crate::{Outcome, thread_counts};

pub(crate) fn write(
    folder: &Path,
    description: &Description,
    batches: &Batches,
    losses: &[f64],
) -> Outcome {
    let layers: Vec<Value> = description.layers.iter().map(layer).collect();
    let network = Network::new(description)?;
    let mut samples = Vec::new();
    for batch in &batches.samples {
        samples.extend(batch.flatten_all()?.to_vec1::<f32>()?);
    }
    let document = json!({
        "layers": layers,
        "batch": description.batch,
        "batches": batches.samples.len(),
        "features": description.features(),
        "classes": description.classes(),
    });
    let files = [
        ("params", f32_bytes(&network.params)),
        ("samples", f32_bytes(&samples)),
        ("labels", u32_bytes(&batches.labels.concat())),
    ];
    leave(folder, description.name, document, losses, &files)
}

/// Leaves a network: what is peculiar to it in `document`, to which is added what all have, and its files by extension.
pub(crate) fn leave(
    folder: &Path,
    name: &str,
    mut document: Value,
    losses: &[f64],
    files: &[(&str, Vec<u8>)],
) -> Outcome {
    let threads: Vec<usize> = thread_counts().iter().map(|count| count.get()).collect();
    document["name"] = json!(name);
    document["threads"] = json!(threads);
    document["compared_steps"] = json!(COMPARED_STEPS);
    document["adamw"] = json!({
        "lr": LEARNING_RATE, "betas": [BETA1, BETA2], "eps": EPSILON, "weight_decay": WEIGHT_DECAY,
    });
    document["losses"] = json!(losses);
    // A name that any file system takes.
    let stem: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let path = |extension: &str| folder.join(format!("{stem}.{extension}"));
    std::fs::write(path("json"), format!("{document:#}\n"))?;
    for (extension, bytes) in files {
        std::fs::write(path(extension), bytes)?;
    }
    Ok(())
}

pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

pub(crate) fn u32_bytes(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn layer(layer: &Layer) -> Value {
    match layer {
        Layer::Dense { inputs, outputs } => {
            json!({ "kind": "dense", "inputs": inputs, "outputs": outputs })
        }
        Layer::Convolution { images, outputs } => json!({
            "kind": "convolution", "side": images.height, "channels": images.channels,
            "stride": images.stride, "outputs": outputs,
        }),
    }
}
