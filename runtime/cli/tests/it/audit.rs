//! The audit log of a real cluster (I19).

use mobula::Cluster;
use mobula_storage::engine::{
    Column, Durability, Engine, Read, RocksEngine, RocksOptions, WriteBatch,
};
use mobula_wire::control::{DrainNodeRequest, Stamp};
use serde_json::Value;

use crate::heads::{leader, runtime, start_head, wait_for_voters};
use crate::support::{TestCluster, kill_9, mobula, small_job, text_of, wait_for};

/// All records.
fn records(cluster: &TestCluster) -> Vec<Value> {
    let shown = cluster.json(&["audit", "--since", "0"]);
    shown.as_array().unwrap().clone()
}

fn of_call<'a>(records: &'a [Value], call: &str) -> Vec<&'a Value> {
    records
        .iter()
        .filter(|record| record["call"] == call)
        .collect()
}

#[test]
fn each_call_that_changes_something_has_one_record_with_who_and_what_became_of_it() {
    let cluster = TestCluster::up(1);
    let secret = "the-greatest-secret-of-all";
    let secret_file = cluster.dir().join("secret");
    std::fs::write(&secret_file, secret).unwrap();
    let job = cluster.submit_toml(&small_job("recorded", 40));
    cluster.result_of(&job);
    cluster.ok(&["nodes", "drain", "worker-1"]);
    cluster.refused(&["jobs", "stop", "job-77"]);
    let token = cluster.json(&["tokens", "create", "--role", "client"]);
    cluster.ok(&["tokens", "revoke", token["id"].as_str().unwrap()]);

    let records = records(&cluster);
    let submits = of_call(&records, "SubmitJob");
    assert_eq!(submits.len(), 1, "{records:#?}");
    let record = submits[0];
    assert!(
        record["principal"].as_str().unwrap().starts_with("client-"),
        "{record}"
    );
    assert_eq!(record["subject"], format!("{job} (recorded)"));
    assert_eq!(record["refused"], "");
    assert!(record["session"].as_u64().unwrap() > 0, "{record}");
    let stops = of_call(&records, "StopJob");
    assert_eq!(stops.len(), 1);
    assert!(
        stops[0]["refused"]
            .as_str()
            .unwrap()
            .starts_with("not_found"),
        "{stops:?}"
    );
    assert_eq!(of_call(&records, "DrainNode").len(), 1);
    let revokes = of_call(&records, "RevokeToken");
    let id = token["id"].as_str().unwrap();
    assert_eq!(revokes[0]["subject"], format!("token {id}"));
    // What the job's own processes did has their names.
    let by_hosts = |record: &&Value| record["principal"].as_str().unwrap().contains("/host/");
    assert!(records.iter().filter(by_hosts).count() > 0, "{records:#?}");
    // No token in it, and nothing of what was refused at the door.
    let text = cluster.ok(&["audit", "--since", "0", "--json"]);
    let (_, shown) = token["token"].as_str().unwrap().rsplit_once('.').unwrap();
    assert!(!text.contains(shown) && !text.contains(secret));
    let file = cluster.dir().join("foreign.token");
    std::fs::write(&file, token["token"].as_str().unwrap()).unwrap();
    let before = self::records(&cluster).len();
    let refused = mobula()
        .args([
            "nodes",
            "drain",
            "worker-1",
            "--api",
            cluster.api(),
            "--token-file",
        ])
        .arg(&file)
        .output()
        .unwrap();
    assert!(!refused.status.success(), "{}", text_of(&refused));
    assert_eq!(self::records(&cluster).len(), before);

    let verified = cluster.json(&["audit", "--verify"]);
    assert_eq!(verified["records"], before, "{verified}");
    let newest = cluster.json(&["audit", "--limit", "2"]);
    let newest = newest.as_array().unwrap();
    assert_eq!(newest.len(), 2);
    assert_eq!(newest[1]["sequence"], before);
}

/// Sends one command again and again, as a client does that never hears an answer.
async fn drain_with_stamp(client: &Cluster, stamp: Stamp) -> bool {
    let request = DrainNodeRequest {
        stamp: Some(stamp),
        name: "worker-1".to_owned(),
        undo: true,
        ..DrainNodeRequest::default()
    };
    let sent = client.control().read("drain a node", |mut api| {
        let request = request.clone();
        async move { api.drain_node(request).await }
    });
    sent.await.is_ok()
}

#[test]
fn a_repeated_command_has_one_record_also_across_the_death_of_a_leader() {
    let cluster = TestCluster::up_with(1, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    let mut restarted = Vec::new();
    runtime().block_on(async {
        let client = Cluster::from_data_dir(cluster.dir()).await.unwrap();
        let opened = client
            .control()
            .read("open a session", |mut api| async move {
                let client = "test".to_owned();
                api.open_session(mobula_wire::control::OpenSessionRequest { client })
                    .await
            });
        let session = opened.await.unwrap().session;
        for sequence in 1..=6 {
            let stamp = Stamp { session, sequence };
            assert!(drain_with_stamp(&client, stamp).await);
            if sequence == 3 {
                let lost = tokio::task::block_in_place(|| leader(&cluster));
                kill_9(cluster.pid(&lost));
                restarted.push(start_head(&cluster, &lost, &[]));
            }
            // A repetition that another leader may answer.
            assert!(drain_with_stamp(&client, stamp).await);
        }
    });
    let records = records(&cluster);
    let stamps: Vec<u64> = of_call(&records, "DrainNode")
        .iter()
        .map(|record| record["stamp"].as_u64().unwrap())
        .collect();
    assert_eq!(stamps, [1, 2, 3, 4, 5, 6]);
    cluster.ok(&["audit", "--verify"]);
    // Changes of the group are calls as well.
    cluster.ok(&["head", "transfer"]);
    let records = self::records(&cluster);
    assert_eq!(of_call(&records, "TransferLeadership").len(), 1);
    assert!(of_call(&records, "PromoteHead").len() >= 2, "{records:#?}");
}

#[test]
fn a_record_that_was_changed_on_the_disk_is_found() {
    let cluster = TestCluster::up(0);
    for _ in 0..3 {
        cluster.ok(&["tokens", "create", "--role", "worker"]);
    }
    let second = records(&cluster)
        .into_iter()
        .filter(|record| record["call"] == "CreateToken")
        .nth(1)
        .unwrap();
    kill_9(cluster.pid("head-1"));
    let dir = cluster.dir().join("head-1/raft");
    let engine = wait_for("the store of the dead head", || {
        RocksEngine::open(&dir, &RocksOptions::small()).ok()
    });
    let number = second["sequence"].as_u64().unwrap();
    let key = [&[0, 3], number.to_be_bytes().as_slice()].concat();
    let mut row = engine.get(Column::State, &key).unwrap().unwrap();
    let subject = second["subject"].as_str().unwrap().as_bytes();
    let at = row.windows(subject.len()).position(|part| part == subject);
    row[at.unwrap()] ^= 1;
    let mut batch = WriteBatch::new();
    batch.put(Column::State, key, row);
    engine.write(batch, Durability::Synced).unwrap();
    drop(engine);
    let _head = start_head(&cluster, "head-1", &[]);
    let text = cluster.refused(&["audit", "--verify"]);
    assert!(
        text.contains(&format!("record {number} does not have the hash")),
        "{text}"
    );
    assert!(text.contains("was changed"), "{text}");
}
