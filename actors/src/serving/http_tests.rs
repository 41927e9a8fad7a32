//! The protocol against a real server on a loopback socket.

use std::io::Write;
use std::time::Duration;

use reqwest::{Client, Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::super::oip::{Parameters, RequestedOutput, TensorData, encode_request};
use super::super::server::ServeSummary;
use super::fixture::{BODY_LIMIT, decode, json_body, request, start, start_with_body_timeout};
use super::*;

#[tokio::test]
async fn metadata_health_and_statistics() {
    let server = start().await;
    let metadata = json!({"name": "mobula", "version": "0", "extensions": ["binary_tensor_data"]});
    assert_eq!(server.get_json("/v2").await, metadata);
    for path in [
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/double/ready",
    ] {
        let response = server.call(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        assert!(response.bytes().await.unwrap().is_empty());
    }
    let model = server.get_json("/v2/models/double").await;
    assert_eq!(
        model["inputs"][0],
        json!({"name": "x", "datatype": "FP32", "shape": [-1, 2]})
    );
    assert_eq!(server.get_json("/v2/models/double/versions/1").await, model);
    let config = server.get_json("/v2/models/double/config").await;
    assert_eq!(
        (&config["max_batch_size"], &config["input"][0]["dims"]),
        (&json!(4096), &json!([2]))
    );
    server.infer("double", json_body(3)).send().await.unwrap();
    let stats = server.get_json("/v2/models/double/versions/1/stats").await;
    assert_eq!(stats["model_stats"][0]["inference_count"], 3);
    assert_eq!(
        stats["model_stats"][0]["inference_stats"]["success"]["count"],
        1
    );
}

#[tokio::test]
async fn json_inference_without_content_type() {
    let server = start().await;
    let response = server.infer("double", json_body(2)).send().await.unwrap();
    let response = decode(response).await;
    assert_eq!(
        (response.model_name.as_str(), response.id.as_deref()),
        ("double", Some("r1"))
    );
    assert_eq!(
        response.outputs[0].data(),
        &TensorData::Fp32(vec![0.0, 2.0, 4.0, 6.0])
    );
    assert_eq!(
        response.outputs[1].data(),
        &TensorData::Bytes(vec!["grüezi".into(); 2])
    );
}

#[tokio::test]
async fn the_key_of_a_request_comes_from_its_header() {
    let server = start().await;
    for (key, expected) in [(Some("user-7"), "user-7"), (None, "1")] {
        let mut call = server.infer("double", json_body(1));
        if let Some(key) = key {
            call = call.header("X-Mobula-Key", key);
        }
        let body = call.send().await.unwrap().bytes().await.unwrap();
        let answer: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(answer["model_version"], expected, "{answer}");
    }
}

#[tokio::test]
async fn binary_inference_both_ways_and_raw() {
    let server = start().await;
    let mut request = request(2);
    let output = |name: &str, binary_data| RequestedOutput {
        name: name.to_owned(),
        binary_data: Some(binary_data),
        classes: None,
        parameters: Parameters::new(),
    };
    request.outputs = vec![output("text", true), output("y", false)];
    let body = encode_request(&request, true).unwrap();
    let call = server
        .infer("double", body.bytes)
        .header("Inference-Header-Content-Length", body.json_length.unwrap());
    let response = decode(call.send().await.unwrap()).await;
    assert_eq!(
        response.outputs[0].data(),
        &TensorData::Bytes(vec!["grüezi".into(); 2])
    );
    assert_eq!(
        response.outputs[1].data(),
        &TensorData::Fp32(vec![0.0, 2.0, 4.0, 6.0])
    );

    let raw: Vec<u8> = [1.0f32, 2.0]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let call = server
        .infer("double", raw)
        .header("Inference-Header-Content-Length", 0);
    let response = decode(call.send().await.unwrap()).await;
    assert_eq!(
        response.outputs[0].data(),
        &TensorData::Fp32(vec![2.0, 4.0])
    );
    assert_eq!(response.id, None);
}

#[tokio::test]
async fn compressed_bodies_both_ways() {
    let server = start().await;
    let body = json_body(500);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&body).unwrap();
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    zlib.write_all(&body).unwrap();
    for (name, compressed) in [
        ("gzip", gzip.finish().unwrap()),
        ("deflate", zlib.finish().unwrap()),
    ] {
        let call = server
            .infer("double", compressed)
            .header("content-encoding", name);
        let plain = decode(call.send().await.unwrap()).await;
        assert_eq!(plain.outputs[0].shape(), [500, 2]);
        let call = server
            .infer("double", body.clone())
            .header("accept-encoding", name);
        let response = call.send().await.unwrap();
        assert_eq!(response.headers()["content-encoding"], name);
        assert!(response.bytes().await.unwrap().len() < 6_000);
    }
    // What inflates beyond the limit is refused without being held.
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    bomb.write_all(&vec![b' '; BODY_LIMIT * 50]).unwrap();
    let call = server
        .infer("double", bomb.finish().unwrap())
        .header("content-encoding", "gzip");
    assert!(server.error_of(call, 413).await.contains("100000 bytes"));
    let call = server
        .infer("double", "x")
        .header("content-encoding", "gzip");
    assert!(
        server
            .error_of(call, 400)
            .await
            .contains("could not be read")
    );
    let call = server
        .infer("double", "x")
        .header("content-encoding", "zstd");
    assert!(
        server
            .error_of(call, 415)
            .await
            .contains("\"zstd\" is not supported")
    );
}

#[test]
fn an_encoded_body_is_as_much_work_as_it_may_inflate_to() {
    let encoded = |name: &'static str| {
        let value = HeaderValue::from_static(name);
        HeaderMap::from_iter([(header::CONTENT_ENCODING, value)])
    };
    // What a kilobyte of gzip holds is known only when it was read.
    let limit = 64 << 20;
    assert_eq!(work_bytes(&encoded("gzip"), 1_000, limit), limit);
    assert_eq!(work_bytes(&encoded("deflate"), 1_000, limit), limit);
    assert_eq!(work_bytes(&encoded("identity"), 1_000, limit), 1_000);
    assert_eq!(work_bytes(&HeaderMap::new(), 1_000, limit), 1_000);
}

