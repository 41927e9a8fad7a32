//! Two versions that answer: which of them does, in what time, and what is counted of it.

use tokio::time::Instant;

use super::*;
use crate::serving::about::TIMEOUT;
use crate::serving::arm::lock;
use crate::serving::oip::Parameter;
use crate::serving::rollout::trial::{Evidence, Judgement};

/// Version 1 active, and version 2 tried with half of the requests.
pub(super) fn tried(
    candidate: f32,
) -> (EndpointService<Always>, Arc<Mutex<Trial>>, Arc<Arm<Always>>) {
    tried_with(Always(0.1), Always(candidate))
}

fn tried_with<B: Backend>(
    active_backend: B,
    candidate: B,
) -> (EndpointService<B>, Arc<Mutex<Trial>>, Arc<Arm<B>>) {
    let ((active, _), (arm, _)) = (self::arm(1), self::arm(2));
    open(&active, active_backend);
    open(&arm, candidate);
    let trial = Arc::new(Mutex::new(Trial::new(Guardrails::STANDARD, 10, 1, 50)));
    let routes = Routes {
        active,
        tried: Some(Tried {
            arm: Arc::clone(&arm),
            seed: "digits/1/".into(),
            weight_percent: 50,
            trial: Arc::clone(&trial),
        }),
        compared: None,
        shadowed: None,
    };
    (service_of(routes), trial, arm)
}

async fn version_of(service: &EndpointService<Always>, key: &str) -> String {
    let request = InferRequest {
        routing_key: Some(key.to_owned()),
        ..request(1, 0.5)
    };
    let response = service.infer("digits", None, request).await;
    response.unwrap().model_version
}

#[tokio::test]
async fn a_key_always_meets_the_same_version_and_both_sides_are_counted() {
    let (service, trial, _) = tried(0.1);
    let mut versions = std::collections::BTreeMap::new();
    for user in 0..60 {
        let key = format!("user-{user}");
        let version = version_of(&service, &key).await;
        assert_eq!(version_of(&service, &key).await, version);
        *versions.entry(version).or_insert(0u64) += 2;
    }
    assert_eq!(versions.len(), 2, "{versions:?}");
    let (Judgement::Pass(evidence) | Judgement::Hold(evidence) | Judgement::RollBack(evidence)) =
        lock(&trial).judge();
    assert_eq!(evidence.candidate.requests, versions["2"]);
    assert_eq!(evidence.baseline.requests, versions["1"]);
    // Who asks for a version gets it, and is no sample.
    for version in ["1", "2"] {
        let asked = service
            .infer("digits", Some(version), request(1, 0.5))
            .await;
        assert_eq!(asked.unwrap().model_version, version);
    }
    let metadata = service.model_metadata("digits", None).await.unwrap();
    assert_eq!(metadata.versions, ["1", "2"]);
}

#[tokio::test]
async fn what_a_candidate_answers_with_no_number_counts_and_reaches_nobody() {
    let (service, trial, arm) = tried(f32::NAN);
    for user in 0..60 {
        assert_eq!(version_of(&service, &format!("user-{user}")).await, "1");
    }
    let Judgement::RollBack(evidence) = lock(&trial).judge() else {
        panic!("half of sixty requests failed")
    };
    assert_eq!(evidence.candidate.errors, evidence.candidate.requests);
    assert_eq!(evidence.baseline.errors, 0);
    let last = &evidence.candidate.last_error;
    assert!(last.contains("version 2 answered NaN at index 0"), "{last}");
    assert_eq!(arm.statistics().failure_count(), evidence.candidate.errors);
    let error = service
        .infer("digits", Some("2"), request(1, 0.5))
        .await
        .unwrap_err();
    assert_eq!(error.status(), 500);
}

#[tokio::test]
async fn a_candidate_without_replicas_gets_nothing_and_nothing_is_counted() {
    let (service, trial, arm) = tried(0.1);
    arm.fleet().berths().next().unwrap().1.close();
    for user in 0..20 {
        assert_eq!(version_of(&service, &format!("user-{user}")).await, "1");
    }
    let Judgement::Hold(evidence) = lock(&trial).judge() else {
        panic!("nothing was tried")
    };
    assert_eq!(
        (evidence.candidate.requests, evidence.baseline.requests),
        (0, 0)
    );
}

/// Answers after so long, or never.
#[derive(Clone)]
struct After(Option<Duration>);

impl Backend for After {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        match self.0 {
            Some(wait) => tokio::time::sleep(wait).await,
            None => std::future::pending().await,
        }
        Three.infer(rows).await
    }
}

