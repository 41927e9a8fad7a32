//! Objects of real processes: read in place, moved between machines and to disk, and lost with
//! their owners, of which nothing is left then.
//!
//! The program that puts and reads them is `tests/programs/object_probe.rs`.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::Value;

use crate::examples::example;
use crate::extra_worker::ExtraWorker;
use crate::small_disk::SmallDisk;
use crate::support::{TestCluster, family, kill_9, processes, wait_for};

const MIB: u64 = 1 << 20;

/// The memory for objects that processes hold, by what the kernel calls its files.
fn arenas_of(processes: &BTreeSet<u32>) -> BTreeSet<u64> {
    let mut arenas = BTreeSet::new();
    for pid in processes {
        // A process may end meanwhile.
        let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for file in files.flatten() {
            let is_arena = std::fs::read_link(file.path())
                .is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:mobula-objects"));
            if is_arena && let Ok(metadata) = std::fs::metadata(file.path()) {
                arenas.insert(metadata.ino());
            }
        }
    }
    arenas
}

fn shared_memory_files() -> Vec<String> {
    std::fs::read_dir("/dev/shm")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("mobula"))
        .collect()
}

fn submit(cluster: &TestCluster, mode: &str) -> String {
    let program = example("object_probe");
    let folder = cluster.dir().to_str().unwrap();
    let program = program.to_str().unwrap();
    let submitted = cluster.ok(&["submit", "--json", program, "--", mode, folder]);
    let submitted: Value = serde_json::from_str(&submitted).unwrap();
    let job = format!("job-{}", submitted["job"]);
    // Its driver is on the only worker; what the test starts now takes the rest.
    told(cluster, &job, "driver.json");
    job
}

/// What the program tells in a file, as soon as it does; fails when its job ends before.
fn told(cluster: &TestCluster, job: &str, name: &str) -> Value {
    wait_for(name, || {
        let text = std::fs::read_to_string(cluster.dir().join(name)).ok();
        if text.is_none() {
            let shown = cluster.run(&["jobs", "show", job, "--json"]);
            let shown: Value = serde_json::from_slice(&shown.stdout).ok()?;
            let logs = || cluster.run(&["jobs", "logs", job]);
            assert!(!shown["ended_ms"].is_u64(), "{shown}\n{:?}", logs());
        }
        serde_json::from_str(&text?).ok()
    })
}

const ROOMY: &str = "object_store_bytes = 536870912";

/// What is left of an owner and how its readers learn of its end: killed by `kill`, which is given
/// the owner's process and its worker.
fn lose_an_owner(kill: impl FnOnce(u32, &ExtraWorker)) -> (Value, TestCluster, [ExtraWorker; 2]) {
    let cluster = TestCluster::up(1);
    let job = submit(&cluster, "lose-an-owner");
    let a = ExtraWorker::start(&cluster, "a", ROOMY);
    let b = ExtraWorker::start(&cluster, "b", ROOMY);
    let owner = told(&cluster, &job, "owner.json")["pid"].as_u64().unwrap();
    // While the processes are there that saw it: one value went to the other machine.
    let trace = cluster.ok(&["jobs", "timeline", &job]);
    let trace: Value = serde_json::from_str(&trace).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let is_transfer = |event: &&Value| event["cat"] == "transfer" && event["ph"] != "e";
    let transfers: Vec<&Value> = events.iter().filter(is_transfer).collect();
    assert_eq!(transfers.len(), 1, "{transfers:?}");
    for worker in [&a, &b] {
        let arenas = arenas_of(&BTreeSet::from([worker.pid()]));
        assert!(!arenas.is_empty(), "both nodes hold something");
    }
    // It writes by now, or will in a moment; both must do.
    kill(u32::try_from(owner).unwrap(), &a);
    std::fs::write(cluster.dir().join("killed"), "").unwrap();
    let result = cluster.result_of(&job);
    for lost in result["lost"].as_array().unwrap() {
        let error = lost["error"].as_str().unwrap_or_default();
        assert!(error.starts_with("owner died"), "{result}");
    }
    println!("{result}");
    (result, cluster, [a, b])
}

#[test]
fn objects_are_read_in_place_and_end_with_their_owners_process() {
    let (result, _cluster, [a, b]) = lose_an_owner(|owner, _| kill_9(owner));
    let views = result["views"].as_array().unwrap();
    assert!(
        views.iter().all(|view| view["is_right"] == true),
        "{result}"
    );
    let memory = |view: usize| views[view]["memory"].as_str().unwrap();
    assert_ne!(memory(0), "unknown", "{result}");
    assert_eq!(memory(0), memory(1), "one memory on a machine");
    assert_ne!(memory(0), memory(2), "a copy on another");
    assert_eq!(memory(2), memory(3), "which is made once");
    // The job has ended: both nodes have freed its objects without waiting for its silence.
    for worker in [&a, &b] {
        wait_for("memory to be given back", || {
            arenas_of(&BTreeSet::from([worker.pid()]))
                .is_empty()
                .then_some(())
        });
    }
}

