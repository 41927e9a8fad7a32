//! `mobula checkpoints`, on a cluster of processes, and saves into a store that is full.

use std::path::Path;

use serde_json::Value;

use crate::small_disk::SmallDisk;
use crate::storage::{committed_steps, wait_for_checkpoints};
use crate::support::{TestCluster, small_job, text_of, wait_for};

fn steps(checkpoints: &Value) -> Vec<u64> {
    checkpoints
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["step"].as_u64().unwrap())
        .collect()
}

/// The header of a safetensors file.
fn header_of(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let end = 8 + usize::try_from(length).unwrap();
    serde_json::from_slice(&bytes[8..end]).unwrap()
}

#[test]
fn checkpoints_are_listed_verified_exported_pinned_and_pruned() {
    let cluster = TestCluster::up(2);
    assert_eq!(
        cluster.json(&["checkpoints", "list"]),
        Value::Array(Vec::new())
    );
    let text = format!(
        "{}[checkpoints]\nevery = 20\nkeep_last = 4\nkeep_best = 1\n",
        small_job("kept", 400)
    );
    let job = cluster.submit_toml(&text);
    let result = cluster.result_of(&job);
    assert!(
        result["snapshot_stall_us"].as_u64().unwrap() > 0,
        "{result}"
    );

    let listed = cluster.json(&["checkpoints", "list", &job]);
    let found = steps(&listed["checkpoints"]);
    assert_eq!(found[0], 400, "{listed}");
    assert!((2..=5).contains(&found.len()), "{listed}");
    assert_eq!(listed["policy"]["keep_last"], 4);
    let newest = &listed["checkpoints"][0];
    assert_eq!(newest["weights_blake3"], result["weights_blake3"]);
    assert!(newest["metric"].as_f64().unwrap() > 0.0, "{newest}");
    let jobs = cluster.json(&["checkpoints", "list"]);
    assert_eq!(jobs[0]["newest"]["step"], 400, "{jobs}");
    let table = cluster.ok(&["checkpoints", "list"]);
    assert!(table.starts_with("JOB") && table.contains(&job), "{table}");
    assert!(
        cluster
            .ok(&["checkpoints", "list", &job])
            .starts_with("STEP")
    );

    let shown = cluster.json(&["checkpoints", "show", &job]);
    let tensor = |name: &str| {
        let tensors = shown["tensors"].as_array().unwrap();
        tensors.iter().find(|t| t["name"] == name).unwrap().clone()
    };
    let shape = tensor("params.dense.0.weight")["shape"].clone();
    assert_eq!(shape, serde_json::json!([64, 64]));
    let table = cluster.ok(&["checkpoints", "show", &job]);
    assert!(table.contains("params.dense.0.weight"), "{table}");

    for one in cluster
        .json(&["checkpoints", "verify", &job])
        .as_array()
        .unwrap()
    {
        assert_eq!(one["verdict"], "whole", "{one}");
    }
    let file = cluster.dir().join("weights.safetensors");
    let path = file.to_str().unwrap();
    let restored = cluster.json(&["checkpoints", "restore", &job, "-o", path]);
    assert_eq!(restored["step"], 400);
    let header = header_of(&file);
    assert_eq!(
        header["params.dense.0.weight"]["shape"],
        serde_json::json!([64, 64])
    );
    assert_eq!(
        header["__metadata__"]["weights_blake3"],
        result["weights_blake3"]
    );
    let refused = cluster.refused(&["checkpoints", "restore", &job, "-o", path]);
    assert!(refused.contains("is there already"), "{refused}");
    let said = cluster.ok(&["checkpoints", "restore", &job, "-o", path, "--force"]);
    assert!(said.contains("[start_from]\nmanifest = "), "{said}");

    a_job_starts_from_another(&cluster, &said);
    what_cannot_be_is_refused_with_what_there_is(&cluster, &job);

    let oldest = *found.last().unwrap();
    cluster.ok(&["checkpoints", "pin", &job, &oldest.to_string()]);
    let planned = cluster.json(&["checkpoints", "prune", &job, "--dry-run"]);
    assert_eq!(planned["kept"], serde_json::json!([400, oldest]));
    assert_eq!(
        steps(&cluster.json(&["checkpoints", "list", &job])["checkpoints"]).len(),
        // The leader may have begun to forget what an ended job needs no more.
        planned["kept"].as_array().unwrap().len() + planned["hidden"].as_array().unwrap().len()
    );
    let pruned = cluster.json(&["checkpoints", "prune", &job]);
    assert_eq!(pruned["kept"], serde_json::json!([400, oldest]));
    let left = cluster.json(&["checkpoints", "list", &job]);
    assert_eq!(steps(&left["checkpoints"]), [400, oldest]);
    cluster.ok(&["checkpoints", "pin", &job, &oldest.to_string(), "--undo"]);
    let said = cluster.ok(&["checkpoints", "prune", &job]);
    assert!(said.contains(&format!("hidden: {oldest}")), "{said}");

    damage_is_said(&cluster, &job);
}

