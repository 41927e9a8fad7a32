//! A trained version behind an endpoint: the protocol, its refusals, a replica that dies, and drift.

mod autoscaling;
mod conformance;
mod devices;
mod encoders;
mod imported;
mod ingress;
mod memory;
mod predicted;
pub(crate) mod served;
mod triton_clients;

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};

use self::served::{Answer, FEATURES, ROWS, Served, output, request_of};
use crate::support::{kill_9, wait_for};

const REPLICAS: u64 = 2;

/// Rows in a monitor's window.
const WINDOW_ROWS: u64 = 200;

#[test]
fn an_endpoint_answers_the_protocol_refuses_with_reasons_and_goes_without_a_trace() {
    let served = Served::up(2);
    let deployed = &served.deployment;
    assert_eq!(
        (&deployed["model"], &deployed["version"]),
        (&json!("digits"), &json!(1))
    );
    described(&served);
    answers_json(&served);
    answers_binary(&served);
    names_classes_and_origins(&served);
    keeps_its_repository(&served);
    refuses(&served);

    let nodes: BTreeSet<u64> = served
        .actors("serving/digits/v1/replica-")
        .iter()
        .map(|replica| replica["node"].as_u64().unwrap())
        .collect();
    assert_eq!(nodes.len() as u64, REPLICAS, "replicas share a node");
    let listed = served.cluster.json(&["serve", "list"]);
    assert_eq!(listed[0]["state"], "serving", "{listed}");
    assert_eq!(listed[0]["replicas_running"], REPLICAS, "{listed}");

    let cluster = &served.cluster;
    let text = cluster.refused(&["serve", "deploy", "digits:7", "--endpoint", "other"]);
    assert!(
        text.contains("version 7") && text.contains("digits"),
        "{text}"
    );
    let text = cluster.refused(&["serve", "deploy", "digits", "--endpoint", "digits"]);
    assert!(
        text.contains("digits:1 already") && text.contains("serve delete"),
        "{text}"
    );
    assert_eq!(
        cluster.json(&["serve", "list"]).as_array().unwrap().len(),
        1
    );

    // The replicas and their router, and the monitor.
    assert_eq!(served.actors("serving/").len() as u64, REPLICAS + 1);
    assert_eq!(served.actors("drift/").len(), 1);
    cluster.ok(&["serve", "delete", "digits"]);
    wait_for("the endpoint to be gone", || {
        let listed = cluster.json(&["serve", "list"]);
        listed.as_array().unwrap().is_empty().then_some(())
    });
    assert_eq!(served.actors("serving/"), Vec::<Value>::new());
    assert_eq!(served.actors("drift/"), Vec::<Value>::new());
    let address = deployed["url"]
        .as_str()
        .unwrap()
        .strip_prefix("http://")
        .unwrap();
    wait_for("the front door to be closed", || {
        std::net::TcpStream::connect(address).is_err().then_some(())
    });
}

fn described(served: &Served) {
    for path in [
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/digits/ready",
    ] {
        assert_eq!(served.get(path).status, 200, "{path}");
    }
    let server = served.get("/v2").json();
    assert_eq!(server["name"], "mobula", "{server}");
    assert!(names_of(&server["extensions"]).contains(&"binary_tensor_data"));
    for path in ["/v2/models/digits", "/v2/models/digits/versions/1"] {
        let model = served.get(path).json();
        assert_eq!(model["versions"], json!(["1"]), "{model}");
        assert_eq!(
            model["inputs"],
            json!([{"name": "image", "datatype": "FP32", "shape": [-1, 64]}]),
        );
        assert_eq!(output(&model, "class")["datatype"], "INT64");
        assert_eq!(output(&model, "probabilities")["shape"], json!([-1, 10]));
    }
}

fn names_of(names: &Value) -> Vec<&str> {
    names
        .as_array()
        .unwrap()
        .iter()
        .map(|name| name.as_str().unwrap())
        .collect()
}

