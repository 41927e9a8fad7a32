//! `mobula train`, against a cluster of real processes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::support::{TestCluster, family, repository, small_job, text_of, wait_for};

/// A job that gets no better soon: its rate is far too small.
fn hopeless_job(name: &str) -> String {
    let rate = "seed = 7\nlearning_rate = 1e-9";
    format!(
        "{}[evaluation]\nevery_steps = 10\n\
         [evaluation.early_stop]\npatience = 2\nmin_delta = 0.01\n",
        small_job(name, 400).replace("seed = 7", rate)
    )
}

fn write(cluster: &TestCluster, name: &str, text: &str) -> String {
    let file = cluster.dir().join(name);
    std::fs::write(&file, text).unwrap();
    file.display().to_string()
}

/// Whether a step's parts are no more than its time: of a job with so many samples in a step.
fn check_breakdown(status: &Value, global_batch: f64) {
    let part = |name: &str| {
        let ms = status["breakdown_ms"][name].as_f64();
        let ms = ms.unwrap_or_else(|| panic!("{name}: {status}"));
        assert!(ms >= 0.0, "{name}: {status}");
        ms
    };
    let parts = ["data", "compute", "exchange", "wait", "checkpoint"].map(part);
    assert!(part("compute") > 0.0, "{status}");
    let progress = &status["progress"];
    let goodput = progress["goodput"].as_f64().unwrap();
    assert!(goodput > 0.0 && goodput <= 1.0, "{status}");
    // Both are of the steps since the line before. What is neither part of a step nor a save is measuring, and is in none.
    let samples_per_second = progress["samples_per_second"].as_f64().unwrap();
    let step_ms = 1e3 * global_batch / samples_per_second;
    let sum: f64 = parts.iter().sum();
    let rounding = 0.01 * step_ms + 0.01;
    assert!(
        sum > 0.0 && sum <= step_ms + rounding,
        "{parts:?} of {step_ms} ms: {status}"
    );
}

#[test]
fn a_job_is_followed_and_its_status_says_where_the_time_goes() {
    let cluster = TestCluster::up(2);
    let file = repository("cluster-configs/jobs/digits-mlp.toml");
    let file = file.to_str().unwrap();
    let text = cluster.ok(&["train", file, "--workers", "1..2", "--follow"]);
    assert!(text.contains("done: held-out loss"), "{text}");
    assert!(text.contains("evaluation after step 400: loss"), "{text}");
    let status = cluster.json(&["train", "status", "1"]);
    assert_eq!(
        (&status["state"], &status["job"]),
        (&Value::from("succeeded"), &1.into())
    );
    assert_eq!(status["progress"]["step"], 2400, "{status}");
    check_breakdown(&status, 128.0);
    let result = &status["result"];
    assert!(result["accuracy"].as_f64().unwrap() >= 0.95, "{result}");
    assert!(result["goodput"].as_f64().unwrap() > 0.0, "{result}");
    let text = cluster.ok(&["train", "status", "job-1"]);
    assert!(
        text.contains("step 2400 of 2400") && text.contains("goodput"),
        "{text}"
    );
    let text = cluster.refused(&["train", file, "--workers", "3..2"]);
    assert!(text.contains("write 2..8, or 4"), "{text}");
    let text = cluster.refused(&["train"]);
    assert!(text.contains("name a job file"), "{text}");
}

/// The memory in which `processes` exchange sums: which of them have each piece of it mapped.
fn memory_of_sums(processes: &BTreeSet<u32>) -> BTreeMap<String, BTreeSet<u32>> {
    let mut memory: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    for pid in processes {
        // A process may end meanwhile.
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        for line in maps
            .lines()
            .filter(|line| line.contains("/memfd:mobula-sums"))
        {
            let inode = line.split_whitespace().nth(4).unwrap().to_owned();
            memory.entry(inode).or_default().insert(*pid);
        }
    }
    memory
}

