//! Experiments on processes: a version that is better is found, and nothing else changes by it; groups of the
//! wrong sizes conclude nothing; one that answers no numbers is ended, and so is one that is wrong about a row whose
//! answer is known; the next router goes on with a count.

use std::collections::BTreeMap;

use mobula_actors::drift::vitals::sentinels::SENTINELS_MAX;
use mobula_actors::serving::controller::replica_name;
use mobula_actors::serving::rollout::split::{BUCKETS, bucket};
use reqwest::Method;
use serde_json::{Value, json};

use crate::rollouts::{another_router, register_changed, register_file, request};
use crate::serving::served::Served;
use crate::support::wait_for;

/// Users between two looks at the experiment.
const USERS: usize = 40;

/// The experiments of these tests: half of the keys each, hashed with a known seed.
fn start(served: &Served, options: &[&str]) -> Value {
    start_with(served, "digits@2", options)
}

/// The same with this treatment.
fn start_with(served: &Served, treatment: &str, options: &[&str]) -> Value {
    let mut arguments = vec![
        "experiment",
        "start",
        "digits",
        treatment,
        "--seed",
        "exp",
        // What takes long on a shared machine says nothing of a version.
        "--guardrail",
        "error-rate=0.01",
    ];
    arguments.extend(options);
    served.cluster.json(&arguments)
}

const CLICKS: [&str; 4] = ["--primary", "outcome:clicks", "--min-effect", "0.5"];

/// The endpoint's newest experiment, if a head answers.
fn experiment(served: &Served) -> Option<Value> {
    let shown = served
        .cluster
        .run(&["experiment", "status", "digits", "--json"]);
    serde_json::from_slice(&shown.stdout).ok()
}

/// Whether a user meets the treatment.
fn is_treated(user: usize) -> bool {
    bucket("exp", &format!("user-{user}")) < BUCKETS / 2
}

/// Asks for a user, which must be answered; by which version.
fn ask(served: &Served, url: &str, user: usize) -> String {
    let answer = served.try_infer(url, &request(served, user)).unwrap();
    let body = answer.json();
    assert_eq!(answer.status, 200, "{body}");
    body["model_version"].as_str().unwrap().to_owned()
}

/// Reports a value of a user; the HTTP status.
fn report(served: &Served, user: usize, value: f64) -> u16 {
    let body = json!({"key": format!("user-{user}"), "value": value});
    let answer = served.call(
        Method::POST,
        "/v2/models/digits/outcomes",
        Some(served.token()),
        None,
        body.to_string().into_bytes(),
    );
    answer.status
}

