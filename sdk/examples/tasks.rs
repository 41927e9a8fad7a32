//! Tasks: functions that run wherever there is room. Values are passed by reference, tasks wait
//! for what they need, submit others, and are executed again when their process is lost.
//!
//! `cargo run --example tasks -- 2000 5`, or
//! `mobula submit --follow target/debug/examples/tasks -- 2000 5`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mobula::prelude::*;

/// The sum of the squares below `x`, after `pause_ms` of waiting for something outside.
#[mobula::task(cpus = 0.5, max_retries = 10)]
async fn sum_of_squares(ctx: &TaskContext, x: u64, pause_ms: u64) -> (u64, String) {
    tokio::time::sleep(Duration::from_millis(pause_ms)).await;
    let sum = (0..x).map(|n| n * n).sum();
    let place = format!("{} pid {}", ctx.node_name(), std::process::id());
    (sum, place)
}

/// Begins when both are there.
#[mobula::task(cpus = 0.5)]
async fn add(a: ObjectRef<u64>, b: ObjectRef<u64>) -> Result<u64, mobula::Error> {
    Ok(a.get().await? + b.get().await?)
}

/// A task that submits tasks and waits for them: its slot is theirs meanwhile.
#[mobula::task(cpus = 0.5)]
async fn fibonacci(ctx: &TaskContext, n: u64) -> Result<u64, mobula::Error> {
    if n < 2 {
        return Ok(n);
    }
    let cluster = ctx.cluster();
    let parts = [n - 1, n - 2].map(|n| cluster.task(fibonacci(n)).submit());
    let sum = cluster.task(add(parts[0].clone(), parts[1].clone()));
    sum.submit().get().await
}

/// Fails at its first two attempts with an error of its own, which is a reason to try again only
/// because it says so.
#[mobula::task(cpus = 0.5, max_retries = 2, retry_errors = true)]
async fn third_time(ctx: &TaskContext) -> Result<u32, String> {
    match ctx.attempt() {
        attempt @ 1..=2 => Err(format!("attempt {attempt} is too early")),
        attempt => Ok(attempt),
    }
}

/// Ends its process the first time.
#[mobula::task(cpus = 0.5, max_retries = 1)]
async fn survives(ctx: &TaskContext) -> u32 {
    if ctx.attempt() == 1 {
        std::process::exit(3);
    }
    ctx.attempt()
}

/// Ends its process each time.
#[mobula::task(cpus = 0.5, max_retries = 0)]
async fn exits() -> u32 {
    std::process::exit(4)
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<()> {
    let count: u64 = args.first().map_or(Ok(2000), |text| text.parse())?;
    let pause_ms: u64 = args.get(1).map_or(Ok(0), |text| text.parse())?;

    let begun = Instant::now();
    println!("submitting {count} tasks");
    let sums: Vec<_> = (0..count)
        .map(|x| cluster.task(sum_of_squares(x, pause_ms)).submit())
        .collect();
    let first = cluster.wait(&sums, 10, Duration::from_secs(60)).await?;
    println!("{} are ready first", first.ready.len());
    let mut places = BTreeMap::<String, u64>::new();
    let mut right = 0;
    for (x, sum) in (0..count).zip(&sums) {
        let (sum, place) = sum.get().await?;
        right += u64::from(sum == (0..x).map(|n| n * n).sum::<u64>());
        *places.entry(place).or_default() += 1;
    }
    println!("{right} of {count} are right, after {:?}", begun.elapsed());
    for (place, tasks) in &places {
        println!("{tasks} ran on {place}");
    }

    let twelfth = cluster.task(fibonacci(12)).submit().get().await?;
    println!("the twelfth Fibonacci number is {twelfth}");

    let third = cluster.task(third_time()).submit().get().await?;
    let once = cluster.task(third_time()).retry_errors(false).submit();
    let error = once.get().await.expect_err("its first attempt fails");
    println!("right at attempt {third}; tried once: {error}");
    if third != 3 || error.user_error::<String>().as_deref() != Some("attempt 1 is too early") {
        return Err("errors are tried again where that is asked for, and nowhere else".into());
    }

    let attempt = cluster.task(survives()).submit().get().await?;
    let lost = cluster
        .task(exits())
        .submit()
        .get()
        .await
        .expect_err("a process that exits brings no value");
    println!("one survived at attempt {attempt}, one did not: {lost}");
    cluster
        .set_result(&serde_json::json!({
            "count": count, "right": right, "places": places, "fibonacci": twelfth,
            "attempt": attempt, "lost": lost.to_string(),
        }))
        .await
}