fn answers_json(served: &Served) {
    let mut request = request_of(served.image(0));
    request["id"] = json!("one");
    let answer = served.infer(&request).json();
    assert_eq!(answer["model_name"], "digits", "{answer}");
    assert_eq!(answer["model_version"], "1");
    assert_eq!(answer["id"], "one");
    assert_eq!(output(&answer, "class")["shape"], json!([1]));
    let probabilities = &output(&answer, "probabilities")["data"];
    let sum: f64 = probabilities
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p.as_f64().unwrap())
        .sum();
    assert!((sum - 1.0).abs() < 1e-4, "{answer}");

    // Single rows and many rows at once: the accuracy that training measured, exactly.
    let mut classes = served.classify(served.image(0));
    for images in served.images[FEATURES..].chunks(ROWS * FEATURES) {
        classes.extend(served.classify(images));
    }
    let right = classes
        .iter()
        .zip(&served.labels)
        .filter(|(a, b)| **a == u64::from(**b))
        .count();
    let accuracy = right as f64 / served.labels.len() as f64;
    assert!(
        (accuracy - served.accuracy).abs() < 1e-9,
        "{accuracy} against {}",
        served.accuracy
    );
}

/// A request whose input and outputs are bytes after the JSON.
fn binary_request(images: &[f32], size_bytes: usize) -> (usize, Vec<u8>) {
    let binary = json!({"binary_data": true});
    let head = json!({
        "inputs": [{
            "name": "image", "shape": [images.len() / FEATURES, FEATURES], "datatype": "FP32",
            "parameters": {"binary_data_size": size_bytes},
        }],
        "outputs": [
            {"name": "class", "parameters": binary},
            {"name": "probabilities", "parameters": binary},
        ],
    });
    let mut body = head.to_string().into_bytes();
    let length = body.len();
    body.extend(images.iter().flat_map(|value| value.to_le_bytes()));
    (length, body)
}

fn answers_binary(served: &Served) {
    const INFER: &str = "/v2/models/digits/versions/1/infer";
    let token = Some(served.token());
    let images = &served.images[..3 * FEATURES];
    let expected = served.classify(images);
    let (length, body) = binary_request(images, images.len() * 4);
    let answer = served.call(Method::POST, INFER, token, Some(length), body);
    assert_eq!(
        answer.status,
        200,
        "{}",
        String::from_utf8_lossy(&answer.body)
    );
    let length = answer.headers["Inference-Header-Content-Length"]
        .to_str()
        .unwrap();
    let (head, mut bytes) = answer.body.split_at(length.parse().unwrap());
    let head: Value = serde_json::from_slice(head).unwrap();
    // Binary outputs stand in the order in which the JSON names them.
    for shown in head["outputs"].as_array().unwrap() {
        let size = shown["parameters"]["binary_data_size"].as_u64().unwrap();
        let (data, rest) = bytes.split_at(usize::try_from(size).unwrap());
        bytes = rest;
        if shown["name"] == "class" {
            let (numbers, _) = data.as_chunks::<8>();
            let classes: Vec<u64> = numbers.iter().map(|n| u64::from_le_bytes(*n)).collect();
            assert_eq!(classes, expected);
        } else {
            assert_eq!(shown["name"], "probabilities");
            let (numbers, _) = data.as_chunks::<4>();
            let sum: f32 = numbers.iter().map(|n| f32::from_le_bytes(*n)).sum();
            assert!(numbers.len() == 30 && (sum - 3.0).abs() < 1e-4, "{sum}");
        }
    }
    assert!(bytes.is_empty());

    let (length, body) = binary_request(images, images.len() * 4 - 4);
    let answer = served.call(Method::POST, INFER, token, Some(length), body);
    assert_eq!(answer.status, 400);
    let error = answer.json()["error"].as_str().unwrap().to_owned();
    assert!(
        error.contains("takes 768 bytes, binary_data_size is 764"),
        "{error}"
    );
}

/// Every refusal has its status, and a body `{"error": …}` that says what was expected.
fn names_classes_and_origins(served: &Served) {
    let mut request = request_of(served.image(0));
    request["outputs"] = json!([{"name": "probabilities", "parameters": {"classification": 2}}]);
    let answer = served.infer(&request).json();
    let best = &output(&answer, "probabilities")["data"];
    let class = served.classify(served.image(0))[0];
    let first = best[0].as_str().unwrap();
    let parts: Vec<&str> = first.split(':').collect();
    // The digits' labels are their own names.
    assert_eq!(
        parts[1..],
        [class.to_string(), class.to_string()],
        "{answer}"
    );

    let shown = served.cluster.json(&["models", "show", "digits:1"])[0].clone();
    let digest = wait_for("the router to know where the version comes from", || {
        let answer = served.infer_explained(&request_of(served.image(0)));
        assert_eq!(answer.status, 200, "{}", answer.json());
        assert_eq!(answer.headers["x-mobula-version"], "1");
        let times = answer.headers["x-mobula-times-us"].to_str().unwrap();
        assert!(times.contains("compute="), "{times}");
        // Nobody has signed anything yet.
        assert!(!answer.headers.contains_key("x-mobula-signers"));
        let digest = answer.headers.get("x-mobula-digest")?;
        Some(digest.to_str().unwrap().to_owned())
    });
    assert_eq!(shown["digest"], json!(digest), "{shown}");
}

