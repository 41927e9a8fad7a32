//! One address on every worker for all endpoints: what it answers, whom it refuses, and that it goes on when routers,
//! workers and heads go.

mod graph;
mod link;
mod scripted_router;
mod stage;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use mobula_actors::serving::grpc::proto;
use proto::grpc_inference_service_client::GrpcInferenceServiceClient;
use serde_json::{Value, json};

use self::graph::runs_a_graph;
use super::served::{Answer, FEATURES, Served, integers, output, request_of};
use crate::support::{LIMIT, kill_9, signal, wait_for};

/// A port of this machine that is free, and so is the one after it.
fn free_pair() -> u16 {
    wait_for("two neighbouring free ports", || {
        let first = TcpListener::bind("127.0.0.1:0").ok()?;
        let port = first.local_addr().ok()?.port();
        TcpListener::bind(("127.0.0.1", port.checked_add(1)?)).ok()?;
        Some(port)
    })
}

fn get(served: &Served, url: &str, token: Option<&str>) -> reqwest::Result<Answer> {
    served.send(|http| match token {
        Some(token) => http.get(url).bearer_auth(token),
        None => http.get(url),
    })
}

fn infer_with(served: &Served, url: &str, token: &str, header: Option<(&str, &str)>) -> Answer {
    let request = request_of(served.image(0));
    let answer = served.send(|http| {
        let call = http
            .post(format!("{url}/v2/models/digits/infer"))
            .bearer_auth(token)
            .header("x-mobula-explain", "true")
            .body(request.to_string());
        match header {
            Some((name, value)) => call.header(name, value),
            None => call,
        }
    });
    answer.unwrap()
}

fn classes_of(answer: &Answer) -> Vec<u64> {
    assert_eq!(answer.status, 200, "{}", answer.json());
    integers(&output(&answer.json(), "class")["data"])
}

#[test]
fn every_worker_answers_for_all_endpoints_whatever_goes() {
    let port = free_pair();
    let address = format!("127.0.0.1:{port}");
    let served = Served::up_with(2, &["--ingress", &address]);
    let ingresses = wait_for("both ingresses to run", || {
        let listed = served.cluster.json(&["serve", "ingress"]);
        let ingresses = listed.as_array().unwrap();
        let run = ingresses.iter().filter(|one| one["state"] == "running");
        (run.count() == 2).then(|| listed.clone())
    });
    // They are listed in the order in which the workers joined, which need not be that of their names.
    let mut listed = ingresses.as_array().unwrap().iter();
    let first = listed.find(|one| one["node"] == "worker-1");
    assert_eq!(first.unwrap()["address"], address, "{ingresses}");
    let urls: Vec<String> = [port, port + 1]
        .map(|port| format!("http://127.0.0.1:{port}"))
        .to_vec();
    for url in &urls {
        wait_for("the ingress to be ready", || {
            let ready = get(&served, &format!("{url}/v2/health/ready"), None).ok()?;
            (ready.status == 200).then_some(())
        });
    }

    for url in &urls {
        answers_as_the_router_does(&served, url);
        refuses(&served, url);
    }
    speaks_grpc(&served, port);
    knows_tokens(&served, &urls);
    follows_rules(&served, &urls[0]);
    runs_a_graph(&served, &urls[1]);
    answers_a_file(&served);
    answers_later(&served, &urls);
    outlives_a_router(&served, &urls);
    leaves_in_order(&served, &urls);
    // Nobody tells it anything any more.
    kill_9(served.cluster.pid("head-1"));
    for _ in 0..20 {
        let answer = served.try_infer(&urls[0], &request_of(served.image(0)));
        assert_eq!(answer.unwrap().status, 200);
    }
}

