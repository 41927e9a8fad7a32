use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::*;
use crate::serving::arm::{Origin, Tried};
use crate::serving::feed::feed;
use crate::serving::fleet::{BackendFailure, Fleet};
use crate::serving::replica::Inference;
use crate::serving::rollout::plan::tests::begun;
use crate::serving::rollout::plan::{Guardrails, Strategy};
use crate::serving::rollout::split::Side;
use crate::serving::rollout::trial::{Outcome, Trial};
use crate::serving::rows::Batch;
use crate::serving::shadow::mirror::Shadowed;
use crate::serving::shadow::trial::{Copied, ShadowTrial};
use crate::serving::shadow::{self, Rule};

/// A replica that nobody asks.
#[derive(Clone)]
struct Idle;

impl Backend for Idle {
    async fn infer(&self, _rows: Batch) -> Result<Inference, BackendFailure> {
        std::future::pending().await
    }
}

const TOOK: Duration = Duration::from_millis(2);

/// A version of two replicas, of which so many answer.
fn arm(version: u64, answering: usize) -> Arc<Arm<Idle>> {
    let (feed, _) = feed();
    let (_, origin) = watch::channel(Origin::default());
    let (arm, _) = Arm::new(version, origin, Fleet::new(2), feed, JoinSet::new());
    for (_, berth) in arm.fleet().berths().take(answering) {
        berth.open(Idle);
    }
    Arc::new(arm)
}

fn routes() -> Routes<Idle> {
    Routes {
        active: arm(1, 2),
        tried: None,
        compared: None,
        shadowed: None,
    }
}

/// The candidate gets this share of the requests, and both sides had so many of them.
fn tried(answering: usize, weight_percent: u32, requests: usize) -> Routes<Idle> {
    let mut trial = Trial::new(Guardrails::STANDARD, 10, 1, 50);
    for side in [Side::Candidate, Side::Baseline] {
        (0..requests).for_each(|_| trial.record(side, Outcome::Answered(TOOK)));
    }
    let tried = Tried {
        arm: arm(2, answering),
        seed: "digits/1/".into(),
        weight_percent,
        trial: Arc::new(Mutex::new(trial)),
    };
    Routes {
        tried: Some(tried),
        ..routes()
    }
}

/// The candidate had copies of so many requests.
fn shadowed(answering: usize, copies: usize) -> Routes<Idle> {
    let plan = shadow::Plan {
        percent: 100,
        samples: 20,
        mismatch_max_bp: 100,
        rule: Rule::Ulps(0),
        outputs: Vec::new(),
    };
    let rollout = begun(Strategy::Canary, &[0, 100]);
    let mut trial = ShadowTrial::new(plan.clone(), &rollout);
    (0..copies).for_each(|_| trial.record(TOOK, Copied::Same(TOOK)));
    let shadowed = Shadowed {
        arm: arm(2, answering),
        seed: rollout.seed(),
        plan: Arc::new(plan),
        trial: Arc::new(Mutex::new(trial)),
    };
    Routes {
        shadowed: Some(shadowed),
        ..routes()
    }
}

/// What is seen in a word, and why.
fn seen(routes: &Routes<Idle>) -> (&'static str, String) {
    let rollout = begun(Strategy::Canary, &[0, 100]);
    match look(routes, &rollout).unwrap() {
        Seen::Waits(evidence) => ("waits", evidence.reason),
        Seen::Judged(Judgement::Pass(evidence)) => ("pass", evidence.reason),
        Seen::Judged(Judgement::Hold(evidence)) => ("hold", evidence.reason),
        Seen::Judged(Judgement::RollBack(evidence)) => ("roll back", evidence.reason),
    }
}

#[tokio::test]
async fn a_step_waits_where_the_candidate_lacks_replicas_and_says_so() {
    let rollout = begun(Strategy::Canary, &[0, 100]);
    assert!(look(&routes(), &rollout).is_none());
    for (routes, what, why) in [
        (tried(0, 0, 0), "waits", "0 of 2 replicas answer"),
        (tried(1, 0, 0), "waits", "1 of 2 replicas answer"),
        (tried(2, 0, 0), "pass", "2 of 2 replicas answer"),
        (
            tried(0, 5, 3),
            "waits",
            "no replica of the candidate answers; 3 of 10 requests",
        ),
        // Requests are waited for as long as it takes, and one replica can answer them.
        (tried(1, 5, 3), "hold", "3 of 10 requests"),
        (tried(0, 5, 10), "pass", "10 requests within the guardrails"),
        (
            shadowed(0, 3),
            "waits",
            "no replica of the candidate answers; 3 of 20 comparisons",
        ),
        (shadowed(1, 3), "hold", "3 of 20 comparisons"),
        (shadowed(1, 20), "waits", "1 of 2 replicas answer"),
        (
            shadowed(2, 20),
            "pass",
            "as a shadow, within the guardrails",
        ),
    ] {
        let (found, reason) = seen(&routes);
        assert_eq!(found, what, "{reason}");
        assert!(reason.starts_with(why), "{reason}");
    }
}