#[test]
fn processes_of_one_machine_exchange_sums_in_memory() {
    let cluster = TestCluster::up(2);
    // Large enough that each trainer owns a bucket, so that the driver asks both.
    let text = small_job("long", 1_000_000)
        .replace("min = 1", "min = 2")
        .replace("[64]", "[256, 192]");
    let file = write(&cluster, "long.toml", &text);
    let reply = cluster.json(&["train", &file]);
    let sums = || {
        let workers = ["worker-1", "worker-2"].map(|name| family(cluster.pid(name)));
        memory_of_sums(&workers.into_iter().flatten().collect())
    };
    // Each trainer's is read by the other one and by the driver, whose copy takes the sums of every step.
    wait_for("memory of two trainers, read by three processes", || {
        let sums = sums();
        let is_shared = sums.len() == 2 && sums.values().all(|readers| readers.len() == 3);
        is_shared.then_some(())
    });
    let job = format!("job-{}", reply["job"]);
    let step = || cluster.json(&["train", "status", &job])["progress"]["step"].as_u64();
    let before = wait_for("a step", step);
    wait_for("the next steps", || step().filter(|step| *step > before));
    check_breakdown(&cluster.json(&["train", "status", &job]), 128.0);
    // The driver's process says so in the metrics of the worker that it is on.
    let shown = wait_for("the job's metrics", || {
        let texts = ["worker-1", "worker-2"].map(|worker| cluster.ok(&["metrics", worker]));
        let shown = texts.concat();
        shown.contains("mobula_training_step{").then_some(shown)
    });
    let value = |name: &str| -> f64 {
        let line = shown.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("{name} in:\n{shown}"));
        assert!(line.contains(&format!("job=\"{job}\"")), "{line}");
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(value("mobula_training_step{") > 0.0);
    assert_eq!(value("mobula_training_workers{"), 2.0);
    assert!(value("mobula_training_cpu_cores{") > 0.0, "{shown}");
    // On CPUs nothing is said of GPUs.
    assert!(!shown.contains("mobula_training_gpu_"), "{shown}");
    assert!(value("mobula_training_step_seconds{") >= 0.0);
    cluster.ok(&["jobs", "stop", &job]);
    wait_for("the end of that memory", || sums().is_empty().then_some(()));
}

#[test]
fn early_stopping_comes_at_the_same_step_with_the_same_bits_however_many_workers() {
    let cluster = TestCluster::up(2);
    let file = write(&cluster, "hopeless.toml", &hopeless_job("hopeless"));
    let results: Vec<Value> = ["1", "2"]
        .iter()
        .map(|workers| {
            let reply = cluster.json(&["train", &file, "--workers", workers]);
            cluster.result_of(&format!("job-{}", reply["job"]))
        })
        .collect();
    for result in &results {
        assert_eq!(result["stopped_early"], true, "{result}");
        assert_eq!(
            (&result["steps"], &result["best"][1]),
            (&30.into(), &10.into()),
            "{result}"
        );
    }
    assert_eq!(results[0]["weights_blake3"], results[1]["weights_blake3"]);
}

#[test]
fn text_is_shipped_and_learned() {
    let cluster = TestCluster::up(1);
    let words = "the cat sat on the mat and the dog sat on the cat. ".repeat(40);
    std::fs::write(cluster.dir().join("words.txt"), words).unwrap();
    let job = "name = \"words\"\nseed = 7\nsteps = 60\nglobal_batch = 16\nvirtual_shards = 4\n\
               learning_rate = 0.01\ncheckpoint_every_steps = 50\nworkers = { min = 1, max = 1 }\n\
               [dataset.text]\nfiles = [\"words.txt\"]\ncontext = 16\n\
               [model.transformer]\nlayers = 1\nwidth = 16\nheads = 2\ndropout = 0.02\n";
    let file = write(&cluster, "words.toml", job);
    let reply = cluster.json(&["train", &file]);
    let result = cluster.result_of(&format!("job-{}", reply["job"]));
    // A byte drawn at random costs ln 256 = 5.5.
    let loss = result["held_out_loss"].as_f64().unwrap();
    assert!(loss < 2.5, "{result}");
    assert!(result["metrics"]["bits_per_token"].is_number(), "{result}");
}

