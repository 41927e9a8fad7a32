use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::super::Rule;
use super::*;
use crate::serving::arm::{Origin, Routes};
use crate::serving::feed::feed;
use crate::serving::fleet::{BackendFailure, Fleet};
use crate::serving::http::InferenceService;
use crate::serving::oip::{InferRequest, TensorData};
use crate::serving::replica::{Inference, classified};
use crate::serving::rollout::plan::Strategy;
use crate::serving::rollout::plan::tests::begun;
use crate::serving::rollout::trial::{Evidence, Judgement};
use crate::serving::rows::Batch;
use crate::serving::signature::{INPUT, Signature};

const FEATURES: usize = 2;
const CLASSES: usize = 2;

/// What a replica does.
#[derive(Clone)]
enum Replica {
    /// It answers with this probability for the first class.
    Answers(f32),
    /// It answers when it is permitted to.
    Waits(Arc<Semaphore>),
}

impl Backend for Replica {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        let count = rows.rows.unwrap() as usize;
        let probability = match self {
            Replica::Answers(probability) => *probability,
            Replica::Waits(permits) => {
                permits.acquire().await.unwrap().forget();
                0.75
            }
        };
        let probabilities = [probability, 1.0 - probability].repeat(count);
        let classes = vec![u32::from(probability < 0.5); count];
        Ok(Inference {
            outputs: classified(probabilities, classes),
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

fn arm(version: u64, replica: Replica) -> Arc<Arm<Replica>> {
    let (feed, _) = feed();
    let (_, origin) = watch::channel(Origin::default());
    let (arm, _) = Arm::new(version, origin, Fleet::new(1), feed, JoinSet::new());
    arm.fleet().berths().next().unwrap().1.open(replica);
    Arc::new(arm)
}

/// An endpoint whose candidate is shadowed.
struct Shadowing {
    service: Arc<EndpointService<Replica>>,
    trial: Arc<Mutex<ShadowTrial>>,
    candidate: Arc<Arm<Replica>>,
    _comparing: JoinSet<()>,
}

fn shadowing(candidate: Replica) -> Shadowing {
    let plan = Plan {
        percent: 100,
        samples: 20,
        mismatch_max_bp: 0,
        rule: Rule::Close {
            absolute: 1e-6,
            relative: 0.0,
        },
        outputs: Vec::new(),
    };
    let rollout = begun(Strategy::Canary, &[0, 100]);
    let trial = Arc::new(Mutex::new(ShadowTrial::new(plan.clone(), &rollout)));
    let candidate = arm(2, candidate);
    let routes = Routes {
        active: arm(1, Replica::Answers(0.75)),
        tried: None,
        compared: None,
        shadowed: Some(Shadowed {
            arm: Arc::clone(&candidate),
            seed: rollout.seed(),
            plan: Arc::new(plan),
            trial: Arc::clone(&trial),
        }),
    };
    let labels = vec!["no".into(), "yes".into()];
    let signature = Signature::classifier(FEATURES, CLASSES, labels);
    let (_, receiver) = watch::channel(Arc::new(routes));
    let (mirror, copies) = mirror();
    let service = Arc::new(EndpointService::new("digits", signature, receiver, mirror));
    let mut comparing = JoinSet::new();
    comparing.spawn(compare_copies(Arc::clone(&service), copies));
    Shadowing {
        service,
        trial,
        candidate,
        _comparing: comparing,
    }
}

impl Shadowing {
    /// Asks so often; always the active version answers.
    async fn ask(&self, count: usize) {
        for _ in 0..count {
            let data = TensorData::Fp32(vec![0.5; FEATURES]);
            let input = Tensor::new(INPUT, vec![1, FEATURES as u64], data).unwrap();
            let request = InferRequest {
                inputs: vec![input],
                ..InferRequest::default()
            };
            let answer = self.service.infer("digits", None, request).await.unwrap();
            assert_eq!(answer.model_version, "1");
        }
    }

    /// Waits until the trial comes to something that `is_it` wants.
    async fn until(&self, is_it: impl Fn(&Judgement) -> bool) -> Judgement {
        let found = async {
            loop {
                let judgement = lock(&self.trial).judge();
                if is_it(&judgement) {
                    return judgement;
                }
                tokio::task::yield_now().await;
            }
        };
        let limit = Duration::from_secs(30);
        tokio::time::timeout(limit, found)
            .await
            .unwrap_or_else(|_| {
                panic!("{:?}", lock(&self.trial).judge());
            })
    }
}

fn evidence(judgement: Judgement) -> Evidence {
    match judgement {
        Judgement::Pass(evidence) | Judgement::Hold(evidence) | Judgement::RollBack(evidence) => {
            evidence
        }
    }
}

#[tokio::test]
async fn equal_answers_pass_and_callers_see_only_the_active_version() {
    let shadowing = shadowing(Replica::Answers(0.75));
    shadowing.ask(30).await;
    let passed = shadowing
        .until(|found| matches!(found, Judgement::Pass(_)))
        .await;
    assert!(evidence(passed).candidate.requests >= 20);
    let refused = shadowing
        .service
        .model_metadata("digits", Some("2"))
        .await
        .unwrap_err();
    assert_eq!(refused.status(), 404);
}

#[tokio::test]
async fn other_answers_and_numbers_that_are_none_are_found() {
    for (probability, expected) in [
        (0.5, "\"probabilities\" at index 0 is 0.5 instead of 0.75"),
        (f32::NAN, "too many failures"),
    ] {
        let shadowing = shadowing(Replica::Answers(probability));
        shadowing.ask(30).await;
        let found = shadowing
            .until(|found| matches!(found, Judgement::RollBack(_)))
            .await;
        let evidence = evidence(found);
        assert!(evidence.reason.contains(expected), "{evidence:?}");
    }
}

#[tokio::test]
async fn a_candidate_that_hangs_sheds_copies_and_delays_nobody() {
    let permits = Arc::new(Semaphore::new(0));
    let shadowing = shadowing(Replica::Waits(Arc::clone(&permits)));
    let count = WAITING_MAX + AT_ONCE_MAX + 50;
    // None of these is answered by the candidate, and all of them are.
    shadowing.ask(count).await;
    let held = shadowing
        .until(|found| matches!(found, Judgement::Hold(_)))
        .await;
    let reason = evidence(held).reason;
    assert!(
        reason.contains("copies were shed") && !reason.contains(" 0 copies"),
        "{reason}"
    );
    permits.add_permits(count);
    let passed = shadowing
        .until(|found| matches!(found, Judgement::Pass(_)))
        .await;
    assert_eq!(evidence(passed).candidate.errors, 0);
}

#[tokio::test]
async fn without_a_replica_of_the_candidate_nothing_is_copied() {
    let shadowing = shadowing(Replica::Answers(0.75));
    shadowing
        .candidate
        .fleet()
        .berths()
        .next()
        .unwrap()
        .1
        .close();
    shadowing.ask(30).await;
    let held = evidence(lock(&shadowing.trial).judge());
    assert_eq!(
        held.reason,
        "0 of 20 comparisons: 0 of 0 answers differ, 0 copies were shed"
    );
}