#[test]
fn a_better_version_is_found_and_changes_nothing_until_it_is_rolled_out() {
    let served = Served::up(2);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| parameters[0] += 1e-6);
    let begun = start(&served, &CLICKS);
    assert_eq!(
        (
            &begun["state"],
            &begun["decision"],
            &begun["plan"]["primary"]
        ),
        (
            &json!("running"),
            &json!("undecided"),
            &json!("outcome:clicks:up")
        )
    );
    let digest = begun["plan_blake3"].clone();
    // Nobody has asked so far.
    let text = served.cluster.ok(&["experiment", "status", "digits"]);
    assert!(text.contains("nothing is counted so far"), "{text}");
    // The plan is fixed, and so is the version.
    let text = served.cluster.refused(&[
        "experiment",
        "start",
        "digits",
        "digits@2",
        "--seed",
        "exp",
        "--guardrail",
        "error-rate=0.01",
        "--primary",
        "outcome:clicks",
        "--min-effect",
        "0.1",
        "--alpha",
        "0.1",
    ]);
    assert!(
        text.contains("with another minimum effect, alpha"),
        "{text}"
    );
    let text = served
        .cluster
        .refused(&["rollout", "start", "digits", "digits@2"]);
    assert!(text.contains("mobula experiment stop digits"), "{text}");

    // One of them by hand.
    let token = served.cluster.dir().join("endpoint-token");
    std::fs::write(&token, served.token()).unwrap();
    let by_hand = (0..).find(|user| is_treated(*user)).unwrap();
    wait_for("an answer of the treatment", || {
        (ask(&served, &url, by_hand) == "2").then_some(())
    });
    let key = format!("user-{by_hand}");
    let record = [
        "experiment",
        "record",
        "digits",
        "--key",
        &key,
        "--value",
        "2.5",
        "--endpoint-token-file",
        token.to_str().unwrap(),
    ];
    let text = served.cluster.ok(&record);
    assert_eq!(text, "counted for the treatment, version 2\n");
    let text = served.cluster.refused(&record);
    assert!(text.contains("a key counts once, with the first"), "{text}");

    let mut user = by_hand;
    let decided = wait_for("a decision", || {
        for _ in 0..USERS {
            user += 1;
            let expected = if is_treated(user) { "2" } else { "1" };
            if ask(&served, &url, user) != expected {
                // The router has concluded, and goes by it.
                assert_ne!(experiment(&served)?["state"], "running");
                break;
            }
            let better = f64::from(u8::from(is_treated(user)));
            let value = 2.0 * better + (user % 10) as f64 / 10.0;
            // When the router has concluded, it counts no more.
            assert!([200, 404].contains(&report(&served, user, value)));
        }
        experiment(&served).filter(|found| found["state"] != "running")
    });
    assert_eq!(
        (
            &decided["state"],
            &decided["decision"],
            &decided["plan_blake3"]
        ),
        (&json!("decided"), &json!("treatment"), &digest),
        "{decided}"
    );
    let effect = &decided["findings"]["measured"][0]["effect"];
    assert!(
        effect["lower"].as_f64().unwrap() > 0.0 && effect["upper"].as_f64().unwrap() > 2.0,
        "{effect}"
    );
    let file = served.cluster.dir().join("ab_summary.json");
    let path = file.to_str().unwrap();
    let text = served
        .cluster
        .ok(&["experiment", "status", "digits", "--out", path]);
    assert!(
        text.contains("mobula rollout start digits digits:2"),
        "{text}"
    );
    let summary: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(summary["findings"], decided["findings"]);

    // The version is the one of before, and nothing of the other is left.
    wait_for("the end of the treatment", || {
        (experiment(&served)?["cleanup"] == "done").then_some(())
    });
    assert_eq!(served.actors("serving/digits/v2/"), Vec::<Value>::new());
    assert_eq!(ask(&served, &url, by_hand), "1");
    served.cluster.ok(&[
        "rollout",
        "start",
        "digits",
        "digits@2",
        "--strategy",
        "blue-green",
    ]);
    wait_for("the promotion", || {
        let rollouts = served.cluster.json(&["rollout", "status", "digits"]);
        (rollouts["version"] == 2).then_some(())
    });
    let listed = served.cluster.json(&["experiment", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
}

#[test]
fn groups_of_the_wrong_sizes_conclude_nothing_and_the_next_router_goes_on_with_them() {
    let served = Served::up(2);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| parameters[0] += 1e-6);
    start(&served, &CLICKS);
    let mut users = (0..).filter(|user| is_treated(*user));
    // Somebody upstream loses all users of the control.
    let found = wait_for("the mismatch", || {
        for _ in 0..USERS {
            ask(&served, &url, users.next().unwrap());
        }
        let found = experiment(&served)?;
        let is_mismatch = found["findings"]["ratios"][0]["is_mismatch"] == true;
        is_mismatch.then_some(found)
    });
    assert_eq!(
        (&found["state"], &found["decision"], &found["counts"]),
        (&json!("running"), &json!("undecided"), &json!(1))
    );
    let text = served.cluster.ok(&["experiment", "status", "digits"]);
    assert!(
        text.contains("sample ratio mismatch") && text.contains("nothing is concluded"),
        "{text}"
    );

    let known = found["findings"]["ratios"][0]["treatment"].clone();
    let next = users.next().unwrap();
    let treated: Vec<usize> = (0..next).filter(|user| is_treated(*user)).collect();

    let url = another_router(&served);
    let mut others = (next..).filter(|user| !is_treated(*user));
    let mut count_more_than = |control: u64| {
        wait_for("numbers of the next router", || {
            for _ in 0..USERS {
                ask(&served, &url, others.next().unwrap());
            }
            let keys = experiment(&served)?["findings"]["ratios"][0].clone();
            let found = keys["control"].as_u64()?;
            (found > control).then_some((found, keys["treatment"].clone()))
        })
    };
    let (mut control, treatment) = count_more_than(0);
    assert!(treatment.as_u64() >= known.as_u64(), "{treatment}, {known}");
    // Those of before come again, and each is the one that it was.
    for user in &treated {
        ask(&served, &url, *user);
    }
    let mut treatment = json!(0);
    // The first of two copies may have been taken before.
    for _ in 0..2 {
        (control, treatment) = count_more_than(control);
    }
    assert_eq!(treatment, json!(treated.len()));
    assert_eq!(experiment(&served).unwrap()["counts"], 1);
    let stopped = served.cluster.json(&["experiment", "stop", "digits"]);
    assert_eq!(
        (&stopped["state"], &stopped["decision"]),
        (&json!("stopped"), &json!("undecided"))
    );
    let text = served.cluster.refused(&["experiment", "stop", "digits"]);
    assert!(text.contains("is over already"), "{text}");
}

