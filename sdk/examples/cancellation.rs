//! Calls that end before their time: cancelled by their caller, together with the calls that they
//! wait for, or by a deadline that travels with them.
//!
//! Run it on a cluster of its own with `cargo run --example cancellation`, or on a real one with
//! `mobula submit target/debug/examples/cancellation`.

use std::time::Duration;

use mobula::prelude::*;

struct Kitchen {
    interrupted: u32,
}

/// Counts the methods that were dropped half-way.
struct Cooking<'a> {
    interrupted: &'a mut u32,
    done: bool,
}

impl Drop for Cooking<'_> {
    fn drop(&mut self) {
        *self.interrupted += u32::from(!self.done);
    }
}

#[mobula::actor]
impl Kitchen {
    fn new() -> Self {
        Kitchen { interrupted: 0 }
    }

    async fn cook(&mut self, duration_ms: u64) -> String {
        let mut cooking = Cooking {
            interrupted: &mut self.interrupted,
            done: false,
        };
        tokio::time::sleep(Duration::from_millis(duration_ms)).await;
        cooking.done = true;
        "a meal".to_owned()
    }

    async fn interrupted(&self) -> u32 {
        self.interrupted
    }
}

struct Waiter;

#[mobula::actor]
impl Waiter {
    fn new() -> Self {
        Waiter
    }

    /// Has no timeout of its own: it waits as long as its own caller does.
    async fn order(
        &self,
        kitchen: ActorRef<Kitchen>,
        duration_ms: u64,
    ) -> Result<String, mobula::Error> {
        kitchen.cook(duration_ms).await
    }
}

/// Waits until the kitchen cooks: while it answers questions, no order has reached it.
async fn until_busy(kitchen: &ActorRef<Kitchen>) {
    let limit = Duration::from_millis(200);
    while kitchen.interrupted().timeout(limit).await.is_ok() {}
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    let an_hour_ms = 3_600_000;
    let kitchen = cluster.actor(Kitchen::new()).spawn().await?;
    let waiter = cluster.actor(Waiter::new()).spawn().await?;
    println!("served: {}", waiter.order(kitchen.clone(), 1).await?);

    // One that has not begun does not run.
    let cooking = kitchen.cook(an_hour_ms).start().await?;
    until_busy(&kitchen).await;
    let waiting = kitchen.cook(1).start().await?;
    waiting.cancel();
    let error = waiting.await.expect_err("it was cancelled");
    println!("waiting: {error}");
    assert_eq!(error.executed(), Executed::No);
    // One that runs is dropped at its next await.
    cooking.cancel();
    let error = cooking.await.expect_err("it was cancelled");
    println!("cooking: {error}");
    assert_eq!(error.executed(), Executed::Unknown);
    assert_eq!(kitchen.interrupted().await?, 1);

    // The call that a cancelled method waits for is cancelled with it.
    let order = waiter.order(kitchen.clone(), an_hour_ms).start().await?;
    until_busy(&kitchen).await;
    order.cancel();
    order.await.expect_err("it was cancelled");
    assert_eq!(kitchen.interrupted().await?, 2);

    // A deadline is passed on: the waiter gives up when its guest does, though this kitchen cooks on. If
    // it waited, it could serve nobody else for an hour.
    let slow = cluster.actor(Kitchen::new()).spawn().await?;
    let limit = Duration::from_millis(300);
    let error = waiter.order(slow, an_hour_ms).timeout(limit).await;
    println!("in a hurry: {}", error.expect_err("the kitchen is slow"));
    println!("served: {}", waiter.order(kitchen, 1).await?);
    cluster
        .set_result(&serde_json::json!({ "interrupted": 2 }))
        .await?;
    println!("all cancelled");
    Ok(())
}
