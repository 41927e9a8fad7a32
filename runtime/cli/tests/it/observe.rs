//! What is there to see of a running cluster: metrics and timelines.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::examples::example;
use crate::support::{TestCluster, repository, text_of, wait_for};

/// The names of metrics in a text of Prometheus' format.
fn exported(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .map(str::to_owned)
        .collect()
}

/// The names in the first column of the tables of `docs/metrics.md`.
fn documented() -> BTreeSet<String> {
    let text = std::fs::read_to_string(repository("docs/metrics.md")).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| line.split('`').next())
        .map(str::to_owned)
        .collect()
}

/// The value of a series.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

/// Whether there is one for each host process.
fn is_of_hosts(name: &str) -> bool {
    name.starts_with("mobula_worker_host_")
}

/// Whether there is one for each GPU.
fn is_of_gpus(name: &str) -> bool {
    name.starts_with("mobula_worker_gpu_")
}

/// Whether there is one for each training job.
fn is_of_training(name: &str) -> bool {
    name.starts_with("mobula_training_") || name.starts_with("ml_data_integration_")
}

/// Whether there is one for each graph.
fn is_of_graphs(name: &str) -> bool {
    name.starts_with("ml_pipeline_")
}

/// Whether there is one for each endpoint.
fn is_of_serving(name: &str) -> bool {
    let prefixes = ["mobula_serving_", "nv_inference_", "nv_cache_"];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// What an endpoint's worker exports of it is what is documented.
pub(crate) fn assert_serving_exported(text: &str) {
    let of_serving = |names: BTreeSet<String>| -> BTreeSet<String> {
        names
            .into_iter()
            .filter(|name| is_of_serving(name))
            .collect()
    };
    let (found, documented) = (of_serving(exported(text)), of_serving(documented()));
    assert_eq!(found, documented, "left: exported, right: documented");
}

#[test]
fn metrics_are_exported_under_the_names_that_are_documented() {
    let cluster = TestCluster::up(1);
    let program = example("counter");
    cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
    let head = cluster.ok(&["metrics"]);
    let worker = cluster.ok(&["metrics", "worker-1"]);
    let mut found = exported(&head);
    found.extend(exported(&worker));
    // A series of each host, of each reason, or of each endpoint: there is none where there are no hosts, where
    // nothing is pending, or where nothing is deployed.
    let is_of_some = |name: &String| {
        is_of_hosts(name)
            || is_of_gpus(name)
            || is_of_training(name)
            || is_of_serving(name)
            || is_of_graphs(name)
    };
    found.extend(documented().into_iter().filter(is_of_some));
    found.insert("mobula_actors_pending_by_reason".to_owned());
    found.insert("mobula_endpoint_replicas_wanted".to_owned());
    assert_eq!(found, documented(), "left: exported, right: documented");

    assert_eq!(value(&head, "mobula_raft_is_leader"), Some(1.0));
    let submitted = "mobula_api_requests_total{method=\"SubmitJob\",code=\"Ok\"}";
    assert_eq!(value(&head, submitted), Some(1.0), "{head}");
    // The driver, its actor, and the actor's second start.
    let ordered = value(&head, "mobula_dispatcher_orders_total{kind=\"start\"}");
    assert!(ordered >= Some(3.0), "{head}");
    let panicked = "mobula_worker_actor_exits_total{kind=\"panicked\"}";
    assert_eq!(value(&worker, panicked), Some(1.0), "{worker}");
    let started = value(&worker, "mobula_worker_hosts_started_total");
    assert!(started >= Some(2.0), "{worker}");

    let text = cluster.refused(&["metrics", "worker-9"]);
    assert!(text.contains("no node is called `worker-9`"), "{text}");
}

#[test]
fn hosts_report_their_calls_through_their_agent() {
    let cluster = TestCluster::up(1);
    let program = example("parallel_pi");
    let arguments = ["submit", program.to_str().unwrap(), "--", "4", "200000000"];
    cluster.ok(&arguments);
    let calls = |text: &str| -> f64 {
        let series = text.lines().filter(|line| {
            line.starts_with("mobula_worker_host_call_duration_seconds_count")
                || line.starts_with("mobula_worker_host_calls_in_flight")
        });
        let values = series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.sum()
    };
    let text = wait_for("a call that a host tells of", || {
        let text = cluster.ok(&["metrics", "worker-1"]);
        (calls(&text) >= 1.0).then_some(text)
    });
    let found: BTreeSet<_> = exported(&text)
        .into_iter()
        .filter(|name| is_of_hosts(name))
        .collect();
    let documented: BTreeSet<_> = documented()
        .into_iter()
        .filter(|name| is_of_hosts(name))
        .collect();
    assert_eq!(found, documented, "left: exported, right: documented");
    let memory = text
        .lines()
        .find(|line| line.starts_with("mobula_worker_host_resident_memory_bytes{"));
    let bytes: f64 = memory.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(bytes > 1e6, "{memory:?}");
    cluster.ok(&["jobs", "stop", "job-1"]);
}

/// Puts a library in NVML's place that says what the lines of `gpus` say, as `runtime/gpu` tests with it.
fn stand_in_for_nvml(folder: &Path, gpus: &str) {
    let machine = folder.join("machine");
    std::fs::write(&machine, gpus).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let output = Command::new(&compiler)
        .args(["-std=c++17", "-shared", "-fPIC"])
        .arg(format!("-DMACHINE={machine:?}"))
        .arg("-o")
        .arg(folder.join("libnvidia-ml.so.1"))
        .arg(repository("runtime/gpu/src/stand_in.cpp"))
        .output()
        .unwrap_or_else(|error| panic!("`{compiler}` compiles the stand-in: {error}"));
    assert!(output.status.success(), "{}", text_of(&output));
}

#[test]
fn a_worker_finds_its_gpus_and_shows_how_they_are_used() {
    let folder = tempfile::tempdir().unwrap();
    let gpus = "GPU-aa 25 0 1000 4000 0\nGPU-bb 75 0 3000 4000 0\n";
    stand_in_for_nvml(folder.path(), gpus);
    let mut libraries = folder.path().display().to_string();
    if let Ok(others) = std::env::var("LD_LIBRARY_PATH") {
        libraries = format!("{libraries}:{others}");
    }
    let env = [
        ("LD_LIBRARY_PATH", libraries.as_str()),
        // NVML shows them all; this worker is to have one.
        ("CUDA_VISIBLE_DEVICES", "GPU-bb"),
    ];
    let cluster = TestCluster::up_with(1, &[], &env);
    let nodes = cluster.json(&["nodes", "list"]);
    assert_eq!(nodes[0]["capacity"]["gpu_milli"], 1000, "{nodes}");
    assert_eq!(nodes[0]["labels"]["gpu"], "Stand-in", "{nodes}");
    let text = wait_for("a GPU that says how it is used", || {
        let text = cluster.ok(&["metrics", "worker-1"]);
        exported(&text)
            .iter()
            .any(|name| is_of_gpus(name))
            .then_some(text)
    });
    let of_gpus = |names: BTreeSet<String>| -> BTreeSet<String> {
        names.into_iter().filter(|name| is_of_gpus(name)).collect()
    };
    let (found, documented) = (of_gpus(exported(&text)), of_gpus(documented()));
    assert_eq!(found, documented, "left: exported, right: documented");
    for (series, expected) in [
        ("mobula_worker_gpu_utilization_ratio{gpu=\"GPU-bb\"}", 0.75),
        (
            "mobula_worker_gpu_memory_used_bytes{gpu=\"GPU-bb\"}",
            3000.0,
        ),
        ("mobula_worker_gpu_memory_bytes{gpu=\"GPU-bb\"}", 4000.0),
    ] {
        assert_eq!(value(&text, series), Some(expected), "{series} in:\n{text}");
    }
    assert!(!text.contains("GPU-aa"), "{text}");
}

#[test]
fn a_timeline_shows_starts_and_restarts_nested_and_in_order() {
    let cluster = TestCluster::up(1);
    let program = example("counter");
    cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
    let file = cluster.dir().join("trace.json");
    let text = cluster.ok(&[
        "jobs",
        "timeline",
        "job-1",
        "--output",
        file.to_str().unwrap(),
    ]);
    assert!(text.contains("ui.perfetto.dev"), "{text}");
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let events: Vec<&Value> = trace["traceEvents"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["ph"] == "X")
        .collect();
    let number = |event: &Value, key: &str| event[key].as_u64().unwrap();
    // Ordered by their beginnings, and on each track either apart or one in the other.
    for pair in events.windows(2) {
        assert!(number(pair[0], "ts") <= number(pair[1], "ts"), "{pair:?}");
    }
    for (place, outer) in events.iter().enumerate() {
        let end = number(outer, "ts") + number(outer, "dur");
        let same_track =
            |event: &&&Value| (&event["pid"], &event["tid"]) == (&outer["pid"], &outer["tid"]);
        for inner in events[place + 1..].iter().filter(same_track) {
            let begins_inside = number(inner, "ts") < end;
            let ends_inside = number(inner, "ts") + number(inner, "dur") <= end;
            assert!(!begins_inside || ends_inside, "{outer} and {inner}");
        }
    }
    let count = |name: &str| events.iter().filter(|event| event["name"] == name).count();
    assert_eq!(
        count("counter"),
        3,
        "the job, and both lives of its actor: {events:#?}"
    );
    assert_eq!(count("run"), 3, "the driver, and the actor twice");
    assert!(count("launch a process") >= 2, "{events:#?}");
    let exits: Vec<&Value> = events.iter().map(|e| &e["args"]["exit"]).collect();
    assert!(exits.contains(&&Value::from("panicked")), "{exits:?}");
}

#[test]
fn a_timeline_shows_what_tasks_waited_for() {
    let cluster = TestCluster::up(1);
    let program = example("tasks");
    // A thousand tasks of a tenth of a second: what processes recorded goes with them, so this looks while
    // they are there.
    let arguments = ["submit", program.to_str().unwrap(), "--", "1000", "100"];
    cluster.ok(&arguments);
    let trace: Value = wait_for("a task and what it waited for", || {
        let text = cluster.ok(&["jobs", "timeline", "job-1"]);
        let trace: Value = serde_json::from_str(&text).unwrap();
        let is_there = ["task", "queue", "lease"]
            .iter()
            .all(|category| count(&trace, category) > 0);
        is_there.then_some(trace)
    });
    cluster.ok(&["jobs", "stop", "job-1"]);
    let events = trace["traceEvents"].as_array().unwrap();
    let waits = events.iter().filter(|event| event["cat"] == "queue");
    for wait in waits.filter(|event| event["ph"] == "b") {
        let is_end = |event: &&Value| {
            event["ph"] == "e" && (&event["id"], &event["cat"]) == (&wait["id"], &wait["cat"])
        };
        let end = events.iter().find(is_end).unwrap();
        assert!(end["ts"].as_u64() >= wait["ts"].as_u64(), "{wait} {end}");
        assert!(wait["args"]["for"].is_string(), "{wait}");
    }
}

/// Events of a category.
fn count(trace: &Value, category: &str) -> usize {
    let events = trace["traceEvents"].as_array().unwrap();
    let of_it = |event: &&Value| event["cat"] == category;
    events.iter().filter(of_it).count()
}
