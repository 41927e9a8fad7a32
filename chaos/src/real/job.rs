//! The jobs of a scenario, which the platform's own binary brings along: one that leaves a mark when
//! it really runs, and one that counts.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use mobula::core::error::Executed;
use mobula::core::spec::RestartPolicy;
use mobula::prelude::*;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

/// The first argument of these jobs.
pub const KIND: &str = "chaos";

/// Calls to the counter that are under way at once.
const CALLS_MAX: usize = 16;

/// How long the counter may take to tell its last count: it may just be starting again.
const LAST_COUNT_MAX: Duration = Duration::from_secs(60);

/// A counter that survives its process.
struct Counter {
    n: u64,
}

#[mobula::actor(durable)]
impl Counter {
    fn new(ctx: &ActorContext) -> Result<Self, StateError> {
        let n = ctx.state().load("n")?.unwrap_or(0);
        Ok(Counter { n })
    }

    async fn add(&mut self, ctx: &ActorContext, by: u64) -> Result<u64, StateError> {
        self.n += by;
        ctx.state().save("n", &self.n)?;
        Ok(self.n)
    }

    async fn get(&self) -> u64 {
        self.n
    }
}

/// Arguments of a job that appends `key` to the file `ledger` and stores it as its result.
#[must_use]
pub(super) fn mark_arguments(ledger: &Path, key: &str) -> Vec<String> {
    let ledger = ledger.display().to_string();
    vec![KIND.into(), "mark".into(), ledger, key.into()]
}

/// Arguments of a job that counts at this rate until the file `stop` is there.
#[must_use]
pub(super) fn count_arguments(stop: &Path, per_second: f64) -> Vec<String> {
    let stop = stop.display().to_string();
    vec![KIND.into(), "count".into(), stop, per_second.to_string()]
}

/// Drives such a job.
pub async fn main(cluster: Cluster, arguments: Vec<String>) -> mobula::Result<Value> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        [KIND, "mark", ledger, key] => {
            // One write of one short line: lines of jobs that run at the same time stay whole.
            std::fs::File::options()
                .create(true)
                .append(true)
                .open(ledger)?
                .write_all(format!("{key}\n").as_bytes())?;
            Ok(json!(key))
        }
        [KIND, "count", stop, per_second] => {
            let rate: f64 = per_second.parse().map_err(|_| bad_rate(per_second))?;
            if !(0.001..=1e6).contains(&rate) {
                return Err(bad_rate(per_second));
            }
            count(&cluster, Path::new(stop), rate).await
        }
        _ => Err("this job is for scenarios of `mobula chaos run`".into()),
    }
}

fn bad_rate(text: &str) -> mobula::Error {
    format!("`{text}` is no number of calls a second").into()
}

async fn count(cluster: &Cluster, stop: &Path, per_second: f64) -> mobula::Result<Value> {
    let counter = cluster
        .actor(Counter::new())
        .name("counter")
        .isolated()
        .restart(RestartPolicy {
            max_restarts: 1_000_000,
            backoff_initial_ms: 10,
            backoff_max_ms: 200,
        })
        .spawn()
        .await?;
    let mut ticks = interval(Duration::from_secs_f64(1.0 / per_second));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut calls: JoinSet<Executed> = JoinSet::new();
    let (mut acknowledged, mut unknown) = (0_u64, 0_u64);
    let (mut last, mut longest_gap) = (Instant::now(), Duration::ZERO);
    let mut note = |executed: Executed| match executed {
        Executed::Yes => {
            acknowledged += 1;
            longest_gap = longest_gap.max(last.elapsed());
            last = Instant::now();
        }
        Executed::Unknown => unknown += 1,
        Executed::No => {}
    };
    while !stop.exists() {
        ticks.tick().await;
        while calls.len() >= CALLS_MAX {
            note(ended(calls.join_next().await));
        }
        while let Some(call) = calls.try_join_next() {
            note(ended(Some(call)));
        }
        let counter = counter.clone();
        calls.spawn(async move {
            match counter.add(1).exactly_once().await {
                Ok(_) => Executed::Yes,
                Err(failure) => {
                    println!("a call failed: {failure}");
                    failure.executed()
                }
            }
        });
    }
    while !calls.is_empty() {
        note(ended(calls.join_next().await));
    }
    let n = counter.get().timeout(LAST_COUNT_MAX).await?;
    let longest_gap_ms = u64::try_from(longest_gap.as_millis()).unwrap_or(u64::MAX);
    Ok(json!({
        "n": n,
        "acknowledged": acknowledged,
        "unknown": unknown,
        "longest_gap_ms": longest_gap_ms,
    }))
}

/// A call that panicked, or was never there, counts as one of unknown outcome.
fn ended(call: Option<Result<Executed, tokio::task::JoinError>>) -> Executed {
    call.and_then(Result::ok).unwrap_or(Executed::Unknown)
}
