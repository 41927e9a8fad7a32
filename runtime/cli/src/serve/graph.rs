//! `mobula serve graph`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, anyhow};
use mobula::Cluster;
use mobula_actors::serving::client;
use mobula_actors::serving::graph::spec::{GraphSpec, Node, Wire};
use mobula_actors::serving::graph::state::{Command, Graph};
use mobula_core::clock::Clock;
use serde::Serialize;

use crate::args::{Format, ServeGraphCommand};
use crate::clock::SystemClock;
use crate::output::{age, print_json, print_table};

/// A graph as `--json` prints it.
#[derive(Serialize)]
struct GraphJson<'a> {
    graph: &'a str,
    created_ms: u64,
    /// In the order in which they run.
    nodes: Vec<NodeJson<'a>>,
    outputs: BTreeMap<&'a str, Vec<String>>,
    /// Of a new graph; shown this once.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<&'a str>,
}

#[derive(Serialize)]
struct NodeJson<'a> {
    name: &'a str,
    endpoint: &'a str,
    waits_for: Vec<&'a str>,
    inputs: BTreeMap<&'a str, Vec<String>>,
    conditional: bool,
}

fn sources(wires: &[Wire]) -> BTreeMap<&str, Vec<String>> {
    let named = wires.iter().map(|wire| {
        let sources = wire.sources.iter().map(ToString::to_string);
        (wire.name.as_str(), sources.collect())
    });
    named.collect()
}

fn node_json(node: &Node) -> NodeJson<'_> {
    NodeJson {
        name: &node.name,
        endpoint: &node.endpoint,
        waits_for: node.waits_for().into_iter().collect(),
        inputs: sources(&node.inputs),
        conditional: node.when.is_some(),
    }
}

fn json_of<'a>(graph: &'a Graph, token: Option<&'a str>) -> GraphJson<'a> {
    GraphJson {
        graph: &graph.name,
        created_ms: graph.created_ms,
        nodes: graph.spec.nodes.iter().map(node_json).collect(),
        outputs: sources(&graph.spec.outputs),
        token,
    }
}

fn read(file: &Path) -> anyhow::Result<GraphSpec> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("the graph {} cannot be read", file.display()))?;
    GraphSpec::from_toml(&text).map_err(|error| anyhow!("{}: {error}", file.display()))
}

pub(super) async fn run(cluster: &Cluster, command: ServeGraphCommand) -> anyhow::Result<()> {
    match command {
        ServeGraphCommand::Create { name, file, format } => {
            let (graph, token) = client::create_graph(cluster, &name, read(&file)?).await?;
            print_new(&graph, &token, format)
        }
        ServeGraphCommand::Change { name, file, format } => {
            let command = Command::Change {
                graph: name,
                spec: read(&file)?,
            };
            let graph = client::change_graph(cluster, command).await?;
            match format.json {
                true => print_json(&json_of(&graph, None)),
                false => list(&[graph], format),
            }
        }
        ServeGraphCommand::List(format) => list(&client::graphs(cluster).await?, format),
        ServeGraphCommand::Delete { name, format } => {
            let command = Command::Delete { graph: name };
            let graph = client::change_graph(cluster, command).await?;
            if format.json {
                return print_json(&json_of(&graph, None));
            }
            println!("{} is deleted", graph.name);
            Ok(())
        }
    }
}

fn print_new(graph: &Graph, token: &str, format: Format) -> anyhow::Result<()> {
    if format.json {
        return print_json(&json_of(graph, Some(token)));
    }
    println!("graph      {}", graph.name);
    println!("nodes      {}", order(graph));
    println!("token      {token}");
    println!(
        "\nThe token is shown this once. Every ingress answers for it at /v2/models/{}/infer: see `mobula serve \
         ingress`",
        graph.name
    );
    Ok(())
}

/// The nodes in the order in which they run, those with a condition in brackets.
fn order(graph: &Graph) -> String {
    let shown = graph.spec.nodes.iter().map(|node| match node.when {
        Some(_) => format!("[{}]", node.name),
        None => node.name.clone(),
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn list(graphs: &[Graph], format: Format) -> anyhow::Result<()> {
    if format.json {
        let graphs = graphs.iter().map(|graph| json_of(graph, None));
        return print_json(&graphs.collect::<Vec<_>>());
    }
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = graphs
        .iter()
        .map(|graph| {
            let outputs = graph.spec.outputs.iter().map(|wire| wire.name.as_str());
            vec![
                graph.name.clone(),
                order(graph),
                outputs.collect::<Vec<_>>().join(", "),
                age(graph.created_ms, now_ms),
            ]
        })
        .collect();
    print_table(&["GRAPH", "NODES", "OUTPUTS", "AGE"], &rows);
    Ok(())
}