#[test]
fn objects_end_with_the_agent_of_their_owner() {
    let (_, _cluster, [mut a, b]) = lose_an_owner(|owner, worker| {
        let arenas = arenas_of(&family(worker.pid()));
        assert!(!arenas.is_empty());
        kill_9(worker.pid());
        wait_for("the owner to end with its agent", || {
            (!Path::new(&format!("/proc/{owner}")).exists()).then_some(())
        });
        let everybody: BTreeSet<u32> = processes().into_iter().collect();
        wait_for("the memory to go with its last process", || {
            arenas_of(&everybody).is_disjoint(&arenas).then_some(())
        });
    });
    a.process.wait().unwrap();
    wait_for("the copies on the other node to go", || {
        arenas_of(&BTreeSet::from([b.pid()]))
            .is_empty()
            .then_some(())
    });
    assert_eq!(shared_memory_files(), Vec::<String>::new());
}

/// 16 MiB of memory.
const SMALL: &str = "object_store_bytes = 16777216";

#[test]
fn what_memory_has_no_room_for_waits_or_goes_to_disk_and_comes_back() {
    let cluster = TestCluster::up(1);
    let job = submit(&cluster, "run-short");
    let _worker = ExtraWorker::start(&cluster, "small", SMALL);
    let result = cluster.result_of(&job);
    let pressed = &result["pressed"];
    assert_eq!(pressed["has_waited"], true, "{result}");
    assert_eq!(pressed["is_right"], true, "{result}");
    let refused = pressed["refused"].as_str().unwrap_or_default();
    assert!(refused.contains("is full"), "{result}");
    assert!(refused.contains("worker.object_store_bytes"), "{result}");
    assert_eq!(
        result["kept"], 12,
        "three times what memory holds: {result}"
    );
    assert_eq!(result["wrong"], Value::Array(Vec::new()), "{result}");
    assert_eq!(result["after"], 8, "{result}");
    assert_eq!(result["wrong_after"], Value::Array(Vec::new()), "{result}");
}

#[test]
fn a_full_disk_refuses_what_it_has_no_room_for_and_loses_nothing() {
    let cluster = TestCluster::up(1);
    // Where the worker puts what memory has no room for.
    let objects = ExtraWorker::dir(&cluster, "small").join("objects");
    let _disk = match SmallDisk::mount_at(&objects, 12 * MIB) {
        Ok(disk) => disk,
        Err(error) => {
            println!("skipped: this system does not let the test mount a small disk: {error}");
            return;
        }
    };
    let job = submit(&cluster, "run-short");
    let settings = format!("{SMALL}\nobject_spill_bytes = 1073741824");
    let _worker = ExtraWorker::start(&cluster, "small", &settings);
    let result = cluster.result_of(&job);
    let refused = result["refused"].as_str().unwrap_or_default();
    assert!(refused.starts_with("DiskFull"), "{result}");
    assert!(refused.contains("No space left"), "{result}");
    let kept = result["kept"].as_u64().unwrap();
    assert!((4..=7).contains(&kept), "memory and disk hold 7: {result}");
    // Nothing can come back from a disk that takes nothing in exchange, until something is dropped.
    let wrong = &result["wrong"];
    let is_refused = wrong
        .as_str()
        .is_some_and(|error| error.contains("DiskFull"));
    assert!(
        is_refused || wrong.as_array().is_some_and(Vec::is_empty),
        "{result}"
    );
    assert_eq!(result["refused_after"], Value::Null, "{result}");
    assert_eq!(result["after"], kept - kept / 2 + 2, "{result}");
    assert_eq!(result["wrong_after"], Value::Array(Vec::new()), "{result}");
}

#[test]
fn wrong_types_and_freed_references_are_errors() {
    let cluster = TestCluster::up(1);
    let job = submit(&cluster, "mistake");
    let _worker = ExtraWorker::start(&cluster, "small", SMALL);
    let result = cluster.result_of(&job);
    for wrong in ["as_words", "as_text"] {
        let error = result[wrong].as_str().unwrap_or_default();
        assert!(error.contains("WrongType"), "{wrong}: {result}");
    }
    let freed = result["freed"].as_str().unwrap_or_default();
    assert!(freed.contains("Freed"), "{result}");
}

#[test]
fn nothing_is_left_of_a_cluster_that_is_killed() {
    let cluster = TestCluster::up(1);
    let job = submit(&cluster, "hold");
    let worker = ExtraWorker::start(&cluster, "small", SMALL);
    assert_eq!(told(&cluster, &job, "held.json")["kept"], 8);
    let mut everybody = family(worker.pid());
    for name in ["head-1", "worker-1"] {
        everybody.extend(family(cluster.pid(name)));
    }
    let arenas = arenas_of(&everybody);
    assert!(!arenas.is_empty());
    for pid in &everybody {
        kill_9(*pid);
    }
    wait_for("memory and processes to go", || {
        let left: BTreeSet<u32> = processes().into_iter().collect();
        arenas_of(&left).is_disjoint(&arenas).then_some(())
    });
    assert_eq!(shared_memory_files(), Vec::<String>::new());
    let objects = std::fs::read_dir(worker.dir.join("objects")).unwrap();
    assert_eq!(objects.count(), 0, "what is on disk has no name either");
}
