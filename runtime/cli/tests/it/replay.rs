//! `mobula train replay` and `mobula train diff`, of runs on a cluster of processes.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::examples::example;
use crate::support::{TestCluster, kill_9, mobula, small_job, text_of, wait_for};

#[test]
fn a_run_is_replayed_to_the_same_bits_and_two_runs_are_told_apart() {
    let cluster = TestCluster::up(2);
    let text = small_job("first", 1200);
    let job = cluster.submit_toml(&text);
    crate::storage::wait_for_checkpoints(&cluster, &job, 1);
    // Its driver begins again in the middle: the record is of the whole run.
    let driver = wait_for("the driver", || {
        let actors = cluster.json(&["actors", "list", "--job", &job]);
        let driver = actors
            .as_array()?
            .iter()
            .find(|a| a["type_name"] == "driver")?;
        u32::try_from(driver["pid"].as_u64()?).ok()
    });
    kill_9(driver);
    let result = cluster.result_of(&job);
    assert_eq!(result["restarts"], 1, "{result}");
    assert_eq!(result["record"].as_str().unwrap().len(), 64);

    let report = cluster.json(&["train", "replay", &job]);
    assert_eq!(report["equal"], true, "{report}");
    assert_eq!(report["steps"], 1200);
    assert_eq!(report["weights_blake3"], result["weights_blake3"]);
    let compared = report["compared"].as_u64().unwrap();
    // Steps between the newest checkpoint and the driver's end are not recorded: how many is a matter of speed.
    assert!((400..=1200).contains(&compared), "{report}");
    let rows = report["not_recorded"].as_array().unwrap().iter();
    let missing = rows.map(|row| row[1].as_u64().unwrap() - row[0].as_u64().unwrap() + 1);
    assert_eq!(compared + missing.sum::<u64>(), 1200, "{report}");
    let said = cluster.ok(&["train", "replay", &job, "--steps", "20"]);
    assert!(
        said.contains("equal: 20 steps, 20 recorded states"),
        "{said}"
    );

    let other = cluster.submit_toml(&format!(
        "learning_rate = 0.004\n{}",
        small_job("second", 40)
    ));
    cluster.result_of(&other);
    let diff = cluster.json(&["train", "diff", &job, &other]);
    assert_eq!(diff["equal_weights"], false);
    assert_eq!(
        diff["fields"]["spec.name"],
        serde_json::json!(["first", "second"])
    );
    assert_eq!(diff["fields"]["spec.learning_rate"][1], "0.004");
    assert_eq!(diff["fields"]["spec.seed"], Value::Null, "equal: {diff}");
    assert_eq!(diff["difference"]["step"], 1, "{diff}");
    let said = cluster.ok(&["train", "diff", &job, &other]);
    assert!(said.contains("spec.learning_rate"), "{said}");
    assert!(
        said.contains("the first tensor that differs after step"),
        "{said}"
    );
    let said = cluster.ok(&["train", "diff", &job, &job]);
    assert!(said.contains("nothing differs"), "{said}");
    assert!(said.contains("both ended in the same bits"), "{said}");

    let refused = cluster.refused(&["train", "replay", "job-999"]);
    assert!(refused.contains("job-999"), "{refused}");
    let waiting = cluster.submit_toml(&small_job("long", 100_000));
    let refused = cluster.refused(&["train", "diff", &job, &waiting]);
    assert!(refused.contains("has not ended"), "{refused}");
    cluster.ok(&["jobs", "stop", &waiting]);
}

/// Submits a program with models of its own; its job.
fn submitted(cluster: &TestCluster, name: &str, options: &[&str]) -> String {
    let program = example(name);
    let arguments = [&["submit", program.to_str().unwrap()][..], options].concat();
    format!("job-{}", cluster.json(&arguments)["job"])
}

/// Replays a job in the program that ran, whose files must be gone afterwards.
fn replay_by_program(cluster: &TestCluster, job: &str, options: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let output = mobula()
        .arg("--cluster")
        .arg(cluster.dir())
        .args(["train", "replay", job, "--run-program"])
        .args(options)
        .env("TMPDIR", folder.path())
        .output()
        .unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    output
}

