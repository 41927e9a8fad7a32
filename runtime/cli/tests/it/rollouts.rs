//! Rollouts on processes: a version that is no worse is promoted without a failed request, one that answers
//! no numbers is rolled back; neither minds that a head's leader or the router dies in the middle.

use std::collections::BTreeMap;

use mobula::Cluster;
use mobula_actors::registry::client::{register, version};
use mobula_actors::registry::state::NewVersion;
use mobula_actors::registry::version_file::VersionFile;
use mobula_storage::blob::{BlobStore, S3Options};
use serde_json::{Value, json};

use crate::heads::{leader, wait_for_voters};
use crate::serving::served::{Served, request_of};
use crate::support::{kill_9, wait_for};

/// Requests between two looks at the rollout.
const REQUESTS: usize = 40;

/// Registers the second version of `digits`: the first with changed parameters, and its own answers to the rows that it knows.
pub(crate) fn register_changed(served: &Served, change: impl Fn(&mut [f32])) {
    let registered = register_file(served, |file| {
        change(&mut file.parameters);
        let known = &file.reference;
        let rows: Vec<f32> = (0..known.predictions.len())
            .flat_map(|row| known.columns.iter().map(move |column| column[row]))
            .collect();
        file.reference.predictions = file.build_model().unwrap().predictions(&rows).unwrap();
    });
    assert_eq!(registered, 2);
}

/// Registers another version of `digits`, of which the file is the first one's, changed; its number.
pub(crate) fn register_file(served: &Served, change: impl FnOnce(&mut VersionFile)) -> u64 {
    let status = served.cluster.json(&["status"]);
    let storage_url = status["storage_url"].as_str().unwrap();
    let blobs = BlobStore::open(storage_url, &S3Options::default()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let cluster = Cluster::from_data_dir(served.cluster.dir()).await.unwrap();
        let first = version(&cluster, "digits", Some(1))
            .await
            .unwrap()
            .description;
        let mut file = VersionFile::load(&blobs, &first.digest, first.size_bytes)
            .await
            .unwrap();
        change(&mut file);
        let stored = file.store(&blobs).await.unwrap();
        let new = NewVersion {
            digest: stored.digest,
            size_bytes: stored.size_bytes,
            ..first
        };
        register(&cluster, new).await.unwrap().version
    })
}

/// The endpoint's newest rollout, if a head answers.
fn rollout(served: &Served) -> Option<Value> {
    let shown = served
        .cluster
        .run(&["rollout", "status", "digits", "--json"]);
    let status: Value = serde_json::from_slice(&shown.stdout).ok()?;
    status["rollouts"].as_array()?.last().cloned()
}

/// A request of a user: the same user always meets the same version.
pub(crate) fn request(served: &Served, user: usize) -> Value {
    let mut request = request_of(served.image(user % 100));
    request["id"] = json!(format!("user-{user}"));
    request
}

/// Sends requests, all of which must be answered, until `look` finds something in the rollout. How
/// many each version answered.
fn send_until(
    served: &Served,
    url: &str,
    what: &str,
    look: impl Fn(&Value) -> bool,
) -> BTreeMap<String, u64> {
    let mut answered = BTreeMap::new();
    let mut user = 0;
    wait_for(what, || {
        for _ in 0..REQUESTS {
            user += 1;
            let answer = served.try_infer(url, &request(served, user)).unwrap();
            let body = answer.json();
            assert_eq!(answer.status, 200, "{body}");
            let version = body["model_version"].as_str().unwrap().to_owned();
            *answered.entry(version).or_insert(0) += 1;
        }
        rollout(served).filter(&look)
    });
    answered
}

fn start(served: &Served, options: &[&str]) -> Value {
    let mut arguments = vec!["rollout", "start", "digits", "digits@2"];
    arguments.extend(options);
    arguments.extend([
        "--min-samples",
        "40",
        // The machine is shared with other tests, and what takes long here says nothing of a version.
        "--max-latency-increase",
        "100000",
    ]);
    served.cluster.json(&arguments)
}

/// The steps of these tests: each needs requests.
const CANARY: [&str; 2] = ["--steps", "25,50,100"];

fn actions(rollout: &Value) -> Vec<&str> {
    let decisions = rollout["decisions"].as_array().unwrap();
    decisions
        .iter()
        .map(|decision| decision["action"].as_str().unwrap())
        .collect()
}

fn pids(served: &Served, prefix: &str) -> Vec<u64> {
    let actors = served.actors(prefix);
    actors
        .iter()
        .filter_map(|actor| actor["pid"].as_u64())
        .collect()
}

