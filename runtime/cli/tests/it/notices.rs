//! What a training job's driver does when a cloud says something of its machine.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::chaos::actor_of;
use crate::extra_worker::ExtraWorker;
use crate::support::{TestCluster, signal, small_job, text_of, wait_for};

/// The metadata service of a machine that AWS may take away, as long as it is told so.
fn rebalancing(is_advised: Arc<AtomicBool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    // It ends with the process: a test has no other way to end an `accept`.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let Some(Ok(asked)) = lines.next() else {
                continue;
            };
            // The rest of the head, for a question has no body.
            let _ = lines.find(|line| line.as_ref().is_ok_and(String::is_empty));
            let advised = is_advised.load(Ordering::SeqCst);
            let body = match asked.as_str() {
                line if line.starts_with("PUT /latest/api/token") => Some("token-1"),
                line if line.contains("/rebalance") && advised => {
                    Some(r#"{"noticeTime": "2017-09-18T08:22:00Z"}"#)
                }
                _ => None,
            };
            let status = if body.is_some() {
                "200 OK"
            } else {
                "404 Not Found"
            };
            let body = body.unwrap_or_default();
            let length = body.len();
            // Who asked may have gone.
            let _ = write!(
                stream,
                "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
        }
    });
    url
}

/// The phases that a job's drivers went to, once they are so many.
fn phases(cluster: &TestCluster, job: &str, count: usize) -> Vec<String> {
    wait_for(&format!("{count} steps of {job}'s driver"), || {
        let status = cluster.json(&["train", "status", job]);
        let steps = status["preemptions"].as_array()?;
        let went = steps
            .iter()
            .map(|step| step["to"].as_str().unwrap().to_owned());
        (steps.len() >= count).then(|| went.collect())
    })
}

/// A worker that a cloud may take away, and all others drained.
fn only_spot(cluster: &TestCluster, is_advised: &Arc<AtomicBool>) -> ExtraWorker {
    cluster.ok(&["nodes", "drain", "worker-1"]);
    let url = rebalancing(Arc::clone(is_advised));
    let cloud = ["--cloud", "aws", "--cloud-endpoint", &url];
    ExtraWorker::start_with(cluster, "spot", "", &cloud)
}

/// The step of a job's newest checkpoint.
fn saved(cluster: &TestCluster, job: &str) -> Option<u64> {
    let known = cluster.run(&["checkpoints", "list", job, "--json"]);
    let known: Value = serde_json::from_slice(&known.stdout).ok()?;
    known["checkpoints"].as_array()?.first()?["step"].as_u64()
}

fn wait_for_step(cluster: &TestCluster, job: &str, step: u64) {
    wait_for(&format!("step {step} of {job}"), || {
        let status = cluster.json(&["train", "status", job]);
        let reached = status["progress"]["step"].as_u64();
        reached.filter(|reached| *reached >= step)
    });
}

#[test]
fn advice_of_the_cloud_makes_a_driver_save_and_stay() {
    let cluster = TestCluster::up(1);
    let is_advised = Arc::new(AtomicBool::new(false));
    let _spot = only_spot(&cluster, &is_advised);
    // It would save at its end only.
    let text = small_job("advised", 1_000_000).replace(
        "checkpoint_every_steps = 40",
        "checkpoint_every_steps = 1000000",
    );
    let job = cluster.submit_toml(&text);
    wait_for_step(&cluster, &job, 1);
    assert_eq!(saved(&cluster, &job), None);
    is_advised.store(true, Ordering::SeqCst);
    assert_eq!(phases(&cluster, &job, 1), ["ADVISED"]);
    wait_for("a checkpoint for the advice's sake", || {
        saved(&cluster, &job)
    });
    is_advised.store(false, Ordering::SeqCst);
    assert_eq!(phases(&cluster, &job, 2), ["ADVISED", "RUNNING"]);
    let status = cluster.json(&["train", "status", &job]);
    assert_eq!(
        (&status["state"], &status["restarts"]),
        (&"running".into(), &0.into()),
        "nothing is moved for advice: {status}"
    );
    cluster.ok(&["jobs", "stop", &job]);
}

/// A job whose state is some 30 MB: four chunks.
fn large_job(name: &str) -> String {
    format!(
        "name = \"{name}\"\nseed = 7\nsteps = 80\nglobal_batch = 32\nvirtual_shards = 4\n\
         checkpoint_every_steps = 40\nworkers = {{ min = 1, max = 2 }}\n\
         [model.mlp]\nhidden = [1536, 1536]\n"
    )
}

