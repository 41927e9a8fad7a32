//! Tasks while the processes around them are killed. `tests/programs/task_cases.rs` is the job; it
//! and the test meet in a folder.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use crate::examples::example;
use crate::heads::start_head;
use crate::support::{TestCluster, kill_9, wait_for};

struct Case {
    cluster: TestCluster,
    job: String,
    folder: tempfile::TempDir,
}

impl Case {
    /// Submits one of the program's cases to a cluster of two workers.
    fn begin(case: &str) -> Self {
        let cluster = TestCluster::up(2);
        let folder = tempfile::tempdir().unwrap();
        let program = example("task_cases");
        let submitted = cluster.ok(&[
            "submit",
            "--json",
            // Its driver must not be started again: what it has seen would be gone.
            "--max-restarts",
            "0",
            program.to_str().unwrap(),
            "--",
            case,
            folder.path().to_str().unwrap(),
        ]);
        let submitted: Value = serde_json::from_str(&submitted).unwrap();
        let job = format!("job-{}", submitted["job"]);
        Case {
            cluster,
            job,
            folder,
        }
    }

    fn say(&self, name: &str) {
        std::fs::write(self.folder.path().join(name), "").unwrap();
    }

    /// What was said so far whose name begins like this.
    fn said(&self, beginning: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| {
                let name = path.file_name().unwrap().to_str().unwrap();
                name.starts_with(beginning) && !name.ends_with(".draft")
            })
            .collect()
    }

    /// What `name` says, once it is said.
    fn heard(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        wait_for(&format!("`{name}`"), || {
            if self.is_over() && !path.exists() {
                // Fails, and says what the job printed.
                self.cluster.result_of(&self.job);
            }
            std::fs::read_to_string(&path).ok()
        })
    }

    fn is_over(&self) -> bool {
        let output = self.cluster.run(&["jobs", "show", &self.job, "--json"]);
        let shown: Option<Value> = serde_json::from_slice(&output.stdout).ok();
        shown.is_some_and(|shown| shown["ended_ms"].is_u64())
    }

    /// The job's actors of one type.
    fn actors(&self, type_name: &str) -> Vec<Value> {
        let output = self
            .cluster
            .run(&["actors", "list", "--job", &self.job, "--json"]);
        let actors: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let of_type = actors
            .into_iter()
            .filter(|actor| actor["type_name"] == type_name);
        of_type.collect()
    }

    fn result(&self) -> Value {
        self.cluster.result_of(&self.job)
    }
}

#[test]
fn two_thousand_tasks_bring_the_right_values_though_their_processes_are_killed() {
    let case = Case::begin("kills");
    let mut killed = BTreeSet::new();
    for x in [7, 673, 1339] {
        // This one cannot end at its first attempt otherwise.
        let pid = case.heard(&format!("held-{x}")).parse().unwrap();
        kill_9(pid);
        killed.insert(pid);
    }
    let result = case.result();
    assert_eq!(result["right"], 2000, "{result}");
    assert!(result["retried"].as_u64().unwrap() >= 3, "{result}");
    assert_eq!(killed.len(), 3, "each was in a process of its time");
}

#[test]
fn tasks_go_on_while_the_head_is_away_and_find_it_when_it_is_back() {
    let case = Case::begin("kills");
    let first = case.heard("held-7").parse().unwrap();
    kill_9(case.cluster.pid("head-1"));
    // Another slot is needed for it, which nobody can grant now.
    kill_9(first);
    let _head = start_head(&case.cluster, "head-1", &[]);
    for x in [673, 1339] {
        kill_9(case.heard(&format!("held-{x}")).parse().unwrap());
    }
    let result = case.result();
    assert_eq!(result["right"], 2000, "{result}");
    assert!(result["retried"].as_u64().unwrap() >= 3, "{result}");
}

#[test]
fn tasks_wait_for_a_free_slot_and_nested_ones_get_on_in_a_full_cluster() {
    let case = Case::begin("full");
    // No slot is free when one more has found no place, and each that has one holds a long task.
    wait_for("a full cluster", || {
        let slots = case.actors("mobula.task-slot");
        let in_state = |state: &str| slots.iter().filter(|slot| slot["state"] == state).count();
        let is_full = in_state("pending") > 0 && in_state("running") == case.said("holding").len();
        (is_full && in_state("assigned") == 0).then_some(())
    });
    assert!(case.said("holding").len() < 16, "some must wait");
    assert_eq!(case.said("said"), Vec::<PathBuf>::new(), "all must wait");
    case.say("go");
    let result = case.result();
    assert_eq!(result["sum"], 15 * 16 / 2 + 99 * 100 / 2, "{result}");
    assert_eq!(result["fibonacci"], serde_json::json!([13]), "{result}");
}

/// Where a large value was made: the node's name and the process.
fn makers(case: &Case) -> Vec<(String, u32)> {
    let said = case.said("made-").into_iter().map(|path| {
        let text = std::fs::read_to_string(path).unwrap();
        let (node, pid) = text.split_once(' ').unwrap();
        (node.to_owned(), pid.parse().unwrap())
    });
    said.collect()
}

/// Begins the case, and waits until its large values are made, on two nodes.
fn with_large_values() -> Case {
    let case = Case::begin("lost");
    wait_for("two nodes that make values", || {
        let nodes: BTreeSet<String> = makers(&case).into_iter().map(|(node, _)| node).collect();
        (nodes.len() == 2).then_some(())
    });
    case.say("two-nodes");
    case.heard("made");
    case
}

#[test]
fn large_values_outlive_the_processes_that_made_them() {
    let case = with_large_values();
    let made = makers(&case);
    let processes: BTreeSet<u32> = made.iter().map(|(_, pid)| *pid).collect();
    processes.into_iter().for_each(kill_9);
    case.say("gone");
    assert_eq!(case.result()["right"], 12);
    assert_eq!(makers(&case).len(), made.len(), "none is made again");
}

#[test]
fn large_values_that_are_lost_with_their_node_are_made_again() {
    let case = with_large_values();
    let made = makers(&case);
    let driver = &case.actors("driver")[0]["node"];
    let nodes = case.cluster.json(&["nodes", "list"]);
    let other = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|node| node["id"] != *driver)
        .unwrap();
    let name = other["name"].as_str().unwrap();
    let lost = made.iter().filter(|(node, _)| node == name).count();
    assert!(lost > 0, "{made:?}");
    kill_9(case.cluster.pid(name));
    case.say("gone");
    assert_eq!(case.result()["right"], 12);
    let again = makers(&case).len() - made.len();
    assert!(again >= lost, "{again} of {lost} were made again");
}

#[test]
fn a_task_of_another_process_makes_no_more_than_its_reader_takes() {
    let case = Case::begin("pressure");
    let result = case.result();
    assert!(result["ahead"].as_u64() >= Some(1), "{result}");
}

#[test]
fn a_task_ends_in_each_way_and_takes_nothing_else_along() {
    let case = Case::begin("ends");
    assert_eq!(case.result(), "all ended as they should");
}
