//! Hosts, workers and heads die at random moments of a training job, and the weights come out the
//! same.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::heads::start_head;
use crate::support::{TestCluster, kill_9, signal, small_job, wait_for};

/// Some seconds of training: long enough for a head to come back while it goes on.
const STEPS: u32 = 6_000;

/// The step that a job has reached, by its own output.
fn step_of(cluster: &TestCluster, job: &str) -> u64 {
    let output = cluster.run(&["jobs", "logs", job]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .rev()
        .find_map(|line| {
            let (step, _) = line[line.find("step ")? + 5..].split_once('/')?;
            step.trim().parse().ok()
        })
        .unwrap_or(0)
}

fn wait_for_step(cluster: &TestCluster, job: &str, step: u64) {
    wait_for(&format!("step {step} of {job}"), || {
        let shown = cluster.run(&["jobs", "show", job, "--json"]);
        let shown: Value = serde_json::from_slice(&shown.stdout).ok()?;
        let is_over = shown["ended_ms"].is_u64();
        (is_over || step_of(cluster, job) >= step).then_some(())
    });
}

fn undisturbed(cluster: &TestCluster) -> String {
    let job = cluster.submit_toml(&small_job("undisturbed", STEPS));
    let result = cluster.result_of(&job);
    assert_eq!(result["steps"], STEPS);
    assert!(result["accuracy"].as_f64().unwrap() >= 0.95, "{result}");
    assert_eq!(result["lost_steps"], 0);
    result["weights_blake3"].as_str().unwrap().to_owned()
}

/// A running trainer's (or the driver's) process id and node.
pub(crate) fn actor_of(cluster: &TestCluster, job: &str, type_name: &str) -> (u32, u64) {
    wait_for(&format!("a running {type_name} of {job}"), || {
        let output = cluster.run(&["actors", "list", "--job", job, "--json"]);
        let actors: Value = serde_json::from_slice(&output.stdout).ok()?;
        actors.as_array()?.iter().find_map(|actor| {
            let found = actor["type_name"] == type_name && actor["state"] == "running";
            let pid = u32::try_from(actor["pid"].as_u64()?).ok()?;
            found.then_some((pid, actor["node"].as_u64()?))
        })
    })
}

#[test]
fn hosts_a_worker_and_the_head_die_and_the_weights_are_the_same() {
    let seed = std::env::var("MOBULA_TEST_SEED")
        .map_or_else(|_| rand::rng().random(), |text| text.parse().unwrap());
    println!("seed {seed}: repeat with MOBULA_TEST_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let cluster = TestCluster::up(3);
    let expected = undisturbed(&cluster);

    let job = cluster.submit_toml(&small_job("disturbed", STEPS));
    let mut moments: Vec<u64> = (0..4)
        .map(|_| rng.random_range(50..u64::from(STEPS) * 2 / 3))
        .collect();
    moments.sort_unstable();

    wait_for_step(&cluster, &job, moments[0]);
    let (trainer, _) = actor_of(&cluster, &job, "mobula.trainer");
    println!("step {}: killing trainer host {trainer}", moments[0]);
    kill_9(trainer);

    wait_for_step(&cluster, &job, moments[1]);
    let (driver, _) = actor_of(&cluster, &job, "driver");
    println!("step {}: killing driver {driver}", moments[1]);
    kill_9(driver);

    wait_for_step(&cluster, &job, moments[2]);
    println!("step {}: killing the head", moments[2]);
    kill_9(cluster.pid("head-1"));
    let _head = start_head(&cluster, "head-1", &[]);

    wait_for_step(&cluster, &job, moments[3]);
    let (_, node) = actor_of(&cluster, &job, "mobula.trainer");
    let nodes = cluster.json(&["nodes", "list"]);
    let name = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|shown| shown["id"] == node)
        .map(|shown| shown["name"].as_str().unwrap().to_owned())
        .unwrap();
    println!("step {}: killing the agent of {name}", moments[3]);
    kill_9(cluster.pid(&name));

    let result = cluster.result_of(&job);
    assert_eq!(result["weights_blake3"], expected, "seed {seed}: {result}");
}

#[test]
fn a_preempted_worker_hands_off_within_its_grace_and_no_step_is_lost() {
    let cluster = TestCluster::up(3);
    let expected = undisturbed(&cluster);
    let job = cluster.submit_toml(&small_job("preempted", STEPS));
    wait_for_step(&cluster, &job, 60);
    let (_, node) = actor_of(&cluster, &job, "mobula.trainer");
    cluster.ok(&["nodes", "preempt", &format!("node-{node}"), "--grace", "8s"]);
    let result = cluster.result_of(&job);
    assert_eq!(result["weights_blake3"], expected, "{result}");
    assert_eq!(result["lost_steps"], 0, "{result}");
    wait_for("the preempted node to be gone", || {
        let nodes = cluster.json(&["nodes", "list"]);
        let shown = nodes
            .as_array()?
            .iter()
            .find(|shown| shown["id"] == node)?
            .clone();
        (shown["state"] == "lost").then_some(())
    });
}

#[test]
fn a_driver_hands_over_to_trainers_elsewhere_and_what_it_did_is_known_after_it() {
    let cluster = TestCluster::up(3);
    let expected = undisturbed(&cluster);
    // No checkpoint before the last one: whatever goes on, goes on from what trainers hold.
    let job = small_job("handed-over", STEPS).replace(
        "checkpoint_every_steps = 40",
        "checkpoint_every_steps = 1000000",
    );
    let job = cluster.submit_toml(&job);
    wait_for_step(&cluster, &job, 60);
    let (_, node) = actor_of(&cluster, &job, "driver");
    cluster.ok(&[
        "nodes",
        "preempt",
        &format!("node-{node}"),
        "--grace",
        "20s",
    ]);
    let result = cluster.result_of(&job);
    assert_eq!(result["weights_blake3"], expected, "{result}");
    assert_eq!(
        (&result["lost_steps"], &result["lost_steps_known"]),
        (&0.into(), &true.into()),
        "{result}"
    );
    assert_eq!(
        (&result["restarts"], &result["checkpoints"]),
        (&1.into(), &1.into())
    );

    let status = cluster.json(&["train", "status", &job]);
    let steps = handed_over(&status);
    assert!(
        steps
            .iter()
            .all(|step| step["incarnation"] == steps[0]["incarnation"]),
        "all of it is about the driver that left: {status}"
    );
    let handoff = &steps[1];
    assert!(
        handoff["why"]
            .as_str()
            .unwrap()
            .contains("without notice hold these bits")
            && handoff["usable_ms"].is_u64(),
        "{handoff}"
    );
    let text = cluster.ok(&["train", "status", &job]);
    assert!(text.contains("NOTICED -> HANDOFF"), "{text}");
    let trace: Value = serde_json::from_str(&cluster.ok(&["jobs", "timeline", &job])).unwrap();
    let marks = trace["traceEvents"].as_array().unwrap().iter();
    let marks = marks.filter(|event| event["cat"] == "preemption").count();
    assert_eq!(marks, 4);
}

/// The recorded steps of a driver that handed its job over.
fn handed_over(status: &Value) -> &[Value] {
    let steps = status["preemptions"].as_array().unwrap();
    let went: Vec<&str> = steps
        .iter()
        .map(|step| step["to"].as_str().unwrap())
        .collect();
    assert_eq!(went, ["NOTICED", "HANDOFF", "DETACHED", "GONE"], "{status}");
    steps
}

#[test]
fn a_job_that_may_stop_early_is_handed_over_with_what_was_measured() {
    let cluster = TestCluster::up(3);
    // Its rate is so small that nothing is better than what the first evaluation finds.
    let text = |name: &str| {
        let job = small_job(name, STEPS)
            .replace("seed = 7", "seed = 7\nlearning_rate = 1e-9")
            .replace(
                "checkpoint_every_steps = 40",
                "checkpoint_every_steps = 1000000",
            );
        format!(
            "{job}[evaluation]\nevery_steps = 50\n\
             [evaluation.early_stop]\npatience = 40\nmin_delta = 0.01\n"
        )
    };
    let undisturbed = cluster.submit_toml(&text("undisturbed"));
    let expected = cluster.result_of(&undisturbed);
    assert_eq!(
        (&expected["stopped_early"], &expected["steps"]),
        (&true.into(), &2050.into()),
        "{expected}"
    );
    let job = cluster.submit_toml(&text("stops-early"));
    wait_for_step(&cluster, &job, 60);
    let (_, node) = actor_of(&cluster, &job, "driver");
    let node = format!("node-{node}");
    cluster.ok(&["nodes", "preempt", &node, "--grace", "20s"]);
    let result = cluster.result_of(&job);
    for same in ["weights_blake3", "steps", "stopped_early", "best"] {
        assert_eq!(result[same], expected[same], "{same}: {result}");
    }
    assert_eq!(
        (&result["restarts"], &result["lost_steps"]),
        (&1.into(), &0.into()),
        "{result}"
    );
    let status = cluster.json(&["train", "status", &job]);
    let steps = handed_over(&status);
    // Trainers may go on by themselves up to the next evaluation: nobody misses anything of that.
    let [left, resumed] = [1, 3].map(|step| steps[step]["trained_steps"].as_u64().unwrap());
    assert!(
        (left..=(left / 50 + 1) * 50).contains(&resumed),
        "the next driver goes on where this one left: {status}"
    );
}

#[test]
fn a_notice_by_file_and_by_sigterm_counts_too() {
    let cluster = TestCluster::up(3);
    let node = |name: &str| {
        let nodes = cluster.json(&["nodes", "list"]);
        nodes
            .as_array()
            .unwrap()
            .iter()
            .find(|node| node["name"] == name)
            .unwrap()
            .clone()
    };
    std::fs::write(cluster.dir().join("worker-1/notice"), "5").unwrap();
    wait_for("worker-1 to have notice", || {
        (node("worker-1")["state"] != "alive").then_some(())
    });
    signal(cluster.pid("worker-2"), libc::SIGTERM);
    wait_for("worker-2 to have notice", || {
        (node("worker-2")["state"] != "alive").then_some(())
    });
    assert_eq!(node("worker-3")["state"], "alive");
}

#[test]
fn a_drained_node_is_emptied_and_takes_work_again() {
    let cluster = TestCluster::up(2);
    let job = cluster.submit_toml(&small_job("drained", STEPS));
    wait_for_step(&cluster, &job, 20);
    cluster.ok(&["nodes", "drain", "worker-1"]);
    wait_for("worker-1 to be empty", || {
        let nodes = cluster.json(&["nodes", "list"]);
        let shown = nodes
            .as_array()?
            .iter()
            .find(|node| node["name"] == "worker-1")?
            .clone();
        (shown["actors"] == 0 && shown["state"] == "draining").then_some(())
    });
    cluster.ok(&["nodes", "drain", "worker-1", "--undo"]);
    cluster.result_of(&job);
}
