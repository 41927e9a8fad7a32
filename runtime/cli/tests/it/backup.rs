//! Backups of whole clusters, and clusters that come back from them (I20).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use mobula_storage::engine::{RocksEngine, RocksOptions};
use mobula_storage::tables::state_hash;
use serde_json::Value;

use crate::heads::{another_head, leader, start_head, wait_for_voters};
use crate::small_disk::SmallDisk;
use crate::storage::wait_for_checkpoints;
use crate::support::{TestCluster, kill_9, mobula, small_job, text_of, wait_for};

/// Backs the cluster up; the file, and what it is of.
fn back_up(cluster: &TestCluster, name: &str) -> (PathBuf, Value) {
    let file = cluster.dir().join(name);
    let manifest = cluster.json(&["head", "backup", file.to_str().unwrap()]);
    assert_eq!(
        manifest["state_hash"].as_str().unwrap().len(),
        64,
        "{manifest}"
    );
    (file, manifest)
}

fn restore(file: &Path, data_dir: &Path) -> Output {
    mobula()
        .args(["head", "restore", "--json"])
        .arg(file)
        .arg("--data-dir")
        .arg(data_dir)
        .output()
        .unwrap()
}

/// Restores what must be possible to restore, and compares what is on the disk then with the backup.
fn restored(file: &Path, data_dir: &Path) -> Value {
    let output = restore(file, data_dir);
    assert!(output.status.success(), "{}", text_of(&output));
    let restored: Value = serde_json::from_slice(&output.stdout).unwrap();
    let engine = RocksEngine::open(data_dir.join("raft"), &RocksOptions::small()).unwrap();
    let hash = state_hash(&engine).unwrap().to_hex().to_string();
    assert_eq!(restored["backup"]["state_hash"], hash, "{restored}");
    restored
}

fn refused(file: &Path, data_dir: &Path) -> String {
    let output = restore(file, data_dir);
    assert!(!output.status.success(), "{}", text_of(&output));
    text_of(&output)
}

fn submit_with_key(cluster: &TestCluster, key: &str) -> Value {
    let file = cluster.dir().join("keyed.toml");
    std::fs::write(&file, small_job("keyed", 40)).unwrap();
    let file = file.to_str().unwrap();
    cluster.json(&["submit", file, "--idempotency-key", key])["job"].clone()
}

/// The jobs that have ended.
fn ended_jobs(cluster: &TestCluster) -> Vec<Value> {
    let jobs = cluster.json(&["jobs", "list"]);
    let jobs = jobs.as_array().unwrap().iter();
    jobs.filter(|job| job["ended_ms"].is_u64())
        .cloned()
        .collect()
}

#[test]
fn a_cluster_whose_only_head_is_destroyed_goes_on_from_a_backup_and_its_actors_are_adopted() {
    let cluster = TestCluster::up(2);
    let keyed = submit_with_key(&cluster, "once");
    cluster.result_of(&format!("job-{keyed}"));
    let running = cluster.submit_toml(&small_job("survivor", 6_000));
    wait_for_checkpoints(&cluster, &running, 1);
    let nodes_before = cluster.json(&["nodes", "list"]);
    let jobs_before = ended_jobs(&cluster);

    // To a file, and to standard output: the same at the same entry, which the job moves on.
    let (file, manifest) = back_up(&cluster, "backup");
    let checked = cluster.json(&["head", "restore", "--check", file.to_str().unwrap()]);
    assert_eq!(checked, manifest);
    let piped = cluster.run(&["head", "backup", "-"]);
    assert!(piped.status.success(), "{}", text_of(&piped));
    let second = cluster.dir().join("piped");
    std::fs::write(&second, &piped.stdout).unwrap();
    cluster.ok(&["head", "restore", "--check", second.to_str().unwrap()]);
    let there = cluster.refused(&["head", "backup", file.to_str().unwrap()]);
    assert!(there.contains("is there already"), "{there}");

    kill_9(cluster.pid("head-1"));
    let dir = cluster.dir().join("head-1");
    let ready = std::fs::read(dir.join("ready.json")).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    let restored = restored(&file, &dir);
    assert_eq!(restored["backup"], manifest);
    // It is to be found where the old one was.
    std::fs::write(dir.join("ready.json"), ready).unwrap();
    let _head = start_head(&cluster, "head-1", &[]);

    wait_for("the workers to be back", || {
        let output = cluster.run(&["nodes", "list", "--json"]);
        let nodes: Value = serde_json::from_slice(&output.stdout).ok()?;
        let alive = nodes.as_array()?.iter().filter(|n| n["state"] == "alive");
        (alive.count() == 2).then_some(())
    });
    assert_eq!(ended_jobs(&cluster), jobs_before);
    let incarnations = |nodes: &Value| -> Vec<Value> {
        let nodes = nodes.as_array().unwrap().iter();
        nodes.map(|node| node["incarnation"].clone()).collect()
    };
    let nodes = cluster.json(&["nodes", "list"]);
    assert_eq!(incarnations(&nodes), incarnations(&nodes_before), "{nodes}");
    assert_eq!(
        submit_with_key(&cluster, "once"),
        keyed,
        "it is the same job still"
    );
    let result = cluster.result_of(&running);
    assert_eq!(result["steps"], 6_000, "{result}");
    let next = submit_with_key(&cluster, "another");
    assert!(
        next.as_u64().unwrap() > 1_000_000,
        "{next} may name an old job's files"
    );
    cluster.result_of(&format!("job-{next}"));
    // What came before cannot speak for the group any more.
    let status = cluster.json(&["status"]);
    assert_eq!(status["cluster_id"], manifest["cluster_id"], "{status}");
    assert!(
        status["term"].as_u64() > manifest["term"].as_u64(),
        "{status}"
    );
}