#[tokio::test]
async fn an_id_is_bounded() {
    let server = start().await;
    let mut long = request(1);
    long.id = Some("i".repeat(2_000));
    let body = encode_request(&long, false).unwrap().bytes;
    let error = server.error_of(server.infer("double", body), 400).await;
    assert!(error.contains("2000 bytes, the limit is 1024"), "{error}");
}

#[tokio::test]
async fn every_failure_is_json_with_its_status() {
    let server = start().await;
    let get = |path: &str| server.call(Method::GET, path);
    assert!(
        server
            .error_of(get("/v2/models/nothing"), 404)
            .await
            .contains("unknown model \"nothing\"")
    );
    assert!(
        server
            .error_of(get("/v2/models/double/versions/9"), 404)
            .await
            .contains("serves [\"1\"]")
    );
    assert!(
        server
            .error_of(get("/nowhere"), 404)
            .await
            .contains("nothing is served at /nowhere")
    );
    assert!(
        server
            .error_of(get("/v2/models/%ff"), 404)
            .await
            .contains("nothing is served")
    );
    assert!(
        server
            .error_of(get("/v2/models/double/infer"), 405)
            .await
            .contains("GET is not allowed")
    );
    assert!(
        server
            .error_of(server.call(Method::POST, "/v2"), 405)
            .await
            .contains("POST is not allowed")
    );
    assert!(
        server
            .error_of(get("/v2/models/down/ready"), 503)
            .await
            .contains("no replica runs")
    );
    assert!(
        server
            .error_of(server.infer("nothing", json_body(1)), 404)
            .await
            .contains("unknown model")
    );
    assert!(
        server
            .error_of(server.infer("double", "{"), 400)
            .await
            .contains("malformed inference JSON")
    );
    assert!(
        server
            .error_of(server.infer("double", ""), 400)
            .await
            .contains("malformed")
    );
    assert!(
        server
            .error_of(server.infer("double", vec![b' '; BODY_LIMIT + 1]), 413)
            .await
            .contains("100000")
    );
    let overloaded = server.infer("full", json_body(1)).send().await.unwrap();
    assert_eq!(
        (
            overloaded.status().as_u16(),
            &overloaded.headers()["retry-after"]
        ),
        (503, &"1".parse().unwrap())
    );
    let wrong_name =
        r#"{"inputs": [{"name": "z", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}"#;
    assert!(
        server
            .error_of(server.infer("double", wrong_name), 400)
            .await
            .contains("unexpected input \"z\"")
    );
    let call = server
        .infer("double", json_body(1))
        .header("inference-header-content-length", "x");
    assert!(
        server
            .error_of(call, 400)
            .await
            .contains("Inference-Header-Content-Length \"x\"")
    );
}

