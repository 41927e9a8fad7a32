//! Replicas that take more memory than they may.

use serde_json::{Value, json};

use super::imported::Imported;
use crate::support::wait_for;

/// A request of so many tokens, for a model that compares each of them with every other one.
fn tokens(count: usize) -> Value {
    json!({"inputs": [
        {"name": "tokens", "datatype": "INT64", "shape": [1, count], "data": vec![1; count]},
        {"name": "mask", "datatype": "FP32", "shape": [1, count], "data": vec![1.0; count]},
    ]})
}

#[test]
fn a_replica_that_takes_too_much_memory_is_ended_and_comes_back() {
    let imported = Imported::up();
    let cluster = &imported.cluster;
    imported.register("attention", &[]);
    let refused = cluster.refused(&["serve", "deploy", "attention", "--memory", "1"]);
    assert!(refused.contains("at least 128 MiB"), "{refused}");
    let deployed = cluster.json(&[
        "serve",
        "deploy",
        "attention",
        "--replicas",
        "1",
        "--memory",
        "256",
    ]);
    let listed = cluster.json(&["serve", "list"]);
    assert_eq!(listed[0]["memory_bytes"], 256 << 20, "{listed}");
    let (status, answer) = imported.infer(&deployed, &tokens(8));
    assert_eq!(status, 200, "{answer}");

    let nodes = cluster.json(&["nodes", "list"]);
    let limits = nodes[0]["labels"]["memory_limits"].as_str().unwrap();
    if !limits.starts_with("cgroup") {
        println!("not shown: {limits}");
        return;
    }
    // Some 600 MB, once.
    let (status, answer) = imported.infer(&deployed, &tokens(12_000));
    assert!(status >= 500, "{status}: {answer}");
    wait_for("the replica's end", || {
        let actors = cluster.json(&["actors", "list"]);
        let actors = actors.as_array()?.iter();
        let mut reasons = actors.filter_map(|actor| actor["exit_reason"].as_str());
        reasons
            .any(|reason| reason.contains("out of memory: limit 268435456 bytes"))
            .then_some(())
    });
    wait_for("another start of it", || {
        (imported.infer(&deployed, &tokens(8)).0 == 200).then_some(())
    });
}
