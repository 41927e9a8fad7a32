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
    let threads: Vec<usize> = thread_counts().iter().map(|count| count.get()).collect();
    let document = json!({
        "name": description.name,
        "layers": layers,
        "batch": description.batch,
        "batches": batches.samples.len(),
        "features": description.features(),
        "classes": description.classes(),
        "threads": threads,
        "compared_steps": COMPARED_STEPS,
        "adamw": {
            "lr": LEARNING_RATE, "betas": [BETA1, BETA2], "eps": EPSILON, "weight_decay": WEIGHT_DECAY,
        },
        "losses": losses,
    });
    // A name that any file system takes.
    let stem: String = description
        .name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let path = |extension: &str| folder.join(format!("{stem}.{extension}"));
    std::fs::write(path("json"), format!("{document:#}\n"))?;
    let network = Network::new(description)?;
    let parameters: Vec<u8> = network
        .params
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    std::fs::write(path("params"), parameters)?;
    let mut samples = Vec::new();
    for batch in &batches.samples {
        let values = batch.flatten_all()?.to_vec1::<f32>()?;
        samples.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    std::fs::write(path("samples"), samples)?;
    let labels = batches
        .labels
        .iter()
        .flatten()
        .flat_map(|label| label.to_le_bytes());
    std::fs::write(path("labels"), labels.collect::<Vec<u8>>())?;
    Ok(())
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
