//! A counter that survives its process: what it saves is committed before its callers hear the
//! answer, and `exactly_once` calls count once, however often they must be sent.
//!
//! Run it on a cluster of its own with `cargo run --example durable_counter -- 1000`, or on a real
//! one with `mobula submit target/debug/examples/durable_counter -- 1000`. Kill its host process
//! as often as you like meanwhile.

use std::time::Duration;

use futures::stream::{self, StreamExt, TryStreamExt};
use mobula::core::spec::RestartPolicy;
use mobula::prelude::*;

/// Increments under way at once.
const AT_ONCE: usize = 16;

struct Counter {
    n: u64,
}

#[mobula::actor(durable)]
impl Counter {
    /// Every start begins with what the last one had committed.
    fn new(ctx: &ActorContext) -> Result<Self, StateError> {
        let n = ctx.state().load("n")?.unwrap_or(0);
        Ok(Counter { n })
    }

    /// What it saves is committed when it returns, together with its answer.
    async fn add(&mut self, ctx: &ActorContext, by: u64) -> Result<u64, StateError> {
        self.n += by;
        ctx.state().save("n", &self.n)?;
        Ok(self.n)
    }

    async fn get(&self) -> u64 {
        self.n
    }

    /// The worst moment: it has counted and saved, and is gone before it returns.
    async fn vanish(&mut self, ctx: &ActorContext) -> Result<(), StateError> {
        ctx.state().save("n", &(self.n + 1_000_000))?;
        std::process::abort()
    }
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<()> {
    let increments: u64 = args.first().map_or(Ok(100), |text| text.parse())?;
    let counter = cluster
        .actor(Counter::new())
        .name("counter")
        // In a process of its own, so that nothing else dies with it, and with a share of a core.
        .isolated()
        .cpus(0.1)
        .restart(RestartPolicy {
            max_restarts: 1_000_000,
            backoff_initial_ms: 10,
            backoff_max_ms: 100,
        })
        .spawn()
        .await?;

    let error = counter.vanish().await.expect_err("it never returns");
    println!("vanished: {error}");
    let started = std::time::Instant::now();
    stream::iter(0..increments)
        .map(|_| counter.add(1).exactly_once().into_future())
        .buffer_unordered(AT_ONCE)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let n = counter.get().timeout(Duration::from_secs(60)).await?;
    let seconds = started.elapsed().as_secs_f64();
    println!("counted to {n} with {increments} increments in {seconds:.1} s");
    if n != increments {
        return Err(format!("{increments} increments came to {n}").into());
    }
    cluster.set_result(&serde_json::json!({ "n": n })).await
}