fn answers_as_the_router_does(served: &Served, url: &str) {
    let request = request_of(&served.images[..50 * FEATURES]);
    let own = served.infer(&request);
    let through = served.try_infer(url, &request).unwrap();
    assert_eq!(through.status, 200, "{}", through.json());
    assert_eq!(through.json(), own.json());
    let token = Some(served.token());
    for path in [
        "/v2/models/digits",
        "/v2/models/digits/config",
        "/v2/models/digits/ready",
        "/v2",
    ] {
        let through = get(served, &format!("{url}{path}"), token).unwrap();
        assert_eq!(through.status, 200, "{path}");
        assert_eq!(through.body, served.get(path).body, "{path}");
    }
    let stats = get(served, &format!("{url}/v2/models/digits/stats"), token).unwrap();
    assert_eq!(stats.json()["model_stats"][0]["name"], "digits");
    let index = served.send(|http| {
        http.post(format!("{url}/v2/repository/index"))
            .bearer_auth(served.token())
            .body("{}")
    });
    let index = index.unwrap().json();
    assert_eq!(
        index,
        json!([{"name": "digits", "version": "1", "state": "READY"}])
    );
}

fn refuses(served: &Served, url: &str) {
    let status = |path: &str, token: Option<&str>| {
        get(served, &format!("{url}{path}"), token).unwrap().status
    };
    // A load balancer has no token, and learns one bit.
    assert_eq!(status("/v2/health/live", None), 200);
    for path in ["/v2", "/v2/models/digits", "/v2/models/other", "/metrics"] {
        assert_eq!(status(path, None), 401, "{path}");
        assert_eq!(status(path, Some("wrong")), 401, "{path}");
    }
    let token = Some(served.token());
    assert_eq!(status("/v2/models/other", token), 404);
    assert_eq!(status("/v2/models/digits/versions/7", token), 404);
    let mut narrow = request_of(served.image(0));
    narrow["inputs"][0]["shape"] = json!([1, 63]);
    let refused = served.try_infer(url, &narrow).unwrap();
    assert_eq!(refused.status, 400);
    // More than a full batch of this model can take, though less than of others.
    let large = served.send(|http| {
        http.post(format!("{url}/v2/models/digits/infer"))
            .bearer_auth(served.token())
            .body(vec![b' '; 1 << 20])
    });
    assert_eq!(large.unwrap().status, 413);
}

fn speaks_grpc(served: &Served, port: u16) {
    let values: Vec<u8> = served
        .image(0)
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let request = proto::ModelInferRequest {
        model_name: "digits".to_owned(),
        inputs: vec![proto::model_infer_request::InferInputTensor {
            name: "image".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, FEATURES as i64],
            ..Default::default()
        }],
        raw_input_contents: vec![values.into()],
        ..Default::default()
    };
    let with_token = |token: &str| {
        let mut request = tonic::Request::new(request.clone());
        let value = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", value);
        request
    };
    let (answered, refused) = served.block_on(async {
        let address = format!("http://127.0.0.1:{port}");
        let channel = tonic::transport::Endpoint::from_shared(address).unwrap();
        let mut client = GrpcInferenceServiceClient::new(channel.connect().await.unwrap());
        let answered = client.model_infer(with_token(served.token())).await;
        (answered, client.model_infer(with_token("wrong")).await)
    });
    let answered = answered.unwrap().into_inner();
    assert_eq!(answered.model_version, "1");
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unauthenticated);
}

fn knows_tokens(served: &Served, urls: &[String]) {
    let cluster = &served.cluster;
    let added = cluster.json(&["serve", "tokens", "add", "digits", "ann", "--ttl", "1h"]);
    let token = added["token"].as_str().unwrap();
    let own = served.deployment["url"].as_str().unwrap();
    let doors: Vec<&str> = urls.iter().map(String::as_str).chain([own]).collect();
    for door in &doors {
        wait_for("a new token to be taken", || {
            (infer_with(served, door, token, None).status == 200).then_some(())
        });
    }
    let text = cluster.refused(&["serve", "tokens", "add", "digits", "ann"]);
    assert!(text.contains("tokens revoke digits ann"), "{text}");
    let listed = cluster.json(&["serve", "tokens", "list", "digits"]);
    assert_eq!(listed[0]["name"], "deploy", "{listed}");
    assert_eq!(listed[1]["name"], "ann", "{listed}");
    assert!(!listed.to_string().contains(token), "{listed}");

    let text = cluster.ok(&["serve", "tokens", "revoke", "digits", "ann"]);
    assert_eq!(text, "ann is revoked\n");
    for door in &doors {
        wait_for("a revoked token to be refused", || {
            (infer_with(served, door, token, None).status == 401).then_some(())
        });
        assert_eq!(infer_with(served, door, served.token(), None).status, 200);
    }
    let text = cluster.refused(&["serve", "tokens", "revoke", "digits", "ann"]);
    assert!(text.contains("no token that is called `ann`"), "{text}");

    let limit = [
        "serve",
        "tokens",
        "add",
        "digits",
        "slow",
        "--rate-limit",
        "1",
    ];
    let slow = cluster.json(&limit);
    let slow = slow["token"].as_str().unwrap();
    // Through both ingresses: the limit is the endpoint's.
    let refused = wait_for("a token's limit to hold", || {
        let mut answers = urls.iter().map(|url| infer_with(served, url, slow, None));
        answers.find(|answer| answer.status == 429)
    });
    let text = refused.json()["error"].to_string();
    assert!(
        text.contains("slow") && refused.headers.contains_key("retry-after"),
        "{text}"
    );
}

