//! A till that stays open when the job that opened it is over: a detached actor, in a namespace.
//!
//! Each of these is a job of its own, one after the other or at once:
//!
//! ```text
//! mobula submit target/debug/examples/detached --namespace shop --follow -- open
//! mobula submit target/debug/examples/detached --namespace shop --follow -- sell 100
//! mobula submit target/debug/examples/detached --namespace shop --follow -- close
//! ```
//!
//! `MOBULA_NAMESPACE=shop cargo run --example detached -- open sell 100 close` does all three in one job
//! on a cluster of its own.

use std::time::Duration;

use mobula::prelude::*;

/// Its state is durable, so it survives its process too.
struct Till {
    sold: u64,
}

#[mobula::actor(durable)]
impl Till {
    fn new(ctx: &ActorContext) -> Result<Self, StateError> {
        let sold = ctx.state().load("sold")?.unwrap_or(0);
        Ok(Till { sold })
    }

    async fn sell(&mut self, ctx: &ActorContext) -> Result<u64, StateError> {
        self.sold += 1;
        ctx.state().save("sold", &self.sold)?;
        Ok(self.sold)
    }

    async fn sold(&self) -> u64 {
        self.sold
    }
}

/// Opens the till, unless another job has.
async fn open(cluster: &Cluster) -> mobula::Result<ActorRef<Till>> {
    cluster
        .actor(Till::new())
        .name("till")
        .detached()
        .get_or_create()
        .max_restarts(1000)
        .cpus(0.1)
        .spawn()
        .await
}

async fn sell(till: &ActorRef<Till>, times: u64) -> mobula::Result<()> {
    for _ in 0..times {
        // Once each, whatever becomes of the till's process meanwhile.
        till.sell().exactly_once().await?;
    }
    Ok(())
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<u64> {
    let mut sold = 0;
    let mut words = args.iter().map(String::as_str);
    while let Some(word) = words.next() {
        match word {
            "open" => {
                let till = open(&cluster).await?;
                sold = till.sold().await?;
                println!("the till is open: {sold} sold so far");
            }
            "sell" => {
                let times = words.next().unwrap_or("1").parse()?;
                let till = cluster.get_actor::<Till>("till").await?;
                sell(&till, times).await?;
                sold = till.sold().await?;
                println!("sold {times} more, {sold} in all");
            }
            "close" => {
                let till = cluster.get_actor::<Till>("till").await?;
                sold = till.sold().await?;
                till.stop_actor(Duration::from_secs(10)).await?;
                println!("the till is closed: {sold} sold");
            }
            other => return Err(format!("`{other}`? say `open`, `sell 3` or `close`").into()),
        }
    }
    Ok(sold)
}