#[test]
fn a_treatment_that_answers_no_numbers_is_ended_by_its_guardrail() {
    let served = Served::up(2);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| parameters.fill(f32::NAN));
    start(&served, &["--primary", "latency", "--min-effect", "0.1"]);
    let mut user = 0;
    let ended = wait_for("the end", || {
        for _ in 0..USERS {
            user += 1;
            // Nobody is given an answer of the treatment, and nobody goes without one.
            assert_eq!(ask(&served, &url, user), "1");
        }
        experiment(&served).filter(|found| found["state"] != "running")
    });
    assert_eq!(
        (&ended["state"], &ended["decision"]),
        (&json!("guardrail"), &json!("control")),
        "{ended}"
    );
    let violated = &ended["findings"]["guardrails"][0];
    assert_eq!(
        (&violated["metric"], &violated["is_violated"]),
        (&json!("error-rate"), &json!(true))
    );
    wait_for("the end of the treatment", || {
        (experiment(&served)?["cleanup"] == "done").then_some(())
    });
    assert_eq!(served.actors("serving/digits/v2/"), Vec::<Value>::new());
}

/// The sentinel that a treatment is wrong about: not the first one, so that which one it is, is looked for.
const SENTINEL: usize = 5;

/// Registers a version that computes as the first one does, and whose file has another class for one of its sentinels: a device
/// that computes wrongly is not to be had here, and to whoever holds answers against the file this is the same. Returns what is
/// to be said of it.
fn register_wrong(served: &Served) -> String {
    let mut said = String::new();
    let registered = register_file(served, |file| {
        let known = &mut file.reference.predictions;
        let row = SENTINEL * known.len() / SENTINELS_MAX;
        let answered = known[row];
        let expected = (answered + 1) % 10;
        known[row] = expected;
        said = format!(
            "answered sentinel {SENTINEL} with class {answered} instead of class {expected}"
        );
    });
    assert_eq!(registered, 3);
    said
}

/// How often replicas of a version of the endpoint have answered their sentinels so, as its router has counted.
fn sentinel_answers(served: &Served, version: u64, result: &str) -> Option<f64> {
    let name = "mobula_serving_sentinel_answers_total{";
    let labels = [
        "endpoint=\"digits\"".to_owned(),
        format!("version=\"{version}\""),
        format!("result=\"{result}\""),
    ];
    let is_it = |line: &&str| {
        line.starts_with(name) && labels.iter().all(|label| line.contains(label.as_str()))
    };
    ["worker-1", "worker-2"].into_iter().find_map(|worker| {
        let text = served.cluster.ok(&["metrics", worker]);
        let series = text.lines().find(is_it)?;
        series.rsplit(' ').next()?.parse().ok()
    })
}

/// The experiments that the registry's log says have ended, oldest first.
fn logged(served: &Served) -> Vec<Value> {
    let file = served.cluster.dir().join("registry.log");
    let path = file.to_str().unwrap();
    served.cluster.ok(&["audit", "export", path]);
    served.cluster.ok(&["audit", "verify", path]);
    let text = std::fs::read_to_string(&file).unwrap();
    let entries = text.lines().filter_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        serde_json::from_str::<Value>(line["entry"].as_str()?).ok()
    });
    entries
        .filter(|entry| entry["event"] == "experiment")
        .collect()
}

/// Waits until nothing is left of the treatment of the newest experiment.
fn wait_until_cleaned(served: &Served) {
    wait_for("the end of the treatment", || {
        (experiment(served)?["cleanup"] == "done").then_some(())
    });
}

