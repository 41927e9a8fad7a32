//! `mobula models`.

use std::collections::BTreeMap;

use mobula_actors::registry::{ModelVersion, client};
use mobula_core::clock::Clock;
use mobula_core::id::JobId;
use serde::Serialize;

use crate::args::{ModelsCommand, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};

/// A version as `--json` prints it.
#[derive(Serialize)]
struct VersionJson<'a> {
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
}

impl<'a> From<&'a ModelVersion> for VersionJson<'a> {
    fn from(version: &'a ModelVersion) -> Self {
        let description = &version.description;
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
        }
    }
}

fn print_versions_json(versions: &[ModelVersion]) -> anyhow::Result<()> {
    print_json(&versions.iter().map(VersionJson::from).collect::<Vec<_>>())
}

fn row(version: &ModelVersion) -> Vec<String> {
    let description = &version.description;
    let accuracy = description.metrics.get("accuracy");
    vec![
        description.model.clone(),
        version.version.to_string(),
        or_dash(accuracy.map(|accuracy| format!("{accuracy:.4}"))),
        JobId(description.job).to_string(),
        age(version.registered_ms, SystemClock.now_ms()),
        description
            .digest
            .get(..12)
            .unwrap_or(&description.digest)
            .to_owned(),
    ]
}

pub(crate) async fn run(target: &Target, command: ModelsCommand) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    match command {
        ModelsCommand::List(format) => {
            let mut versions = Vec::new();
            for newest in client::list(&cluster).await? {
                versions.extend(client::versions(&cluster, &newest.description.model).await?);
            }
            if format.json {
                return print_versions_json(&versions);
            }
            let rows: Vec<Vec<String>> = versions.iter().map(row).collect();
            print_table(
                &["MODEL", "VERSION", "ACCURACY", "JOB", "AGE", "DIGEST"],
                &rows,
            );
        }
        ModelsCommand::Show { model, format } => {
            let versions = client::versions(&cluster, &model).await?;
            if format.json {
                return print_versions_json(&versions);
            }
            for (index, version) in versions.iter().enumerate() {
                if index > 0 {
                    println!();
                }
                show(version);
            }
        }
    }
    Ok(())
}

fn show(version: &ModelVersion) {
    let description = &version.description;
    println!("model      {}:{}", description.model, version.version);
    println!("digest     {}", description.digest);
    println!("size       {} bytes", description.size_bytes);
    println!("weights    {}", description.weights_blake3);
    println!("data       {}", description.dataset_blake3);
    println!("job        {}", JobId(description.job));
    println!(
        "age        {}",
        age(version.registered_ms, SystemClock.now_ms())
    );
    for (metric, value) in &description.metrics {
        println!("{metric:<10} {value:.4}");
    }
    println!("training   {}", description.training_json);
}