/// A request of this user that allows 400 ms.
fn limited(user: u32) -> InferRequest {
    let mut limited = InferRequest {
        routing_key: Some(format!("user-{user}")),
        ..request(1, 0.5)
    };
    let limit = Parameter::Int(400_000);
    limited.parameters.insert(TIMEOUT.to_owned(), limit);
    limited
}

fn evidence_of(trial: &Mutex<Trial>) -> Evidence {
    let (Judgement::Pass(evidence) | Judgement::Hold(evidence) | Judgement::RollBack(evidence)) =
        lock(trial).judge();
    evidence
}

#[tokio::test(start_paused = true)]
async fn the_active_version_answers_within_what_a_candidate_leaves_of_the_time() {
    let (service, trial, _) = tried_with(After(Some(Duration::ZERO)), After(None));
    for user in 0..40 {
        let began = Instant::now();
        let answer = service.infer("digits", None, limited(user)).await.unwrap();
        assert_eq!(answer.model_version, "1");
        assert!(began.elapsed() < Duration::from_millis(400));
    }
    let evidence = evidence_of(&trial);
    assert!(evidence.candidate.requests > 0);
    assert_eq!(evidence.candidate.errors, evidence.candidate.requests);
    assert_eq!(evidence.baseline.errors, 0);

    let (service, _, _) = tried_with(After(None), After(None));
    for user in 0..40 {
        let began = Instant::now();
        let error = service
            .infer("digits", None, limited(user))
            .await
            .unwrap_err();
        // The time of the whole request, whichever of the two was asked first.
        assert_eq!(error, OipError::DeadlineExceeded { limit_ms: 400 });
        let took = began.elapsed();
        assert!(took < Duration::from_millis(450), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn versions_that_are_compared_are_held_to_the_same_time() {
    let slow = || After(Some(Duration::from_millis(300)));
    let (service, trial, _) = tried_with(slow(), slow());
    let mut answered = 0;
    for user in 0..40 {
        let answer = service.infer("digits", None, limited(user)).await;
        answered += u64::from(answer.is_ok());
    }
    let evidence = evidence_of(&trial);
    for side in [&evidence.candidate, &evidence.baseline] {
        assert!(side.requests > 0);
        assert_eq!(side.errors, side.requests, "{side:?}");
    }
    // The callers of the active version have their answers all the same.
    assert!(answered >= evidence.baseline.requests);
    let said = &evidence.baseline.last_error;
    assert!(
        said.contains("more than half of the request's 400 ms"),
        "{said}"
    );
}

#[tokio::test(start_paused = true)]
async fn versions_are_judged_by_what_they_take_and_not_by_where_they_run() {
    for (way_ms, counted_us) in [(1, 1), (4, 3_000)] {
        // The model takes no time: it is all on the way.
        let way = After(Some(Duration::from_millis(way_ms)));
        let (service, trial, _) = tried_with(After(Some(Duration::ZERO)), way);
        for user in 0..40 {
            let asked = limited(user);
            service.infer("digits", None, asked).await.unwrap();
        }
        let Evidence {
            candidate,
            baseline,
            ..
        } = evidence_of(&trial);
        assert!(candidate.requests > 0 && baseline.requests > 0);
        let counted = (candidate.latency_mean_us, baseline.latency_mean_us);
        assert_eq!(counted, (counted_us, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn callers_who_go_away_speak_against_the_version_that_they_waited_for() {
    let (service, trial, _) = tried_with(After(None), After(None));
    let go_away_after = async |wait: u64, user: u32| {
        let asked = InferRequest {
            routing_key: Some(format!("user-{user}")),
            ..request(1, 0.5)
        };
        let asking = service.infer("digits", None, asked);
        let gone = tokio::time::timeout(Duration::from_millis(wait), asking).await;
        assert!(gone.is_err());
    };
    for user in 0..40 {
        go_away_after(50, user).await;
    }
    let evidence = evidence_of(&trial);
    assert_eq!(
        (evidence.candidate.requests, evidence.baseline.requests),
        (0, 0)
    );
    for user in 0..40 {
        go_away_after(150, user).await;
    }
    let evidence = evidence_of(&trial);
    for side in [&evidence.candidate, &evidence.baseline] {
        assert!(side.requests > 0);
        assert_eq!(side.errors, side.requests, "{side:?}");
        let said = &side.last_error;
        assert!(said.starts_with("the caller went away after 15"), "{said}");
    }
}