#[test]
fn what_diverges_or_does_not_fit_fails_once_and_says_why() {
    let cluster = TestCluster::up(1);
    let failed = |name: &str, text: &str| {
        let file = write(&cluster, name, text);
        let reply = cluster.json(&["train", &file]);
        let job = format!("job-{}", reply["job"]);
        let ended = cluster.wait_job(&job);
        assert_eq!(
            (&ended["state"], &ended["restarts"]),
            (&"failed".into(), &0.into()),
            "{ended}"
        );
        let logs = text_of(&cluster.run(&["jobs", "logs", &job]));
        format!("{} {logs}", ended["exit_reason"])
    };
    // Features so large that products of them overflow once the weights have grown.
    let row = "1e30,-2e30,3e30,0\n-3e30,1e30,2e30,1\n";
    std::fs::write(cluster.dir().join("large.csv"), row.repeat(80)).unwrap();
    let diverging = small_job("diverges", 200).replace(
        "seed = 7",
        "seed = 7\nlearning_rate = 100.0\noptimizer = { sgd = { momentum = 0.9 } }",
    );
    let diverging = format!("{diverging}[dataset.csv]\nfiles = [\"large.csv\"]\n");
    let text = failed("diverges.toml", &diverging);
    assert!(
        text.contains("is not finite; the loss has diverged"),
        "{text}"
    );
    assert!(text.contains("step ") && text.contains("dense."), "{text}");
    let image =
        small_job("shape", 10).replace("[model.mlp]\nhidden = [64]", "[model.cnn]\nchannels = [2]");
    std::fs::write(
        cluster.dir().join("flat.csv"),
        "1,2,3,0\n4,5,6,1\n".repeat(80),
    )
    .unwrap();
    let image = format!("{image}[dataset.csv]\nfiles = [\"flat.csv\"]\n");
    let text = failed("shape.toml", &image);
    assert!(
        text.contains("a cnn needs images of [height, width]"),
        "{text}"
    );
    let short = small_job("short", 10);
    std::fs::write(cluster.dir().join("few.csv"), "1,2,3,0\n4,5,6,1\n").unwrap();
    let text = failed(
        "short.toml",
        &format!("{short}[dataset.csv]\nfiles = [\"few.csv\"]\n"),
    );
    assert!(
        text.contains("global_batch is 128: the training part of the data has 1 samples"),
        "{text}"
    );
}

/// All values of the tensors in a safetensors file.
fn values_of(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap());
    let (header, data) = rest.split_at(usize::try_from(length).unwrap());
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    let mut values = Vec::new();
    for (name, tensor) in tensors {
        assert_eq!(tensor["dtype"], "F32", "{name}");
        let [start, end] =
            [0_usize, 1].map(|end| tensor["data_offsets"][end].as_u64().unwrap() as usize);
        let numbers = data[start..end].chunks_exact(4);
        values.extend(numbers.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())));
    }
    values
}

#[test]
fn a_job_that_diverges_keeps_the_last_good_checkpoint() {
    let cluster = TestCluster::up(1);
    // A line through one point: at this rate each step makes its error 1.02 times as large, until no number is.
    let point = cluster.dir().join("point.csv");
    std::fs::write(point, "1,1000\n".repeat(160)).unwrap();
    let text = "name = \"grows\"\nseed = 7\nsteps = 1000000\nlearning_rate = 1.01\n\
                schedule = \"constant\"\noptimizer = { sgd = { momentum = 0.0 } }\n\
                checkpoint_every_steps = 40\nworkers = { min = 1, max = 1 }\n\
                [model.mlp]\nhidden = []\n\
                [dataset.csv]\nfiles = [\"point.csv\"]\ntargets = 1\n";
    let file = write(&cluster, "grows.toml", text);
    let job = format!("job-{}", cluster.json(&["train", &file])["job"]);
    let ended = cluster.wait_job(&job);
    assert_eq!(
        (&ended["state"], &ended["restarts"]),
        (&"failed".into(), &0.into()),
        "{ended}"
    );
    let log = text_of(&cluster.run(&["jobs", "logs", &job]));
    assert!(log.contains("the loss has diverged"), "{log}");
    // "step 3886: the gradient of dense.0.bias is not finite; …", perhaps behind the trainer that says so.
    let (before, _) = log.split_once(" is not finite").expect(&log);
    let (_, from) = before.rsplit_once("step ").expect(&log);
    let diverged: u64 = from.split_once(':').expect(&log).0.parse().unwrap();

    let listed = cluster.json(&["checkpoints", "list", &job]);
    let newest = listed["checkpoints"][0]["step"]
        .as_u64()
        .expect("one is kept");
    assert!(
        (40..=diverged).contains(&newest),
        "{newest} of {diverged}: {listed}"
    );
    let verified = cluster.json(&["checkpoints", "verify", &job]);
    for one in verified.as_array().unwrap() {
        assert_eq!(one["verdict"], "whole", "{one}");
    }
    let path = cluster.dir().join("good.safetensors");
    let restored = cluster.json(&["checkpoints", "restore", &job, "-o", path.to_str().unwrap()]);
    assert_eq!(restored["step"], newest);
    let values = values_of(&path);
    // A weight and a bias, and a moment of each.
    assert_eq!(values.len(), 4);
    assert!(values.iter().all(|value| value.is_finite()), "{values:?}");
}