#[test]
fn a_treatment_goes_on_while_it_is_right_about_known_rows_and_is_ended_once_it_is_wrong() {
    let served = Served::up(2);
    let url = served.deployment["url"].as_str().unwrap().to_owned();
    register_changed(&served, |parameters| parameters[0] += 1e-6);
    let said = register_wrong(&served);

    start(&served, &CLICKS);
    // Nobody has asked so far, so that this is no matter of numbers.
    let asked = wait_for("both replicas to have answered their sentinels", || {
        let found = experiment(&served)?;
        assert_eq!(found["state"], "running", "{found}");
        let asked = &found["sentinels"];
        (asked["right"] == 2).then(|| asked.clone())
    });
    assert_eq!(
        (&asked["sentinels"], &asked["replicas"]),
        (&json!(SENTINELS_MAX), &json!(2)),
        "{asked}"
    );
    let text = served.cluster.ok(&["experiment", "status", "digits"]);
    let said_so =
        "2 of the 2 replicas of the treatment that take requests have answered all 8 rightly";
    assert!(text.contains(said_so), "{text}");
    wait_for("the metrics of both answers", || {
        (sentinel_answers(&served, 2, "right")? >= 2.0).then_some(())
    });
    assert_eq!(sentinel_answers(&served, 2, "wrong"), Some(0.0));
    // What the router reports from here on, it says after a look at those answers.
    let (mut user, mut has_met) = (0, false);
    let found = wait_for("numbers of a treatment that was asked", || {
        for _ in 0..USERS {
            user += 1;
            has_met |= ask(&served, &url, user) == "2";
        }
        let found = experiment(&served)?;
        let is_counted = has_met && found["findings"].is_object();
        (found["state"] != "running" || is_counted).then_some(found)
    });
    assert_eq!(
        (&found["state"], &found["decision"]),
        (&json!("running"), &json!("undecided")),
        "{found}"
    );
    let reason = found["findings"]["reason"].as_str().unwrap();
    assert!(!reason.contains("no sentinels"), "{reason}");
    served.cluster.ok(&["experiment", "stop", "digits"]);
    wait_until_cleaned(&served);

    // Nobody sends this one a request: no number could end it.
    let begun = start_with(&served, "digits@3", &CLICKS);
    let mut places = BTreeMap::new();
    let ended = wait_for("the end", || {
        for replica in served.actors("serving/digits/v3/") {
            if let Some(node) = replica["node"].as_u64() {
                places.insert(replica["name"].as_str()?.to_owned(), node);
            }
        }
        experiment(&served).filter(|found| found["state"] != "running")
    });
    assert_eq!(
        (&ended["number"], &ended["state"], &ended["decision"]),
        (&json!(2), &json!("sentinel"), &json!("control")),
        "{ended}"
    );
    let reason = ended["findings"]["reason"].as_str().unwrap();
    let about = "the treatment is wrong about a row whose answer is known: replica ";
    assert!(
        reason.starts_with(about) && reason.contains(&said),
        "{reason} does not say: {said}"
    );
    // It names the replica and the machine that is to be looked at, one of the two workers'.
    let (replica, rest) = reason[about.len()..].split_once(" on node-").unwrap();
    let node: u64 = rest.split(' ').next().unwrap().parse().unwrap();
    let nodes = served.cluster.json(&["nodes", "list"]);
    let is_it = |known: &Value| known["id"] == node;
    assert!(nodes.as_array().unwrap().iter().any(is_it), "{reason}");
    if let Some(place) = places.get(&replica_name("digits", 3, replica.parse().unwrap())) {
        assert_eq!(*place, node, "{reason}");
    }
    assert_eq!(ended["sentinels"], Value::Null);
    wait_for("the metrics of a wrong answer", || {
        (sentinel_answers(&served, 3, "wrong")? >= 1.0).then_some(())
    });
    let measured = ended["findings"]["measured"].as_array().unwrap();
    let is_asked = |row: &Value| row["treatment"]["count"] != 0;
    assert!(!measured.iter().any(is_asked), "{ended}");
    let text = served.cluster.ok(&["experiment", "status", "digits"]);
    assert!(
        text.contains("ended: the treatment answered a known row wrongly")
            && text.contains(&format!("decision: control ({reason})")),
        "{text}"
    );

    // Those who would have met the treatment, too, are answered by the control.
    wait_until_cleaned(&served);
    assert_eq!(served.actors("serving/digits/v3/"), Vec::<Value>::new());
    for user in 0..USERS {
        assert_eq!(ask(&served, &url, user), "1");
    }
    let entries = logged(&served);
    let outcomes: Vec<&Value> = entries.iter().map(|entry| &entry["outcome"]).collect();
    assert_eq!(outcomes, ["stopped", "sentinel"]);
    let last = &entries[1];
    assert_eq!(
        (&last["control"], &last["treatment"], &last["decision"]),
        (&json!(1), &json!(3), &json!("control")),
        "{last}"
    );
    assert_eq!(
        (&last["plan_blake3"], &last["reason"]),
        (&begun["plan_blake3"], &ended["findings"]["reason"])
    );
}