#[tokio::test]
async fn nothing_is_answered_without_the_token() {
    let server = start().await;
    for path in ["/v2", "/v2/health/live", "/v2/models/double", "/nowhere"] {
        let call = || server.client.get(format!("{}{path}", server.base));
        let error = server.error_of(call(), 401).await;
        assert!(error.contains("Authorization: Bearer <token>"), "{error}");
        let response = call().bearer_auth("wrong").send().await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
    }
    let call = server
        .client
        .post(format!("{}/v2/models/double/infer", server.base));
    server.error_of(call.body(json_body(1)), 401).await;
}

#[tokio::test]
async fn shutdown_finishes_what_is_in_flight_and_refuses_the_rest() {
    let server = start().await;
    let call = server.infer("slow", json_body(1));
    let in_flight = tokio::spawn(async move { call.send().await.unwrap().status() });
    server.service.slow_started.notified().await;
    server.stop.send(()).unwrap();
    let refused =
        |client: Client, url: String| async move { client.get(url).send().await.is_err() };
    // The listener closes at once; a fresh client opens a new connection each time.
    while !refused(Client::new(), server.base.clone()).await {
        tokio::task::yield_now().await;
    }
    server.service.slow_may_finish.notify_one();
    assert_eq!(in_flight.await.unwrap(), StatusCode::OK);
    assert_eq!(
        server.task.await.unwrap(),
        ServeSummary {
            aborted_connections: 0
        }
    );
}

#[tokio::test]
async fn a_body_that_stalls_ends_its_request() {
    let server = start_with_body_timeout(Duration::from_millis(50)).await;
    let address = server.base.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = "POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n\
                Content-Length: 100\r\n\r\n{\"inputs\"";
    stream.write_all(head.as_bytes()).await.unwrap();
    // The server says why, and gives the connection up.
    let mut answer = String::new();
    let reading = stream.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(30), reading)
        .await
        .expect("the connection is closed")
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("did not arrive within 50 ms"), "{answer}");
}

#[tokio::test]
async fn classes_are_given_where_an_output_asks_for_them() {
    let server = start().await;
    let ask = |output: &str, classes: Value| {
        let mut body: Value = serde_json::from_slice(&json_body(2)).unwrap();
        body["outputs"] = json!([{"name": output, "parameters": {"classification": classes}}]);
        server.infer("double", body.to_string())
    };
    let response = decode(ask("y", json!(1)).send().await.unwrap()).await;
    let best = TensorData::Bytes(vec![b"2.000000:1".to_vec(), b"6.000000:1".to_vec()]);
    assert_eq!(response.outputs[0].data(), &best);
    assert_eq!(response.outputs[0].shape(), [2, 1]);
    // None at all are the values.
    let response = decode(ask("y", json!(0)).send().await.unwrap()).await;
    assert_eq!(response.outputs[0].shape(), [2, 2]);
    let error = server.error_of(ask("text", json!(1)), 400).await;
    assert!(error.contains("BYTES has no classes"), "{error}");
    let error = server.error_of(ask("y", json!("1")), 400).await;
    assert!(error.contains("classification"), "{error}");
}