#[test]
fn a_run_of_a_users_own_model_is_replayed_by_the_program_that_ran() {
    let cluster = TestCluster::up(2);
    let job = submitted(&cluster, "own_model", &[]);
    let result = cluster.result_of(&job);
    let refused = cluster.refused(&["train", "replay", &job, "--steps", "20"]);
    let command = format!("`mobula train replay {job} --run-program --steps 20`");
    assert!(refused.contains(&command), "{refused}");

    let output = replay_by_program(&cluster, &job, &["--json"]);
    assert!(output.status.success(), "{}", text_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["equal"], true, "{report}");
    assert_eq!(report["steps"], 120, "{report}");
    assert_eq!(report["compared"], 120, "{report}");
    assert_eq!(report["weights_blake3"], result["weights_blake3"]);
    let output = replay_by_program(&cluster, &job, &["--steps", "20"]);
    assert!(output.status.success(), "{}", text_of(&output));
    let said = String::from_utf8_lossy(&output.stdout);
    for expected in [
        &format!("replaying 20 of 120 steps of {job} (`own-model`) on this machine\n"),
        "equal: 20 steps, 20 recorded states compared\n",
    ] {
        assert!(said.contains(expected), "{said}");
    }

    // Of one program there is one artifact.
    let artifacts = std::fs::read_dir(cluster.dir().join("store/artifacts")).unwrap();
    let [program] = artifacts
        .map(|entry| entry.unwrap().path())
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    std::fs::write(&program, "another program").unwrap();
    let output = replay_by_program(&cluster, &job, &[]);
    assert!(!output.status.success());
    let text = text_of(&output);
    assert!(text.contains("in the store is damaged"), "{text}");
    std::fs::remove_file(&program).unwrap();
    let output = replay_by_program(&cluster, &job, &[]);
    assert!(!output.status.success());
    let text = text_of(&output);
    assert!(text.contains("object store any more"), "{text}");
}

#[test]
fn a_model_that_breaks_the_promise_of_equal_bits_is_caught() {
    let cluster = TestCluster::up(1);
    let [steady, moody, mortal] = ["steady", "moody", "mortal"].map(|mood| {
        let job = submitted(&cluster, "moody_model", &["--env", &format!("MOOD={mood}")]);
        cluster.result_of(&job);
        job
    });
    // What it prints is not taken for the answer.
    let output = replay_by_program(&cluster, &steady, &["--json"]);
    assert!(output.status.success(), "{}", text_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["equal"], true, "{report}");
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(
        printed.contains("the model thinks about step 5"),
        "{printed}"
    );

    let output = replay_by_program(&cluster, &moody, &["--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", text_of(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["equal"], false, "{report}");
    assert_eq!(report["difference"]["step"], 1, "{report}");
    let output = replay_by_program(&cluster, &moody, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", text_of(&output));
    let said = String::from_utf8_lossy(&output.stdout);
    let expected = "differs: the states after step 1 are not the same";
    assert!(said.contains(expected), "{said}");

    let output = replay_by_program(&cluster, &mortal, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", text_of(&output));
    let text = text_of(&output);
    let expected = "gave up the replay without a word: it ended with exit status: 7";
    assert!(text.contains(expected), "{text}");
}

/// Neither a program whose crates do not have a role, nor one whose SDK knows of none and only sees that it should look
/// for the order of an agent, takes that for a start by a person, who would have a job submitted.
#[test]
fn a_program_without_a_role_does_not_run_its_main_instead() {
    let program = example("counter");
    let folder = Path::new("/nonexistent");
    let mut command = ::mobula::role::command(&program, "replay", folder);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text_of(&output));
    let text = text_of(&output);
    assert!(text.contains("this program has no such role"), "{text}");
    let output = command.env_remove("MOBULA_ROLE").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text_of(&output));
    let text = text_of(&output);
    assert!(text.contains("bootstrap file"), "{text}");
}
