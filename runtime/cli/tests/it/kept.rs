//! Objects that a job keeps: they survive their owner's process, its worker and the whole cluster, are
//! nobody else's, and go with the job.
//!
//! The program that keeps and reads them is `tests/programs/kept_probe.rs`.

use serde_json::{Value, json};

use crate::examples::example;
use crate::extra_worker::ExtraWorker;
use crate::support::{TestCluster, kill_9, text_of, wait_for};

fn submit(cluster: &TestCluster, arguments: &[&str]) -> String {
    let program = example("kept_probe");
    let folder = cluster.dir().to_str().unwrap();
    let mut command = vec!["submit", "--json", program.to_str().unwrap(), "--"];
    command.extend(arguments);
    command.push(folder);
    let submitted: Value = serde_json::from_str(&cluster.ok(&command)).unwrap();
    format!("job-{}", submitted["job"])
}

/// What the program tells in a file, as soon as it does; fails when its job ends before.
fn told(cluster: &TestCluster, job: &str, name: &str) -> Value {
    wait_for(name, || {
        let text = std::fs::read_to_string(cluster.dir().join(name)).ok();
        if text.is_none() {
            let shown = cluster.run(&["jobs", "show", job, "--json"]);
            let shown: Value = serde_json::from_slice(&shown.stdout).ok()?;
            let logs = || text_of(&cluster.run(&["jobs", "logs", job]));
            assert!(!shown["ended_ms"].is_u64(), "{shown}\n{}", logs());
        }
        serde_json::from_str(&text?).ok()
    })
}

#[test]
fn kept_objects_survive_their_process_their_worker_and_the_whole_cluster() {
    let mut cluster = TestCluster::up(1);
    let job = submit(&cluster, &["keep"]);
    told(&cluster, &job, "driver.json");
    let worker = ExtraWorker::start(&cluster, "a", "object_store_bytes = 268435456");
    let owner = told(&cluster, &job, "kept.json")["pid"].as_u64().unwrap();
    kill_9(u32::try_from(owner).unwrap());
    let after = told(&cluster, &job, "lost-process.json");
    assert_eq!(after["is_right"], true, "another process of its worker");
    kill_9(worker.pid());
    let after = told(&cluster, &job, "lost-worker.json");
    assert_eq!(after["is_right"], true, "a process of another worker");
    for process in ["head-1", "worker-1"] {
        kill_9(cluster.pid(process));
    }
    cluster.up_again(1);
    let after = told(&cluster, &job, "again.json");
    let names = json!(["large-1", "large-2", "small-1", "small-2"]);
    assert_eq!(after, json!({ "is_right": true, "names": names }));

    let number = job.strip_prefix("job-").unwrap();
    let intruder = cluster.result_of(&submit(&cluster, &["intrude", number]));
    let refused = json!(["permission_denied"].repeat(4));
    assert_eq!(intruder["codes"], refused, "{intruder}");
    assert_eq!(intruder["own"], false, "names are each job's own");
    let listed = cluster.json(&["jobs", "kept", &job]);
    assert_eq!(listed.as_array().unwrap().len(), 4, "{listed}");
    assert_eq!(listed[0]["name"], "large-1", "{listed}");
    assert_eq!(listed[0]["size_bytes"], 9 << 20, "{listed}");

    std::fs::write(cluster.dir().join("looked-into"), "").unwrap();
    assert_eq!(cluster.result_of(&job)["still"], 4);
    assert_eq!(cluster.json(&["jobs", "kept", &job]), json!([]));
}