fn keeps_its_repository(served: &Served) {
    let post = |path: &str| {
        let path = format!("/v2/repository/{path}");
        served.call(Method::POST, &path, Some(served.token()), None, Vec::new())
    };
    let index = post("index").json();
    assert_eq!(
        index,
        json!([{"name": "digits", "version": "1", "state": "READY"}])
    );
    for (change, command) in [
        ("models/digits/load", "mobula rollout start digits"),
        ("models/digits/unload", "mobula serve delete digits"),
        ("models/faces/load", "mobula serve deploy faces"),
    ] {
        let refused = post(change);
        assert_eq!(refused.status, 400, "{change}");
        let words = refused.json();
        assert!(
            words["error"].as_str().unwrap().contains(command),
            "{words}"
        );
    }
    let unknown = served.call(Method::POST, "/v2/repository/index", None, None, Vec::new());
    assert_eq!(unknown.status, 401);
}

fn refuses(served: &Served) {
    const INFER: &str = "/v2/models/digits/infer";
    let token = Some(served.token());
    let good = request_of(served.image(0));
    let with = |key: &str, value: Value| {
        let mut request = good.clone();
        request["inputs"][0][key] = value;
        request.to_string()
    };
    let without_last: Vec<f32> = served.image(0)[1..].to_vec();
    let too_many = request_of(&served.images[..129 * FEATURES]).to_string();
    let narrow = {
        let mut request = request_of(&without_last);
        request["inputs"][0]["shape"] = json!([1, 63]);
        request["inputs"][0]["data"] = json!(without_last);
        request.to_string()
    };
    let posts = [
        (
            INFER,
            token,
            with("name", json!("picture")),
            400,
            "unexpected input \"picture\"",
        ),
        (
            INFER,
            token,
            narrow,
            400,
            "has shape [1, 63], expected [-1, 64]",
        ),
        (
            INFER,
            token,
            with("datatype", json!("FP64")),
            400,
            "datatype FP64, expected FP32",
        ),
        (
            INFER,
            token,
            with("datatype", json!("FLOAT")),
            400,
            "unknown datatype \"FLOAT\"",
        ),
        (
            INFER,
            token,
            with("data", json!(without_last)),
            400,
            "holds 64 elements, got 63",
        ),
        (
            INFER,
            token,
            with("data", json!(vec!["x"; FEATURES])),
            400,
            "expected FP32",
        ),
        (
            INFER,
            token,
            too_many,
            400,
            "batch size 129, expected 1 to 128",
        ),
        (
            INFER,
            token,
            "{".to_owned(),
            400,
            "malformed inference JSON",
        ),
        (
            INFER,
            token,
            json!({"inputs": []}).to_string(),
            400,
            "input \"image\" is missing",
        ),
        (
            "/v2/models/nothing/infer",
            token,
            good.to_string(),
            404,
            "unknown model \"nothing\"",
        ),
        (
            "/v2/models/digits/versions/9/infer",
            token,
            good.to_string(),
            404,
            "version \"9\"",
        ),
        (INFER, None, good.to_string(), 401, "missing or wrong token"),
        (
            INFER,
            Some("0123456789abcdef"),
            good.to_string(),
            401,
            "missing or wrong token",
        ),
        ("/v2/health/live", token, String::new(), 405, "POST"),
    ];
    for (path, token, body, status, reason) in posts {
        let answer = served.call(Method::POST, path, token, None, body.into_bytes());
        assert_refused(&answer, status, reason);
    }
    assert_refused(&served.get(INFER), 405, "GET");
    assert_refused(&served.get("/v2/models/nothing"), 404, "unknown model");
    assert_refused(&served.get("/v3"), 404, "/v3");
    let anonymous = served.call(Method::GET, "/v2/models/digits", None, None, Vec::new());
    assert_refused(&anonymous, 401, "Authorization: Bearer");
    // After all of that it answers as before.
    assert_eq!(served.infer(&good).status, 200);
}

