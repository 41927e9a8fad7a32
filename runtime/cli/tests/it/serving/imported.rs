//! Models that other tools made, from their file to their answers.

use std::path::PathBuf;
use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::served::output;
use crate::python::python_with;
use crate::support::{TestCluster, mobula, repository, text_of, wait_for};

/// A cluster with models that were registered from files.
pub(super) struct Imported {
    pub(super) cluster: TestCluster,
    pub(super) http: reqwest::Client,
    pub(super) runtime: Runtime,
}

fn golden(file: &str) -> PathBuf {
    repository("actors/src/serving/onnx/golden").join(file)
}

/// The cases of a model: inputs, and what onnxruntime answered.
fn cases(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(golden(&format!("{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

impl Imported {
    pub(super) fn up() -> Self {
        Self::on(TestCluster::up(1))
    }

    pub(super) fn on(cluster: TestCluster) -> Self {
        Imported {
            cluster,
            http: reqwest::Client::new(),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
        }
    }

    pub(super) fn register(&self, name: &str, more: &[&str]) -> Value {
        let file = golden(&format!("{name}.onnx"));
        let mut arguments = vec!["models", "register", name, "--onnx", file.to_str().unwrap()];
        arguments.extend(more);
        self.cluster.json(&arguments)
    }

    pub(super) fn deploy(&self, name: &str) -> Value {
        self.cluster
            .json(&["serve", "deploy", name, "--replicas", "1"])
    }

    pub(super) fn call(
        &self,
        deployment: &Value,
        method: Method,
        path: &str,
        body: &Value,
    ) -> (u16, Value) {
        let url = format!("{}{path}", deployment["url"].as_str().unwrap());
        let request = self.http.request(method, url);
        let request = request.bearer_auth(deployment["token"].as_str().unwrap());
        self.runtime.block_on(async {
            let answer = request.body(body.to_string()).send().await.unwrap();
            let status = answer.status().as_u16();
            (status, answer.json().await.unwrap())
        })
    }

    pub(super) fn infer(&self, deployment: &Value, body: &Value) -> (u16, Value) {
        let name = deployment["endpoint"].as_str().unwrap();
        let path = format!("/v2/models/{name}/infer");
        self.call(deployment, Method::POST, &path, body)
    }
}

pub(super) fn assert_near(found: &Value, expected: &Value) {
    let numbers = |values: &Value| -> Vec<f64> {
        let values = values.as_array().unwrap().iter();
        values.map(|value| value.as_f64().unwrap()).collect()
    };
    let (found, expected) = (numbers(found), numbers(expected));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        let near = (found - expected).abs() <= 1e-5 * expected.abs().max(1.0);
        assert!(near, "{found} instead of {expected}");
    }
}

#[test]
fn an_onnx_file_becomes_an_endpoint_that_answers_as_onnxruntime_does() {
    let imported = Imported::up();
    let metadata = imported.cluster.dir().join("metadata.json");
    let said = json!({
        "metrics": {"accuracy": 0.9}, "seed": 7, "training": {"epochs": 3},
        "labels": {"probabilities": ["setosa", "versicolor", "virginica"]},
    });
    std::fs::write(&metadata, said.to_string()).unwrap();
    let version = imported.register("mlp", &["--metadata", metadata.to_str().unwrap()]);
    let weights = blake3::hash(&std::fs::read(golden("mlp.onnx")).unwrap()).to_string();
    assert_eq!(version["weights_blake3"], weights, "{version}");
    assert_eq!(
        (&version["version"], &version["job"]),
        (&json!(1), &json!(0))
    );
    assert_eq!(version["metrics"]["accuracy"], 0.9);
    let missing = version["missing"].as_array().unwrap();
    for field in ["dataset", "code", "environment", "run_record"] {
        assert!(missing.contains(&json!(field)), "{version}");
    }
    // The same file again is the same version, and what people read says where it comes from.
    let again = imported.register("mlp", &["--metadata", metadata.to_str().unwrap()]);
    assert_eq!(again["version"], 1);
    let shown = imported.cluster.ok(&["models", "show", "mlp:1"]);
    assert!(shown.contains("job        imported"), "{shown}");
    let card = imported.cluster.ok(&["models", "card", "mlp:1"]);
    assert!(
        card.contains("imported") && card.contains("not known"),
        "{card}"
    );
    imported.cluster.ok(&["models", "verify", "mlp:1"]);
    imported.cluster.ok(&["models", "lineage", "mlp"]);

    let deployment = imported.deploy("mlp");
    let (_, described) = imported.call(&deployment, Method::GET, "/v2/models/mlp", &json!(null));
    assert_eq!(described["platform"], "mobula_onnx", "{described}");
    assert_eq!(
        described["inputs"],
        json!([{"name": "x", "datatype": "FP32", "shape": [-1, 4]}])
    );
    for case in cases("mlp") {
        let (status, answer) = imported.infer(&deployment, &json!({"inputs": case["inputs"]}));
        assert_eq!(status, 200, "{answer}");
        for expected in case["outputs"].as_array().unwrap() {
            let found = output(&answer, expected["name"].as_str().unwrap());
            assert_eq!(found["shape"], expected["shape"], "{answer}");
            assert_near(&found["data"], &expected["data"]);
        }
    }
    let case = &cases("mlp")[0];
    let wanted = json!([{"name": "probabilities", "parameters": {"classification": 1}}]);
    let (_, answer) = imported.infer(
        &deployment,
        &json!({"inputs": case["inputs"], "outputs": wanted}),
    );
    let best = output(&answer, "probabilities")["data"][0]
        .as_str()
        .unwrap();
    assert!(
        ["setosa", "versicolor", "virginica"]
            .iter()
            .any(|name| best.ends_with(name)),
        "{best}"
    );
    let (status, refused) = imported.infer(
        &deployment,
        &json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 5], "data": [0, 0, 0, 0, 0]}]}),
    );
    assert_eq!(status, 400);
    assert!(
        refused["error"]
            .as_str()
            .unwrap()
            .contains("expected [-1, 4]"),
        "{refused}"
    );
    // Nothing is known of what it was trained on, so nobody watches it.
    let actors = imported.cluster.json(&["actors", "list"]);
    let mut actors = actors.as_array().unwrap().iter();
    assert!(!actors.any(|actor| actor["name"].as_str().unwrap().starts_with("drift/")));
}