#[test]
fn a_good_version_is_promoted_without_a_failed_request_though_the_leader_dies() {
    let served = Served::up_with(2, &["--heads", "3"]);
    wait_for_voters(&served.cluster, 3);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| parameters[0] += 1e-6);
    let begun = start(&served, &CANARY);
    assert_eq!(
        (&begun["phase"], &begun["weight_percent"]),
        (&json!("running"), &json!(25))
    );
    let text = served
        .cluster
        .refused(&["rollout", "start", "digits", "digits:2"]);
    assert!(text.contains("is under way"), "{text}");

    let first = send_until(&served, &url, "the first step to be passed", |rollout| {
        rollout["step"] == 1
    });
    assert!(first["1"] > first["2"] && first["2"] >= 40, "{first:?}");
    let replicas = wait_for("both replicas of the candidate", || {
        let replicas = pids(&served, "serving/digits/v2/replica-");
        (replicas.len() == 2).then_some(replicas)
    });
    kill_9(served.cluster.pid(&leader(&served.cluster)));
    send_until(&served, &url, "the promotion", |rollout| {
        rollout["phase"] == "promoted"
    });
    // Until nothing is left of the version of before.
    send_until(&served, &url, "the end of the drain", |rollout| {
        rollout["cleanup"] == "done"
    });
    let after = send_until(&served, &url, "more answers", |_| true);
    assert_eq!(after.keys().collect::<Vec<_>>(), ["2"], "{after:?}");
    assert_eq!(served.actors("serving/digits/v1/"), Vec::<Value>::new());
    assert_eq!(served.actors("drift/digits/v1/"), Vec::<Value>::new());
    // What was tried is what serves.
    assert_eq!(pids(&served, "serving/digits/v2/replica-"), replicas);

    let rollout = rollout(&served).unwrap();
    assert_eq!(actions(&rollout), ["start", "pass", "promote"], "{rollout}");
    let evidence = &rollout["decisions"][2]["evidence"];
    for side in ["candidate", "baseline"] {
        assert!(
            evidence[side]["requests"].as_u64().unwrap() >= 40,
            "{evidence}"
        );
        assert_eq!(evidence[side]["errors"], 0, "{evidence}");
    }
    let listed = served.cluster.json(&["serve", "list"]);
    assert_eq!(
        (&listed[0]["version"], &listed[0]["replicas_running"]),
        (&json!(2), &json!(2))
    );
    let file = served.cluster.dir().join("card.md");
    let path = file.to_str().unwrap();
    served
        .cluster
        .ok(&["models", "card", "digits:2", "--out", path]);
    let card = std::fs::read_to_string(file).unwrap();
    for row in ["| serves at | digits |", "| digits 1 |", "| promoted |"] {
        assert!(card.contains(row), "{card}");
    }

    // And back: the version of before answers when it can, the one of now until then.
    served.cluster.ok(&["rollout", "rollback", "digits"]);
    send_until(&served, &url, "the end of the way back", |rollout| {
        rollout["cleanup"] == "done"
    });
    let after = send_until(&served, &url, "more answers", |_| true);
    assert_eq!(after.keys().collect::<Vec<_>>(), ["1"], "{after:?}");
}

#[test]
fn replicas_are_replaced_without_a_failed_request_and_a_router_that_starts_finds_the_active_version()
 {
    let served = Served::up(2);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| parameters[0] += 1e-6);
    start(&served, &["--strategy", "rolling"]);
    send_until(&served, &url, "the promotion", |rollout| {
        rollout["phase"] == "promoted"
    });
    send_until(&served, &url, "the end of the drain", |rollout| {
        rollout["cleanup"] == "done"
    });
    let shown = rollout(&served).unwrap();
    assert_eq!(
        actions(&shown),
        ["start", "pass", "pass", "promote"],
        "{shown}"
    );
    // It was created for version 1.
    let url = another_router(&served);
    let after = send_until(&served, &url, "more answers", |_| true);
    assert_eq!(after.keys().collect::<Vec<_>>(), ["2"], "{after:?}");

    // Back, and at once to the other side again.
    served.cluster.ok(&["rollout", "rollback", "digits"]);
    send_until(&served, &url, "the end of the way back", |rollout| {
        rollout["cleanup"] == "done"
    });
    start(&served, &["--strategy", "blue-green"]);
    send_until(&served, &url, "the promotion", |rollout| {
        rollout["number"] == 2 && rollout["phase"] == "promoted"
    });
    let shown = rollout(&served).unwrap();
    assert_eq!(
        shown["decisions"][1]["evidence"]["reason"], "2 of 2 replicas answer",
        "{shown}"
    );
    // In the middle of everything it can be deleted, and leaves nothing.
    served.cluster.ok(&["serve", "delete", "digits"]);
    wait_for("the endpoint to be gone", || {
        let listed = served.cluster.json(&["serve", "list"]);
        listed.as_array().unwrap().is_empty().then_some(())
    });
    assert_eq!(served.actors("serving/"), Vec::<Value>::new());
    assert_eq!(served.actors("drift/"), Vec::<Value>::new());
}

