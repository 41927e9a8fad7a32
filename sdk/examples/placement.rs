//! Where actors run: apart, together, where a label says so, and where there is what they need.
//!
//! `cargo run --example placement` shows the first two. On a cluster with a worker that was started with
//! `--label spot=north` and one whose configuration has `[worker.resources.custom]` and in it `licence = 2`,
//! `mobula submit target/debug/examples/placement -- north licence` shows all.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::try_join_all;
use mobula::core::label::Requirement;
use mobula::core::resource::Resources;
use mobula::prelude::*;

struct Probe;

#[mobula::actor]
impl Probe {
    fn new() -> Self {
        Probe
    }

    /// On which node it is.
    async fn place(&self, ctx: &ActorContext) -> String {
        ctx.node_name().to_owned()
    }
}

async fn places(probes: &[ActorRef<Probe>]) -> mobula::Result<BTreeSet<String>> {
    let places = try_join_all(probes.iter().map(|probe| probe.place().into_future())).await?;
    Ok(places.into_iter().collect())
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<serde_json::Value> {
    let probe = || cluster.actor(Probe::new()).cpus(0.1);

    // On different nodes where there are as many; with `spread_strict` they wait until there are.
    let apart = try_join_all((0..3).map(|_| probe().spread("probes").spawn())).await?;
    let apart = places(&apart).await?;
    println!("three that keep apart are on {apart:?}");

    // On the node where others of the same key are.
    let together = try_join_all((0..3).map(|_| probe().affinity("cache").spawn())).await?;
    let together = places(&together).await?;
    println!("three that keep together are on {together:?}");
    if together.len() != 1 {
        return Err("they were to keep together".into());
    }
    let [spot, resource] = args.as_slice() else {
        return Ok(serde_json::json!({ "apart": apart, "together": together }));
    };

    // Where the label has this value; `NotIn` and `Exists` are the other kinds.
    let there = Requirement::In("spot".to_owned(), vec![spot.clone()]);
    let labelled = probe().require(there).spawn().await?.place().await?;
    let elsewhere = Requirement::NotIn("spot".to_owned(), vec![spot.clone()]);
    let elsewhere = probe().require(elsewhere).spawn().await?.place().await?;
    println!("with the label {labelled}, without it {elsewhere}");

    // A resource of the operator's own: each takes one until none is left.
    let one = || {
        let mut needs = Resources::cpu_milli(100);
        needs.custom.insert(resource.clone(), 1000);
        cluster.actor(Probe::new()).resources(needs).spawn()
    };
    let (first, second, third) = (one().await?, one().await?, one().await?);
    let licensed = places(&[first.clone(), second]).await?;
    let soon = Duration::from_millis(500);
    let error = third.place().timeout(soon).await;
    let error = error.expect_err("there are two of them, and three want one");
    println!("the third waits: {error}");
    assert_eq!(error.executed(), Executed::No);
    first.stop_actor(Duration::from_secs(10)).await?;
    let third = third.place().await?;
    println!("of those with `{resource}` two run on {licensed:?}, and then another on {third}");
    Ok(serde_json::json!({
        "apart": apart, "together": together, "labelled": labelled, "elsewhere": elsewhere,
        "licensed": licensed, "third": third,
    }))
}