#[test]
fn requests_of_different_lengths_and_models_without_a_batch_are_answered() {
    let imported = Imported::up();
    for name in ["attention", "centred"] {
        imported.register(name, &[]);
        let deployment = imported.deploy(name);
        let path = format!("/v2/models/{name}/config");
        let (_, config) = imported.call(&deployment, Method::GET, &path, &json!(null));
        let rows = if name == "attention" { 128 } else { 0 };
        assert_eq!(config["max_batch_size"], rows, "{config}");
        for case in cases(name) {
            let (status, answer) = imported.infer(&deployment, &json!({"inputs": case["inputs"]}));
            assert_eq!(status, 200, "{answer}");
            assert_near(&answer["outputs"][0]["data"], &case["outputs"][0]["data"]);
        }
    }
    // A version that takes something else does not get into service: the router rolls it back.
    let file = golden("mlp.onnx");
    let file = file.to_str().unwrap();
    imported
        .cluster
        .ok(&["models", "register", "centred", "--onnx", file]);
    imported
        .cluster
        .ok(&["rollout", "start", "centred", "centred:2"]);
    let status = wait_for("the rollout to be rolled back", || {
        let status = imported.cluster.json(&["rollout", "status", "centred"]);
        (status["rollouts"][0]["phase"] == "rolled_back").then_some(status)
    });
    assert!(status.to_string().contains("x FP32[-1, 4]"), "{status}");
}

