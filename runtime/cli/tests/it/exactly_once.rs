//! The process of a durable counter dies again and again under `exactly_once` increments, and so do the
//! head and the worker that the counter is on; each increment counts once.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::examples::example;
use crate::heads::start_head;
use crate::support::{Started, TestCluster, kill_9, wait_for};

/// `MOBULA_TEST_INCREMENTS` and `MOBULA_TEST_SEED` choose others.
const INCREMENTS: u64 = 10_000;

/// Each costs a second or two in which the counter is not placed again.
const HEAD_KILLS_MAX: u32 = 4;

/// Kills of the counter after which its whole worker goes. It does not come back: another takes over
/// when its lease is over.
const KILLS_BEFORE_THE_WORKER: u32 = 2;

fn from_env(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .map_or(default, |text| text.parse().unwrap())
}

/// The counter's process and node, once it is not the process that was killed last; `None` when the job
/// is over.
fn next_victim(cluster: &TestCluster, job: &str, last: Option<u32>) -> Option<(u32, Value)> {
    wait_for("another start of the counter", || {
        let shown = cluster.run(&["jobs", "show", job, "--json"]);
        let shown: Value = serde_json::from_slice(&shown.stdout).ok()?;
        if shown["ended_ms"].is_u64() {
            return Some(None);
        }
        let output = cluster.run(&["actors", "list", "--job", job, "--json"]);
        let actors: Value = serde_json::from_slice(&output.stdout).ok()?;
        let counter = actors.as_array()?.iter().find(|actor| {
            actor["type_name"] == "durable_counter::Counter" && actor["state"] == "running"
        })?;
        let pid = u32::try_from(counter["pid"].as_u64()?).ok()?;
        (Some(pid) != last).then(|| Some((pid, counter["node"].clone())))
    })
}

#[test]
fn increments_count_exactly_once_whatever_is_killed() {
    let seed = from_env("MOBULA_TEST_SEED", rand::random());
    let increments = from_env("MOBULA_TEST_INCREMENTS", INCREMENTS);
    println!("MOBULA_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let cluster = TestCluster::up(3);
    let nodes = cluster.json(&["nodes", "list"]);
    let nodes = nodes.as_array().unwrap();
    // A driver that needs a whole worker cannot stand beside the counter: it is who repeats a call.
    let cpus = nodes[0]["capacity"]["cpu_milli"].as_f64().unwrap() / 1000.0;
    let program = example("durable_counter");
    let program = program.to_str().unwrap();
    let (cpus, count) = (cpus.to_string(), increments.to_string());
    let submitted = cluster.ok(&["submit", "--json", "--cpus", &cpus, program, "--", &count]);
    let submitted: Value = serde_json::from_str(&submitted).unwrap();
    let job = format!("job-{}", submitted["job"]);

    let (mut counters, mut heads, mut workers) = (0, 0, 0);
    let mut last = None;
    let mut head: Option<Started> = None;
    while let Some((pid, node)) = next_victim(&cluster, &job, last) {
        // Somewhere in its life: as it starts, or well into its calls.
        std::thread::sleep(Duration::from_millis(random.random_range(0..1200)));
        if heads < HEAD_KILLS_MAX && counters == 2 * heads + 1 {
            // Calls need no head. Its next start is a process of this test.
            match head.take() {
                Some(started) => drop(started),
                None => kill_9(cluster.pid("head-1")),
            }
            heads += 1;
            // How long it is away is part of the fault.
            std::thread::sleep(Duration::from_millis(random.random_range(0..500)));
            head = Some(start_head(&cluster, "head-1", &[]));
        } else if workers == 0 && counters == KILLS_BEFORE_THE_WORKER {
            let home = nodes.iter().find(|known| known["id"] == node).unwrap();
            kill_9(cluster.pid(home["name"].as_str().unwrap()));
            workers += 1;
            last = Some(pid);
        } else {
            // It may have ended by itself meanwhile, and its number is not given out again so soon.
            kill_9(pid);
            counters += 1;
            last = Some(pid);
        }
    }
    let kills = format!("{counters} of the counter, {heads} of the head, {workers} of a worker");
    let result = cluster.result_of(&job);
    assert_eq!(result["n"], increments, "after {kills}, seed {seed}");
    assert!(
        counters >= 3 && heads >= 1 && workers == 1,
        "only {kills}: count further"
    );
    println!("{increments} increments, kills: {kills}");
}