/// Two jobs that start from the same weights end in the same ones, and not where one ends that does not.
fn a_job_starts_from_another(cluster: &TestCluster, said: &str) {
    let start = &said[said.find("[start_from]").unwrap()..];
    let text = small_job("goes-on", 60);
    let plain = cluster.submit_toml(&text);
    let first = cluster.submit_toml(&format!("{text}{start}"));
    let second = cluster.submit_toml(&format!("{text}{start}"));
    let hash = |job: &str| cluster.result_of(job)["weights_blake3"].clone();
    assert_eq!(hash(&first), hash(&second));
    assert_ne!(hash(&first), hash(&plain));
    let log = text_of(&cluster.run(&["jobs", "logs", &first]));
    assert!(
        log.contains("starting from the weights of manifest/"),
        "{log}"
    );

    let wide = text.replace("hidden = [64]", "hidden = [32]");
    let other = cluster.submit_toml(&format!("{wide}{start}"));
    assert_eq!(cluster.wait_job(&other)["state"], "failed");
    let log = text_of(&cluster.run(&["jobs", "logs", &other]));
    assert!(log.contains("give both jobs the same [model]"), "{log}");
}

fn what_cannot_be_is_refused_with_what_there_is(cluster: &TestCluster, job: &str) {
    for (arguments, expected) in [
        (
            vec!["checkpoints", "list", "job-999"],
            "job-999 has no checkpoints",
        ),
        (
            vec!["checkpoints", "show", "job-999"],
            "`mobula checkpoints list` shows",
        ),
        (
            vec!["checkpoints", "show", job, "--step", "7"],
            "there are those of 400",
        ),
        (
            vec!["checkpoints", "pin", job, "7"],
            "there are those of 400",
        ),
        (
            vec!["checkpoints", "prune", job, "--keep", "0"],
            "0 is not in 1..",
        ),
        (
            vec!["checkpoints", "prune", "job-999"],
            "job-999 has no checkpoints",
        ),
        (
            vec!["checkpoints", "restore", job, "-o", "/no/folder/file"],
            "/no/folder/file cannot be written",
        ),
    ] {
        let refused = cluster.refused(&arguments);
        assert!(refused.contains(expected), "{arguments:?}: {refused}");
    }
}

fn damage_is_said(cluster: &TestCluster, job: &str) {
    let shown = cluster.json(&["checkpoints", "show", job]);
    let manifest = cluster
        .dir()
        .join("store")
        .join(shown["manifest"].as_str().unwrap());
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replacen("\"seed\"", "\"sEed\"", 1)).unwrap();
    let output = cluster.run(&["checkpoints", "verify", job, "--json"]);
    assert!(!output.status.success());
    let verdicts: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(verdicts[0]["verdict"], "damaged", "{verdicts}");
    let refused = cluster.refused(&["checkpoints", "restore", job]);
    assert!(refused.contains("is damaged"), "{refused}");
    assert!(refused.contains("none of 1 checkpoints"), "{refused}");
}