#[test]
fn files_that_are_no_models_are_refused_before_anything_is_stored() {
    let imported = Imported::up();
    let bytes = std::fs::read(golden("mlp.onnx")).unwrap();
    let cut = imported.cluster.dir().join("cut.onnx");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let text = imported.cluster.dir().join("text.onnx");
    std::fs::write(&text, "this is no model").unwrap();
    let absent = imported.cluster.dir().join("absent.onnx");
    let good = golden("mlp.onnx");
    for (file, more, expected) in [
        (&cut, &[][..], "not an ONNX model"),
        (&text, &[], "not an ONNX model"),
        (&absent, &[], "absent.onnx cannot be read"),
        (&good, &["--max-batch", "129"], "the limit is 128 rows"),
    ] {
        let mut arguments = vec!["models", "register", "m", "--onnx", file.to_str().unwrap()];
        arguments.extend(more);
        let said = imported.cluster.refused(&arguments);
        assert!(said.contains(expected), "{said}");
    }
    let said = imported.cluster.refused(&[
        "models",
        "register",
        "../m",
        "--onnx",
        good.to_str().unwrap(),
    ]);
    assert!(said.contains("cannot name a model"), "{said}");
    assert_eq!(imported.cluster.json(&["models", "list"]), json!([]));
    // Which of the options is wrong is said without a cluster, too.
    let output = mobula().args(["models", "register", "m"]).output().unwrap();
    assert!(text_of(&output).contains("--onnx"), "{}", text_of(&output));
}

#[test]
fn an_endpoint_and_onnxruntime_answer_the_same() {
    let packages = ["onnxruntime==1.32.0", "onnx==1.23.2"];
    let Some(python) = python_with("onnxruntime", &packages) else {
        return;
    };
    let imported = Imported::up();
    for name in ["mlp", "cnn", "attention", "centred"] {
        imported.register(name, &[]);
        let deployment = imported.deploy(name);
        let text = |key: &str| deployment[key].as_str().unwrap();
        let output = Command::new(&python)
            .arg(repository("runtime/cli/tests/programs/onnx_models.py"))
            .arg("ask")
            .arg(golden(&format!("{name}.onnx")))
            .args([text("url"), text("token"), name])
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {}", text_of(&output));
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(said["worst"].as_f64().unwrap() < 1e-4, "{name}: {said}");
        assert!(said["values"].as_u64().unwrap() >= 16, "{name}: {said}");
    }
}

#[test]
fn an_endpoint_with_a_cache_says_what_it_knew_already() {
    let imported = Imported::up();
    imported.register("mlp", &[]);
    let deployment = imported.deploy("mlp");
    let set = imported
        .cluster
        .json(&["serve", "cache", "mlp", "--mib", "1", "--ttl", "1h"]);
    assert_eq!(
        (&set["cache_bytes"], &set["ttl_ms"]),
        (&json!(1 << 20), &json!(3_600_000))
    );
    let case = &cases("mlp")[0];
    let request = json!({"inputs": case["inputs"]});
    let path = "/v2/models/mlp/stats";
    let counted = |what: &str| {
        let (_, stats) = imported.call(&deployment, Method::GET, path, &json!(null));
        stats["model_stats"][0]["inference_stats"][what]["count"]
            .as_u64()
            .unwrap()
    };
    // The router looks at its row twice a second.
    wait_for("an answer that was kept", || {
        let (status, answer) = imported.infer(&deployment, &request);
        assert_eq!(status, 200, "{answer}");
        assert_near(
            &output(&answer, "probabilities")["data"],
            &case["outputs"][0]["data"],
        );
        (counted("cache_hit") > 0).then_some(())
    });
    assert_eq!(counted("cache_miss"), 1);
    imported.cluster.ok(&["serve", "cache", "mlp", "--off"]);
    let said = imported
        .cluster
        .refused(&["serve", "cache", "mlp", "--mib", "0"]);
    assert!(said.contains("0 is not in 1..=16384"), "{said}");
    let said = imported.cluster.refused(&["serve", "cache", "nobody"]);
    assert!(said.contains("no endpoint is called"), "{said}");
}
