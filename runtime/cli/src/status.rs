//! `mobula status` and `mobula metrics`.

use mobula_core::clock::Clock;
use mobula_wire::control::{MetricsRequest, StatusRequest};

use crate::args::{Format, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, print_json};

/// `mobula metrics`.
pub(crate) async fn metrics(target: &Target, node: Option<String>) -> anyhow::Result<()> {
    // The head is meant by its own word as well.
    let node = node.filter(|node| node != "head").unwrap_or_default();
    let cluster = connect(target).await?;
    let reply = cluster
        .control()
        .read("read metrics", |mut client| {
            let request = MetricsRequest { node: node.clone() };
            async move { client.metrics(request).await }
        })
        .await?;
    print!("{}", reply.text);
    Ok(())
}

pub(crate) async fn run(target: &Target, format: Format) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    let status = cluster
        .control()
        .read("read the status", |mut client| async move {
            client.status(StatusRequest {}).await
        })
        .await?;
    if format.json {
        return print_json(&status);
    }
    println!("cluster  {} (mobula {})", status.cluster_id, status.version);
    println!(
        "head     {} in term {}, applied {}, at {}",
        status.role, status.term, status.applied_index, status.api_address
    );
    println!(
        "nodes    {} alive of {}",
        status.nodes_alive, status.nodes_total
    );
    println!("jobs     {} live", status.jobs_running);
    println!(
        "actors   {} placed, {} pending",
        status.actors_running, status.actors_pending
    );
    if !status.state_problem.is_empty() {
        println!("         PROBLEM: {}", status.state_problem);
    }
    println!("storage  {}", status.storage_url);
    if !status.storage_problem.is_empty() {
        println!("         PROBLEM: {}", status.storage_problem);
    }
    if let Some(sweep) = &status.sweep
        && let Some(last_ms) = sweep.last_ms
    {
        println!(
            "sweep    {} ago; {} checkpoints kept, {} blobs ({} bytes) removed",
            age(last_ms, SystemClock.now_ms()),
            sweep.checkpoints_kept,
            sweep.blobs_deleted,
            sweep.bytes_deleted
        );
        if !sweep.problem.is_empty() {
            println!("         PROBLEM: {}", sweep.problem);
        }
    }
    Ok(())
}
