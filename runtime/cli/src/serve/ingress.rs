//! `mobula serve ingress`.

use mobula::Cluster;
use mobula_actors::serving::ingress::plan::{ADDRESS_LABEL, NODE_LABEL, ingress_name};
use mobula_core::id::JobId;
use serde::Serialize;

use crate::args::Format;
use crate::nodes;
use crate::output::{or_dash, print_json, print_table};

/// An ingress as `--json` prints it.
#[derive(Serialize)]
struct IngressJson {
    node: String,
    /// As the worker was told.
    address: String,
    /// That of the actor, or `none`.
    state: String,
    /// How often it was started again.
    restarts: u32,
    /// Why it ended the last time, where it does not run.
    problem: Option<String>,
}

pub(super) async fn run(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let actors = cluster.list_actors(Some(JobId::SYSTEM)).await?;
    let nodes = nodes::list(cluster).await?;
    let told = nodes
        .into_iter()
        .filter(|node| node.labels.contains_key(NODE_LABEL) && node.state != "lost");
    let found = told.map(|node| {
        let name = ingress_name(&node.name);
        let mut of_name = actors.iter().filter(|actor| actor.name == name);
        let actor = of_name.find(|actor| actor.state != "ended");
        IngressJson {
            address: node.labels.get(ADDRESS_LABEL).cloned().unwrap_or_default(),
            node: node.name,
            state: actor.map_or_else(|| "none".to_owned(), |actor| actor.state.clone()),
            restarts: actor.map_or(0, |actor| actor.restarts),
            problem: actor
                .filter(|actor| actor.state != "running")
                .and_then(|actor| actor.exit_reason.clone()),
        }
    });
    let found: Vec<IngressJson> = found.collect();
    if format.json {
        return print_json(&found);
    }
    if found.is_empty() {
        println!("no worker has an ingress: start workers with `mobula worker --ingress IP:PORT`");
        return Ok(());
    }
    let rows: Vec<Vec<String>> = found
        .into_iter()
        .map(|ingress| {
            let url = format!("http://{}", ingress.address);
            let restarts = ingress.restarts.to_string();
            vec![
                ingress.node,
                url,
                ingress.state,
                restarts,
                or_dash(ingress.problem),
            ]
        })
        .collect();
    print_table(&["NODE", "URL", "STATE", "RESTARTS", "PROBLEM"], &rows);
    Ok(())
}
