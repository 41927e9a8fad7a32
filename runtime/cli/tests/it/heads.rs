//! Groups of heads as processes: they lose their leader, grow, shrink, and take back who was away.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use mobula::Cluster;
use mobula_wire::control::{CreateTokenRequest, DrainNodeRequest};
use serde_json::Value;

use crate::support::{
    Started, TestCluster, kill_9, mobula, runs, signal, small_job, text_of, wait_for,
};

/// The heads, as the leader knows them.
pub(crate) fn heads(cluster: &TestCluster) -> Vec<Value> {
    let output = cluster.run(&["head", "members", "--json"]);
    let reply: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    reply["heads"].as_array().cloned().unwrap_or_default()
}

pub(crate) fn head(cluster: &TestCluster, name: &str) -> Option<Value> {
    heads(cluster).into_iter().find(|head| head["name"] == name)
}

/// A head that the others know; who is asked may not answer at once.
fn known_head(cluster: &TestCluster, name: &str) -> Value {
    wait_for(&format!("somebody to name {name}"), || head(cluster, name))
}

pub(crate) fn leader(cluster: &TestCluster) -> String {
    wait_for("a leader", || {
        let heads = heads(cluster);
        // One that was killed is named by those that have not noticed.
        let leads = |head: &&Value| head["leader"] == true && head["active"] == true;
        Some(heads.iter().find(leads)?["name"].as_str()?.to_owned())
    })
}

/// Of three heads one that does not have this name.
pub(crate) fn another_head(name: &str) -> &'static str {
    let mut heads = ["head-1", "head-2", "head-3"].into_iter();
    heads.find(|other| *other != name).unwrap()
}

pub(crate) fn wait_for_voters(cluster: &TestCluster, count: usize) {
    wait_for(&format!("{count} voters"), || {
        (active_voters(cluster) == count && heads(cluster).len() == count).then_some(())
    });
}

/// How many heads vote and answer.
pub(crate) fn active_voters(cluster: &TestCluster) -> usize {
    let votes = |head: &&Value| head["role"] == "voter" && head["active"] == true;
    heads(cluster).iter().filter(votes).count()
}

/// Starts a head on `name`'s directory, with `arguments` besides.
pub(crate) fn start_head(cluster: &TestCluster, name: &str, arguments: &[&str]) -> Started {
    let dir = cluster.dir().join(name);
    let ready = std::fs::read_to_string(dir.join("ready.json")).unwrap_or_default();
    let ready: Value = serde_json::from_str(&ready).unwrap_or_default();
    let address = |key: &str| ready[key].as_str().unwrap_or("127.0.0.1:0").to_owned();
    let log = cluster.dir().join(format!("{name}.log"));
    let log = File::options().create(true).append(true).open(log).unwrap();
    let mut command = mobula();
    command
        .args(["head", "--name", name])
        .args(["--api-listen", &address("api_address")])
        .args(["--cluster-listen", &address("cluster_address")])
        .arg("--data-dir")
        .arg(&dir)
        .arg("--ready-file")
        .arg(dir.join("ready.json"))
        .arg("--storage-url")
        .arg(format!("file://{}", cluster.dir().join("store").display()))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(log);
    Started(command.spawn().unwrap())
}

