//! Jobs: what is shipped with them, what they leave, and what becomes of them when things go wrong.

use std::path::PathBuf;
use std::process::Stdio;

use crate::examples::example;
use crate::support::{Started, TestCluster, kill_9, mobula, runs, small_job, text_of, wait_for};

#[test]
fn files_and_environment_are_shipped_and_the_result_is_kept() {
    let cluster = TestCluster::up(2);
    let words = cluster.dir().join("words.txt");
    std::fs::write(&words, "red green red\nblue, red.").unwrap();
    let empty = cluster.dir().join("empty");
    std::fs::write(&empty, "").unwrap();
    let program = example("word_count");
    let named = format!("{}:data/words", words.display());
    let mut arguments = vec!["submit", program.to_str().unwrap(), "--env", "WORD=red"];
    arguments.extend(["--file", &named, "--file", empty.to_str().unwrap()]);
    let mut ended = arguments.clone();
    ended.extend(["--follow", "--json", "--", "data/words", "empty"]);
    let output = cluster.run(&ended);
    assert!(output.status.success(), "{}", text_of(&output));
    let text = text_of(&output);
    assert!(text.contains("data/words: 3 times `red`"), "{text}");

    let shown = cluster.json(&["jobs", "show", "job-1"]);
    assert_eq!(
        shown["result"],
        serde_json::json!({"data/words": 3, "empty": 0})
    );
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(shown["result_json"].as_str().unwrap()).unwrap(),
        shown["result"]
    );
    // The working directories went with the job's last processes.
    wait_for("the end of the working directories", || {
        let left = working_directories(&cluster);
        left.is_empty().then_some(())
    });

    // An error that main returned is the job's end, without a second try.
    let mut refused = arguments.clone();
    refused.extend(["--follow", "--", "data/words", "absent.txt"]);
    let text = cluster.refused(&refused);
    assert!(text.contains("absent.txt: No such file"), "{text}");
    let shown = cluster.json(&["jobs", "show", "job-2"]);
    assert_eq!(shown["state"], "failed");
    assert_eq!(shown["restarts"], 0, "{shown}");
    // Unless it is asked for.
    let mut retried = arguments;
    retried.extend(["--retry-errors", "--max-restarts", "2", "--follow"]);
    retried.extend(["--", "absent.txt"]);
    cluster.refused(&retried);
    let shown = cluster.json(&["jobs", "show", "job-3"]);
    assert_eq!(shown["restarts"], 2, "{shown}");
}

/// What is left in the workers' work folders.
fn working_directories(cluster: &TestCluster) -> Vec<std::path::PathBuf> {
    let entries = |dir: &std::path::Path| {
        std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().path())
            .collect::<Vec<_>>()
    };
    entries(cluster.dir())
        .iter()
        .flat_map(|process| entries(&process.join("work")))
        .collect()
}

#[test]
fn a_file_that_cannot_be_shipped_is_refused_before_anything_is_submitted() {
    let cluster = TestCluster::up(1);
    let program = example("word_count");
    let program = program.to_str().unwrap();
    let text = cluster.refused(&["submit", program, "--file", "/nowhere/at-all"]);
    assert!(text.contains("/nowhere/at-all is not a file"), "{text}");
    let words = cluster.dir().join("words.txt");
    std::fs::write(&words, "x").unwrap();
    let named = format!("{}:../words", words.display());
    let text = cluster.refused(&["submit", program, "--file", &named]);
    assert!(text.contains("cannot be the name of a file"), "{text}");
    assert_eq!(cluster.json(&["jobs", "list"]), serde_json::json!([]));
}

#[test]
fn who_uses_more_memory_than_it_may_is_ended_and_told_so() {
    let cluster = TestCluster::up(1);
    let nodes = cluster.json(&["nodes", "list"]);
    let limits = nodes[0]["labels"]["memory_limits"].as_str().unwrap();
    let program = example("memory_limit");
    cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
    let shown = cluster.json(&["jobs", "show", "job-1"]);
    let result = shown["result"].as_str().unwrap();
    if limits.starts_with("cgroup") {
        let limit = 96 << 20;
        let expected = format!("out of memory: limit {limit} bytes, used ");
        assert!(result.starts_with(&expected), "{limits}: {result}");
    } else {
        assert!(limits.starts_with("none-"), "{limits}");
        assert!(result.starts_with("nothing limits memory here"), "{result}");
    }
}

