use super::super::feed::{FeedReader, feed};
use super::super::fleet::BackendFailure;
use super::super::replica::Inference;
use super::*;
use mobula_core::id::Incarnation;

const FEATURES: usize = 64;
const CLASSES: usize = 10;

/// Always answers that it is a three.
#[derive(Clone)]
struct Three;

impl Backend for Three {
    async fn infer(&self, rows: Vec<f32>) -> Result<Inference, BackendFailure> {
        let count = rows.len() / FEATURES;
        let row: Vec<f32> = (0..CLASSES)
            .map(|class| f32::from(u8::from(class == 3)))
            .collect();
        Ok(Inference {
            probabilities: row.repeat(count),
            classes: vec![3; count],
            computed_ns: 1,
        })
    }
}

fn service() -> (EndpointService<Three>, FeedReader, Arc<Fleet<Three>>) {
    let endpoint = Endpoint {
        name: "digits".into(),
        model: "digits-mlp".into(),
        version: 4,
        digest: "a".repeat(64),
        size_bytes: 1,
        replicas: 1,
        token_hash: [0; 32],
        deployed_ms: 0,
        http_address: None,
        router_incarnation: Incarnation(0),
        deleting: false,
    };
    let fleet = Arc::new(Fleet::new(1));
    let (feed, reader) = feed();
    (
        EndpointService::new(&endpoint, (FEATURES, CLASSES), Arc::clone(&fleet), feed),
        reader,
        fleet,
    )
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
    let (service, mut reader, fleet) = service();
    assert_eq!(service.server_ready().await.unwrap_err().status(), 503);
    assert_eq!(
        service
            .model_ready("digits", None)
            .await
            .unwrap_err()
            .status(),
        503
    );
    fleet.berths().next().unwrap().1.open(Three);
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
    let (version, statistics) = service.model_statistics("digits", None).await.unwrap();
    assert_eq!((version.as_str(), statistics.inference_count()), ("4", 2));
    assert_eq!(statistics.execution_count(), 1);
}

#[tokio::test]
async fn what_is_not_served_or_no_number_is_refused() {
    let (service, _reader, fleet) = service();
    fleet.berths().next().unwrap().1.open(Three);
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
