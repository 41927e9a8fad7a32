use tokio::sync::Barrier;

use super::super::metadata::tests::model;
use super::*;
use crate::serving::oip::{Datatype, TensorData};

/// Endpoints that add their number to each value; `b` answers only together with `c`, `broken` fails, `slow` has to be waited
/// for.
struct Adders {
    both: Barrier,
    asked: Mutex<Vec<String>>,
    /// Whether each was asked to explain itself.
    explained: Mutex<Vec<bool>>,
    /// What each request to them allows.
    limits: Mutex<Vec<Option<Duration>>>,
    /// How long `slow` takes.
    takes: Duration,
}

impl Adders {
    fn new() -> Self {
        Adders::taking(Duration::ZERO)
    }

    fn taking(takes: Duration) -> Self {
        Adders {
            both: Barrier::new(2),
            asked: Mutex::default(),
            explained: Mutex::default(),
            limits: Mutex::default(),
            takes,
        }
    }
}

/// Where the version of `known` comes from.
fn origin() -> Explanation {
    Explanation {
        digest: Some("d1".to_owned()),
        signers: vec!["ann".to_owned(), "bob".to_owned()],
        ..Explanation::default()
    }
}

fn added(endpoint: &str) -> f32 {
    match endpoint {
        "a" => 1.0,
        "b" => 10.0,
        _ => 100.0,
    }
}

impl Endpoints for Adders {
    fn metadata<'a>(&'a self, endpoint: &'a str) -> ServiceFuture<'a, Arc<ModelMetadata>> {
        Box::pin(async move {
            if endpoint == "gone" {
                return Err(OipError::UnknownModel {
                    model: endpoint.to_owned(),
                });
            }
            let tensors = |name| [(name, Datatype::Fp32, &[-1, 1][..])];
            Ok(model(endpoint, &tensors("x"), &tensors("y")).1)
        })
    }

    fn infer<'a>(
        &'a self,
        endpoint: &'a str,
        request: InferRequest,
    ) -> ServiceFuture<'a, InferResponse> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(endpoint.to_owned());
            self.explained.lock().unwrap().push(request.explain);
            if endpoint == "b" || endpoint == "c" {
                self.both.wait().await;
            }
            if endpoint == "broken" {
                let reason = "no model".to_owned();
                return Err(OipError::Failed { reason });
            }
            let limit = time_limit(&request).unwrap();
            self.limits.lock().unwrap().push(limit);
            if endpoint == "slow" {
                tokio::time::sleep(self.takes).await;
            }
            let x = request.input("x").expect("it is called x here");
            let TensorData::Fp32(values) = x.data() else {
                panic!("it is FP32 everywhere")
            };
            let sums = values.iter().map(|value| value + added(endpoint)).collect();
            let y = Tensor::new("y", x.shape().to_vec(), TensorData::Fp32(sums)).unwrap();
            Ok(InferResponse {
                model_version: "7".to_owned(),
                outputs: vec![y],
                explanation: (request.explain && endpoint == "known").then(origin),
                ..InferResponse::default()
            })
        })
    }
}

fn request(value: f32) -> InferRequest {
    let x = Tensor::new("data", vec![1, 1], TensorData::Fp32(vec![value])).unwrap();
    InferRequest {
        inputs: vec![x],
        parameters: [(TIMEOUT.to_owned(), Parameter::Int(7_000_000))].into(),
        explain: true,
        ..InferRequest::default()
    }
}

fn graph(text: &str) -> GraphModel {
    GraphModel::new("g", GraphSpec::from_toml(text).unwrap())
}

fn outputs(response: &InferResponse) -> Vec<(&str, f32)> {
    let value = |tensor: &Tensor| match tensor.data() {
        TensorData::Fp32(values) => values[0],
        _ => panic!("it is FP32 everywhere"),
    };
    let outputs = response.outputs.iter();
    outputs
        .map(|tensor| (tensor.name(), value(tensor)))
        .collect()
}

/// `a`, then `b` and `c` at once.
const FORK: &str = r#"
[outputs]
left = "l.y"
right = "r.y"
[[nodes]]
name = "l"
endpoint = "b"
inputs = { x = "top.y" }
[[nodes]]
name = "r"
endpoint = "c"
inputs = { x = "top.y" }
[[nodes]]
name = "top"
endpoint = "a"
inputs = { x = "request.data" }
"#;

