//! Steps of a rollout as a router's tests have them, and what is seen of one in a word.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::looking::Seen;
use super::plan::tests::begun;
use super::split::Side;
use super::trial::{Evidence, Judgement, Outcome, Trial};
use super::{Guardrails, Strategy};
use crate::serving::arm::{Arm, Origin, Routes, Tried};
use crate::serving::feed::feed;
use crate::serving::fleet::{Backend, Fleet};
use crate::serving::shadow::mirror::Shadowed;
use crate::serving::shadow::trial::{Copied, ShadowTrial};
use crate::serving::shadow::{self, Rule};

/// How long every answer took.
const TOOK: Duration = Duration::from_millis(2);

/// A version of two replicas, of which these take requests.
pub(in crate::serving) fn arm<B: Backend>(version: u64, replicas: Vec<B>) -> Arc<Arm<B>> {
    let (feed, _) = feed();
    let (_, origin) = watch::channel(Origin::default());
    let (arm, _) = Arm::new(version, origin, Fleet::new(2), feed, JoinSet::new());
    for ((_, berth), replica) in arm.fleet().berths().zip(replicas) {
        berth.open(replica);
    }
    Arc::new(arm)
}

/// Nothing is tried beside version 1.
pub(in crate::serving) fn routes<B: Backend>() -> Routes<B> {
    Routes {
        active: arm(1, Vec::new()),
        tried: None,
        compared: None,
        shadowed: None,
    }
}

/// The candidate gets this share of the requests, and both sides had so many of the ten that the step takes.
pub(super) fn tried<B: Backend>(
    candidate: Arc<Arm<B>>,
    weight_percent: u32,
    requests: usize,
) -> Routes<B> {
    let mut trial = Trial::new(Guardrails::STANDARD, 10, 1, 50);
    for side in [Side::Candidate, Side::Baseline] {
        (0..requests).for_each(|_| trial.record(side, Outcome::Answered(TOOK)));
    }
    let tried = Tried {
        arm: candidate,
        seed: "digits/1/".into(),
        weight_percent,
        trial: Arc::new(Mutex::new(trial)),
    };
    Routes {
        tried: Some(tried),
        ..routes()
    }
}

/// The candidate had copies of so many requests of the twenty that a shadow takes, and answered them as the callers were.
pub(super) fn shadowed<B: Backend>(candidate: Arc<Arm<B>>, copies: usize) -> Routes<B> {
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
        arm: candidate,
        seed: rollout.seed(),
        plan: Arc::new(plan),
        trial: Arc::new(Mutex::new(trial)),
    };
    Routes {
        shadowed: Some(shadowed),
        ..routes()
    }
}

/// What is seen in a word, and the numbers.
pub(super) fn in_a_word(seen: Seen) -> (&'static str, Evidence) {
    match seen {
        Seen::Waits(evidence) => ("waits", evidence),
        Seen::Judged(Judgement::Pass(evidence)) => ("pass", evidence),
        Seen::Judged(Judgement::Hold(evidence)) => ("hold", evidence),
        Seen::Judged(Judgement::RollBack(evidence)) => ("roll back", evidence),
    }
}