/// The steps and values of `accuracy` that a job's log has.
fn accuracies(log: &str) -> Vec<(u64, f64)> {
    let measured = log.lines().filter_map(|line| {
        let (step, rest) = line
            .split_once("evaluation after step ")?
            .1
            .split_once(':')?;
        let (_, value) = rest.split_once("accuracy ")?;
        Some((step.parse().unwrap(), value.trim().parse().unwrap()))
    });
    measured.collect()
}

#[test]
fn the_best_by_what_is_measured_on_held_out_samples_are_kept() {
    let cluster = TestCluster::up(1);
    let text = format!(
        "{}[evaluation]\nevery_steps = 20\n\
         [checkpoints]\nevery = 70\nkeep_last = 1\nkeep_best = 2\nkeep_best_by = \"accuracy\"\n",
        small_job("best", 1_000_000)
    );
    let job = cluster.submit_toml(&text);
    wait_for_checkpoints(&cluster, &job, 20);
    let listed = cluster.json(&["checkpoints", "list", &job]);
    let kept = steps(&listed["checkpoints"]);
    let log = text_of(&cluster.run(&["jobs", "logs", &job]));
    cluster.ok(&["jobs", "stop", &job]);
    let policy = &listed["policy"];
    assert_eq!(
        (&policy["keep_best"], &policy["larger_is_better"]),
        (&2.into(), &true.into())
    );
    // Of those that were committed by then, the two with the most, and of equal ones the newer.
    let committed = committed_steps(&log);
    let mut best: Vec<(u64, f64)> = accuracies(&log)
        .into_iter()
        .filter(|(step, _)| *step <= kept[0] && committed.contains(step))
        .collect();
    best.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
    let mut expected: Vec<u64> = best.iter().take(2).map(|(step, _)| *step).collect();
    expected.push(kept[0]);
    expected.sort_unstable_by(|a, b| b.cmp(a));
    expected.dedup();
    assert_eq!(kept, expected, "{listed}\n{log}");
    for one in listed["checkpoints"].as_array().unwrap() {
        let step = one["step"].as_u64().unwrap();
        let measured = best.iter().find(|(at, _)| *at == step);
        let metric = one["metric"].as_f64();
        assert_eq!(metric.is_some(), measured.is_some(), "{one}");
        if let (Some(metric), Some((_, accuracy))) = (metric, measured) {
            assert!((metric - accuracy).abs() < 1e-4, "{one}");
        }
    }
}

#[test]
fn a_store_without_space_stops_no_training_and_loses_no_checkpoint() {
    const DISK_BYTES: u64 = 24 << 20;
    let disk = match SmallDisk::mount(DISK_BYTES) {
        Ok(disk) => disk,
        Err(error) => {
            println!("skipped: this system does not let the test mount a small disk: {error}");
            return;
        }
    };
    let url = format!("file://{}", disk.path().display());
    let cluster = TestCluster::up_with(1, &["--storage-url", &url], &[]);
    let job = cluster.submit_toml(&small_job("full", 2500));
    wait_for_checkpoints(&cluster, &job, 1);
    disk.fill();
    let line = wait_for("a save that finds no space", || {
        let log = text_of(&cluster.run(&["jobs", "logs", &job]));
        let line = log.lines().find(|line| line.contains("is not saved"))?;
        Some(line.to_owned())
    });
    assert!(line.contains("no space is left"), "{line}");
    assert!(line.contains("waiting, next attempt in"), "{line}");
    // Whatever was committed is whole.
    for one in cluster
        .json(&["checkpoints", "verify", &job])
        .as_array()
        .unwrap()
    {
        assert_eq!(one["verdict"], "whole", "{one}");
    }
    disk.free();
    let result = cluster.result_of(&job);
    assert_eq!(result["restarts"], 0, "a full disk is no failure: {result}");
    let newest = &cluster.json(&["checkpoints", "list", &job])["checkpoints"][0];
    assert_eq!(newest["step"], 2500);
    assert_eq!(newest["weights_blake3"], result["weights_blake3"]);
}
