//! `mobula train replay` and `mobula train diff`, of runs on a cluster of processes.

use serde_json::Value;

use crate::support::{TestCluster, kill_9, small_job, wait_for};

#[test]
fn a_run_is_replayed_to_the_same_bits_and_two_runs_are_told_apart() {
    let cluster = TestCluster::up(2);
    let text = small_job("first", 1200);
    let job = cluster.submit_toml(&text);
    crate::storage::wait_for_checkpoints(&cluster, &job, 1);
    // Its driver begins again in the middle: the record is of the whole run.
    let driver = wait_for("the driver", || {
        let actors = cluster.json(&["actors", "list", "--job", &job]);
        let driver = actors
            .as_array()?
            .iter()
            .find(|a| a["type_name"] == "driver")?;
        u32::try_from(driver["pid"].as_u64()?).ok()
    });
    kill_9(driver);
    let result = cluster.result_of(&job);
    assert_eq!(result["restarts"], 1, "{result}");
    assert_eq!(result["record"].as_str().unwrap().len(), 64);

    let report = cluster.json(&["train", "replay", &job]);
    assert_eq!(report["equal"], true, "{report}");
    assert_eq!(report["steps"], 1200);
    assert_eq!(report["weights_blake3"], result["weights_blake3"]);
    let compared = report["compared"].as_u64().unwrap();
    // Steps between the newest checkpoint and the driver's end are not recorded: how many is a matter of speed.
    assert!((400..=1200).contains(&compared), "{report}");
    let rows = report["not_recorded"].as_array().unwrap().iter();
    let missing = rows.map(|row| row[1].as_u64().unwrap() - row[0].as_u64().unwrap() + 1);
    assert_eq!(compared + missing.sum::<u64>(), 1200, "{report}");
    let said = cluster.ok(&["train", "replay", &job, "--steps", "20"]);
    assert!(
        said.contains("equal: 20 steps, 20 recorded states"),
        "{said}"
    );

    let other = cluster.submit_toml(&format!(
        "learning_rate = 0.004\n{}",
        small_job("second", 40)
    ));
    cluster.result_of(&other);
    let diff = cluster.json(&["train", "diff", &job, &other]);
    assert_eq!(diff["equal_weights"], false);
    assert_eq!(
        diff["fields"]["spec.name"],
        serde_json::json!(["first", "second"])
    );
    assert_eq!(diff["fields"]["spec.learning_rate"][1], "0.004");
    assert_eq!(diff["fields"]["spec.seed"], Value::Null, "equal: {diff}");
    assert_eq!(diff["difference"]["step"], 1, "{diff}");
    let said = cluster.ok(&["train", "diff", &job, &other]);
    assert!(said.contains("spec.learning_rate"), "{said}");
    assert!(
        said.contains("the first tensor that differs after step"),
        "{said}"
    );
    let said = cluster.ok(&["train", "diff", &job, &job]);
    assert!(said.contains("nothing differs"), "{said}");
    assert!(said.contains("both ended in the same bits"), "{said}");

    let refused = cluster.refused(&["train", "replay", "job-999"]);
    assert!(refused.contains("job-999"), "{refused}");
    let waiting = cluster.submit_toml(&small_job("long", 100_000));
    let refused = cluster.refused(&["train", "diff", &job, &waiting]);
    assert!(refused.contains("has not ended"), "{refused}");
    cluster.ok(&["jobs", "stop", &waiting]);
}
