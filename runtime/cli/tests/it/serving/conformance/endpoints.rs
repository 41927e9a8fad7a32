//! The probes against endpoints of a cluster: each model that a registered version can be is deployed under its name, and the
//! answers are those of the protocol's server alone, but for the differences that the last section of the page lists.

use std::process::Command;

use mobula_actors::serving::oip::Datatype;
use serde_json::{Map, Value, json};

use super::onnx_file::{Copied, copying};
use super::{Part, compare_with_page, identity_server, program};
use crate::python::python_with;
use crate::serving::triton_clients::CLIENTS;
use crate::support::{TestCluster, text_of};

/// CPUs that the worker says it has: each endpoint takes 0.3 of them.
const CPUS: &str = "8";

/// A model of the probes, as a version can be it.
struct Model {
    name: String,
    tensors: Vec<Copied>,
    /// Rows of a request, at most.
    rows_max: &'static str,
    /// The names of the classes of the first output.
    labels: &'static [&'static str],
}

/// The models, but for those of texts and of BF16, which no graph takes. The probes' models of one datatype have no batch;
/// a graph whose first dimension is open has one.
fn models() -> Vec<Model> {
    let fp32 = |row: &'static [u64]| Copied {
        datatype: Datatype::Fp32,
        row,
    };
    let model = |name: &str, rows_max: &'static str, tensors: Vec<Copied>| Model {
        name: name.to_owned(),
        tensors,
        rows_max,
        labels: &[],
    };
    let int32 = Copied {
        datatype: Datatype::Int32,
        row: &[4],
    };
    let mut models = vec![
        model("identity", "8", vec![fp32(&[16])]),
        model("pair", "4", vec![fp32(&[4]), int32]),
        Model {
            labels: &["zero", "one", "two", "three"],
            ..model("labelled", "4", vec![fp32(&[4])])
        },
    ];
    for datatype in Datatype::ALL {
        if !matches!(datatype, Datatype::Fp32 | Datatype::Bf16 | Datatype::Bytes) {
            let name = format!("typed_{}", datatype.name().to_lowercase());
            let values = Copied { datatype, row: &[] };
            models.push(model(&name, "128", vec![values]));
        }
    }
    models
}

/// Registers a model and deploys it; the endpoint's address and token.
fn deploy(cluster: &TestCluster, model: &Model) -> Value {
    let name = model.name.as_str();
    let file = cluster.dir().join(format!("{name}.onnx"));
    std::fs::write(&file, copying(&model.tensors)).unwrap();
    let mut arguments = vec!["models", "register", name, "--onnx"];
    arguments.extend([file.to_str().unwrap(), "--max-batch", model.rows_max]);
    let metadata = cluster.dir().join(format!("{name}.json"));
    if !model.labels.is_empty() {
        let said = json!({"labels": {"OUTPUT0": model.labels}});
        std::fs::write(&metadata, said.to_string()).unwrap();
        arguments.extend(["--metadata", metadata.to_str().unwrap()]);
    }
    cluster.json(&arguments);
    let deployed = cluster.json(&["serve", "deploy", name, "--replicas", "1"]);
    let text = |key: &str| deployed[key].as_str().unwrap();
    let address = text("url").trim_start_matches("http://");
    json!({"address": address, "token": text("token")})
}

#[test]
fn endpoints_answer_as_the_protocols_server_does_but_for_the_differences_that_the_page_lists() {
    let Some(python) = python_with("tritonclient", &[CLIENTS]) else {
        return;
    };
    let (_server, address, token) = identity_server();
    let cluster = TestCluster::up_with(1, &["--cpus", CPUS], &[]);
    let models = models();
    let deployed = models
        .iter()
        .map(|model| (model.name.clone(), deploy(&cluster, model)));
    let endpoints: Map<String, Value> = deployed.collect();
    let file = cluster.dir().join("endpoints.json");
    std::fs::write(&file, Value::Object(endpoints).to_string()).unwrap();
    let output = Command::new(python)
        .arg(program("endpoints.py"))
        .args([&address, &token])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    let found = String::from_utf8(output.stdout).unwrap();
    compare_with_page(Part::Endpoints, &found);
}
