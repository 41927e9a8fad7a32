//! A counter: typed calls, a user's own error, an actor found by its name, and a restart.
//!
//! Run it on a cluster of its own with `cargo run --example counter`, or on a real one with
//! `mobula submit target/debug/examples/counter`.

use std::fmt;
use std::time::Duration;

use mobula::prelude::*;
use serde::{Deserialize, Serialize};

struct Counter {
    n: u64,
    limit: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct OutOfRange {
    wanted: u64,
    limit: u64,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is over the limit of {}", self.wanted, self.limit)
    }
}

#[mobula::actor]
impl Counter {
    fn new(start: u64, limit: u64) -> Self {
        Counter { n: start, limit }
    }

    /// Adds, unless that would go over the limit.
    async fn add(&mut self, by: u64) -> Result<u64, OutOfRange> {
        let wanted = self.n + by;
        if wanted > self.limit {
            return Err(OutOfRange {
                wanted,
                limit: self.limit,
            });
        }
        self.n = wanted;
        Ok(self.n)
    }

    /// The present value.
    async fn get(&self) -> u64 {
        self.n
    }

    /// Something goes badly wrong.
    async fn crash(&mut self) -> u64 {
        panic!("crashed on request at {}", self.n)
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    let counter = cluster
        .actor(Counter::new(5, 10))
        .name("counter")
        .max_restarts(3)
        .spawn()
        .await?;
    println!("5 + 3 = {}", counter.add(3).await?);

    // A user's error arrives as that error.
    match counter.add(100).await {
        Err(CallFailure::User(error)) => println!("refused: {error}"),
        other => return Err(format!("expected OutOfRange, got {other:?}").into()),
    }

    // Anyone in the job finds it by its name.
    let found = cluster.get_actor::<Counter>("counter").await?;
    println!("found by name: {}", found.get().await?);

    // A panic ends the actor; its caller learns so, and the next call meets the restarted one.
    let error = counter.crash().await.expect_err("the method panics");
    println!("crash: {error} ({})", error.executed());
    let value = counter.get().timeout(Duration::from_secs(30)).await?;
    println!("after the restart it is {value} again");

    cluster
        .set_result(&serde_json::json!({ "value": value }))
        .await
}
