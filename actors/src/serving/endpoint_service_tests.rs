use std::sync::Mutex;
use std::time::Duration;

use tokio::task::JoinSet;

use super::super::access::rules::{Matcher, Rule};
use super::super::access::state::Token;
use super::super::arm::{Origin, Tried};
use super::super::feed::{FeedReader, feed};
use super::super::fleet::{BackendFailure, Fleet};
use super::super::oip::{Datatype, Tensor, TensorData, TensorMetadata};
use super::super::replica::{Inference, classified};
use super::super::rollout::Guardrails;
use super::super::rollout::trial::Trial;
use super::super::rows::{Batch, Cell};
use super::super::shadow::mirror::mirror;
use super::super::signature::INPUT;
use super::super::statistics::FailureReason;
use super::*;

const FEATURES: usize = 64;
const CLASSES: usize = 10;

/// Always answers that it is a three.
#[derive(Clone)]
struct Three;

impl Backend for Three {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        let count = rows.rows.unwrap() as usize;
        let row: Vec<f32> = (0..CLASSES)
            .map(|class| f32::from(u8::from(class == 3)))
            .collect();
        Ok(Inference {
            outputs: classified(row.repeat(count), vec![3; count]),
            computed_ns: 1,
            memory_percent: None,
            energies: (1..=count).map(|row| -(row as f32)).collect(),
        })
    }
}

/// An arm of one replica that takes no requests yet.
fn arm<B: Backend>(version: u64) -> (Arc<Arm<B>>, FeedReader) {
    let (feed, reader) = feed();
    let (_, origin) = watch::channel(Origin {
        digest: Some("d1".to_owned()),
        signers: vec!["alice".to_owned()],
    });
    let (arm, _) = Arm::new(version, origin, Fleet::new(1), feed, JoinSet::new());
    (Arc::new(arm), reader)
}

fn open<B: Backend>(arm: &Arm<B>, backend: B) {
    arm.fleet().berths().next().unwrap().1.open(backend);
}

fn service_of<B: Backend>(routes: Routes<B>) -> EndpointService<B> {
    let (_, receiver) = watch::channel(Arc::new(routes));
    let labels = (0..CLASSES).map(|class| format!("digit {class}")).collect();
    let signature = Signature::classifier(FEATURES, CLASSES, labels);
    EndpointService::new("digits", signature, receiver, mirror().0)
}

fn service() -> (EndpointService<Three>, FeedReader, Arc<Arm<Three>>) {
    let (active, reader) = arm(4);
    let routes = Routes {
        active: Arc::clone(&active),
        tried: None,
        compared: None,
        shadowed: None,
    };
    (service_of(routes), reader, active)
}

fn request(rows: u64, value: f32) -> InferRequest {
    let data = vec![value; rows as usize * FEATURES];
    let input = Tensor::new(INPUT, vec![rows, FEATURES as u64], TensorData::Fp32(data)).unwrap();
    InferRequest {
        inputs: vec![input],
        ..InferRequest::default()
    }
}

#[tokio::test]
async fn answers_carry_name_and_version_and_reach_the_monitor() {
    let (service, mut reader, active) = service();
    assert_eq!(service.server_ready().await.unwrap_err().status(), 503);
    assert_eq!(
        service
            .model_ready("digits", None)
            .await
            .unwrap_err()
            .status(),
        503
    );
    open(&active, Three);
    service.model_ready("digits", Some("4")).await.unwrap();
    let response = service
        .infer("digits", None, request(2, 0.5))
        .await
        .unwrap();
    assert_eq!(
        (
            response.model_name.as_str(),
            response.model_version.as_str()
        ),
        ("digits", "4")
    );
    assert_eq!(response.outputs[0].shape(), [2, 10]);
    assert_eq!(response.outputs[1].data(), &TensorData::Int64(vec![3, 3]));
    let seen = reader.next().await.unwrap();
    assert_eq!((seen.rows, seen.classes), (vec![0.5; 128], vec![3, 3]));
    // The energies are for the monitor, and no output.
    assert_eq!(seen.energies, [Some(-1.0), Some(-2.0)]);
    assert_eq!(response.outputs.len(), 2);
    let (version, statistics) = service.model_statistics("digits", None).await.unwrap();
    assert_eq!((version.as_str(), statistics.inference_count()), ("4", 2));
    assert_eq!(statistics.execution_count(), 1);
}

#[tokio::test]
async fn what_is_not_served_or_no_number_is_refused() {
    let (service, _reader, active) = service();
    open(&active, Three);
    let error = service
        .infer("faces", None, request(1, 0.0))
        .await
        .unwrap_err();
    assert_eq!(error.status(), 404);
    let error = service
        .infer("digits", Some("9"), request(1, 0.0))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("it serves [\"4\"]"), "{error}");
    let error = service
        .infer("digits", None, request(1, f32::NAN))
        .await
        .unwrap_err();
    assert_eq!(error.status(), 400);
    assert!(error.to_string().contains("NaN"), "{error}");
}

/// Answers with this probability for every class.
#[derive(Clone)]
struct Always(f32);

