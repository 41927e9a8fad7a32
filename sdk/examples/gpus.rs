//! Actors that ask for GPUs, and which devices each of their processes sees.
//!
//! `mobula submit target/debug/examples/gpus --follow`; without GPUs in the cluster it waits for some
//! (`mobula explain job-1` says so).

use std::collections::BTreeMap;

use mobula::prelude::*;

struct Device;

#[mobula::actor]
impl Device {
    fn new() -> Self {
        println!("looking for devices");
        Device
    }

    /// What CUDA would be told.
    async fn visible(&mut self) -> String {
        std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_else(|_| "not set".to_owned())
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<BTreeMap<String, String>> {
    let ask = |gpus: f64| cluster.actor(Device::new()).gpus(gpus).spawn();
    // Two that share a device, one that has a device of its own, and one without.
    let (half, other_half) = (ask(0.5).await?, ask(0.5).await?);
    let (whole, none) = (ask(1.0).await?, ask(0.0).await?);
    let mut seen = BTreeMap::new();
    for (name, actor) in [
        ("half", half),
        ("other half", other_half),
        ("whole", whole),
        ("none", none),
    ] {
        seen.insert(name.to_owned(), actor.visible().await?);
    }
    Ok(seen)
}