/// Joins a head with a token of its own.
pub(crate) fn join_head(cluster: &TestCluster, name: &str) -> Started {
    let added = cluster.json(&["head", "add"]);
    let file = cluster.dir().join(format!("{name}.token"));
    std::fs::write(&file, added["token"].as_str().unwrap()).unwrap();
    std::fs::create_dir_all(cluster.dir().join(name)).unwrap();
    let join = added["join"].as_str().unwrap();
    start_head(
        cluster,
        name,
        &["--join", join, "--join-token-file", file.to_str().unwrap()],
    )
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// Something small that goes through the log.
pub(crate) async fn write_once(cluster: &Cluster) -> mobula::Result<()> {
    let wrote = cluster.control().mutate("drain a node", |mut api, stamp| {
        let request = DrainNodeRequest {
            stamp: Some(stamp),
            name: "worker-1".to_owned(),
            undo: true,
            ..DrainNodeRequest::default()
        };
        async move { api.drain_node(request).await }
    });
    wrote.await.map(|_| ())
}

#[test]
fn a_leader_dies_and_writes_workers_and_jobs_go_on_under_another() {
    let cluster = TestCluster::up_with(2, &["--heads", "3"], &[]);
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(cluster.dir().join("cluster.json")).unwrap())
            .unwrap();
    assert_eq!(record["api_addresses"].as_array().unwrap().len(), 3);
    wait_for_voters(&cluster, 3);
    let job = cluster.submit_toml(&small_job("survivor", 4_000));
    let before = incarnations(&cluster);

    let mut gaps_ms = Vec::new();
    let mut started = Vec::new();
    for _ in 0..5 {
        let lost = leader(&cluster);
        let pid = pid_of(&cluster, &lost, &started);
        // A client that is connected and writes all the time, as a busy program does.
        let gap = runtime().block_on(async {
            let client = Cluster::from_data_dir(cluster.dir()).await.unwrap();
            write_once(&client).await.unwrap();
            kill_9(pid);
            let began = Instant::now();
            write_once(&client).await.unwrap();
            began.elapsed()
        });
        gaps_ms.push(gap.as_millis());
        started.push((lost.clone(), start_head(&cluster, &lost, &[])));
        wait_for_voters(&cluster, 3);
    }
    println!("from kill -9 of the leader to the next acknowledged write: {gaps_ms:?} ms");

    let result = cluster.result_of(&job);
    assert_eq!(result["steps"], 4_000, "{result}");
    assert_eq!(
        (&result["restarts"], &result["trainers_lost"]),
        (&0.into(), &0.into()),
        "no change of leaders may cost a worker: {result}"
    );
    assert_eq!(incarnations(&cluster), before);
    // Any head answers.
    let token = cluster.dir().join("tokens/client.token");
    for head in heads(&cluster) {
        let shown = mobula()
            .args(["--api", head["api_address"].as_str().unwrap()])
            .arg("--token-file")
            .arg(&token)
            .args(["tokens", "create", "--role", "worker"])
            .output()
            .unwrap();
        assert!(shown.status.success(), "{}", text_of(&shown));
    }
}

/// Of the workers: one that was given up is another afterwards.
fn incarnations(cluster: &TestCluster) -> Vec<Value> {
    let nodes = cluster.json(&["nodes", "list"]);
    let nodes = nodes.as_array().unwrap();
    nodes
        .iter()
        .map(|node| node["incarnation"].clone())
        .collect()
}

