//! `mobula models list`, `show` and `search`.

use mobula::Cluster;
use mobula_actors::registry::provenance::{Parent, missing};
use mobula_actors::registry::search::{Filter, Selector, VersionView};
use mobula_actors::registry::stages::Stage;
use mobula_actors::registry::{ModelVersion, client};
use mobula_core::clock::Clock;
use mobula_core::id::JobId;

use super::name::VersionName;
use super::{name_of, print_versions_json};
use crate::args::SearchArguments;
use crate::clock::SystemClock;
use crate::output::{age, or_dash, print_table};

pub(super) async fn list(cluster: &Cluster, json: bool) -> anyhow::Result<()> {
    let versions = client::search(cluster, &Filter::default(), usize::MAX).await?;
    print(&versions, json)
}

pub(super) async fn search(cluster: &Cluster, arguments: SearchArguments) -> anyhow::Result<()> {
    let tags = arguments.tags.iter().map(|tag| match tag.split_once('=') {
        None => (tag.clone(), None),
        Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
    });
    let filter = Filter {
        model: arguments.model,
        stage: arguments.stage.map(Stage::from),
        tags: tags.collect(),
        metrics: arguments.metrics,
        ..Filter::default()
    };
    let versions = client::search(cluster, &filter, arguments.limit).await?;
    print(&versions, arguments.format.json)
}

fn print(versions: &[VersionView], json: bool) -> anyhow::Result<()> {
    if json {
        return print_versions_json(versions);
    }
    let rows: Vec<Vec<String>> = versions.iter().map(row).collect();
    print_table(
        &[
            "MODEL", "VERSION", "STAGE", "ALIASES", "ACCURACY", "JOB", "AGE", "DIGEST",
        ],
        &rows,
    );
    Ok(())
}

fn row(view: &VersionView) -> Vec<String> {
    let version = &view.version;
    let description = &version.description;
    let accuracy = description.metrics.get("accuracy");
    let aliases = view.aliases.join(",");
    vec![
        description.model.clone(),
        version.version.to_string(),
        view.standing.stage.as_str().to_owned(),
        or_dash(Some(aliases).filter(|aliases| !aliases.is_empty())),
        or_dash(accuracy.map(|accuracy| format!("{accuracy:.4}"))),
        made_by(version),
        age(version.registered_ms, SystemClock.now_ms()),
        short(&description.digest).to_owned(),
    ]
}

/// The job that trained a version, or that none did.
pub(super) fn made_by(version: &ModelVersion) -> String {
    match version.is_imported() {
        false => JobId(version.description.job).to_string(),
        true => "imported".to_owned(),
    }
}

/// The beginning of a digest: enough for people.
pub(super) fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

pub(super) async fn show(cluster: &Cluster, name: &VersionName, json: bool) -> anyhow::Result<()> {
    let versions = match &name.selector {
        Selector::Newest => {
            let filter = Filter {
                model: Some(name.model.clone()),
                ..Filter::default()
            };
            client::search(cluster, &filter, usize::MAX).await?
        }
        selector => vec![client::view(cluster, &name.model, selector.clone()).await?],
    };
    if json {
        return print_versions_json(&versions);
    }
    let model = client::model(cluster, &name.model).await?;
    println!("model      {}", model.model);
    println!("revision   {}", model.state.revision);
    println!("production {}", or_dash(model.state.production));
    let policy = model.state.policy;
    println!(
        "policy     {} risk, {} signatures",
        policy.risk.as_str(),
        policy.signatures
    );
    for (alias, row) in &model.aliases {
        println!("alias      {alias} is {}", row.version);
    }
    for version in &versions {
        println!();
        show_version(version);
    }
    Ok(())
}

fn show_version(view: &VersionView) {
    let version = &view.version;
    let description = &version.description;
    let now_ms = SystemClock.now_ms();
    println!("version    {}", name_of(view));
    println!(
        "stage      {}, for {}",
        view.standing.stage.as_str(),
        age(view.standing.since_ms, now_ms)
    );
    println!("digest     {}", description.digest);
    println!("size       {} bytes", description.size_bytes);
    println!("weights    {}", description.weights_blake3);
    let data = Some(&description.dataset_blake3);
    println!(
        "data       {}",
        or_dash(data.filter(|data| !data.is_empty()))
    );
    println!("job        {}", made_by(version));
    println!("age        {}", age(version.registered_ms, now_ms));
    for (metric, value) in &description.metrics {
        println!("{metric:<10} {value:.4}");
    }
    for (tag, value) in &view.standing.tags {
        println!("tag        {tag}={value}");
    }
    for endpoint in &view.endpoints {
        println!("endpoint   {endpoint}");
    }
    if let Some(provenance) = &view.provenance {
        println!("sha256     {}", or_dash(provenance.sha256.as_ref()));
        let code = provenance.code.as_ref();
        let code = code.map(|code| format!("{} ({})", code.reference, short(&code.blake3)));
        println!("code       {}", or_dash(code));
        for (fact, value) in &provenance.environment {
            println!("{fact:<10} {value}");
        }
        println!("seed       {}", or_dash(provenance.seed));
        let parent = provenance.parent.as_ref().map(|parent| match parent {
            Parent::Seed => "drawn from the seed",
            Parent::Checkpoint(of) => of.manifest.as_str(),
        });
        println!("parent     {}", or_dash(parent));
        let checkpoint = provenance.checkpoint.as_ref();
        println!("checkpoint {}", or_dash(checkpoint.map(|of| &of.manifest)));
        println!("run        {}", or_dash(provenance.run_record.as_ref()));
    }
    let missing = missing(version, view.provenance.as_ref());
    if !missing.is_empty() {
        println!("lacks      {}", missing.join(", "));
    }
    println!("training   {}", description.training_json);
}
