use tokio::sync::Barrier;

use super::super::metadata::tests::model;
use super::*;
use crate::serving::oip::{Datatype, TensorData};

/// Endpoints that add their number to each value; `b` answers only together with `c`, `broken` fails.
struct Adders {
    both: Barrier,
    asked: Mutex<Vec<String>>,
}

impl Adders {
    fn new() -> Self {
        Adders {
            both: Barrier::new(2),
            asked: Mutex::default(),
        }
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
            if endpoint == "b" || endpoint == "c" {
                self.both.wait().await;
            }
            if endpoint == "broken" {
                let reason = "no model".to_owned();
                return Err(OipError::Failed { reason });
            }
            let limit = time_limit(&request).unwrap();
            assert!(limit.is_none_or(|limit| limit <= Duration::from_secs(7)));
            let x = request.input("x").expect("it is called x here");
            let TensorData::Fp32(values) = x.data() else {
                panic!("it is FP32 everywhere")
            };
            let sums = values.iter().map(|value| value + added(endpoint)).collect();
            let y = Tensor::new("y", x.shape().to_vec(), TensorData::Fp32(sums)).unwrap();
            Ok(InferResponse {
                model_version: "7".to_owned(),
                outputs: vec![y],
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