/// Kills the router; where the next one answers.
pub(crate) fn another_router(served: &Served) -> String {
    let killed = pids(served, "serving/digits/router").pop().unwrap();
    kill_9(u32::try_from(killed).unwrap());
    wait_for("another router", || {
        let router = pids(served, "serving/digits/router").pop()?;
        let listed = served.cluster.json(&["serve", "list"]);
        let url = listed[0]["url"].as_str()?.to_owned();
        let answer = served.try_infer(&url, &request(served, 0)).ok()?;
        (router != killed && answer.status == 200).then_some(url)
    })
}

#[test]
fn a_version_that_answers_no_numbers_is_rolled_back_though_the_router_dies() {
    let served = Served::up(2);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| parameters.fill(f32::NAN));
    start(&served, &CANARY);
    wait_for("a replica of the candidate", || {
        let replicas = served.actors("serving/digits/v2/replica-");
        replicas
            .iter()
            .any(|replica| replica["state"] == "running")
            .then_some(())
    });
    // What these find is lost with the router, and found again by the next one.
    for user in 0..10 {
        let answer = served.try_infer(&url, &request(&served, user)).unwrap();
        assert_eq!(answer.json()["model_version"], "1");
    }
    let url = another_router(&served);

    // Nobody is given an answer of the candidate, and nobody goes without one.
    let answered = send_until(&served, &url, "the rollback", |rollout| {
        rollout["phase"] == "rolled_back"
    });
    assert_eq!(answered.keys().collect::<Vec<_>>(), ["1"], "{answered:?}");
    send_until(&served, &url, "the end of the candidate", |rollout| {
        rollout["cleanup"] == "done"
    });
    assert_eq!(served.actors("serving/digits/v2/"), Vec::<Value>::new());

    let rollout = rollout(&served).unwrap();
    assert_eq!(actions(&rollout), ["start", "roll_back"], "{rollout}");
    let evidence = &rollout["decisions"][1]["evidence"];
    let candidate = &evidence["candidate"];
    assert_eq!(candidate["errors"], candidate["requests"], "{evidence}");
    assert_eq!(evidence["baseline"]["errors"], 0, "{evidence}");
    let last_error = candidate["last_error"].as_str().unwrap();
    assert!(last_error.contains("version 2 answered NaN"), "{evidence}");
    let violated = &evidence["guardrails"][0];
    assert_eq!(
        (&violated["guardrail"], &violated["is_violated"]),
        (&json!("errors"), &json!(true))
    );
    assert!(violated["value"].as_f64() >= violated["limit"].as_f64());

    evidence_can_be_checked(&served, &rollout);
    let text = served.cluster.ok(&["rollout", "status", "digits"]);
    assert!(text.contains("digits serves digits:1"), "{text}");
    assert!(
        text.contains("rolled back") && text.contains("answered NaN"),
        "{text}"
    );
    let text = served.cluster.refused(&["rollout", "promote", "digits"]);
    assert!(text.contains("nothing to promote"), "{text}");
}

/// Writes the evidence of a rollout and checks it with what everybody has.
fn evidence_can_be_checked(served: &Served, rollout: &Value) {
    let folder = served.cluster.dir().join("evidence");
    let path = folder.to_str().unwrap();
    let arguments = ["rollout", "evidence", "digits", "--out", path];
    let written = served.cluster.json(&arguments);
    let check = || {
        let mut command = std::process::Command::new("sha256sum");
        command.args(["--check", "--strict", "SHA256SUMS"]);
        command.current_dir(&folder).output().unwrap()
    };
    let checked = check();
    assert!(checked.status.success(), "{checked:?}");
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let of = |name: &str| -> Value { serde_json::from_slice(&read(name)).unwrap() };
    assert_eq!(of("rollout.json")["decisions"], rollout["decisions"]);
    let versions = of("versions.json");
    assert_eq!(
        versions[1]["digest"], rollout["candidate"]["digest"],
        "{versions}"
    );
    let names: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(written["files"], json!(names.len() - 1));
    let proofs = names.iter().filter(|name| name.starts_with("audit-"));
    let proofs: Vec<&String> = proofs.collect();
    // Both versions were registered at least.
    assert!(proofs.len() >= 2, "{names:?}");
    let is_the_end = |name: &&&String| {
        let proof = of(name);
        let entry: Value = serde_json::from_str(proof["entry"].as_str().unwrap()).unwrap();
        entry["event"] == "rollout" && entry["outcome"] == rollout["phase"]
    };
    assert_eq!(proofs.iter().filter(is_the_end).count(), 1, "{names:?}");
    for proof in proofs {
        let file = folder.join(proof);
        served
            .cluster
            .ok(&["audit", "verify", file.to_str().unwrap()]);
    }
    // Another bundle does not go among these files.
    let text = served.cluster.refused(&arguments);
    assert!(
        text.contains("name a folder that does not exist yet"),
        "{text}"
    );
    std::fs::write(folder.join("rollout.json"), "{}").unwrap();
    assert!(!check().status.success());
}