/// A stopped process keeps its connections, and takes new ones: nothing tells that it leads no more.
#[test]
fn a_leader_that_stops_without_dying_costs_no_worker() {
    let cluster = TestCluster::up_with(2, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    let job = cluster.submit_toml(&small_job("unmoved", 1_500));
    let before = incarnations(&cluster);
    let sessions = |worker: &str| {
        let log = cluster.dir().join(format!("{worker}.log"));
        let log = std::fs::read_to_string(log).unwrap();
        log.matches("session with the leader node=").count()
    };
    let workers = ["worker-1", "worker-2"];
    let sessions_before = workers.map(sessions);

    let stopped = cluster.pid(&leader(&cluster));
    signal(stopped, libc::SIGSTOP);
    for (worker, before) in workers.into_iter().zip(sessions_before) {
        wait_for(
            &format!("a session of {worker} with the next leader"),
            || (sessions(worker) > before).then_some(()),
        );
    }
    assert_eq!(
        incarnations(&cluster),
        before,
        "they came after their lease had run out"
    );
    signal(stopped, libc::SIGCONT);
    wait_for_voters(&cluster, 3);
    let result = cluster.result_of(&job);
    assert_eq!(
        (&result["restarts"], &result["trainers_lost"]),
        (&0.into(), &0.into()),
        "{result}"
    );
    assert_eq!(incarnations(&cluster), before);
}

/// What was said to it meanwhile is still in its sockets when it goes on.
#[test]
fn a_head_that_was_stopped_for_longer_than_a_lease_gives_nobody_up() {
    const LEASE: Duration = Duration::from_secs(3);
    let mut config = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
    let limits = "[limits]\nlease_ms = 3000\nrenew_ms = 500\nsuspect_ms = 2000\n";
    config.write_all(limits.as_bytes()).unwrap();
    let config = config.path().to_str().unwrap();
    let cluster = TestCluster::up_with(1, &["--config", config], &[]);
    let before = incarnations(&cluster);
    let job = cluster.submit_toml(&small_job("undisturbed", 1_500));

    let head = cluster.pid("head-1");
    signal(head, libc::SIGSTOP);
    // This is the fault, and its length matters.
    std::thread::sleep(2 * LEASE);
    signal(head, libc::SIGCONT);
    let log = cluster.dir().join("head-1.log");
    wait_for("the head to see that it was stopped", || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.contains("this head was stopped").then_some(())
    });
    let result = cluster.result_of(&job);
    assert_eq!(
        (&result["restarts"], &result["trainers_lost"]),
        (&0.into(), &0.into()),
        "{result}"
    );
    assert_eq!(incarnations(&cluster), before);
}

fn pid_of(cluster: &TestCluster, name: &str, started: &[(String, Started)]) -> u32 {
    let again = started.iter().rev().find(|(head, _)| head == name);
    again.map_or_else(|| cluster.pid(name), |(_, head)| head.0.id())
}

