//! Named actors: found by their name, created once, stopped with grace or killed.
//!
//! Run it on a cluster of its own with `cargo run --example names`, or on a real one with
//! `mobula submit target/debug/examples/names`.

use std::time::Duration;

use mobula::Error;
use mobula::core::ErrorCode;
use mobula::prelude::*;

/// Remembers what others tell it.
struct Ledger {
    lines: Vec<String>,
}

#[mobula::actor]
impl Ledger {
    fn new() -> Self {
        Ledger { lines: Vec::new() }
    }

    async fn write(&mut self, line: String) {
        self.lines.push(line);
    }

    async fn read(&self) -> Vec<String> {
        self.lines.clone()
    }
}

struct Shop {
    ledger: ActorRef<Ledger>,
}

#[mobula::actor]
impl Shop {
    fn new(ledger: ActorRef<Ledger>) -> Self {
        Shop { ledger }
    }

    async fn sell(&self, what: String) -> Result<(), Error> {
        self.ledger.write(format!("sold {what}")).await
    }

    async fn serve_for_ever(&self) {
        std::future::pending().await
    }

    /// Has the rest of its grace to tidy up.
    #[mobula(stop)]
    async fn close(&mut self) {
        if let Err(error) = self.ledger.write("closed".to_owned()).await {
            eprintln!("not written down: {error}");
        }
    }
}

/// Waits until the actor has ended, and says how.
async fn ended(shop: &ActorRef<Shop>) -> mobula::Result<String> {
    let patient = Duration::from_secs(60);
    loop {
        match shop.sell("nothing".to_owned()).timeout(patient).await {
            Err(CallFailure::System(Error::Call(CallError::ActorDied { reason, .. }))) => {
                return Ok(reason);
            }
            Err(CallFailure::System(Error::Call(CallError::ActorUnavailable { .. }))) | Ok(()) => {}
            Err(other) => return Err(other.into()),
        }
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    let ledger = cluster.actor(Ledger::new()).spawn().await?;
    let describe = || cluster.actor(Shop::new(ledger.clone())).name("shop");
    let shop = describe().spawn().await?;
    shop.sell("a lamp".to_owned()).await?;

    // A name is taken as long as its actor lives; whoever does not mind takes that one.
    let error = describe().spawn().await.expect_err("the name is taken");
    println!("second shop: {error}");
    assert_eq!(error.code(), Some(ErrorCode::AlreadyExists));
    let same = describe().get_or_create().spawn().await?;
    let found = cluster.get_actor::<Shop>("shop").await?;
    assert_eq!([same.actor_id(), found.actor_id()], [shop.actor_id(); 2]);
    // A name of another type is not mistaken.
    cluster
        .get_actor::<Ledger>("shop")
        .await
        .expect_err("it is a shop");

    // A stop lets it finish and tidy up.
    found.stop_actor(Duration::from_secs(10)).await?;
    println!("the shop: {}", ended(&shop).await?);
    let lines = ledger.read().await?;
    println!("the ledger: {lines:?}");
    if lines.first().map(String::as_str) != Some("sold a lamp")
        || !lines.contains(&"closed".to_owned())
    {
        return Err("the shop did not close its books".into());
    }

    // Its name is free again. A kill gives no grace, and no hook runs.
    let second = describe().spawn().await?;
    second.sell("a chair".to_owned()).await?;
    let serving = second.serve_for_ever().start().await?;
    second.kill_actor().await?;
    let error = serving.await.expect_err("it was killed");
    println!("serving: {error}");
    ended(&second).await?;
    let closed = ledger
        .read()
        .await?
        .iter()
        .filter(|line| *line == "closed")
        .count();
    if closed != 1 {
        return Err(format!("{closed} shops were closed").into());
    }
    cluster
        .set_result(&serde_json::json!({ "lines": lines }))
        .await?;
    println!("the books are right");
    Ok(())
}
