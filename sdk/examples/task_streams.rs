//! Tasks that bring many values, one after another: four search for primes at once, and none runs
//! further ahead than its reader.
//!
//! Run it on a cluster of its own with `cargo run --example task_streams`, or on a real one with
//! `mobula submit target/debug/examples/task_streams`.

use futures::stream::{self, Stream, StreamExt};
use mobula::prelude::*;

fn is_prime(n: u64) -> bool {
    n > 1
        && (2..)
            .take_while(|d| d * d <= n)
            .all(|d| !n.is_multiple_of(d))
}

/// The primes from `from` on, up to but without `to`.
#[mobula::task(cpus = 0.5)]
fn primes(from: u64, to: u64) -> impl Stream<Item = u64> {
    stream::iter((from..to).filter(|n| is_prime(*n)))
}

/// Ends its process at its first attempt, after so many values.
#[mobula::task(cpus = 0.5, max_retries = 2)]
fn counts(ctx: &TaskContext, to: u64, exit_after: u64) -> impl Stream<Item = u64> {
    let is_first = ctx.attempt() == 1;
    stream::iter(0..to).inspect(move |n| {
        if is_first && *n == exit_after {
            std::process::exit(5);
        }
    })
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    // At most eight values of each wait here; until they are read the tasks wait.
    let ranges = (0..4).map(|n| (n * 25_000, (n + 1) * 25_000));
    let streams = ranges.map(|(from, to)| cluster.task(primes(from, to)).window(8).submit());
    let mut all = stream::select_all(streams);
    let mut count = 0;
    while let Some(prime) = all.next().await {
        prime?;
        count += 1;
    }
    println!("there are {count} primes below 100000");
    if count != 9592 {
        return Err("that is not how many there are".into());
    }

    // Without end, as far as anybody knows: dropping the stream ends the task.
    let mut endless = cluster.task(primes(0, u64::MAX)).submit();
    let mut sum = 0;
    for _ in 0..100 {
        sum += endless.next().await.ok_or("there are more than that")??;
    }
    drop(endless);
    println!("the first 100 add up to {sum}");

    // Its process ends in the middle; it is executed again, and what has come is left out.
    let mut counted = cluster.task(counts(1000, 500)).submit();
    let mut expected = 0;
    while let Some(n) = counted.next().await {
        if n? != expected {
            return Err(format!("{expected} is missing or came twice").into());
        }
        expected += 1;
    }
    println!("streamed {expected} numbers in two attempts, each once");
    cluster
        .set_result(&serde_json::json!({ "primes": count, "sum": sum, "counted": expected }))
        .await
}
