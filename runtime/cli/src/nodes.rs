//! `mobula nodes`.

use mobula::Cluster;
use mobula_core::clock::Clock;
use mobula_core::id::NodeId;
use mobula_core::resource::Milli;
use mobula_wire::control::{
    DrainNodeRequest, ListNodesRequest, Node, PreemptNodeRequest, Resources,
};

use crate::args::{NodesCommand, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};

/// A node by id (`node-3`, `3`) or by name.
fn id_or_name(text: &str) -> (u64, String) {
    match text.parse::<NodeId>() {
        Ok(id) => (id.0, String::new()),
        Err(_) => (0, text.to_owned()),
    }
}

fn amount(
    free: Option<&Resources>,
    capacity: Option<&Resources>,
    of: fn(&Resources) -> u64,
) -> String {
    let of_some = |resources: Option<&Resources>| resources.map_or(0, of);
    format!("{}/{}", Milli(of_some(free)), Milli(of_some(capacity)))
}

/// All nodes.
pub(crate) async fn list(cluster: &Cluster) -> anyhow::Result<Vec<Node>> {
    let reply = cluster
        .control()
        .read("list nodes", |mut client| async move {
            client.list_nodes(ListNodesRequest {}).await
        })
        .await?;
    Ok(reply.nodes)
}

pub(crate) async fn run(target: &Target, command: NodesCommand) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    match command {
        NodesCommand::List(format) => {
            let nodes = list(&cluster).await?;
            if format.json {
                return print_json(&nodes);
            }
            let now_ms = SystemClock.now_ms();
            let rows: Vec<Vec<String>> = nodes
                .iter()
                .map(|node| {
                    let (free, capacity) = (node.free.as_ref(), node.capacity.as_ref());
                    vec![
                        NodeId(node.id).to_string(),
                        node.name.clone(),
                        node.state.clone(),
                        amount(free, capacity, |r| r.cpu_milli),
                        amount(free, capacity, |r| r.gpu_milli),
                        node.actors.to_string(),
                        or_dash(node.deadline_ms.map(|at| format!("in {}", age(now_ms, at)))),
                    ]
                })
                .collect();
            print_table(
                &[
                    "ID", "NAME", "STATE", "CPU FREE", "GPU FREE", "ACTORS", "GONE",
                ],
                &rows,
            );
        }
        NodesCommand::Drain { node, undo } => {
            let (id, name) = id_or_name(&node);
            cluster
                .control()
                .mutate("drain a node", |mut client, stamp| {
                    let request = DrainNodeRequest {
                        stamp: Some(stamp),
                        node: id,
                        name: name.clone(),
                        undo,
                    };
                    async move { client.drain_node(request).await }
                })
                .await?;
            println!(
                "{node} {}",
                if undo {
                    "takes new work again"
                } else {
                    "is draining"
                }
            );
        }
        NodesCommand::Preempt { node, grace } => {
            let (id, name) = id_or_name(&node);
            cluster
                .control()
                .mutate("preempt a node", |mut client, stamp| {
                    let request = PreemptNodeRequest {
                        stamp: Some(stamp),
                        node: id,
                        name: name.clone(),
                        grace_ms: grace,
                    };
                    async move { client.preempt_node(request).await }
                })
                .await?;
            println!("{node} will be gone in {grace} ms");
        }
    }
    Ok(())
}
