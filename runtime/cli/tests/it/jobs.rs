//! Jobs: what is shipped with them, what they leave, and what becomes of them when things go wrong.

use crate::examples::example;
use crate::support::{TestCluster, text_of};

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
    crate::support::wait_for("the end of the working directories", || {
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