fn follows_rules(served: &Served, url: &str) {
    let cluster = &served.cluster;
    let rule = [
        "serve",
        "route",
        "set",
        "digits",
        "--header",
        "X-Tier=beta",
        "--version",
        "1",
    ];
    let rules = cluster.json(&rule);
    assert_eq!(rules[0]["answered"], true, "{rules}");
    let rule_of = |tier: &str| {
        let answer = infer_with(served, url, served.token(), Some(("x-tier", tier)));
        assert_eq!(answer.status, 200);
        let rule = answer.headers.get("x-mobula-rule")?;
        Some(rule.to_str().unwrap().to_owned())
    };
    let told = wait_for("the rule to hold", || rule_of("beta"));
    assert_eq!(told, "header x-tier=beta to version 1");
    assert_eq!(rule_of("gold"), None);
    let text = cluster.refused(&[
        "serve",
        "route",
        "set",
        "digits",
        "--header",
        "x-tier=beta",
        "--version",
        "7",
    ]);
    assert!(text.contains("version 7"), "{text}");
    let explained = cluster.json(&["serve", "explain", "digits"]);
    assert_eq!(explained["rules"], rules, "{explained}");
    let left = cluster.json(&[
        "serve",
        "route",
        "remove",
        "digits",
        "--header",
        "x-tier=beta",
    ]);
    assert_eq!(left, json!([]));
    wait_for("the rule to be gone", || {
        rule_of("beta").is_none().then_some(())
    });
}

fn answers_a_file(served: &Served) {
    let dir = served.cluster.dir();
    let (input, out) = (dir.join("in.jsonl"), dir.join("out.jsonl"));
    let mut lines: Vec<String> = (0..50)
        .map(|index| request_of(served.image(index)).to_string())
        .collect();
    lines[7] = "{}".to_owned();
    std::fs::write(&input, lines.join("\n")).unwrap();
    let batch = [
        "serve",
        "batch",
        "digits",
        "--input",
        input.to_str().unwrap(),
        "--output",
        out.to_str().unwrap(),
    ];
    let mut run = served.cluster.start(&batch);
    wait_for("the first rows to be answered", || {
        let text = std::fs::read_to_string(&out).unwrap_or_default();
        (text.lines().count() > 3).then_some(())
    });
    // It may be through already; then the next run finds nothing to do.
    let _ = run.kill();
    run.wait().unwrap();
    let done = served.cluster.json(&batch);
    assert_eq!(done["rows"], 50, "{done}");
    assert!(done["answered_before"].as_u64().unwrap() > 0, "{done}");
    let text = std::fs::read_to_string(&out).unwrap();
    for (row, line) in text.lines().enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["row"], row, "{line}");
        if row == 7 {
            assert_eq!(line["status"], 400, "{line}");
        } else {
            let classes = integers(&output(&line, "class")["data"]);
            assert_eq!(classes, served.classify(served.image(row)), "row {row}");
        }
    }
    let mut other = batch;
    other[2] = "none";
    let text = served.cluster.refused(&other);
    assert!(
        text.contains("no endpoint is called `none`") && text.contains("--url"),
        "{text}"
    );
}