#[test]
fn a_leader_that_is_asked_to_end_hands_over_first() {
    let cluster = TestCluster::up_with(1, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    let old = leader(&cluster);
    let pid = pid_of(&cluster, &old, &[]);
    signal(pid, libc::SIGTERM);
    wait_for("the end of the old leader", || (!runs(pid)).then_some(()));
    // At this very moment, and not an election later.
    let named: Vec<Value> = heads(&cluster);
    let leads = named.iter().find(|head| head["leader"] == true);
    let new = leads.and_then(|head| head["name"].as_str());
    assert!(
        new.is_some_and(|new| new != old),
        "{old} led, now: {named:?}"
    );
}

#[test]
fn a_group_grows_from_one_to_three_and_shrinks_to_another_one_while_a_job_runs() {
    let cluster = TestCluster::up(2);
    let job = cluster.submit_toml(&small_job("traveller", 4_000));
    let _second = join_head(&cluster, "head-2");
    wait_for_voters(&cluster, 2);
    let mut third = join_head(&cluster, "head-3");
    wait_for_voters(&cluster, 3);
    assert_eq!(leader(&cluster), "head-1");
    let ids: Vec<u64> = heads(&cluster)
        .iter()
        .map(|head| head["raft_id"].as_u64().unwrap())
        .collect();
    assert!(ids[0] == 1 && ids[1] > 1 && ids[2] > ids[1], "{ids:?}");

    // `local up` has made a record of head-1 only, which is about to go.
    note_addresses(&cluster);

    // The leader hands over, is removed, and ends.
    cluster.ok(&["head", "remove", "head-1"]);
    wait_for("head-1 to end", || {
        let log = std::fs::read_to_string(cluster.dir().join("head-1.log")).ok()?;
        log.contains("was removed from its group").then_some(())
    });
    assert_ne!(leader(&cluster), "head-1");
    cluster.ok(&["head", "transfer", "head-2"]);
    assert_eq!(leader(&cluster), "head-2");
    cluster.ok(&["head", "remove", "head-3"]);
    wait_for("head-3 to end", || third.0.try_wait().unwrap());
    wait_for_voters(&cluster, 1);
    assert_eq!(leader(&cluster), "head-2");

    let result = cluster.result_of(&job);
    assert_eq!(result["steps"], 4_000, "{result}");
    assert_eq!(result["restarts"], 0, "{result}");
    // The one that is left will not remove itself.
    let refused = cluster.refused(&["head", "remove", "head-2"]);
    assert!(refused.contains("no other voter is alive"), "{refused}");
    // A head that was removed does not come back.
    let output = wait_with_output(&cluster, "head-3");
    assert!(output.contains("was removed from its group"), "{output}");
}

/// Puts the addresses of all heads into the cluster's record.
fn note_addresses(cluster: &TestCluster) {
    let file = cluster.dir().join("cluster.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let addresses = heads(cluster).into_iter();
    record["api_addresses"] = addresses.map(|head| head["api_address"].clone()).collect();
    std::fs::write(&file, record.to_string()).unwrap();
}

/// Starts a head that must end by itself; its log.
pub(crate) fn wait_with_output(cluster: &TestCluster, name: &str) -> String {
    let mut head = start_head(cluster, name, &[]);
    let status = wait_for(&format!("{name} to end"), || head.0.try_wait().unwrap());
    assert!(!status.success());
    std::fs::read_to_string(cluster.dir().join(format!("{name}.log"))).unwrap()
}

#[test]
fn a_follower_that_was_away_past_the_compaction_catches_up_by_snapshot() {
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        config.path(),
        "[raft]\ncompact_entries = 100\nkeep_entries = 20\n",
    )
    .unwrap();
    let config = config.path().to_str().unwrap();
    let cluster = TestCluster::up_with(1, &["--heads", "3", "--config", config], &[]);
    wait_for_voters(&cluster, 3);
    let leads = leader(&cluster);
    let away = another_head(&leads);
    kill_9(cluster.pid(away));
    let matched = known_head(&cluster, away)["matched_index"]
        .as_u64()
        .unwrap();
    runtime().block_on(async {
        let client = Cluster::from_data_dir(cluster.dir()).await.unwrap();
        for _ in 0..400 {
            write_once(&client).await.unwrap();
        }
    });
    wait_for("a log that begins behind the follower", || {
        let status = cluster.json(&["status"]);
        (status["role"] == "leader" && status["first_log_index"].as_u64()? > matched + 50)
            .then_some(())
    });
    let _again = start_head(&cluster, away, &["--config", config]);
    wait_for("the follower to catch up", || {
        let shown = head(&cluster, away)?;
        (shown["matched_index"].as_u64()? > matched + 300).then_some(())
    });
    let log = std::fs::read_to_string(cluster.dir().join(format!("{away}.log"))).unwrap();
    assert!(log.contains("installing a snapshot"), "{log}");
    // It carries its weight: with another one gone, the two are a majority.
    kill_9(cluster.pid(&leads));
    runtime().block_on(async {
        let client = Cluster::from_data_dir(cluster.dir()).await.unwrap();
        write_once(&client).await.unwrap();
    });
}

#[test]
fn a_wiped_head_is_refused_under_its_old_id_and_replaced_under_a_new_one() {
    let cluster = TestCluster::up_with(1, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    let leads = leader(&cluster);
    let wiped = another_head(&leads);
    let old_id = known_head(&cluster, wiped)["raft_id"].as_u64().unwrap();
    kill_9(cluster.pid(wiped));
    let dir: PathBuf = cluster.dir().join(wiped);
    // Half a wipe: the identity is still there, and must not vote on an empty log.
    std::fs::remove_dir_all(dir.join("raft")).unwrap();
    let log = wait_with_output(&cluster, wiped);
    assert!(log.contains("its log is gone"), "{log}");
    wait_for("the leader to see that it is gone", || {
        (head(&cluster, wiped)?["active"] == false).then_some(())
    });
    cluster.ok(&["head", "remove", wiped]);
    std::fs::remove_dir_all(&dir).unwrap();
    let _new = join_head(&cluster, wiped);
    wait_for_voters(&cluster, 3);
    let new_id = known_head(&cluster, wiped)["raft_id"].as_u64().unwrap();
    assert!(new_id > old_id, "{new_id} after {old_id}");
}

#[test]
fn a_token_of_another_role_or_a_used_up_one_does_not_make_a_head() {
    let cluster = TestCluster::up(0);
    let try_to_join = |token: &str, name: &str| {
        let file = cluster.dir().join("some.token");
        std::fs::write(&file, token).unwrap();
        let output = mobula()
            .args(["head", "--join", cluster.api(), "--name", name])
            .args([
                "--api-listen",
                "127.0.0.1:0",
                "--cluster-listen",
                "127.0.0.1:0",
            ])
            .arg("--join-token-file")
            .arg(&file)
            .arg("--data-dir")
            .arg(cluster.dir().join(name))
            .output()
            .unwrap();
        assert!(!output.status.success());
        assert!(!cluster.dir().join(name).join("ca").exists());
        text_of(&output)
    };
    let worker = cluster.json(&["tokens", "create", "--role", "worker"]);
    let refused = try_to_join(worker["token"].as_str().unwrap(), "head-8");
    assert!(refused.contains("mobula head add"), "{refused}");
    // A role is not a matter of what the token says about itself.
    let forged = worker["token"]
        .as_str()
        .unwrap()
        .replace(".node.", ".head.");
    let refused = try_to_join(&forged, "head-8");
    assert!(refused.contains("unknown to this cluster"), "{refused}");

    let once = runtime().block_on(async {
        let client = Cluster::from_data_dir(cluster.dir()).await.unwrap();
        let made = client.control().mutate("make a token", |mut api, stamp| {
            let request = CreateTokenRequest {
                stamp: Some(stamp),
                role: "head".to_owned(),
                ttl_ms: 60_000,
                uses: 1,
                principal: None,
            };
            async move { api.create_token(request).await }
        });
        made.await.unwrap().token
    });
    let file = cluster.dir().join("once.token");
    std::fs::write(&file, &once).unwrap();
    std::fs::create_dir_all(cluster.dir().join("head-2")).unwrap();
    let join = [
        "--join",
        cluster.api(),
        "--join-token-file",
        file.to_str().unwrap(),
        "--learner",
    ];
    let _second = start_head(&cluster, "head-2", &join);
    // Not by its state: raft keeps one that a snapshot brought everything in `probe` until somebody writes.
    wait_for("head-2 to follow", || {
        let written = head(&cluster, "head-1")?["matched_index"].as_u64()?;
        let shown = head(&cluster, "head-2")?;
        let holds = shown["matched_index"].as_u64()?;
        (shown["role"] == "learner" && holds >= written).then_some(())
    });
    let refused = try_to_join(&once, "head-9");
    assert!(refused.contains("used as often as it may be"), "{refused}");
    // It stays a learner until somebody promotes it, however long it keeps up.
    for _ in 0..3 {
        cluster.ok(&["tokens", "create", "--role", "worker"]);
        let written = known_head(&cluster, "head-1")["matched_index"].as_u64();
        let learner = wait_for("head-2 to hold what was written", || {
            let shown = head(&cluster, "head-2")?;
            (shown["matched_index"].as_u64()? >= written?).then_some(shown)
        });
        assert_eq!(learner["role"], "learner");
    }
    // Refused while it is behind, which a moment without CPU time is enough for.
    wait_for("head-2 to be promoted", || {
        let promoted = cluster.run(&["head", "promote", "head-2"]);
        promoted.status.success().then_some(())
    });
    wait_for_voters(&cluster, 2);
}
