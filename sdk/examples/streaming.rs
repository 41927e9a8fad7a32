//! A method that brings its caller many values, one after another, and makes no more than the
//! caller reads.
//!
//! Run it on a cluster of its own with `cargo run --example streaming`, or on a real one with
//! `mobula submit target/debug/examples/streaming`.

use futures::stream::{self, Stream, StreamExt};
use mobula::prelude::*;

struct Primes {
    made: u64,
}

#[mobula::actor]
impl Primes {
    fn new() -> Self {
        Primes { made: 0 }
    }

    /// All primes from 2 on. It runs until its caller has enough.
    fn all(&mut self) -> impl Stream<Item = u64> {
        let numbers = (2_u64..).filter(|n| (2..).take_while(|d| d * d <= *n).all(|d| n % d != 0));
        stream::iter(numbers).inspect(|_| self.made += 1)
    }

    /// Errors may stand among the values.
    async fn roots(&self, numbers: Vec<i64>) -> StreamOf<Result<u64, String>> {
        let roots = numbers.into_iter().map(|n| match u64::try_from(n) {
            Ok(n) => Ok(n.isqrt()),
            Err(_) => Err(format!("{n} has no real root")),
        });
        stream::iter(roots).boxed()
    }

    async fn made(&self) -> u64 {
        self.made
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    let primes = cluster.actor(Primes::new()).spawn().await?;

    // At most four values wait here; until they are read the method waits.
    let mut stream = primes.all().window(4).await?;
    let mut sum = 0;
    for _ in 0..100 {
        sum += stream
            .next()
            .await
            .ok_or("there are more primes than that")??;
    }
    // Nobody reads on: the method ends, and the actor takes its next call.
    drop(stream);
    let made = primes.made().await?;
    println!("the first 100 primes add up to {sum}; {made} were made");
    if sum != 24_133 || made > 106 {
        return Err("the stream brought something else, or too much".into());
    }

    let mut roots = primes.roots(vec![16, -1, 81]).await?;
    while let Some(root) = roots.next().await {
        match root? {
            Ok(root) => println!("root: {root}"),
            Err(reason) => println!("no root: {reason}"),
        }
    }
    cluster
        .set_result(&serde_json::json!({ "sum": sum }))
        .await?;
    println!("streamed");
    Ok(())
}
