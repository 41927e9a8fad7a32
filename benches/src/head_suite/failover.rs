//! The loss of the leader, again and again, under writes: how long nobody's write is acknowledged.

use std::sync::Arc;

use mobula_benches::results::Results;
use mobula_chaos::real::{RunOptions, Scenario, gaps::Times, run};
use serde_json::json;
use tokio::sync::watch;

use crate::{Options, Outcome};

/// Five hundred writes a second, as many reads, and a kill each three to five seconds.
const FAILOVER: &str = "
title = \"the leader is killed under 500 writes a second\"
[cluster]
heads = 3
workers = 0
[workload]
submitters = 0
submits_per_second = 0
register_clients = 64
registers = 64
register_operations_per_second = 1000
[[fault]]
kind = \"kill\"
target = \"leader\"
every_s = [3.0, 5.0]
lasts_s = [0.0, 0.5]
[checks]
jobs_min_per_minute = 0
register_operations_min_per_minute = 10000
faults_min_per_minute = 8
";

pub(crate) fn measure(options: &Options, results: &mut Results) -> Outcome {
    let scenario = Scenario::from_toml(FAILOVER, "failover")?;
    let run_options = RunOptions {
        program: options.mobula.clone(),
        seed: 1,
        length: options.failover,
        // Nothing between the processes but the kernel.
        only_loopback: true,
        dir: None,
        observe: Arc::new(|_| {}),
    };
    let never = watch::Sender::new(false).subscribe();
    let outcome = run(&scenario, &run_options, never)?;
    println!("{outcome}");
    let figures = [
        ("write gap", &outcome.felt.write_gap),
        ("election", &outcome.felt.election),
        ("recovery", &outcome.felt.recovery),
    ];
    for (name, times) in figures {
        let name = format!("leader killed under 500 writes/s, {name}");
        let Times {
            count,
            p50_ms,
            p99_ms,
            max_ms,
        } = times;
        results.row(
            &format!(
                "{name:<60} p50 {p50_ms} ms, p99 {p99_ms} ms, longest {max_ms} ms, of {count}"
            ),
            json!({
                "name": name, "unit": "ms", "p50": p50_ms, "p99": p99_ms, "max": max_ms,
                "count": count, "load": outcome.load, "promises_kept": outcome.passed,
            }),
        );
    }
    if outcome.passed {
        Ok(())
    } else {
        Err("a promise was broken: these figures mean nothing".into())
    }
}
