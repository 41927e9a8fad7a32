//! What becomes of answers whose truth comes later, on processes: accuracy and calibration, slices, concept drift, and
//! the sentinels; and what is said to those who report labels wrongly.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::serving::served::{FEATURES, Served, request_of};
use crate::support::wait_for;

/// Requests that are labelled with the truth, and then as many with another class.
const REQUESTS: usize = 300;

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

/// Sends each image as a request of its own with an id; every other one in the slice `odd`.
fn send(served: &Served, prefix: &str) {
    for number in 0..REQUESTS {
        let mut request = request_of(served.image(number));
        request["id"] = json!(format!("{prefix}-{number}"));
        if number % 2 == 1 {
            request["parameters"] = json!({"slice": "odd"});
        }
        let answer = served.infer(&request);
        assert_eq!(answer.status, 200, "{}", answer.json());
    }
}

fn arguments(words: &[String; 7]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// Labels for what `send` sent.
fn labels(served: &Served, prefix: &str, class: impl Fn(u32) -> u32) -> String {
    let mut text = String::new();
    for (number, label) in served.labels.iter().take(REQUESTS).enumerate() {
        let class = class(*label);
        writeln!(
            text,
            "{{\"id\": \"{prefix}-{number}\", \"class\": {class}}}"
        )
        .unwrap();
    }
    text
}

/// The endpoint's vitals, once `look` finds something in what `drift status` prints.
fn status_with<T>(served: &Served, what: &str, look: impl Fn(&Value) -> Option<T>) -> (Value, T) {
    wait_for(what, || {
        let listed = served.cluster.json(&["drift", "status"]);
        let monitor = listed.as_array().unwrap().first()?.clone();
        let found = look(&monitor)?;
        Some((monitor, found))
    })
}

#[test]
fn labels_tell_accuracy_and_slices_and_make_wrong_answers_a_drift_event() {
    let served = Served::up(1);
    let cluster = &served.cluster;
    let dir = cluster.dir();
    let token = write(dir, "endpoint-token", served.token());
    let token = token.to_str().unwrap();
    let report = |file: &Path, token: &str| {
        let file = file.to_str().unwrap().to_owned();
        [
            "drift",
            "label",
            "digits",
            "--file",
            &file,
            "--endpoint-token-file",
            token,
        ]
        .map(str::to_owned)
    };

    send(&served, "first");
    let file = write(dir, "first.jsonl", &labels(&served, "first", |class| class));
    let words = report(&file, token);
    let reply = cluster.json(&arguments(&words));
    // A prediction may be on its way to the monitor still; its label waits for it.
    let (joined, waiting) = (
        reply["joined"].as_u64().unwrap(),
        reply["waiting"].as_u64().unwrap(),
    );
    assert_eq!(joined + waiting, REQUESTS as u64, "{reply}");
    assert_eq!((&reply["late"], &reply["refused"]), (&json!(0), &json!(0)));
    let (monitor, ()) = status_with(&served, "all labels", |monitor| {
        let total = &monitor["vitals"]["vitals"]["truth"]["total"];
        (total["samples"] == REQUESTS).then_some(())
    });
    let vitals = &monitor["vitals"]["vitals"];
    let classes = (0..REQUESTS)
        .map(|number| served.classify(served.image(number))[0])
        .zip(&served.labels);
    let right = classes
        .filter(|(class, label)| *class == u64::from(**label))
        .count();
    let truth = &vitals["truth"];
    let expected = right as f64 / REQUESTS as f64;
    assert_eq!(
        truth["total"]["accuracy"].as_f64(),
        Some(expected),
        "{truth}"
    );
    assert_eq!(truth["total"]["bins"].as_array().unwrap().len(), 15);
    assert_eq!(truth["window"]["samples"], 200, "{truth}");
    assert!(truth["trained_accuracy"].as_f64().unwrap() > 0.8, "{truth}");
    let slice = &vitals["slices"][0];
    assert_eq!(
        (&slice["name"], &slice["rows"], &slice["labelled"]),
        (&json!("odd"), &json!(REQUESTS / 2), &json!(REQUESTS / 2))
    );
    // Held-out images look like the reference to the version, and it has one.
    let out = &vitals["out_of_distribution"];
    assert_eq!(out["no_reference"], Value::Null, "{out}");
    assert_eq!(out["last"]["is_out"], false, "{out}");
    // The replicas say the energies of their logits, by which they look like it too.
    let out = &vitals["out_of_distribution_by_energy"];
    assert_eq!(out["score"], "energy", "{out}");
    assert_eq!(out["last"]["is_out"], false, "{out}");
    assert_eq!(vitals["rows_without_energy"], 0, "{vitals}");
    assert_eq!(monitor["events"], 0, "{monitor}");

    // The world has changed: the same images are other classes now.
    send(&served, "second");
    let other = labels(&served, "second", |class| (class + 1) % 10);
    let file = write(dir, "second.jsonl", &other);
    let words = report(&file, token);
    cluster.ok(&arguments(&words));
    let (monitor, signal) = status_with(&served, "concept drift", |monitor| {
        let signals = monitor["signals"].as_array()?;
        signals
            .iter()
            .find(|signal| signal["signal"]["stream"]["stream"] == "errors")
            .cloned()
    });
    let change = &signal["signal"]["stream"]["change"];
    assert!(
        change["after"].as_f64() > change["before"].as_f64(),
        "{signal}"
    );
    assert_eq!(signal["drift_event"], 1, "{signal}");
    let suggestion = &monitor["retrain_suggestion"];
    assert!(
        suggestion["reason"]
            .as_str()
            .unwrap()
            .contains("wrong answers"),
        "{suggestion}"
    );
    let text = cluster.ok(&["drift", "status", "--endpoint", "digits"]);
    for said in [
        "share of wrong answers",
        "calibration error",
        "odd",
        "  energy      within the reference's distribution",
        "sentinels",
    ] {
        assert!(text.contains(said), "no {said:?} in {text}");
    }

    // The replica knows what its version's file says.
    let (monitor, ()) = status_with(&served, "the sentinels", |monitor| {
        // News of later rounds travel with those of requests.
        served.classify(&served.images[..FEATURES]);
        let sentinels = &monitor["vitals"]["vitals"]["sentinels"];
        (sentinels["right"].as_u64()? > 0).then_some(())
    });
    assert_eq!(
        monitor["vitals"]["vitals"]["sentinels"]["wrong"], 0,
        "{monitor}"
    );

    // And what is wrong is refused in words.
    let refused = |text: &str, token: &str| {
        let words = report(&write(dir, "wrong.jsonl", text), token);
        cluster.refused(&arguments(&words))
    };
    let text = refused("{\"id\": \"first-1\", \"class\": 1}\n{\"id\": 7}\n", token);
    assert!(
        text.contains("line 2: ") && text.contains("\"class\": 3"),
        "{text}"
    );
    let text = refused("{\"id\": \"first-1\", \"class\": 99}\n", token);
    assert!(text.contains("none of this version's 10 classes"), "{text}");
    let wrong = write(dir, "wrong-token", "no such token");
    let text = refused(
        "{\"id\": \"first-1\", \"class\": 1}\n",
        wrong.to_str().unwrap(),
    );
    assert!(text.contains("the endpoint says 401"), "{text}");
    let text = cluster.refused(&["drift", "label", "digits", "--file", file.to_str().unwrap()]);
    assert!(text.contains("--endpoint-token-file FILE"), "{text}");
    let text = cluster.refused(&[
        "drift",
        "label",
        "nobody",
        "--file",
        file.to_str().unwrap(),
        "--endpoint-token-file",
        token,
    ]);
    assert!(text.contains("no endpoint is called `nobody`"), "{text}");
}