#[tokio::test]
async fn the_repository_tells_its_states_and_changes_what_may_change() {
    let server = start().await;
    let index = |body: &'static str| server.call(Method::POST, "/v2/repository/index").body(body);
    let ready = json!({"name": "double", "version": "1", "state": "READY"});
    let down = json!({
        "name": "down", "version": "1", "state": "UNAVAILABLE", "reason": "no replica runs",
    });
    for (body, expected) in [
        ("", json!([ready, down])),
        ("{}", json!([ready, down])),
        (r#"{"ready": true}"#, json!([ready])),
    ] {
        let answer = index(body).send().await.unwrap();
        assert_eq!(answer.json::<Value>().await.unwrap(), expected, "{body}");
    }
    let error = server.error_of(index("hello"), 400).await;
    assert!(error.contains("malformed"), "{error}");
    for change in ["load", "unload"] {
        let change = |model: &str| {
            let path = format!("/v2/repository/models/{model}/{change}");
            server.call(Method::POST, &path)
        };
        let changed = change("double").send().await.unwrap();
        assert_eq!(changed.status(), StatusCode::OK);
        let error = server.error_of(change("down"), 400).await;
        assert!(error.contains("ask somebody else"), "{error}");
        server.error_of(change("nobody"), 404).await;
    }
}

#[tokio::test]
async fn an_answer_explains_itself_when_it_is_asked() {
    let server = start().await;
    let plain = server.infer("double", json_body(1)).send().await.unwrap();
    let own = |response: &reqwest::Response| -> Vec<String> {
        let names = response.headers().keys().map(HeaderName::to_string);
        names.filter(|name| name.starts_with("x-mobula-")).collect()
    };
    assert_eq!(own(&plain), Vec::<String>::new());
    let call = server.infer("double", json_body(1));
    let explained = call
        .header("X-Mobula-Explain", "true")
        .send()
        .await
        .unwrap();
    let header = |name: &str| explained.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("x-mobula-version"), "1");
    assert_eq!(header("x-mobula-digest"), "d1");
    assert_eq!(header("x-mobula-signers"), "ann");
    let times = header("x-mobula-times-us");
    let parts: Vec<&str> = times
        .split(", ")
        .map(|part| {
            let (name, microseconds) = part.split_once('=').unwrap();
            microseconds.parse::<u64>().unwrap();
            name
        })
        .collect();
    assert_eq!(
        parts,
        ["queue", "assemble", "hop", "compute", "split", "serialize"]
    );
    // The message itself is the protocol's.
    assert_eq!(
        explained.bytes().await.unwrap(),
        plain.bytes().await.unwrap()
    );
}

#[test]
fn only_a_want_of_room_has_callers_wait_who_ask_again_at_once() {
    let marked = |error: OipError| {
        let marked: Option<AskAgainAfter> = error.into_response().extensions().get().copied();
        marked.map(|AskAgainAfter(pause)| pause.as_millis())
    };
    let full = OipError::Overloaded {
        queued: 256,
        limit: 256,
    };
    assert_eq!(marked(full.clone()), Some(1_000));
    let of_a_graph = OipError::Node {
        graph: "g".to_owned(),
        node: "n".to_owned(),
        error: Box::new(full),
    };
    assert_eq!(marked(of_a_graph), Some(1_000));
    // The text says it more closely than the header's whole seconds.
    let too_fast = OipError::RateLimited {
        per_second: 40,
        retry_after_ms: 25,
    };
    assert_eq!(marked(too_fast), Some(25));
    assert_eq!(marked(OipError::ShuttingDown), None);
    let late = OipError::DeadlineExceeded { limit_ms: 6 };
    assert_eq!(marked(late), None);
}
