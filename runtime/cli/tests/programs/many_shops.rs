//! Opens one shop after the other, each a detached actor, until the test has seen enough: the program of
//! `it/detached.rs`, where the leader goes meanwhile.
//!
//! Argument: the file that the test makes when it has.

use std::path::Path;

use mobula::prelude::*;

/// More than any machine opens while the test looks; then something is wrong.
const SHOPS_MAX: u64 = 20_000;

struct Shop {
    visits: u64,
}

#[mobula::actor]
impl Shop {
    fn new() -> Self {
        Shop { visits: 0 }
    }

    async fn visit(&mut self) -> u64 {
        self.visits += 1;
        self.visits
    }
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<u64> {
    let enough = args.first().ok_or("say which file ends this")?;
    let mut shops = Vec::new();
    for number in 0..SHOPS_MAX {
        if Path::new(enough).exists() {
            break;
        }
        let shop = cluster
            .actor(Shop::new())
            .name(format!("shop-{number}"))
            .detached()
            .cpus(0.0)
            .spawn();
        shops.push(shop.await?);
    }
    for shop in &shops {
        let visits = shop.visit().await?;
        if visits != 1 {
            return Err(format!("{} was there before: {visits} visits", shop.actor_id()).into());
        }
    }
    Ok(shops.len() as u64)
}
