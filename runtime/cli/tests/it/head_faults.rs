//! What a head does about a disk that does not hold what was written, and about heads that are none of
//! its own.

use std::path::{Path, PathBuf};

use crate::heads::{
    active_voters, another_head, heads, join_head, leader, start_head, wait_for_voters,
    wait_with_output,
};
use crate::support::{TestCluster, kill_9, mobula, small_job, text_of, wait_for};

/// The file with the newest entries of a head that has ended.
fn newest_log_file(head: &Path) -> PathBuf {
    let files = std::fs::read_dir(head.join("raft")).unwrap();
    let mut logs: Vec<PathBuf> = files
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "log"))
        .filter(|path| path.metadata().unwrap().len() > 0)
        .collect();
    logs.sort();
    logs.pop().expect("a head that has written has a log")
}

#[test]
fn a_cut_end_of_the_log_is_forgotten_and_a_damaged_middle_refuses_to_start() {
    let cluster = TestCluster::up(0);
    let dir = cluster.dir().join("head-1");
    let job = cluster.submit_toml(&small_job("waits", 40));
    for _ in 0..20 {
        cluster.ok(&["tokens", "create", "--role", "worker"]);
    }
    kill_9(cluster.pid("head-1"));

    // As a power cut in the middle of a write leaves it.
    let log = newest_log_file(&dir);
    let length = log.metadata().unwrap().len();
    let file = std::fs::File::options().write(true).open(&log).unwrap();
    file.set_len(length - 7).unwrap();
    let head = start_head(&cluster, "head-1", &[]);
    let shown = wait_for("the head to serve", || {
        let output = cluster.run(&["jobs", "show", &job]);
        output.status.success().then(|| text_of(&output))
    });
    assert!(shown.contains("waits"), "{shown}");
    for _ in 0..20 {
        cluster.ok(&["tokens", "create", "--role", "worker"]);
    }
    kill_9(head.0.id());
    drop(head);

    // As a disk leaves it that does not keep what it was given.
    let log = newest_log_file(&dir);
    let mut bytes = std::fs::read(&log).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let said = wait_with_output(&cluster, "head-1");
    assert!(said.contains("is damaged"), "{said}");
    assert!(
        said.contains("restore a backup") && said.contains("join again"),
        "{said}"
    );
}

