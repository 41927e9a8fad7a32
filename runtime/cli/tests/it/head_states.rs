//! Heads that do not hold the same: found by what they say of themselves, and stopped where a majority
//! knows better (I12).

use mobula::Cluster;
use mobula_storage::engine::{
    Column, Durability, Engine, Read, RocksEngine, RocksOptions, WriteBatch,
};

use crate::heads::{
    another_head, head, join_head, leader, runtime, start_head, wait_for_voters, wait_with_output,
    write_once,
};
use crate::support::{TestCluster, kill_9, wait_for};

/// Makes a stopped head believe that more sessions were opened than were: the next one that it opens
/// is another one than that of the other heads.
fn spoil(cluster: &TestCluster, name: &str) {
    let dir = cluster.dir().join(name).join("raft");
    // The process that held it may have just died.
    let engine = wait_for("the store of the dead head", || {
        RocksEngine::open(&dir, &RocksOptions::small()).ok()
    });
    let mut batch = WriteBatch::new();
    // Module, table and number of the counter; a row's version and its value.
    let last_session = [1, 1, 5];
    let row = [&[2], 1_000_u64.to_le_bytes().as_slice()].concat();
    let before = engine.get(Column::State, &last_session).unwrap().unwrap();
    assert_eq!(
        (before[0], before.len()),
        (row[0], row.len()),
        "rows look otherwise now"
    );
    batch.put(Column::State, last_session, row);
    engine.write(batch, Durability::Synced).unwrap();
}

fn write_some(cluster: &TestCluster) {
    runtime().block_on(async {
        let client = Cluster::from_data_dir(cluster.dir()).await.unwrap();
        for _ in 0..3 {
            write_once(&client).await.unwrap();
        }
    });
}

#[test]
fn a_head_whose_state_differs_from_the_majoritys_is_named_ends_and_stays_down() {
    let cluster = TestCluster::up_with(1, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    write_some(&cluster);
    wait_for("every head to be compared", || {
        let shown = cluster.json(&["head", "members"]);
        let heads = shown["heads"].as_array()?;
        let same = heads.iter().filter(|head| head["state_differs"] == false);
        (same.count() == 2).then_some(())
    });
    let metrics = cluster.ok(&["metrics"]);
    assert!(
        metrics.contains("mobula_raft_states_compared 2"),
        "{metrics}"
    );

    let leads = leader(&cluster);
    let wrong = another_head(&leads);
    kill_9(cluster.pid(wrong));
    spoil(&cluster, wrong);
    let mut again = start_head(&cluster, wrong, &[]);
    write_some(&cluster);
    let status = wait_for("the wrong head to end", || again.0.try_wait().unwrap());
    assert_eq!(status.code(), Some(65), "{status}");
    let log = std::fs::read_to_string(cluster.dir().join(format!("{wrong}.log"))).unwrap();
    assert!(log.contains("what it holds is wrong"), "{log}");
    assert!(log.contains("join again with an empty directory"), "{log}");

    // The others go on, and name it.
    let named = wait_for("the leader to name it", || {
        head(&cluster, wrong).filter(|head| head["state_differs"] == true)
    });
    let status = cluster.json(&["status"]);
    let problem = status["state_problem"].as_str().unwrap();
    assert!(
        problem.contains(&format!("head {}", named["raft_id"])),
        "{status}"
    );
    let metrics = cluster.ok(&["metrics"]);
    assert!(
        metrics.contains("mobula_raft_states_differing 1"),
        "{metrics}"
    );
    write_some(&cluster);

    // It does not serve again from that disk, and comes back under a new id.
    let log = wait_with_output(&cluster, wrong);
    assert!(log.contains("it must not serve again"), "{log}");
    cluster.ok(&["head", "remove", wrong]);
    std::fs::remove_dir_all(cluster.dir().join(wrong)).unwrap();
    let _new = join_head(&cluster, wrong);
    wait_for_voters(&cluster, 3);
    write_some(&cluster);
    wait_for("the new one to be compared", || {
        (head(&cluster, wrong)?["state_differs"] == false).then_some(())
    });
    assert_eq!(cluster.json(&["status"])["state_problem"], "");
}

#[test]
fn two_heads_that_differ_both_say_so_and_go_on() {
    let cluster = TestCluster::up(1);
    let second = join_head(&cluster, "head-2");
    wait_for_voters(&cluster, 2);
    kill_9(second.0.id());
    drop(second);
    spoil(&cluster, "head-2");
    let mut second = start_head(&cluster, "head-2", &[]);
    wait_for_voters(&cluster, 2);
    write_some(&cluster);
    wait_for("the difference to be seen", || {
        (head(&cluster, "head-2")?["state_differs"] == true).then_some(())
    });
    for name in ["head-1", "head-2"] {
        wait_for(&format!("{name} to say so"), || {
            let log = std::fs::read_to_string(cluster.dir().join(format!("{name}.log"))).ok()?;
            log.contains("one of the two is wrong").then_some(())
        });
    }
    let members = cluster.ok(&["head", "members"]);
    assert!(members.contains("DIFFERS at"), "{members}");
    let status = cluster.ok(&["status"]);
    assert!(
        status.contains("PROBLEM: the state of this head"),
        "{status}"
    );
    write_some(&cluster);
    assert!(
        second.0.try_wait().unwrap().is_none(),
        "nobody can say which is wrong"
    );
}