/// The weight of a process's control group where CPUs are busy: the file's name, and what it says.
fn cpu_weight(pid: u32) -> Option<(&'static str, String)> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let has_cpu = controllers.split(',').any(|controller| controller == "cpu");
        let file = match controllers {
            "" => "cpu.weight",
            _ if has_cpu => "cpu.shares",
            _ => return None,
        };
        let folder = format!("/sys/fs/cgroup/{controllers}{path}");
        let weight = std::fs::read_to_string(PathBuf::from(folder).join(file)).ok()?;
        Some((file, weight.trim().to_owned()))
    })
}

#[test]
fn a_process_weighs_as_much_on_a_busy_cpu_as_it_asked_for() {
    let cluster = TestCluster::up(1);
    let nodes = cluster.json(&["nodes", "list"]);
    let limits = nodes[0]["labels"]["memory_limits"].as_str().unwrap();
    if !limits.starts_with("cgroup") {
        println!("not shown: {limits}");
        return;
    }
    let file = cluster.dir().join("job.toml");
    std::fs::write(&file, small_job("heavy", 1_000_000)).unwrap();
    let submitted = cluster.json(&["submit", file.to_str().unwrap(), "--cpus", "2"]);
    let job = format!("job-{}", submitted["job"]);
    let driver = wait_for("a driver", || {
        let actors = cluster.json(&["actors", "list", "--job", &job]);
        let is_driver = |actor: &&serde_json::Value| actor["type_name"] == "driver";
        u32::try_from(actors.as_array()?.iter().find(is_driver)?["pid"].as_u64()?).ok()
    });
    let weight = cpu_weight(driver);
    // Two cores, where a group that nobody weighed has one.
    let expected = [("cpu.shares", "2048"), ("cpu.weight", "200")];
    let is_expected = |(file, weight): &(&str, String)| expected.contains(&(*file, weight));
    assert!(weight.as_ref().is_some_and(is_expected), "{weight:?}");
    cluster.ok(&["jobs", "stop", &job]);
}

#[test]
fn a_process_that_never_says_that_it_is_there_is_ended_and_told_of() {
    let cluster = TestCluster::up(1);
    // A program that knows nothing of clusters; no other process of the machine has this argument.
    let argument = format!("1000.{}", std::process::id());
    let submitted = cluster.ok(&[
        "submit",
        "--json",
        "/bin/sleep",
        "--max-restarts",
        "0",
        "--",
        &argument,
    ]);
    let submitted: serde_json::Value = serde_json::from_str(&submitted).unwrap();
    let find = || {
        let entries = std::fs::read_dir("/proc").unwrap();
        let mut pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.find(|pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.ends_with(format!("\0{argument}\0").as_bytes())
        })
    };
    let pid = wait_for("the mute process", find);
    let ended = cluster.wait_job(&format!("job-{}", submitted["job"]));
    assert_eq!(ended["state"], "failed", "{ended}");
    let reason = ended["exit_reason"].as_str().unwrap();
    assert!(reason.contains("said nothing within 30000 ms"), "{reason}");
    wait_for("the end of the mute process", || (!runs(pid)).then_some(()));
}

