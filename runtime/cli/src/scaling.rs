//! `mobula serve scale` and `mobula serve explain`.

use mobula::Cluster;
use mobula_actors::serving::autoscaler::{Cause, Change, Figures, Policy, Scaling};
use mobula_actors::serving::client;
use mobula_actors::serving::controller::replica_name;
use mobula_actors::serving::state::Endpoint;
use mobula_core::clock::Clock;
use mobula_core::id::JobId;
use serde::Serialize;

use crate::args::{ExplainScalingArguments, ScaleArguments};
use crate::clock::SystemClock;
use crate::output::{age, print_json, print_table};
use crate::serve::route::{self, RuleJson};

/// How an endpoint is scaled, as `--json` prints it.
#[derive(Serialize)]
struct ScalingJson<'a> {
    endpoint: &'a str,
    /// How many it shall have now.
    replicas: u32,
    replicas_running: usize,
    /// The bounds that hold now.
    floor: u32,
    ceiling: u32,
    policy: PolicyJson,
    /// In the order in which a request is held against them.
    rules: Vec<RuleJson<'a>>,
    /// Oldest first.
    changes: Vec<ChangeJson<'a>>,
}

#[derive(Serialize)]
struct PolicyJson {
    replicas_min: u32,
    replicas_max: u32,
    target_in_flight: u32,
    target_rate: Option<u32>,
    slo_p99_ms: Option<u32>,
    rate_limit: Option<u32>,
    window_ms: u64,
    idle_after_ms: u64,
    up_window_ms: u64,
    down_window_ms: u64,
    schedules: Vec<String>,
    target_busy_percent: Option<u32>,
    target_memory_percent: Option<u32>,
}

#[derive(Serialize)]
struct ChangeJson<'a> {
    at_ms: u64,
    version: u64,
    from: u32,
    to: u32,
    cause: Cause,
    why: &'static str,
    figures: &'a Figures,
}

fn json_of(policy: &Policy) -> PolicyJson {
    PolicyJson {
        replicas_min: policy.replicas_min,
        replicas_max: policy.replicas_max,
        target_in_flight: policy.target_in_flight,
        target_rate: policy.target_rate,
        slo_p99_ms: policy.slo_p99_ms,
        rate_limit: policy.rate_limit,
        window_ms: policy.stable_window_ms,
        idle_after_ms: policy.idle_ms,
        up_window_ms: policy.up_window_ms,
        down_window_ms: policy.down_window_ms,
        schedules: policy.schedules.iter().map(ToString::to_string).collect(),
        target_busy_percent: policy.target_busy_percent,
        target_memory_percent: policy.target_memory_percent,
    }
}

pub(crate) async fn scale(cluster: &Cluster, arguments: ScaleArguments) -> anyhow::Result<()> {
    let known = client::routing(cluster, &arguments.endpoint).await?;
    let policy = arguments.scaling.policy(known.scaling.policy);
    let scaling = client::set_policy(cluster, &arguments.endpoint, policy).await?;
    print(cluster, &known.endpoint, &scaling, arguments.format.json).await
}

pub(crate) async fn explain(
    cluster: &Cluster,
    arguments: ExplainScalingArguments,
) -> anyhow::Result<()> {
    let known = client::routing(cluster, &arguments.endpoint).await?;
    print(
        cluster,
        &known.endpoint,
        &known.scaling,
        arguments.format.json,
    )
    .await
}

async fn print(
    cluster: &Cluster,
    endpoint: &Endpoint,
    scaling: &Scaling,
    json: bool,
) -> anyhow::Result<()> {
    let actors = cluster.list_actors(Some(JobId::SYSTEM)).await?;
    let replicas_running = (1..=scaling.replicas_living(endpoint))
        .map(|number| replica_name(&endpoint.name, endpoint.version, number))
        .filter(|name| {
            let mut running = actors.iter().filter(|actor| actor.state == "running");
            running.any(|actor| actor.name == *name)
        })
        .count();
    let rules = client::access(cluster, &endpoint.name).await?.rules;
    let versions = route::versions(cluster, &endpoint.name).await?;
    let now_ms = SystemClock.now_ms();
    let policy = &scaling.policy;
    let (floor, ceiling) = policy.bounds(now_ms);
    if json {
        return print_json(&ScalingJson {
            endpoint: &endpoint.name,
            replicas: endpoint.replicas,
            replicas_running,
            floor,
            ceiling,
            policy: json_of(policy),
            rules: route::json_of(&rules, &versions),
            changes: scaling.changes.iter().map(change_json).collect(),
        });
    }
    println!("endpoint   {}", endpoint.name);
    println!(
        "replicas   {} wanted, {replicas_running} running; {floor} to {ceiling} allowed now",
        endpoint.replicas
    );
    println!("policy     {}", described(policy));
    for schedule in &policy.schedules {
        println!("schedule   {schedule}");
    }
    for rule in &rules {
        let is_answered = versions.contains(&rule.version);
        let note = if is_answered {
            ""
        } else {
            " (not in service: passed over)"
        };
        println!("rule       {rule}{note}");
    }
    if scaling.changes.is_empty() {
        println!("\nNothing was decided yet.");
        return Ok(());
    }
    println!();
    let rows: Vec<Vec<String>> = scaling
        .changes
        .iter()
        .rev()
        .map(|change| {
            vec![
                age(change.at_ms, now_ms),
                format!("{} -> {}", change.from, change.to),
                change.cause.said().to_owned(),
                change.figures.said(),
            ]
        })
        .collect();
    print_table(&["AGE", "REPLICAS", "WHY", "FIGURES"], &rows);
    Ok(())
}

fn change_json(change: &Change) -> ChangeJson<'_> {
    ChangeJson {
        at_ms: change.at_ms,
        version: change.version,
        from: change.from,
        to: change.to,
        cause: change.cause,
        why: change.cause.said(),
        figures: &change.figures,
    }
}

/// A policy in a line.
fn described(policy: &Policy) -> String {
    let mut text = format!(
        "{}..{} replicas, {} in flight each",
        policy.replicas_min, policy.replicas_max, policy.target_in_flight
    );
    let said = [
        policy
            .target_rate
            .map(|rate| format!("{rate} a second each")),
        policy
            .slo_p99_ms
            .map(|millis| format!("p99 within {millis} ms")),
        policy
            .target_busy_percent
            .map(|percent| format!("computing for {percent} % of the time")),
        policy
            .target_memory_percent
            .map(|percent| format!("{percent} % of the memory")),
        policy
            .rate_limit
            .map(|rate| format!("at most {rate} a second")),
    ];
    for part in said.into_iter().flatten() {
        text.push_str(", ");
        text.push_str(&part);
    }
    text
}
