//! Jobs of one cluster are kept apart, also where one knows everything about the other.

use serde_json::Value;

use crate::examples::example;
use crate::support::{TestCluster, text_of, wait_for};

#[test]
fn no_job_touches_another_jobs_actors_objects_or_records() {
    let cluster = TestCluster::up(1);
    let program = example("neighbours");
    let program = program.to_str().unwrap();
    cluster.ok(&["submit", program, "--", "keep"]);
    let known = wait_for("what the first job tells of itself", || {
        let log = text_of(&cluster.run(&["jobs", "logs", "job-1"]));
        let line = log.lines().find(|line| line.starts_with('{'))?;
        Some(line.to_owned())
    });
    cluster.ok(&["submit", program, "--follow", "--", "try", &known]);
    let tried = cluster.json(&["jobs", "show", "job-2"])["result"].clone();
    let tried = tried.as_object().unwrap();
    assert_eq!(tried.len(), 12, "{tried:#?}");
    for (attempt, end) in tried {
        let end = end.as_str().unwrap();
        if attempt == "read its object" {
            // The owner refuses to be called, and the node's agent knows of no such owner in this job.
            let is_refused = end.contains("not permitted") || end.contains("is lost");
            assert!(is_refused, "{attempt}: {end}");
        } else {
            assert_eq!(end, "permission_denied", "{attempt}");
        }
    }
    // Nothing of it did any harm, and who may, may.
    let shown = cluster.json(&["jobs", "show", "job-1"]);
    assert_eq!(shown["state"], "running", "{shown}");
    let actors = cluster.json(&["actors", "list", "--job", "job-1"]);
    let states: Vec<&Value> = actors
        .as_array()
        .unwrap()
        .iter()
        .map(|a| &a["state"])
        .collect();
    assert_eq!(states, ["running", "running"], "{actors}");
    cluster.ok(&["jobs", "stop", "job-1"]);
}

#[test]
fn a_secret_reaches_the_processes_of_its_job_and_no_one_who_looks() {
    let secret = "hunter2-hunter2";
    let cluster = TestCluster::up(1);
    let file = cluster.dir().join("token");
    std::fs::write(&file, format!("{secret}\n")).unwrap();
    let program = example("secret");
    let program = program.to_str().unwrap();
    let from_file = format!("TOKEN=@{}", file.display());
    let printed = cluster.ok(&["submit", program, "--follow", "--secret", &from_file]);
    assert!(printed.contains("the token has 15 characters"), "{printed}");
    let shown = cluster.json(&["jobs", "show", "job-1"]);
    assert_eq!(shown["result"], true, "{shown}");
    let refused = cluster.refused(&["submit", program, "--secret", "TOKEN=in-the-open"]);
    assert!(refused.contains("every user of this machine"), "{refused}");

    let looks: [&[&str]; 6] = [
        &["jobs", "show", "job-1", "--json"],
        &["jobs", "list", "--json"],
        &["jobs", "logs", "job-1"],
        &["jobs", "timeline", "job-1"],
        &["actors", "list", "--json"],
        &["explain", "job-1"],
    ];
    for look in looks {
        let text = text_of(&cluster.run(look));
        assert!(!text.contains(secret), "{look:?}: {text}");
    }
    std::fs::remove_file(&file).unwrap();
    // Nor is it in any file of the cluster: its tables, their log, the logs of its processes.
    assert_eq!(
        files_with(cluster.dir(), secret.as_bytes()),
        Vec::<String>::new()
    );
}

fn files_with(folder: &std::path::Path, text: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files_with(&path, text));
        } else if let Ok(bytes) = std::fs::read(&path)
            && bytes.windows(text.len()).any(|part| part == text)
        {
            found.push(path.display().to_string());
        }
    }
    found
}