#[test]
fn a_job_goes_on_after_every_process_was_killed() {
    let mut cluster = TestCluster::up(2);
    let job = cluster.submit_toml(&small_job("survivor", 300));
    // Far enough that there is something to go on from.
    wait_for("a first checkpoint", || {
        let log = text_of(&cluster.run(&["jobs", "logs", &job]));
        log.lines()
            .any(|line| line.contains("checkpoint of step") && line.contains(" committed: "))
            .then_some(())
    });
    let before = cluster.json(&["jobs", "show", &job]);
    assert_eq!(before["state"], "running", "{before}");
    let groups = |cluster: &TestCluster| -> Vec<PathBuf> {
        ["worker-1", "worker-2"]
            .iter()
            .flat_map(|worker| control_groups(worker, cluster.pid(worker)))
            .collect()
    };
    let groups_before = groups(&cluster);
    let nodes = cluster.json(&["nodes", "list"]);
    let limits = nodes[0]["labels"]["memory_limits"].as_str().unwrap();
    assert_eq!(limits.starts_with("cgroup"), !groups_before.is_empty());
    let runs = |cluster: &TestCluster| -> Vec<u64> {
        let trace: serde_json::Value =
            serde_json::from_str(&cluster.ok(&["jobs", "timeline", &job])).unwrap();
        let events = trace["traceEvents"].as_array().unwrap().clone();
        let runs = events.iter().filter(|event| event["name"] == "run");
        runs.filter_map(|event| event["ts"].as_u64()).collect()
    };
    let runs_before = runs(&cluster);
    for process in ["head-1", "worker-1", "worker-2"] {
        kill_9(cluster.pid(process));
    }
    cluster.up_again(2);
    // The dead workers could not clean up after themselves; the new ones did.
    wait_for("the end of the dead workers' control groups", || {
        groups_before
            .iter()
            .all(|path| !path.exists())
            .then_some(())
    });
    let result = cluster.result_of(&job);
    assert_eq!(result["steps"], 300, "{result}");
    let after = cluster.json(&["jobs", "show", &job]);
    assert_eq!(after["submitted_ms"], before["submitted_ms"]);
    assert!(after["restarts"].as_u64() >= Some(1), "{after}");
    // The head that was there then is dead; when its actors ran stands in the tables.
    let runs_after = runs(&cluster);
    assert!(runs_after.len() > runs_before.len(), "{runs_after:?}");
    for ran_us in runs_before {
        let near = |after: &&u64| after.abs_diff(ran_us) < 500_000;
        assert!(
            runs_after.iter().any(|after| near(&after)),
            "{ran_us} in {runs_after:?}"
        );
    }
    let groups_after = groups(&cluster);
    cluster.ok(&[
        "local",
        "down",
        "--data-dir",
        cluster.dir().to_str().unwrap(),
    ]);
    for path in groups_after {
        assert!(!path.exists(), "{} was left", path.display());
    }
}

#[test]
fn each_process_sees_the_gpus_that_its_actor_was_given() {
    let cluster = TestCluster::up(1);
    // A worker that says it has two: no driver is asked, the devices are called 0 and 1.
    let dir = cluster.dir().join("gpu-1");
    std::fs::create_dir_all(&dir).unwrap();
    let (config, token) = (dir.join("worker.toml"), dir.join("worker.token"));
    std::fs::write(&config, "[worker.resources]\ngpu = 2.0\n").unwrap();
    let made = cluster.json(&["tokens", "create", "--role", "worker"]);
    std::fs::write(&token, made["token"].as_str().unwrap()).unwrap();
    let join = |name: &str, folder: &str| {
        let mut worker = mobula();
        worker
            .args([
                "worker",
                "--name",
                name,
                "--cpus",
                "4",
                "--head",
                cluster.api(),
            ])
            .arg("--config")
            .arg(&config)
            .arg("--join-token-file")
            .arg(&token)
            .arg("--data-dir")
            .arg(cluster.dir().join(folder))
            .stdout(Stdio::null());
        worker
    };
    let _worker = Started(
        join("gpu-1", "gpu-1")
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let program = example("gpus");
    cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
    let seen = cluster.json(&["jobs", "show", "job-1"])["result"].clone();
    assert_eq!(seen["none"], "", "{seen}");
    assert_eq!(seen["half"], seen["other half"], "{seen}");
    let mut devices = [
        seen["half"].as_str().unwrap(),
        seen["whole"].as_str().unwrap(),
    ];
    devices.sort_unstable();
    assert_eq!(devices, ["0", "1"], "{seen}");

    // Each of the four processes said the same, which is said once.
    let all = cluster.ok(&["jobs", "logs", "job-1", "--all"]);
    let found: Vec<&str> = all
        .lines()
        .filter(|line| line.contains("looking for"))
        .collect();
    assert_eq!(found.len(), 2, "{all}");
    assert!(found[0].starts_with("(node-"), "{all}");
    assert_eq!(found[1], "looking for devices [repeated 3x across hosts]");
    let all = cluster.ok(&["jobs", "logs", "job-1", "--all", "--no-dedup"]);
    assert_eq!(all.matches(") looking for devices").count(), 4, "{all}");

    // While it lives, its name is taken.
    let second = join("gpu-1", "gpu-2").output().unwrap();
    assert!(!second.status.success());
    let text = text_of(&second);
    assert!(
        text.contains("a worker called `gpu-1` is in the cluster"),
        "{text}"
    );
}

/// The folders of control groups that a worker's process made.
fn control_groups(worker: &str, pid: u32) -> Vec<PathBuf> {
    let name = format!("mobula-{worker}-{pid}");
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder && entry.file_name() == name.as_str() {
                found.push(entry.path());
            } else if is_folder {
                folders.push(entry.path());
            }
        }
    }
    found
}