#[tokio::test(start_paused = true)]
async fn branches_answer_at_once_and_are_joined() {
    let (graph, adders) = (graph(FORK), Adders::new());
    let metadata = graph.metadata(&adders).await.unwrap();
    assert_eq!(metadata.inputs[0].name, "data");
    let response = graph.infer(&adders, request(0.5)).await.unwrap();
    assert_eq!(outputs(&response), [("left", 11.5), ("right", 101.5)]);
    let nodes = response.explanation.unwrap().nodes.join(", ");
    assert_eq!(nodes, "top=0 (version 7), l=0 (version 7), r=0 (version 7)");
    assert_eq!(graph.statistics().inference_count(), 1);
}

const CASCADE: &str = r#"
[outputs]
y = ["second.y", "first.y"]
extra = "third.y"
[[nodes]]
name = "first"
endpoint = "a"
inputs = { x = "request.data" }
[[nodes]]
name = "second"
endpoint = "d"
inputs = { x = "first.y" }
when = { output = "first.y", is = "above", value = 5 }
[[nodes]]
name = "third"
endpoint = "e"
inputs = { x = "second.y" }
when = { parameter = "tier", is = "equal", value = "gold" }
"#;

#[tokio::test]
async fn a_condition_skips_a_node_and_what_needs_it() {
    let (graph, adders) = (graph(CASCADE), Adders::new());
    let response = graph.infer(&adders, request(1.0)).await.unwrap();
    assert_eq!(outputs(&response), [("y", 2.0)]);
    let nodes = response.explanation.unwrap().nodes;
    assert_eq!(nodes[1..], ["second=skipped", "third=skipped"]);

    let response = graph.infer(&adders, request(9.0)).await.unwrap();
    assert_eq!(outputs(&response), [("y", 110.0)]);

    let mut gold = request(9.0);
    let tier = Parameter::String("gold".to_owned());
    gold.parameters.insert("tier".to_owned(), tier);
    let response = graph.infer(&adders, gold).await.unwrap();
    assert_eq!(outputs(&response), [("extra", 210.0), ("y", 110.0)]);

    // Asked for, but its node has nothing to work on.
    let mut gold = request(1.0);
    let tier = Parameter::String("gold".to_owned());
    gold.parameters.insert("tier".to_owned(), tier);
    let response = graph.infer(&adders, gold).await.unwrap();
    assert_eq!(outputs(&response), [("y", 2.0)]);
    assert_eq!(adders.asked.lock().unwrap().len(), 1 + 2 + 3 + 1);
}

