//! Bodies as clients write them.

use serde_json::json;

use super::super::message::TensorMetadata;
use super::*;

fn decode_json(value: &Value) -> Result<InferRequest, String> {
    decode_request(value.to_string().as_bytes(), None).map_err(|error| error.to_string())
}

fn model(datatype: Datatype, shape: Vec<i64>) -> ModelMetadata {
    let tensor = |name: &str| TensorMetadata {
        name: name.to_owned(),
        datatype,
        shape: shape.clone(),
        labels: Vec::new(),
    };
    ModelMetadata {
        name: "m".to_owned(),
        versions: vec!["1".to_owned()],
        platform: "test".to_owned(),
        max_batch_size: 0,
        inputs: vec![tensor("x")],
        outputs: vec![tensor("y")],
    }
}

#[test]
fn json_request_with_everything() {
    let request = decode_json(&json!({
        "id": "42",
        "parameters": {"priority": 1, "timeout": 2.5, "tag": "a", "binary_data_output": true},
        "unknown_field": {"ignored": []},
        // The datatype after the data: field order is free in JSON.
        "inputs": [{"name": "x", "shape": [2, 2], "data": [[1, 2], [3, 4]], "datatype": "INT32"}],
        "outputs": [{"name": "y", "parameters": {"binary_data": false, "k": true}}, {"name": "z"}],
    }))
    .unwrap();
    assert_eq!(request.id.as_deref(), Some("42"));
    assert_eq!(request.parameters["priority"], Parameter::Int(1));
    assert_eq!(request.parameters["timeout"], Parameter::Float(2.5));
    assert!(!request.parameters.contains_key("binary_data_output"));
    assert_eq!(
        request.inputs[0].data(),
        &TensorData::Int32(vec![1, 2, 3, 4])
    );
    assert_eq!(request.outputs[0].parameters["k"], Parameter::Bool(true));
    assert!(!request.wants_binary("y") && request.wants_binary("z"));
}

#[test]
fn binary_inputs_follow_the_json_in_order() {
    let json = json!({"inputs": [
        {"name": "a", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}},
        {"name": "j", "shape": [1], "datatype": "BOOL", "data": [true]},
        {"name": "s", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}},
    ]})
    .to_string();
    let mut body = json.clone().into_bytes();
    body.extend([1.0f32, 2.0].iter().flat_map(|value| value.to_le_bytes()));
    body.extend([2, 0, 0, 0, b'h', b'i']);
    let request = decode_request(&body, Some(json.len())).unwrap();
    assert_eq!(request.inputs[0].data(), &TensorData::Fp32(vec![1.0, 2.0]));
    assert_eq!(request.inputs[1].data(), &TensorData::Bool(vec![true]));
    assert_eq!(
        request.inputs[2].data(),
        &TensorData::Bytes(vec![b"hi".to_vec()])
    );

    let error = decode_request(&body[..body.len() - 1], Some(json.len())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor \"s\": binary_data_size is 6 bytes, the body has 5 left"
    );
    body.push(0);
    let error = decode_request(&body, Some(json.len())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "1 bytes are left after the last binary tensor, expected none"
    );
    let error = decode_request(&body, Some(body.len() + 1)).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("Inference-Header-Content-Length"),
        "{error}"
    );
}