fn log_of(cluster: &TestCluster, job: &str) -> String {
    text_of(&cluster.run(&["jobs", "logs", job]))
}

#[test]
fn trainers_upload_a_share_of_a_large_checkpoint() {
    let cluster = TestCluster::up(3);
    let job = cluster.submit_toml(&large_job("shared"));
    let result = cluster.result_of(&job);
    assert!(result["checkpoints"].as_u64() >= Some(2), "{result}");
    let log = log_of(&cluster, &job);
    // The one at the end may come while this is still on its way, and has no help then.
    assert!(
        log.contains("checkpoint of step 40 was shared: trainer-"),
        "{log}"
    );
    assert!(!log.contains("then no more"), "{log}");
    cluster.ok(&["checkpoints", "verify", &job]);
}

#[test]
fn machines_that_all_go_save_together_before_they_do() {
    let cluster = TestCluster::up(3);
    let text = |name: &str| {
        large_job(name)
            .replace("steps = 80", "steps = 160")
            .replace("every_steps = 40", "every_steps = 1000000")
    };
    let job = cluster.submit_toml(&text("undisturbed"));
    let expected = cluster.result_of(&job)["weights_blake3"].clone();
    let job = cluster.submit_toml(&text("all-go"));
    wait_for("both trainers to take part", || {
        let status = cluster.json(&["train", "status", &job]);
        (status["progress"]["workers"] == 2).then_some(())
    });
    // The driver's own machine last: trainers of which it does not know that they go as well would be left the job.
    let (_, driver) = actor_of(&cluster, &job, "driver");
    let nodes = cluster.json(&["nodes", "list"]);
    let nodes = nodes.as_array().unwrap().iter();
    let mut nodes: Vec<u64> = nodes.map(|node| node["id"].as_u64().unwrap()).collect();
    nodes.sort_by_key(|node| *node == driver);
    for node in nodes {
        let node = format!("node-{node}");
        // A quarter of it is what the others are waited for; who does not come to the step by then saves alone.
        cluster.ok(&["nodes", "preempt", &node, "--grace", "60s"]);
    }
    let went = phases(&cluster, &job, 2);
    let log = || log_of(&cluster, &job);
    assert_eq!(went[..2], ["NOTICED", "SAVE_SHARED"], "{}", log());
    let _spare = ExtraWorker::start(&cluster, "spare", "");
    let result = cluster.result_of(&job);
    assert_eq!(result["weights_blake3"], expected, "{result}");
    let went = phases(&cluster, &job, 4);
    assert_eq!(went, ["NOTICED", "SAVE_SHARED", "DETACHED", "GONE"]);
    // The log of a machine that is gone cannot be read any more; what is recorded can.
    let status = cluster.json(&["train", "status", &job]);
    let why = status["preemptions"][1]["why"].as_str().unwrap();
    assert!(
        why.contains("by each of 2") || why.contains("by each of 3"),
        "{why}"
    );
}