/// Copies a directory with everything in it.
fn copy(source: &Path, target: &Path) {
    std::fs::create_dir_all(target).unwrap();
    for entry in std::fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        let to = target.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// A head has ended for want of what it had acknowledged; its last line says so, and what to do.
fn expect_it_told_what_it_lacks(cluster: &TestCluster, name: &str) {
    let log = std::fs::read_to_string(cluster.dir().join(format!("{name}.log"))).unwrap();
    let last = log.lines().last().unwrap_or_default();
    let parts = [
        "error: head ",
        "must not serve again: its log ends at entry ",
        "it has acknowledged entry ",
        "`mobula head remove ",
        "`mobula head add`",
    ];
    assert!(parts.iter().all(|part| last.contains(part)), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

/// Whether `name` has acknowledged all that `leads`, the leader, has in its log.
fn has_everything(cluster: &TestCluster, name: &str, leads: &str) -> bool {
    let heads = heads(cluster);
    let matched = |name: &str| {
        let head = heads.iter().find(|head| head["name"] == name)?;
        head["matched_index"].as_u64()
    };
    matched(leads).is_some() && matched(name) == matched(leads)
}

#[test]
fn a_head_on_an_older_copy_of_its_directory_says_what_it_lacks_and_is_replaced() {
    let cluster = TestCluster::up_with(0, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    let leads = leader(&cluster);
    let restored = another_head(&leads);
    kill_9(cluster.pid(restored));
    let (dir, older) = (cluster.dir().join(restored), cluster.dir().join("older"));
    copy(&dir, &older);
    let head = start_head(&cluster, restored, &[]);
    wait_for_voters(&cluster, 3);
    for _ in 0..3 {
        cluster.ok(&["tokens", "create", "--role", "worker"]);
    }
    wait_for("it to acknowledge all of that", || {
        has_everything(&cluster, restored, &leads).then_some(())
    });
    kill_9(head.0.id());
    drop(head);
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::rename(&older, &dir).unwrap();

    let mut head = start_head(&cluster, restored, &[]);
    let ended = wait_for("the head with the older directory to end", || {
        let ended = head.0.try_wait().unwrap();
        (ended.is_some() || leader(&cluster) != leads).then_some(ended)
    });
    // Another leader than before, which a busy machine may bring about, knows of no acknowledgement.
    let Some(status) = ended else { return };
    assert_eq!(status.code(), Some(1), "{status}");
    expect_it_told_what_it_lacks(&cluster, restored);
    wait_with_output(&cluster, restored);
    expect_it_told_what_it_lacks(&cluster, restored);

    // What it says is to be done.
    cluster.ok(&["head", "remove", restored]);
    std::fs::remove_dir_all(&dir).unwrap();
    let _new = join_head(&cluster, restored);
    wait_for_voters(&cluster, 3);
}

#[test]
fn of_two_heads_with_one_id_the_older_ends_and_says_why() {
    let cluster = TestCluster::up_with(0, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    let leads = leader(&cluster);
    let doubled = another_head(&leads);
    kill_9(cluster.pid(doubled));
    let copied = cluster.dir().join("copied");
    copy(&cluster.dir().join(doubled), &copied);
    // It listens elsewhere, as a copy on another machine would.
    std::fs::remove_file(copied.join("ready.json")).unwrap();
    let connections = || {
        let log = std::fs::read_to_string(cluster.dir().join(format!("{doubled}.log"))).unwrap();
        log.matches("connected to a head").count()
    };
    let before = connections();
    let mut older = start_head(&cluster, doubled, &[]);
    wait_for("the older one to have said hello to both others", || {
        (connections() >= before + 2).then_some(())
    });
    let mut newer = start_head(&cluster, "copied", &[]);
    let status = wait_for("the older of the two to end", || {
        older.0.try_wait().unwrap()
    });
    assert!(!status.success());
    let log = std::fs::read_to_string(cluster.dir().join(format!("{doubled}.log"))).unwrap();
    assert!(
        log.contains("two heads with one id could vote twice"),
        "{log}"
    );
    // A copy lacks what the older one has acknowledged since it was made. Where that is anything, it must not go on either.
    let ended = wait_for("the newer one to vote, or to end for what it lacks", || {
        let ended = newer.0.try_wait().unwrap();
        (ended.is_some() || active_voters(&cluster) == 3).then_some(ended)
    });
    if let Some(status) = ended {
        assert_eq!(status.code(), Some(1), "{status}");
        expect_it_told_what_it_lacks(&cluster, "copied");
    }
    cluster.ok(&["tokens", "create", "--role", "worker"]);
}

#[test]
fn a_head_of_another_cluster_does_not_join() {
    let cluster = TestCluster::up(0);
    let other = TestCluster::up(0);
    let token = other.json(&["head", "add"]);
    let file = cluster.dir().join("foreign.token");
    std::fs::write(&file, token["token"].as_str().unwrap()).unwrap();
    let output = mobula()
        .args(["head", "--name", "stranger", "--join", cluster.api()])
        .args([
            "--api-listen",
            "127.0.0.1:0",
            "--cluster-listen",
            "127.0.0.1:0",
        ])
        .arg("--join-token-file")
        .arg(&file)
        .arg("--data-dir")
        .arg(cluster.dir().join("stranger"))
        .output()
        .unwrap();
    let text = text_of(&output);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("cannot join the group of heads"), "{text}");
    assert!(!cluster.dir().join("stranger/ca").exists());
    assert_eq!(
        cluster.json(&["head", "members"])["heads"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
}
