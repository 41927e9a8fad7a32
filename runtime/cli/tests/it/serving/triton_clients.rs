//! Triton's own Python clients against an endpoint.

use std::process::Command;

use serde_json::{Value, json};

use super::served::{FEATURES, ROWS, Served};
use crate::python::python_with;
use crate::support::{repository, text_of};

/// The newest one when this was written; it brings gRPC and gevent.
pub(super) const CLIENTS: &str = "tritonclient[http,grpc]==2.73.0";

#[test]
fn tritons_own_clients_get_the_same_classes_by_http_and_grpc() {
    let Some(python) = python_with("tritonclient", &[CLIENTS]) else {
        return;
    };
    let served = Served::up(2);
    let images = &served.images[..ROWS * FEATURES];
    let expected = json!(served.classify(images));
    let file = served.cluster.dir().join("rows.f32");
    let bytes: Vec<u8> = images
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    std::fs::write(&file, bytes).unwrap();
    let url = served.deployment["url"].as_str().unwrap();
    let output = Command::new(python)
        .arg(repository("runtime/cli/tests/programs/triton_clients.py"))
        .args([url.trim_start_matches("http://"), served.token(), "digits"])
        .arg(file)
        .arg(FEATURES.to_string())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text_of(&output));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (protocol, forms) in [("http", 7), ("grpc", 7)] {
        let said = &said[protocol];
        for what in ["live", "ready", "model_ready"] {
            assert_eq!(said[what], true, "{protocol} {what}");
        }
        let classes = said["classes"].as_object().unwrap();
        assert_eq!(classes.len(), forms, "{protocol}");
        for (form, found) in classes {
            assert_eq!(*found, expected, "{protocol} {form}");
        }
        let metadata = &said["metadata"];
        assert_eq!(metadata["platform"], "mobula_candle", "{protocol}");
        assert_eq!(metadata["inputs"][0]["datatype"], "FP32", "{protocol}");
        assert!(said["answered"].as_u64().unwrap() >= forms as u64, "{said}");
    }
    // What both describe is the same; gRPC's JSON writes 64-bit numbers as text.
    let names = |tensors: &Value| -> Vec<Value> {
        let tensors = tensors.as_array().unwrap().iter();
        tensors.map(|tensor| tensor["name"].clone()).collect()
    };
    let (http, grpc) = (&said["http"], &said["grpc"]);
    assert_eq!(http["server"], grpc["server"]);
    assert_eq!(
        http["config"]["max_batch_size"],
        grpc["config"]["max_batch_size"]
    );
    assert_eq!(
        http["config"]["input"][0]["data_type"],
        grpc["config"]["input"][0]["data_type"]
    );
    assert_eq!(
        names(&http["config"]["output"]),
        names(&grpc["config"]["output"])
    );
    for (at, status, words) in [
        ("/http/refusals/model", json!("404"), "unknown model"),
        ("/http/refusals/token", json!("401"), "Authorization"),
        (
            "/grpc/refusals/model",
            json!("StatusCode.NOT_FOUND"),
            "unknown model",
        ),
        (
            "/grpc/refusals/token",
            json!("StatusCode.UNAUTHENTICATED"),
            "Authorization",
        ),
        ("/grpc/refusals/stream", json!(null), "unknown model"),
    ] {
        let refusal = said.pointer(at).unwrap();
        assert_eq!(refusal[0], status, "{at}: {refusal}");
        assert!(
            refusal[1].as_str().unwrap().contains(words),
            "{at}: {refusal}"
        );
    }
}
