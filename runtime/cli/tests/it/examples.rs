//! The SDK's examples, embedded and submitted.

use std::path::PathBuf;
use std::process::Command;

use crate::support::{TestCluster, repository, text_of};

/// A built example of the SDK: beside the binary under test.
pub(crate) fn example(name: &str) -> PathBuf {
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_mobula"));
    let path = binary.parent().unwrap().join("examples").join(name);
    assert!(
        path.is_file(),
        "{} is not built: run `cargo build --workspace --examples`",
        path.display()
    );
    path
}

pub(crate) fn embedded(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(example(name))
        .args(arguments)
        .env("MOBULA_BIN", env!("CARGO_BIN_EXE_mobula"))
        .env_remove("MOBULA_CLUSTER")
        .output()
        .unwrap();
    assert!(output.status.success(), "{name}: {}", text_of(&output));
    text_of(&output)
}

#[test]
fn counter_runs_embedded_and_submitted() {
    let text = embedded("counter", &[]);
    assert!(text.contains("after the restart it is 5 again"), "{text}");
    let cluster = TestCluster::up(2);
    let program = example("counter");
    let text = cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
    assert!(text.contains("after the restart it is 5 again"), "{text}");
    // The second time the program is there already.
    cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
    let jobs = cluster.json(&["jobs", "list"]);
    assert!(
        jobs.as_array()
            .unwrap()
            .iter()
            .all(|job| job["state"] == "succeeded"),
        "{jobs}"
    );
}

#[test]
fn parallel_pi_runs_embedded_and_submitted_with_the_same_answer() {
    let text = embedded("parallel_pi", &[]);
    assert!(text.contains("3.14"), "{text}");
    let cluster = TestCluster::up(2);
    let program = example("parallel_pi");
    let text = cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
    assert!(text.contains("3.14"), "{text}");
}

/// Examples that check what they show themselves, and what they print at their end.
const CHECKED: [(&str, &str); 10] = [
    ("concurrency", "loaders at once"),
    ("streaming", "streamed"),
    ("cancellation", "all cancelled"),
    ("durable_counter", "counted to 100 with 100 increments"),
    ("errors", "all errors told apart"),
    ("names", "the books are right"),
    ("objects", "an object ends with its owner"),
    ("kept", "numbers survived in metres"),
    ("tasks", "one survived at attempt 2"),
    ("task_streams", "streamed 1000 numbers in two attempts"),
];

#[test]
fn examples_that_check_themselves_run_embedded() {
    for (name, ending) in CHECKED {
        let text = embedded(name, &[]);
        assert!(text.contains(ending), "{name}: {text}");
    }
}

#[test]
fn examples_that_check_themselves_run_submitted() {
    let cluster = TestCluster::up(2);
    for (name, ending) in CHECKED {
        let program = example(name);
        let text = cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
        assert!(text.contains(ending), "{name}: {text}");
    }
}

#[test]
fn a_detached_actor_needs_a_namespace_which_a_program_run_by_hand_may_name() {
    let run = |namespace: Option<&str>| {
        let mut program = Command::new(example("detached"));
        program
            .args(["open", "sell", "100", "close"])
            .env("MOBULA_BIN", env!("CARGO_BIN_EXE_mobula"))
            .env_remove("MOBULA_CLUSTER")
            .env_remove("MOBULA_NAMESPACE");
        if let Some(namespace) = namespace {
            program.env("MOBULA_NAMESPACE", namespace);
        }
        program.output().unwrap()
    };
    let output = run(Some("shop"));
    assert!(output.status.success(), "{}", text_of(&output));
    let text = text_of(&output);
    assert!(text.contains("the till is closed: 100 sold"), "{text}");
    let output = run(None);
    assert!(!output.status.success());
    let text = text_of(&output);
    assert!(text.contains("is in no namespace"), "{text}");
}

#[test]
fn the_same_idempotency_key_is_the_same_job() {
    let cluster = TestCluster::up(1);
    let program = example("counter");
    let submit = || {
        cluster.json(&[
            "submit",
            program.to_str().unwrap(),
            "--idempotency-key",
            "once",
        ])["job"]
            .clone()
    };
    let first = submit();
    assert_eq!(submit(), first);
    cluster.wait_job(&format!("job-{first}"));
    assert_eq!(submit(), first);
}

#[test]
fn a_model_of_a_users_own_program_trains_to_the_bits_of_one_machine() {
    let ending = "with the bits of one machine";
    let text = embedded("own_model", &[]);
    assert!(text.contains(ending), "{text}");
    let cluster = TestCluster::up(2);
    let program = example("own_model");
    let text = cluster.ok(&["submit", program.to_str().unwrap(), "--follow"]);
    assert!(text.contains(ending), "{text}");
    let job = &cluster.json(&["jobs", "list"])[0];
    let result = cluster.result_of(&format!("job-{}", job["id"]));
    assert!(result["accuracy"].as_f64().unwrap() >= 0.9, "{result}");
    assert_eq!(result["replicas_agreeing"], 2, "{result}");
}

#[test]
fn the_convolutional_example_job_trains() {
    let cluster = TestCluster::up(2);
    let file = repository("cluster-configs/jobs/digits-cnn.toml");
    let job = cluster.json(&["submit", file.to_str().unwrap()])["job"].clone();
    let result = cluster.result_of(&format!("job-{job}"));
    assert!(result["accuracy"].as_f64().unwrap() >= 0.95, "{result}");
    let models = cluster.json(&["models", "list"]);
    assert_eq!(models.as_array().unwrap().len(), 1, "{models}");
}