impl Backend for Always {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        let count = rows.rows.unwrap() as usize;
        Ok(Inference {
            outputs: classified(vec![self.0; count * CLASSES], vec![0; count]),
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

#[tokio::test]
async fn the_monitor_is_told_of_rows_whose_logits_nobody_saw_as_well() {
    let (active, mut reader) = arm(1);
    open(&active, Always(0.1));
    let service = service_of(Routes {
        active,
        tried: None,
        compared: None,
        shadowed: None,
    });
    service
        .infer("digits", None, request(2, 0.5))
        .await
        .unwrap();
    let seen = reader.next().await.unwrap();
    assert_eq!(
        (seen.confidences, seen.energies),
        (vec![0.1; 2], vec![None; 2])
    );
}

#[tokio::test]
async fn an_answer_names_its_origin_and_the_index_its_versions() {
    let (service, _reader, active) = service();
    let state = async || {
        let index = service.repository_index(&Caller::default()).await.unwrap();
        assert_eq!(index.len(), 1);
        (
            index[0].version.clone(),
            index[0].state,
            !index[0].reason.is_empty(),
        )
    };
    assert_eq!(
        state().await,
        ("4".to_owned(), ModelState::Unavailable, true)
    );
    open(&active, Three);
    assert_eq!(state().await, ("4".to_owned(), ModelState::Ready, false));
    let mut asked = request(1, 0.5);
    asked.explain = true;
    let answer = service.infer("digits", None, asked).await.unwrap();
    let explanation = answer.explanation.unwrap();
    assert_eq!(explanation.digest.as_deref(), Some("d1"));
    assert_eq!(explanation.signers, ["alice"]);
    let plain = service.infer("digits", None, request(1, 0.5)).await;
    assert_eq!(plain.unwrap().explanation, None);
    for (model, change, command) in [
        (
            "digits",
            RepositoryChange::Load,
            "mobula rollout start digits",
        ),
        ("faces", RepositoryChange::Load, "mobula serve deploy faces"),
        (
            "digits",
            RepositoryChange::Unload,
            "mobula serve delete digits",
        ),
    ] {
        let refused = service.change_repository(model, change).await.unwrap_err();
        assert_eq!(refused.status(), 400);
        assert!(refused.to_string().contains(command), "{refused}");
    }
    let metadata = service.model_metadata("digits", None).await.unwrap();
    assert_eq!(metadata.outputs[0].labels[3], "digit 3");
}

/// Answers with its first input, turned round, and the second one's first element; and how many rows it was asked at once.
#[derive(Clone)]
struct Swapping;

impl Backend for Swapping {
    async fn infer(&self, mut batch: Batch) -> Result<Inference, BackendFailure> {
        batch.cells.swap(0, 1);
        Ok(Inference {
            outputs: batch,
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

#[tokio::test]
async fn tensors_of_any_kind_and_number_go_there_and_back() {
    let tensor = |name: &str, datatype, shape: &[i64]| TensorMetadata {
        name: name.to_owned(),
        datatype,
        shape: shape.to_vec(),
        labels: Vec::new(),
    };
    for max_batch_size in [8, 0] {
        let (active, mut reader) = arm(4);
        let routes = Routes {
            active: Arc::clone(&active),
            tried: None,
            compared: None,
            shadowed: None,
        };
        let (_, receiver) = watch::channel(Arc::new(routes));
        let (text, number) = (
            tensor("text", Datatype::Bytes, &[-1, 1]),
            tensor("number", Datatype::Fp16, &[-1, 2]),
        );
        let signature = Signature {
            platform: "swapping".into(),
            max_batch_size,
            inputs: vec![text.clone(), number.clone()],
            outputs: vec![number, text],
            is_classifier: false,
            is_finite: false,
        };
        let service = EndpointService::new("swap", signature, receiver, mirror().0);
        open(&active, Swapping);
        let number = TensorData::Fp16(vec![1, 2, 3, 0x7e00]);
        let text = TensorData::Bytes(vec![b"one".to_vec(), b"two".to_vec()]);
        // In another order than the model's.
        let request = InferRequest {
            inputs: vec![
                Tensor::new("number", vec![2, 2], number.clone()).unwrap(),
                Tensor::new("text", vec![2, 1], text.clone()).unwrap(),
            ],
            ..InferRequest::default()
        };
        let answer = service.infer("swap", None, request).await.unwrap();
        let outputs: Vec<(&str, &[u64], &TensorData)> = answer
            .outputs
            .iter()
            .map(|tensor| (tensor.name(), tensor.shape(), tensor.data()))
            .collect();
        let expected: [(&str, &[u64], &TensorData); 2] =
            [("number", &[2, 2], &number), ("text", &[2, 1], &text)];
        assert_eq!(outputs, expected, "{max_batch_size}");
        // No monitor can make anything of that.
        assert_eq!(reader.take_dropped(), 0);
        drop((service, active));
        assert_eq!(reader.next().await, None);
    }
}

/// A service that answers with version 4 and tries 5, as its callers' access says.
fn service_with(access: Access) -> (EndpointService<Three>, [FeedReader; 2]) {
    let ((active, reader), (candidate, other)) = (arm(4), arm(5));
    open(&active, Three);
    open(&candidate, Three);
    let tried = Tried {
        arm: candidate,
        seed: "s".to_owned(),
        weight_percent: 0,
        trial: Arc::new(Mutex::new(Trial::new(Guardrails::STANDARD, 10, 1, 50))),
    };
    let routes = Routes {
        active,
        tried: Some(tried),
        compared: None,
        shadowed: None,
    };
    let (_, access) = watch::channel(Arc::new(access));
    (service_of(routes).with_access(access), [reader, other])
}

#[tokio::test]
async fn a_rule_sends_a_request_to_its_version_before_weights() {
    let rule = |value: &str, version| Rule {
        matcher: Matcher::header("x-tier", value),
        version,
    };
    let access = Access {
        rules: vec![rule("beta", 9), rule("beta", 5)],
        ..Access::default()
    };
    let (service, _readers) = service_with(access);
    assert_eq!(service.routing_headers("digits"), ["x-tier"]);
    let mut asked = InferRequest {
        explain: true,
        ..request(1, 0.5)
    };
    let response = service.infer("digits", None, asked.clone()).await.unwrap();
    assert_eq!(response.model_version, "4");
    assert_eq!(response.explanation.unwrap().rule, None);

    asked.headers.insert("x-tier".to_owned(), "beta".to_owned());
    let response = service.infer("digits", None, asked.clone()).await.unwrap();
    // Version 9 is not in service, so the next rule decides.
    assert_eq!(response.model_version, "5");
    let rule = response.explanation.unwrap().rule;
    assert_eq!(rule.as_deref(), Some("header x-tier=beta to version 5"));
    let response = service.infer("digits", Some("4"), asked).await.unwrap();
    assert_eq!(response.model_version, "4");
}

#[tokio::test]
async fn a_token_with_a_limit_is_refused_above_it_and_others_are_not() {
    let token = |name: &str, per_second| Token {
        name: name.to_owned(),
        hash: [0; 32],
        created_ms: 0,
        expires_ms: None,
        per_second,
    };
    let access = Access {
        tokens: vec![token("slow", Some(1)), token("fast", None)],
        ..Access::default()
    };
    let (service, _readers) = service_with(access);
    let asked = |token: &str| InferRequest {
        token: Some(token.to_owned()),
        ..request(1, 0.5)
    };
    service.infer("digits", None, asked("slow")).await.unwrap();
    let refused = service.infer("digits", None, asked("slow")).await;
    assert!(matches!(
        refused,
        Err(OipError::TokenRateLimited { per_second: 1, .. })
    ));
    for _ in 0..3 {
        service.infer("digits", None, asked("fast")).await.unwrap();
    }
}

#[tokio::test]
async fn an_answer_that_does_not_fit_is_an_error() {
    /// One row too few, whatever it is asked.
    #[derive(Clone)]
    struct Short;
    impl Backend for Short {
        async fn infer(&self, _: Batch) -> Result<Inference, BackendFailure> {
            let cell = Cell {
                shape: vec![2, 1],
                data: TensorData::Fp32(vec![1.0; 2]),
            };
            let outputs = Batch {
                rows: Some(3),
                cells: vec![cell],
            };
            Ok(Inference {
                outputs,
                computed_ns: 1,
                memory_percent: None,
                energies: Vec::new(),
            })
        }
    }
    let (active, _reader) = arm(4);
    let routes = Routes {
        active: Arc::clone(&active),
        tried: None,
        compared: None,
        shadowed: None,
    };
    let service = service_of(routes);
    open(&active, Short);
    let error = service
        .infer("digits", None, request(3, 0.5))
        .await
        .unwrap_err();
    assert_eq!(error.status(), 500);
    assert!(error.to_string().contains("asked were 3 rows"), "{error}");
}

#[tokio::test]
async fn a_caller_that_goes_away_is_counted_as_such() {
    /// Never answers.
    #[derive(Clone)]
    struct Hangs;
    impl Backend for Hangs {
        async fn infer(&self, _rows: Batch) -> Result<Inference, BackendFailure> {
            std::future::pending().await
        }
    }
    let (active, _reader) = arm(4);
    open(&active, Hangs);
    let routes = Routes {
        active: Arc::clone(&active),
        tried: None,
        compared: None,
        shadowed: None,
    };
    let service = service_of(routes);
    let asking = service.infer("digits", None, request(1, 0.5));
    let gone = tokio::time::timeout(Duration::from_millis(10), asking).await;
    assert!(gone.is_err());
    let statistics = active.statistics();
    assert_eq!(statistics.failures_for(FailureReason::Canceled), 1);
    assert_eq!(statistics.failure_count(), 1);
}

#[path = "endpoint_service_tests/known_answers.rs"]
mod known_answers;

#[path = "endpoint_service_tests/observed.rs"]
mod observed;

#[path = "endpoint_service_tests/times.rs"]
mod times;

#[path = "endpoint_service_tests/trials.rs"]
mod trials;
