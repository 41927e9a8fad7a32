//! The loop that drift begins, on processes: a job trains on what the endpoint sees now, and its version goes
//! into service though the leading head dies on the way; what cannot be a policy is refused.

use std::fmt::Write as _;
use std::path::PathBuf;

use mobula_actors::training::data::Dataset;
use serde_json::{Value, json};

use crate::heads::{leader, wait_for_voters};
use crate::serving::served::{FEATURES, ROWS, Served, request_of};
use crate::support::{kill_9, wait_for};

/// Ink where there was paper.
fn inverted(pixel: f32) -> f32 {
    1.0 - pixel
}

/// A job file for `digits` as they look now, with its data beside it.
fn job_file(served: &Served, name: &str, register: &str) -> PathBuf {
    let digits = Dataset::digits().unwrap().all().unwrap();
    let mut text = String::new();
    for (image, label) in digits.features().chunks(FEATURES).zip(digits.labels()) {
        for pixel in image {
            write!(text, "{},", inverted(*pixel)).unwrap();
        }
        writeln!(text, "{label}").unwrap();
    }
    let dir = served.cluster.dir();
    std::fs::write(dir.join("inverted.csv"), text).unwrap();
    let job = format!(
        "name = \"retrain-digits\"\n{register}seed = 7\nsteps = 150\ncheckpoint_every_steps = 40\n\
         workers = {{ min = 1, max = 2 }}\n[model.mlp]\nhidden = [64]\n\
         [dataset.csv]\nfiles = [\"inverted.csv\"]\nshape = [8, 8]\nclasses = 10\n"
    );
    let path = dir.join(name);
    std::fs::write(&path, job).unwrap();
    path
}

/// The endpoint's newest retraining, if there is one and a head answers.
fn newest(served: &Served) -> Option<Value> {
    let shown = served.cluster.run(&["drift", "loop", "digits", "--json"]);
    serde_json::from_slice(&shown.stdout).ok()
}

fn phase_of(retraining: &Value) -> &str {
    retraining["phase"].as_str().unwrap()
}

fn phases(retraining: &Value) -> Vec<&str> {
    let steps = retraining["steps"].as_array().unwrap();
    steps.iter().map(phase_of).collect()
}

/// Sends inverted images, all of which must be answered, until `look` finds something in the retraining.
fn send_until<T>(served: &Served, what: &str, look: impl Fn(&Value) -> Option<T>) -> T {
    let url = served.deployment["url"].as_str().unwrap();
    let mut user = 0;
    wait_for(what, || {
        for _ in 0..40 {
            user += 1;
            let image: Vec<f32> = served
                .image(user % 100)
                .iter()
                .copied()
                .map(inverted)
                .collect();
            let mut request = request_of(&image);
            request["id"] = json!(format!("user-{user}"));
            let answer = served.try_infer(url, &request).unwrap();
            assert_eq!(answer.status, 200, "{}", answer.json());
        }
        look(&newest(served)?)
    })
}

/// The share of inverted images whose class is right.
fn accuracy(served: &Served) -> f64 {
    let images: Vec<f32> = served.images.iter().copied().map(inverted).collect();
    let classes: Vec<u64> = images
        .chunks(ROWS * FEATURES)
        .flat_map(|images| served.classify(images))
        .collect();
    let pairs = classes.iter().zip(&served.labels);
    pairs
        .filter(|(class, label)| **class == u64::from(**label))
        .count() as f64
        / classes.len() as f64
}

fn refuses_what_cannot_be_a_policy(served: &Served) {
    let cluster = &served.cluster;
    let set = |job: &PathBuf, more: &[&str]| {
        let mut arguments = vec![
            "drift",
            "policy",
            "set",
            "digits",
            "--job",
            job.to_str().unwrap(),
        ];
        arguments.extend(more);
        cluster.refused(&arguments)
    };
    let unregistered = job_file(served, "unregistered.toml", "");
    let text = set(&unregistered, &[]);
    assert!(text.contains("write `register = "), "{text}");
    let another = job_file(served, "another.toml", "register = \"faces\"\n");
    let text = set(&another, &[]);
    assert!(
        text.contains("serves digits, and the job registers faces"),
        "{text}"
    );
    let good = job_file(served, "retrain.toml", "register = \"digits\"\n");
    let text = set(&good, &["--budget", "0/24h"]);
    assert!(text.contains("give 1 to 64 jobs"), "{text}");
    let text = cluster.refused(&["drift", "policy", "show", "digits"]);
    assert!(
        text.contains("mobula drift policy set digits --job FILE"),
        "{text}"
    );
    let text = cluster.refused(&["drift", "retrain", "digits"]);
    assert!(text.contains("has no retrain policy"), "{text}");
    let text = cluster.refused(&["drift", "loop", "digits"]);
    assert!(text.contains("has had no retraining"), "{text}");
    let text = cluster.refused(&["drift", "history", "nobody"]);
    assert!(text.contains("no endpoint is called `nobody`"), "{text}");
}