#[test]
fn a_cluster_of_which_every_process_is_dead_resumes_its_jobs_from_a_backup() {
    let mut cluster = TestCluster::up(1);
    let job = cluster.submit_toml(&small_job("resumer", 3_000));
    wait_for_checkpoints(&cluster, &job, 2);
    let (file, _) = back_up(&cluster, "backup");
    kill_9(cluster.pid("head-1"));
    kill_9(cluster.pid("worker-1"));
    let dir = cluster.dir().join("head-1");
    std::fs::remove_dir_all(&dir).unwrap();
    restored(&file, &dir);
    cluster.up_again(1);
    let result = cluster.result_of(&job);
    assert_eq!(result["steps"], 3_000, "{result}");
    assert!(result["restarts"].as_u64() >= Some(1), "{result}");
}

#[test]
fn what_the_last_head_holds_is_saved_also_when_nobody_leads_any_more() {
    let cluster = TestCluster::up_with(0, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    let leader = leader(&cluster);
    let left = another_head(&leader);
    for name in ["head-1", "head-2", "head-3"]
        .into_iter()
        .filter(|name| *name != left)
    {
        kill_9(cluster.pid(name));
    }
    let members = wait_for("the head that is left to say who the others are", || {
        let shown = cluster.run(&["head", "members", "--json"]);
        let shown: Value = serde_json::from_slice(&shown.stdout).ok()?;
        (shown["heads"].as_array()?.len() == 3).then_some(shown)
    });
    let heads = members["heads"].as_array().unwrap();
    let answers = heads.iter().find(|head| head["name"] == left).unwrap();
    assert_eq!(members["answered_by"], answers["raft_id"], "{members}");
    let file = cluster.dir().join("last");
    // Without that word it is the leader's to give, and there is none.
    let refused = cluster.refused(&["head", "backup", file.to_str().unwrap()]);
    assert!(refused.contains("leader"), "{refused}");
    let manifest = cluster.json(&["head", "backup", "--local", file.to_str().unwrap()]);
    let restored = restored(&file, &cluster.dir().join("again"));
    assert_eq!(restored["backup"]["state_hash"], manifest["state_hash"]);
}

#[test]
fn what_is_no_whole_backup_or_no_empty_directory_is_refused_with_what_to_do() {
    let cluster = TestCluster::up(0);
    let (file, _) = back_up(&cluster, "backup");
    let target = cluster.dir().join("new-head");
    // A head runs there.
    let text = refused(&file, &cluster.dir().join("head-1"));
    assert!(
        text.contains("is not empty") && text.contains("name another one"),
        "{text}"
    );

    let damaged = cluster.dir().join("damaged");
    std::fs::copy(&file, &damaged).unwrap();
    let mut open = File::options()
        .read(true)
        .write(true)
        .open(&damaged)
        .unwrap();
    let middle = open.metadata().unwrap().len() / 2;
    let mut byte = [0];
    open.seek(SeekFrom::Start(middle)).unwrap();
    open.read_exact(&mut byte).unwrap();
    open.seek(SeekFrom::Start(middle)).unwrap();
    open.write_all(&[byte[0] ^ 0x10]).unwrap();
    let text = refused(&damaged, &target);
    assert!(
        text.contains("damaged at byte") && text.contains("an older backup"),
        "{text}"
    );
    open.set_len(middle).unwrap();
    let text = refused(&damaged, &target);
    assert!(text.contains("the stream ends here"), "{text}");
    open.seek(SeekFrom::Start(0)).unwrap();
    open.write_all(b"mobula backup 9\n").unwrap();
    let text = refused(&damaged, &target);
    assert!(
        text.contains("format `9`") && text.contains("the version that made it"),
        "{text}"
    );
    let text = refused(&cluster.dir().join("cluster.json"), &target);
    assert!(text.contains("is no backup"), "{text}");
    let text = refused(&cluster.dir().join("not-there"), &target);
    assert!(text.contains("cannot be read"), "{text}");
    assert!(!target.exists());

    // One that broke off is no head.
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("restore_unfinished"), "").unwrap();
    let output = mobula()
        .args([
            "head",
            "--api-listen",
            "127.0.0.1:0",
            "--cluster-listen",
            "127.0.0.1:0",
        ])
        .arg("--data-dir")
        .arg(&target)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = text_of(&output);
    assert!(
        !output.status.success() && text.contains("restore again"),
        "{text}"
    );
}

#[test]
fn a_full_disk_leaves_neither_half_a_backup_nor_half_a_head() {
    let disk = match SmallDisk::mount(8 << 20) {
        Ok(disk) => disk,
        Err(error) => {
            println!("skipped: this system does not let the test mount a small disk: {error}");
            return;
        }
    };
    let cluster = TestCluster::up(0);
    let (file, _) = back_up(&cluster, "backup");
    disk.fill();
    let full = disk.path().join("backup");
    let text = cluster.refused(&["head", "backup", full.to_str().unwrap()]);
    assert!(text.contains("no space is left"), "{text}");
    let target = disk.path().join("head");
    let text = refused(&file, &target);
    assert!(text.contains("no space is left"), "{text}");
    let left: Vec<_> = std::fs::read_dir(disk.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["filler"]);
    disk.free();
    restored(&file, &target);
}