/// The names of the chunks in a cluster's store.
fn chunks(cluster: &TestCluster) -> BTreeSet<String> {
    let folder = cluster.dir().join("store/chunks");
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn too_short_a_notice_for_a_slow_store_begins_no_save_and_says_what_one_needs() {
    // A state of some 13 MB: the second of its two chunks has to wait until the first one's time is over. More steps
    // than anybody takes meanwhile.
    let text = "name = \"abandoned\"\nseed = 7\nsteps = 1000000\nglobal_batch = 16\nvirtual_shards = 2\n\
                checkpoint_every_steps = 1000000\nworkers = { min = 1, max = 1 }\n\
                [model.mlp]\nhidden = [1024, 1024]\n\
                [checkpoints]\nupload_bytes_per_second = 1000000\n";
    let cluster = TestCluster::up(1);
    let is_advised = Arc::new(AtomicBool::new(false));
    let _spot = only_spot(&cluster, &is_advised);
    let job = cluster.submit_toml(text);
    wait_for_step(&cluster, &job, 1);
    // Saves for the advice's sake, and so knows what that takes.
    is_advised.store(true, Ordering::SeqCst);
    let first = wait_for("a checkpoint", || saved(&cluster, &job));
    wait_for_step(&cluster, &job, first + 1);
    let stored = chunks(&cluster);
    cluster.ok(&["nodes", "preempt", "spot", "--grace", "8s"]);
    assert_eq!(
        phases(&cluster, &job, 3)[..3],
        ["ADVISED", "NOTICED", "ABANDON"]
    );
    wait_for("the machine to be gone", || {
        let nodes = cluster.json(&["nodes", "list"]);
        let nodes = nodes.as_array()?;
        let spot = nodes.iter().find(|node| node["name"] == "spot")?;
        (spot["state"] == "lost").then_some(())
    });
    assert_eq!(chunks(&cluster), stored, "nothing was uploaded in vain");
    assert_eq!(saved(&cluster, &job), Some(first));

    cluster.ok(&["nodes", "drain", "worker-1", "--undo"]);
    let status = wait_for("the next driver", || {
        let status = cluster.json(&["train", "status", &job]);
        let last = status["preemptions"].as_array()?.last()?;
        (last["to"] == "GONE").then_some(status)
    });
    let steps = status["preemptions"].as_array().unwrap();
    let abandoned = &steps[2];
    let number = |key: &str| abandoned[key].as_u64().unwrap();
    // 8 MiB at 1 MB a second; of 8 s there are at most 5.5 that count.
    assert!(number("needed_ms") >= 8_000, "{abandoned}");
    assert!(number("usable_ms") <= 5_500, "{abandoned}");
    assert!(number("trained_steps") > first, "{abandoned}");
    let why = abandoned["why"].as_str().unwrap();
    assert!(
        why.contains("a save needs") && why.contains("does not fit"),
        "{why}"
    );
    let gone = steps.last().unwrap();
    assert_eq!(
        (&gone["to"], &gone["trained_steps"]),
        (&"GONE".into(), &first.into()),
        "the next driver goes on from the checkpoint before: {status}"
    );
}

/// The process of a job's trainer on `node`, if one runs there.
fn trainer_on(cluster: &TestCluster, job: &str, node: u64) -> Option<u32> {
    let actors = cluster.json(&["actors", "list", "--job", job]);
    let mut actors = actors.as_array()?.iter();
    let trainer = actors.find(|actor| {
        actor["type_name"] == "mobula.trainer"
            && actor["state"] == "running"
            && actor["node"] == node
    })?;
    u32::try_from(trainer["pid"].as_u64()?).ok()
}

#[test]
fn a_notice_that_is_withdrawn_lets_halted_trainers_go_on_and_the_driver_stay() {
    let cluster = TestCluster::up(2);
    // It may stop early: a driver that leaves it has the trainers stop after a step that none of them has passed.
    let text = format!(
        "{}[evaluation]\nevery_steps = 10\n[evaluation.early_stop]\npatience = 10000\n",
        small_job("withdrawn", 1_000_000).replace("min = 1", "min = 2")
    );
    let job = cluster.submit_toml(&text);
    wait_for_step(&cluster, &job, 1);
    let (_, node) = actor_of(&cluster, &job, "driver");
    let nodes = cluster.json(&["nodes", "list"]);
    let mut nodes = nodes.as_array().unwrap().iter();
    let shown = nodes.find(|shown| shown["id"] == node).unwrap();
    let worker = shown["name"].as_str().unwrap();

    // With one of two trainers stopped nobody takes a step: the driver is on its way to that one until it is told to stay.
    let beside = wait_for("a trainer beside the driver", || {
        trainer_on(&cluster, &job, node)
    });
    signal(beside, libc::SIGSTOP);
    let given_up = format!("on {worker} is lost at step");
    wait_for("the trainer to be given up", || {
        log_of(&cluster, &job).contains(&given_up).then_some(())
    });
    let notice = cluster.dir().join(worker).join("notice");
    let new = notice.with_extension("new");
    // A quarter of it is what the trainers are waited for.
    std::fs::write(&new, "400").unwrap();
    std::fs::rename(&new, &notice).unwrap();
    let last: u64 = wait_for("the trainers to be halted", || {
        let log = log_of(&cluster, &job);
        let (_, halted) = log.split_once("notice: trainers stop after step ")?;
        halted.split_once(';')?.0.parse().ok()
    });
    assert_eq!(phases(&cluster, &job, 1), ["NOTICED"]);
    std::fs::remove_file(&notice).unwrap();
    assert_eq!(phases(&cluster, &job, 2), ["NOTICED", "RUNNING"]);

    signal(beside, libc::SIGCONT);
    wait_for_step(&cluster, &job, last + 1);
    let status = cluster.json(&["train", "status", &job]);
    assert_eq!(
        (&status["state"], &status["restarts"]),
        (&"running".into(), &0.into()),
        "{status}"
    );
    assert_eq!(actor_of(&cluster, &job, "driver").1, node);
    cluster.ok(&["jobs", "stop", &job]);
}