#[test]
fn drift_ends_with_another_version_in_service_though_the_leader_dies() {
    let served = Served::up_with(2, &["--heads", "3"]);
    let cluster = &served.cluster;
    wait_for_voters(cluster, 3);
    refuses_what_cannot_be_a_policy(&served);
    let job = job_file(&served, "retrain.toml", "register = \"digits\"\n");
    let policy = cluster.json(&[
        "drift",
        "policy",
        "set",
        "digits",
        "--auto",
        "--job",
        job.to_str().unwrap(),
        "--budget",
        "1/24h",
        "--cooldown",
        "2h",
        "--steps",
        "50,100",
        "--min-samples",
        "40",
        // The machine is shared with other tests, and what takes long here says nothing of a version.
        "--max-latency-increase",
        "100000",
    ]);
    assert_eq!(
        (&policy["mode"], &policy["gate"]),
        (&json!("auto"), &json!("candidate"))
    );
    assert_eq!(
        policy["budget"],
        json!({"jobs": 1, "period_ms": 86_400_000})
    );
    let before = accuracy(&served);

    served.send_until("drift", inverted, |monitor| {
        monitor["retrain_suggestion"].is_object().then_some(())
    });
    // Whichever step it is at when its leader dies, the next one goes on from there.
    wait_for("the retraining", || newest(&served));
    kill_9(cluster.pid(&leader(cluster)));
    let ended = send_until(&served, "the end of the retraining", |retraining| {
        let is_open = matches!(
            phase_of(retraining),
            "submitting" | "training" | "evaluating" | "queued" | "canary"
        );
        (!is_open).then(|| retraining.clone())
    });
    assert_eq!(
        phases(&ended),
        [
            "submitting",
            "training",
            "evaluating",
            "queued",
            "canary",
            "promoted"
        ],
        "{ended}"
    );
    let comparison = &ended["comparison"];
    assert_eq!(comparison["same_samples"], true, "{ended}");
    assert!(
        comparison["candidate"].as_f64().unwrap() > comparison["baseline"].as_f64().unwrap() + 0.3,
        "{ended}"
    );
    // Until the router has left the version of before, some of the answers are its.
    send_until(&served, "the end of the version of before", |_| {
        let shown = cluster.run(&["rollout", "status", "digits", "--json"]);
        let status: Value = serde_json::from_slice(&shown.stdout).ok()?;
        (status["rollouts"][0]["cleanup"] == "done").then_some(())
    });
    let after = accuracy(&served);
    assert!(after > before + 0.3, "{before} before, {after} after");

    // Once each: one job, one version, one rollout.
    let jobs = cluster.json(&["jobs", "list"]);
    let retrained = jobs
        .as_array()
        .unwrap()
        .iter()
        .filter(|job| job["name"] == "retrain-digits");
    assert_eq!(retrained.count(), 1, "{jobs}");
    let listed = cluster.json(&["serve", "list"]);
    assert_eq!(listed[0]["version"], 2, "{listed}");
    let status = cluster.json(&["rollout", "status", "digits"]);
    assert_eq!(status["rollouts"].as_array().unwrap().len(), 1, "{status}");
    let history = cluster.json(&["drift", "history", "digits"]);
    assert_eq!(
        history["retrainings"].as_array().unwrap().len(),
        1,
        "{history}"
    );
    assert_eq!(history["jobs_left"], 0, "{history}");
    assert!(history["quiet_until_ms"].is_u64(), "{history}");
    let text = cluster.ok(&["drift", "loop", "digits"]);
    assert!(
        text.contains("is promoted") && text.contains("same held-out samples"),
        "{text}"
    );
    let text = cluster.refused(&["drift", "cancel", "digits"]);
    assert!(text.contains("no retraining under way"), "{text}");
    cluster.ok(&["drift", "policy", "remove", "digits"]);
    let text = cluster.ok(&["drift", "history", "digits"]);
    assert!(text.contains("there is no policy"), "{text}");
}