fn assert_refused(answer: &Answer, status: u16, reason: &str) {
    let body = answer.json();
    assert_eq!(answer.status, status, "{reason}: {body}");
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
    let error = body["error"].as_str().unwrap();
    assert!(error.contains(reason), "expected `{reason}`: {error}");
}

#[test]
fn requests_are_answered_while_a_replica_dies_and_comes_back() {
    /// At about a millisecond each they go on beyond the end of the process.
    const REQUESTS: u32 = 300;
    let served = Served::up(2);
    let image = served.image(0);
    let expected = served.classify(image);
    let name = "serving/digits/v1/replica-1";
    let running = || {
        let replica = served.actors(name).pop()?;
        (replica["state"] == "running").then(|| replica["pid"].as_u64())?
    };
    let pid = wait_for("a replica to run", running);
    kill_9(u32::try_from(pid).unwrap());
    // Every answer is the right one: from the kill, which some of the first requests run into,
    // until the replica runs again.
    for _ in 0..REQUESTS {
        assert_eq!(served.classify(image), expected);
    }
    wait_for("the replica to run again", || {
        assert_eq!(served.classify(image), expected);
        running().filter(|now| *now != pid)
    });
    assert_eq!(served.classify(image), expected);
    let statistics = served.get("/v2/models/digits/stats").json();
    let failures = &statistics["model_stats"][0]["inference_stats"]["fail"]["count"];
    assert_eq!(*failures, 0, "{statistics}");
}

#[test]
fn images_unlike_the_training_data_raise_a_drift_event_and_others_do_not() {
    let served = Served::up(2);
    let quiet = served.send_until(
        "two windows",
        |pixel| pixel,
        |monitor| (monitor["windows"].as_u64()? >= 2).then(|| monitor.clone()),
    );
    assert_eq!(quiet["events"], 0, "{quiet}");
    assert_eq!(quiet["drift_events"], json!([]), "{quiet}");
    assert_eq!(quiet["retrain_suggestion"], Value::Null, "{quiet}");

    // Ink where there was paper.
    let loud = served.send_until(
        "a drift event",
        |pixel| 1.0 - pixel,
        |monitor| (monitor["events"].as_u64()? >= 1).then(|| monitor.clone()),
    );
    let event = &loud["drift_events"][0];
    assert_eq!(event["number"], 1, "{event}");
    let report = &event["report"];
    assert_eq!(
        (&report["model"], &report["version"]),
        (&json!("digits"), &json!(1))
    );
    assert_eq!(report["samples"], WINDOW_ROWS);
    let rows = report["drifted"].as_array().unwrap();
    // The digits have more than a thousand rows to train on.
    for statistic in ["psi", "wasserstein"] {
        let is_feature = |row: &&Value| {
            row["statistic"] == statistic && row["feature"].as_str().unwrap().starts_with("pixel_")
        };
        let row = rows.iter().find(is_feature).unwrap();
        assert_eq!(row["current_count"], WINDOW_ROWS, "{row}");
        assert!(row["reference_count"].as_u64().unwrap() > 1000, "{row}");
        assert!(row["value"].as_f64() >= row["threshold"].as_f64(), "{row}");
    }
    let test = rows
        .iter()
        .find(|row| row["statistic"] == "wasserstein")
        .unwrap();
    assert_eq!(test["threshold"], 0.1, "{test}");
    assert!(test["p_value"].as_f64().unwrap() <= 0.05, "{test}");
    assert!(rows.iter().all(|row| row["statistic"] != "ks"), "{report}");
    let suggestion = &loud["retrain_suggestion"];
    assert_eq!(
        (&suggestion["model"], &suggestion["version"]),
        (&json!("digits"), &json!(1))
    );
    assert_eq!(suggestion["event"], 1, "{suggestion}");
    assert!(!suggestion["reason"].as_str().unwrap().is_empty());
    let text = served
        .cluster
        .ok(&["drift", "status", "--endpoint", "digits"]);
    assert!(
        text.contains("retrain digits:1")
            && text.contains("pixel_")
            && text.contains(", wasserstein "),
        "{text}"
    );
}