/// A rollout whose candidate is shadowed first.
const SHADOW: [&str; 5] = ["--steps", "50,100", "--shadow", "--shadow-samples", "60"];

#[test]
fn a_shadow_that_dies_costs_nobody_an_answer_and_one_that_agrees_goes_on_to_the_canary() {
    let served = Served::up(2);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| parameters[0] += 1e-6);
    let begun = start(&served, &SHADOW);
    assert_eq!(
        (&begun["steps"], &begun["shadow"]["percent"]),
        (&json!([0, 50, 100]), &json!(100))
    );
    let text = served.cluster.ok(&["rollout", "status", "digits"]);
    assert!(text.contains("copies of 100 % of the requests"), "{text}");
    let replicas = wait_for("the replicas of the shadow", || {
        let replicas = pids(&served, "serving/digits/v2/replica-");
        (replicas.len() == 2).then_some(replicas)
    });
    for pid in replicas {
        kill_9(u32::try_from(pid).unwrap());
    }
    // Copies that the router sent before it knew of their end failed, which may be too many of so few, or none.
    send_until(&served, &url, "the end of the shadow", |rollout| {
        rollout["step"] == 1 || rollout["phase"] == "rolled_back"
    });
    let shown = rollout(&served).unwrap();
    // Which of both it is, the numbers say.
    let evidence = &shown["decisions"][1]["evidence"];
    let is_rolled_back = shown["phase"] == "rolled_back";
    for (row, is_violated) in [("mismatches", false), ("failures", is_rolled_back)] {
        let rows = evidence["guardrails"].as_array().unwrap();
        let found = rows.iter().find(|found| found["guardrail"] == row).unwrap();
        assert_eq!(found["is_violated"], is_violated, "{evidence}");
        let is_beyond = found["value"].as_f64().unwrap() > found["limit"].as_f64().unwrap();
        assert_eq!(is_beyond, is_violated, "{evidence}");
    }
    if is_rolled_back {
        let reason = evidence["reason"].as_str().unwrap();
        assert!(reason.contains("too many failures"), "{reason}");
        send_until(&served, &url, "the end of the candidate", |rollout| {
            rollout["cleanup"] == "done"
        });
        start(&served, &SHADOW);
    }
    send_until(&served, &url, "the promotion", |rollout| {
        rollout["phase"] == "promoted"
    });
    let shown = rollout(&served).unwrap();
    assert_eq!(actions(&shown), ["start", "pass", "promote"], "{shown}");
    let evidence = &shown["decisions"][1]["evidence"];
    let reason = evidence["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("as a shadow, within the guardrails"),
        "{reason}"
    );
    assert!(
        evidence["candidate"]["requests"].as_u64().unwrap() >= 60,
        "{evidence}"
    );
}

#[test]
fn a_shadow_that_answers_otherwise_is_rolled_back_and_nobody_saw_it() {
    let served = Served::up(2);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| {
        parameters
            .iter_mut()
            .for_each(|parameter| *parameter *= 0.5);
    });
    start(&served, &SHADOW);
    let answered = send_until(&served, &url, "the rollback", |rollout| {
        rollout["phase"] == "rolled_back"
    });
    assert_eq!(answered.keys().collect::<Vec<_>>(), ["1"], "{answered:?}");
    send_until(&served, &url, "the end of the candidate", |rollout| {
        rollout["cleanup"] == "done"
    });
    assert_eq!(served.actors("serving/digits/v2/"), Vec::<Value>::new());
    let shown = rollout(&served).unwrap();
    assert_eq!(actions(&shown), ["start", "roll_back"], "{shown}");
    let evidence = &shown["decisions"][1]["evidence"];
    let reason = evidence["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("as a shadow, too many mismatches")
            && reason.contains("\"probabilities\" at index"),
        "{reason}"
    );

    // The same version, by what counts for its callers: which class is the most probable.
    start(
        &served,
        &[
            "--steps",
            "100",
            "--shadow",
            "--shadow-samples",
            "60",
            "--top-k",
            "probabilities=1",
            "--max-mismatch-bp",
            "2000",
        ],
    );
    send_until(&served, &url, "the promotion", |rollout| {
        rollout["number"] == 2 && rollout["phase"] == "promoted"
    });
}