fn answers_later(served: &Served, urls: &[String]) {
    let mut request = request_of(served.image(3));
    request["id"] = json!("later");
    let accepted = served.send(|http| {
        http.post(format!("{}/v2/models/digits/infer", urls[0]))
            .bearer_auth(served.token())
            .header("Prefer", "respond-async")
            .body(request.to_string())
    });
    let accepted = accepted.unwrap();
    assert_eq!(accepted.status, 202, "{}", accepted.json());
    assert_eq!(accepted.json()["state"], "pending");
    let location = accepted.headers["location"].to_str().unwrap();
    // By whichever door.
    let url = format!("{}{location}", urls[1]);
    let token = Some(served.token());
    let answer = wait_for("the answer", || {
        let answer = get(served, &url, token).unwrap();
        assert!([200, 202].contains(&answer.status), "{}", answer.status);
        (answer.status == 200).then_some(answer)
    });
    assert_eq!(answer.json(), served.infer(&request).json());
    assert_eq!(get(served, &url, token).unwrap().status, 200);
    assert_eq!(get(served, &url, None).unwrap().status, 401);
    let unknown = format!("{}/v2/models/digits/requests/none", urls[1]);
    assert_eq!(get(served, &unknown, token).unwrap().status, 404);
    // What is wrong is said at once.
    request["inputs"][0]["name"] = json!("picture");
    let refused = served.send(|http| {
        http.post(format!("{}/v2/models/digits/infer", urls[0]))
            .bearer_auth(served.token())
            .header("Prefer", "respond-async")
            .body(request.to_string())
    });
    assert_eq!(refused.unwrap().status, 400);
}

fn outlives_a_router(served: &Served, urls: &[String]) {
    let expected = classes_of(&infer_with(served, &urls[0], served.token(), None));
    let router = served.actors("serving/digits/router").pop().unwrap();
    kill_9(u32::try_from(router["pid"].as_u64().unwrap()).unwrap());
    for url in urls {
        let answer = wait_for("the next router to be asked", || {
            let answer = infer_with(served, url, served.token(), None);
            // It is waited for; on a busy machine not long enough.
            assert!([200, 503].contains(&answer.status), "{}", answer.status);
            (answer.status == 200).then_some(answer)
        });
        assert_eq!(classes_of(&answer), expected);
    }
}

/// A request of which a door has taken the head, and the end is still to come.
struct Begun {
    stream: TcpStream,
    rest: Vec<u8>,
}

impl Begun {
    fn at(served: &Served, url: &str) -> Self {
        let address = url.strip_prefix("http://").unwrap();
        let mut body = request_of(served.image(0)).to_string().into_bytes();
        let head = format!(
            "POST /v2/models/digits/infer HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\
             Expect: 100-continue\r\n\r\n",
            served.token(),
            body.len()
        );
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        // The door says so when it waits for the body.
        let expected = b"HTTP/1.1 100 Continue\r\n\r\n";
        let mut said = [0; 25];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, expected, "{}", String::from_utf8_lossy(&said));
        let rest = body.split_off(body.len() / 2);
        stream.write_all(&body).unwrap();
        Begun { stream, rest }
    }

    /// Sends the rest; all that is answered, until the door closes the connection.
    fn finish(mut self) -> String {
        self.stream.write_all(&self.rest).unwrap();
        let mut answer = String::new();
        self.stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

fn leaves_in_order(served: &Served, urls: &[String]) {
    let [stays, leaves] = urls else {
        panic!("there are two")
    };
    let begun = Begun::at(served, leaves);
    signal(served.cluster.pid("worker-2"), libc::SIGTERM);
    let mut said = None;
    wait_for("the ingress to close its door", || {
        // Whoever asks the other one notices nothing.
        let answer = infer_with(served, stays, served.token(), None);
        assert_eq!(answer.status, 200, "{}", answer.json());
        match get(served, &format!("{leaves}/v2/health/ready"), None) {
            Ok(answer) => {
                if answer.status == 503 && said.is_none() {
                    said = Some(answer.json());
                    // It goes on answering for seconds.
                    let answer = infer_with(served, leaves, served.token(), None);
                    assert_eq!(answer.status, 200, "{}", answer.json());
                }
                None
            }
            Err(_) => Some(()),
        }
    });
    let said: Value = said.expect("it says that it leaves before it does");
    assert!(said.to_string().contains("this worker leaves"), "{said}");
    // Nobody is let in any more, and what it has it finishes.
    let answer = begun.finish();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains("\"class\""), "{answer}");
}