#[tokio::test]
async fn errors_name_the_node_and_end_the_request() {
    let adders = Adders::new();
    let broken = graph(&FORK.replace("endpoint = \"c\"", "endpoint = \"broken\""));
    // The other branch would wait for ever.
    let error = broken.infer(&adders, request(0.0)).await.unwrap_err();
    assert_eq!(error.status(), 500);
    assert_eq!(
        error.to_string(),
        "graph \"g\", node \"r\": inference failed: no model"
    );
    assert_eq!(broken.statistics().failures_for(FailureReason::Backend), 1);
    let gone = graph(&FORK.replace("endpoint = \"c\"", "endpoint = \"gone\""));
    let error = gone.metadata(&adders).await.unwrap_err();
    assert_eq!(error.status(), 503, "{error}");
    assert!(error.to_string().contains("node \"r\""), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_explanation_names_what_each_node_answered_with() {
    let text = CASCADE.replace("endpoint = \"a\"", "endpoint = \"known\"");
    let (graph, adders) = (graph(&text), Adders::new());
    let response = graph.infer(&adders, request(1.0)).await.unwrap();
    assert_eq!(
        response.explanation.unwrap().nodes,
        [
            "first=0 (version 7; digest d1; signed by ann and bob)",
            // It does not say.
            "second=0 (version 7)",
            "third=skipped",
        ]
    );
    // Endpoints are not asked for what nobody wants to know.
    let unasked = InferRequest {
        explain: false,
        ..request(1.0)
    };
    let response = graph.infer(&adders, unasked).await.unwrap();
    assert_eq!(response.explanation, None);
    assert_eq!(
        *adders.explained.lock().unwrap(),
        [true, true, false, false]
    );
}

/// So many nodes of which each waits for the one before.
fn chain(nodes: usize) -> GraphModel {
    let mut text = format!("[outputs]\ny = \"n{nodes}.y\"\n");
    for number in 1..=nodes {
        let source = match number {
            1 => "request.data".to_owned(),
            _ => format!("n{}.y", number - 1),
        };
        text += &format!(
            "[[nodes]]\nname = \"n{number}\"\nendpoint = \"slow\"\ninputs = {{ x = \"{source}\" }}\n"
        );
    }
    graph(&text)
}

fn seconds(limits: &Mutex<Vec<Option<Duration>>>) -> Vec<Option<u64>> {
    let limits = limits.lock().unwrap();
    let seconds = limits.iter().map(|limit| Some((*limit)?.as_secs()));
    seconds.collect()
}

#[tokio::test(start_paused = true)]
async fn each_node_has_what_those_before_it_left_of_the_time() {
    let adders = Adders::taking(Duration::from_secs(2));
    // A millisecond is how exact the clock is.
    let mut request = request(0.0);
    let limit = Parameter::Int(7_900_000);
    request.parameters.insert(TIMEOUT.to_owned(), limit);
    let began = Instant::now();
    let response = chain(3).infer(&adders, request.clone()).await.unwrap();
    assert_eq!(outputs(&response), [("y", 300.0)]);
    assert_eq!(seconds(&adders.limits), [Some(7), Some(5), Some(3)]);
    assert_eq!(began.elapsed().as_secs(), 6);

    let graph = chain(6);
    let began = Instant::now();
    let error = graph.infer(&adders, request).await.unwrap_err();
    assert_eq!(began.elapsed().as_secs(), 7);
    assert_eq!(error.status(), 504);
    let late = OipError::NodesLate {
        graph: "g".to_owned(),
        nodes: ["n4", "n5", "n6"].map(str::to_owned).to_vec(),
        limit_ms: 7_900,
    };
    assert_eq!(error, late);
    let canceled = graph.statistics().failures_for(FailureReason::Canceled);
    assert_eq!(canceled, 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_limit_ends_all_the_same() {
    // Just within what an endpoint may take by itself, and there are eight of them.
    let adders = Adders::taking(Duration::from_millis(4_900));
    let mut request = request(0.0);
    request.parameters.clear();
    let began = Instant::now();
    let error = chain(8).infer(&adders, request.clone()).await.unwrap_err();
    assert_eq!(began.elapsed().as_secs(), 35);
    assert_eq!(error.status(), 504);
    let text = error.to_string();
    assert!(
        text.contains("no answer from nodes [\"n8\"] within 35000 ms"),
        "{text}"
    );
    // What wakes is not cut short: the nodes themselves have no limit.
    assert_eq!(seconds(&adders.limits), [None; 8]);
    let response = chain(7).infer(&adders, request).await.unwrap();
    assert_eq!(outputs(&response), [("y", 700.0)]);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_says_that_the_time_is_over_is_named_with_the_requests_limit() {
    /// Had what was left of the time, and says so.
    struct Late;
    impl Endpoints for Late {
        fn metadata<'a>(&'a self, _endpoint: &'a str) -> ServiceFuture<'a, Arc<ModelMetadata>> {
            unreachable!("nobody asks for it")
        }

        fn infer<'a>(
            &'a self,
            _endpoint: &'a str,
            request: InferRequest,
        ) -> ServiceFuture<'a, InferResponse> {
            let limit = time_limit(&request).unwrap().unwrap();
            let limit_ms = limit.as_millis() as u64 - 1;
            Box::pin(async move { Err(OipError::DeadlineExceeded { limit_ms }) })
        }
    }
    let error = chain(2).infer(&Late, request(0.0)).await.unwrap_err();
    let late = OipError::NodesLate {
        graph: "g".to_owned(),
        nodes: ["n1", "n2"].map(str::to_owned).to_vec(),
        limit_ms: 7_000,
    };
    assert_eq!(error, late);
}
