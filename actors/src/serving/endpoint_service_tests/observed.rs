//! What the active version's monitor is told while another version is tried.

use super::*;

/// Version 1 active, and version 2 tried with all requests; and what the feeds of both bring.
fn tried(
    candidate: f32,
) -> (
    EndpointService<Always>,
    Arc<Arm<Always>>,
    FeedReader,
    FeedReader,
) {
    let ((active, of_active), (arm, of_candidate)) = (self::arm(1), self::arm(2));
    open(&active, Always(0.1));
    open(&arm, Always(candidate));
    let routes = Routes {
        active,
        tried: Some(Tried {
            arm: Arc::clone(&arm),
            seed: "digits/1/".into(),
            weight_percent: 100,
            trial: Arc::new(Mutex::new(Trial::new(Guardrails::STANDARD, 10, 1, 50))),
        }),
        compared: None,
        shadowed: None,
    };
    (service_of(routes), arm, of_active, of_candidate)
}

/// Whether a feed has brought nothing, its sender being gone.
async fn is_empty(mut reader: FeedReader) -> bool {
    reader.next().await.is_none()
}

#[tokio::test]
async fn what_a_candidate_answers_is_told_to_the_active_versions_monitor_as_its_own() {
    let (service, arm, mut of_active, of_candidate) = tried(0.1);
    let named = InferRequest {
        id: Some("user-1".to_owned()),
        ..request(2, 0.5)
    };
    let answer = service.infer("digits", None, named).await.unwrap();
    assert_eq!(answer.model_version, "2");
    // Also who asks for it by its number.
    let asked = service.infer("digits", Some("2"), request(1, 0.5)).await;
    assert_eq!(asked.unwrap().model_version, "2");
    let asked = service.infer("digits", Some("1"), request(1, 0.5)).await;
    assert_eq!(asked.unwrap().model_version, "1");
    let seen = of_active.next().await.unwrap();
    assert_eq!(seen.versions, [2, 2, 1]);
    let requests: Vec<_> = seen
        .requests
        .iter()
        .map(|request| (request.id.as_deref(), request.rows))
        .collect();
    assert_eq!(requests, [(Some("user-1"), 2), (None, 1), (None, 1)]);
    drop((service, arm));
    assert!(is_empty(of_candidate).await);
}

#[tokio::test]
async fn what_the_active_version_answers_for_a_candidate_is_its_own() {
    let (service, arm, mut of_active, of_candidate) = tried(f32::NAN);
    let answer = service.infer("digits", None, request(1, 0.5)).await;
    assert_eq!(answer.unwrap().model_version, "1");
    let seen = of_active.next().await.unwrap();
    assert_eq!((seen.versions, seen.classes), (vec![1], vec![0]));
    drop((service, arm));
    assert!(is_empty(of_active).await && is_empty(of_candidate).await);
}

#[tokio::test]
async fn answers_to_copies_are_told_to_nobody() {
    let (service, arm, of_active, of_candidate) = tried(0.1);
    let rows = service.signature.rows_of(request(2, 0.5)).unwrap();
    let outputs: Vec<Tensor> = service.answer_copy(&arm, rows).await.unwrap();
    assert_eq!(outputs[0].shape(), [2, 10]);
    drop((service, arm));
    assert!(is_empty(of_active).await && is_empty(of_candidate).await);
}