#[test]
fn malformed_requests_say_what_is_wrong() {
    let with = |input: Value| json!({"inputs": [input]});
    for (request, expected) in [
        (json!({}), "missing field `inputs`"),
        (json!([]), "malformed inference JSON"),
        (
            with(json!({"name": "x", "datatype": "FP32", "data": [1]})),
            "missing field `shape`",
        ),
        (
            with(json!({"name": "x", "shape": [-1], "datatype": "FP32", "data": [1]})),
            "invalid value: integer `-1`",
        ),
        (
            with(json!({"name": "x", "shape": [1], "datatype": "FP8", "data": [1]})),
            "tensor \"x\": unknown datatype \"FP8\", expected one of",
        ),
        (
            with(json!({"name": "x", "shape": [3], "datatype": "FP32", "data": [1, 2]})),
            "tensor \"x\": shape [3] holds 3 elements, got 2",
        ),
        (
            with(json!({"name": "x", "shape": [1], "datatype": "FP32"})),
            "tensor \"x\": expected either data or parameters.binary_data_size, got neither",
        ),
        (
            with(
                json!({"name": "x", "shape": [1], "datatype": "FP32", "data": [1], "parameters": {"binary_data_size": 4}}),
            ),
            "got both",
        ),
        (
            with(
                json!({"name": "x", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": "4"}}),
            ),
            "parameter \"binary_data_size\": expected a whole number from 0 on, got \"4\"",
        ),
        (
            with(
                json!({"name": "x", "shape": [1], "datatype": "FP32", "parameters": {"shared_memory_region": "r"}}),
            ),
            "parameter \"shared_memory_region\" is not supported",
        ),
        (
            json!({"inputs": [], "parameters": {"a": [1]}}),
            "parameter \"a\": expected a string, number or boolean, got [1]",
        ),
        (
            json!({"inputs": [], "parameters": {"binary_data_output": 1}}),
            "parameter \"binary_data_output\": expected a boolean, got 1",
        ),
    ] {
        let error = decode_json(&request).unwrap_err();
        assert!(error.contains(expected), "{request}: {error}");
    }
    assert!(
        decode_request(b"{\"inputs\": [", None)
            .unwrap_err()
            .to_string()
            .contains("line 1 column 12")
    );
    assert!(decode_request(b"\xff", None).is_err());
}

#[test]
fn a_raw_body_is_the_single_input() {
    let body: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let request = decode_raw_request(&body, &model(Datatype::Fp32, vec![-1, 2])).unwrap();
    assert_eq!(
        (request.inputs[0].name(), request.inputs[0].shape()),
        ("x", &[2, 2][..])
    );
    assert!(request.wants_binary("y"));
    let request = decode_raw_request(b"text", &model(Datatype::Bytes, vec![-1, 1])).unwrap();
    assert_eq!(
        request.inputs[0].data(),
        &TensorData::Bytes(vec![b"text".to_vec()])
    );

    let refused = |body: &[u8], model: &ModelMetadata| {
        decode_raw_request(body, model).unwrap_err().to_string()
    };
    assert!(refused(&body, &model(Datatype::Fp32, vec![-1, 3])).contains("shape [-1, 3]"));
    assert!(refused(&body, &model(Datatype::Fp32, vec![-1, -1])).contains("2 open dimensions"));
    assert!(refused(&body, &model(Datatype::Fp32, vec![-1, 0])).contains("shape [-1, 0]"));
    let fixed = refused(&body, &model(Datatype::Fp32, vec![2]));
    assert!(
        fixed.contains("takes 8 bytes, binary_data_size is 16"),
        "{fixed}"
    );
    let mut two = model(Datatype::Fp32, vec![-1]);
    two.inputs.push(two.inputs[0].clone());
    assert!(refused(&body, &two).contains("has 2 inputs"));
}

#[test]
fn responses_take_the_form_asked_for() {
    let tensor =
        |name: &str, data: TensorData| Tensor::new(name, vec![data.len() as u64], data).unwrap();
    let response = InferResponse {
        model_name: "m".to_owned(),
        model_version: "3".to_owned(),
        id: Some("7".to_owned()),
        outputs: vec![
            tensor("scores", TensorData::Fp32(vec![0.1, f32::NAN])),
            tensor("label", TensorData::Int64(vec![4, 2])),
        ],
        ..InferResponse::default()
    };
    let output = |name: &str, binary_data| RequestedOutput {
        name: name.to_owned(),
        binary_data,
        classes: None,
        parameters: Parameters::new(),
    };
    let mut request = InferRequest {
        outputs: vec![output("label", None)],
        ..InferRequest::default()
    };
    let body = encode_response(&response, &request).unwrap();
    assert_eq!(body.json_length, None);
    assert_eq!(
        String::from_utf8(body.bytes).unwrap(),
        r#"{"model_name":"m","model_version":"3","id":"7","outputs":[{"name":"label","datatype":"INT64","shape":[2],"data":[4,2]}]}"#
    );

    request.outputs.push(output("scores", Some(true)));
    let body = encode_response(&response, &request).unwrap();
    let (json, tail) = body.bytes.split_at(body.json_length.unwrap());
    assert!(json.ends_with(br#""shape":[2],"parameters":{"binary_data_size":8}}]}"#));
    assert_eq!(tail[..4], 0.1f32.to_le_bytes());

    request.outputs.clear();
    let error = encode_response(&response, &request).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor \"scores\": element 1 is NaN, which JSON cannot carry: ask for binary_data"
    );
    request.outputs.push(output("other", None));
    assert!(
        encode_response(&response, &request)
            .unwrap_err()
            .to_string()
            .contains("did not produce")
    );
}
