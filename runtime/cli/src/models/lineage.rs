//! `mobula models lineage`: from data to endpoints.

use std::collections::BTreeMap;

use mobula::Cluster;
use mobula_actors::registry::client;
use mobula_actors::registry::provenance::Parent;
use mobula_actors::registry::search::{Filter, Selector, VersionView};
use mobula_core::id::JobId;

use super::list::{made_by, short};
use super::name::VersionName;
use super::{name_of, print_versions_json};
use crate::output::or_dash;

pub(super) async fn lineage(
    cluster: &Cluster,
    name: Option<VersionName>,
    data: Option<String>,
    job: Option<JobId>,
    json: bool,
) -> anyhow::Result<()> {
    let filter = |model| Filter {
        model,
        dataset_blake3: data.clone(),
        job: job.map(|job| job.0),
        ..Filter::default()
    };
    let versions = match name {
        Some(name) if name.selector != Selector::Newest => {
            vec![client::view(cluster, &name.model, name.selector).await?]
        }
        Some(name) => client::search(cluster, &filter(Some(name.model)), usize::MAX).await?,
        None => client::search(cluster, &filter(None), usize::MAX).await?,
    };
    if json {
        return print_versions_json(&versions);
    }
    let mut by_data: BTreeMap<&str, BTreeMap<u64, Vec<&VersionView>>> = BTreeMap::new();
    for version in &versions {
        let description = &version.version.description;
        let by_job = by_data.entry(&description.dataset_blake3).or_default();
        by_job.entry(description.job).or_default().push(version);
    }
    for (data, by_job) in by_data {
        println!(
            "data {}",
            or_dash(Some(data).filter(|data| !data.is_empty()))
        );
        for versions in by_job.into_values() {
            println!("  {}", made_by(&versions[0].version));
            for version in versions {
                print_version(version);
            }
        }
    }
    Ok(())
}

fn print_version(version: &VersionView) {
    if let Some(provenance) = &version.provenance {
        if let Some(record) = &provenance.run_record {
            println!("    run {}", short(record));
        }
        if let Some(Parent::Checkpoint(parent)) = &provenance.parent {
            println!("    from {}", parent.manifest);
        }
        if let Some(checkpoint) = &provenance.checkpoint {
            println!("    checkpoint {}", checkpoint.manifest);
        }
    }
    let stage = version.standing.stage.as_str();
    println!("    version {} ({stage})", name_of(version));
    for endpoint in &version.endpoints {
        println!("      endpoint {endpoint}");
    }
}
