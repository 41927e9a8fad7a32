//! Sentinels of a candidate: the known rows of its version, which each of its replicas is asked before a step is passed, and
//! again and again while the rollout is open.
//!
//! They find what no guardrail does: a candidate that answers in time and with numbers, and other than it did when it was
//! registered, as one does that computes on a machine or a device that is broken.
//!
//! Invariants:
//! 1. A step is passed only when every replica of the candidate that takes requests has answered as it should at this step.
//! 2. One answer that is another rolls the candidate back, at every look until the head has heard of it. No answer is no
//!    wrong one: the replica is asked again.
//! 3. Replicas are asked past their queues: a sentinel is no request, neither to the step's trial, the statistics and the
//!    autoscaler nor to a monitor and its log.
//! 4. A version without sentinels is neither asked nor held, and that is said.
//! 5. A look never waits: answers are waited for beside it, one round at a time.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::looking::{self, Seen};
use super::plan::Rollout;
use super::trial::{EVIDENCE_TEXT_BYTES_MAX, Evidence, Judgement, shortened};
use crate::drift::vitals::sentinels::{
    Mismatch, SENTINEL_INTERVAL, SENTINEL_PAUSE, SENTINEL_TIMEOUT, Sentinels,
};
use crate::serving::arm::Routes;
use crate::serving::fleet::{Backend, Berth};
use crate::serving::replica::classes_of;

/// What is said of a candidate that cannot be asked.
const NONE: &str = "; its version has no sentinels to be asked";

/// A replica's number, and which of its starts it is.
type Start = (u32, u64);

/// Asks the replicas of a candidate at one step of its rollout.
pub(in crate::serving) struct Asking {
    /// The rollout and its step.
    at: Option<(u64, u32)>,
    sentinels: Arc<Sentinels>,
    /// The questions of the round that is under way, each with its replica and the classes that it answered, if it did; aborted
    /// when dropped.
    round: JoinSet<(Start, Option<Vec<u32>>)>,
    /// Whether one of them was not answered.
    has_gap: bool,
    /// Replicas that have answered as they should at this step, and take requests.
    right: BTreeSet<Start>,
    wrong: Option<Mismatch>,
    /// No round begins before.
    rests_until: Instant,
    /// When a round begins though all are known to be right.
    due: Instant,
}

impl Asking {
    /// Asks nobody yet.
    pub(in crate::serving) fn new() -> Self {
        Self::of(None, Arc::default())
    }

    fn of(at: Option<(u64, u32)>, sentinels: Arc<Sentinels>) -> Self {
        let now = Instant::now();
        Asking {
            at,
            sentinels,
            round: JoinSet::new(),
            has_gap: false,
            right: BTreeSet::new(),
            wrong: None,
            rests_until: now,
            due: now,
        }
    }

    /// Asks by the step that a rollout is at, whose candidate has these sentinels. Each step begins anew.
    pub(in crate::serving) fn at(&mut self, rollout: &Rollout, sentinels: Arc<Sentinels>) {
        let at = Some((rollout.number, rollout.step));
        if self.at != at {
            *self = Self::of(at, sentinels);
        }
    }

    /// A look at the step, as [`looking::look`] has it, and at what the candidate has answered to its sentinels.
    pub(in crate::serving) fn look<B: Backend>(
        &mut self,
        routes: &Routes<B>,
        rollout: &Rollout,
    ) -> Option<Seen> {
        let seen = looking::look(routes, rollout)?;
        if self.sentinels.count() == 0 {
            return Some(noted(seen));
        }
        let open = open_replicas(routes);
        self.hear();
        self.right
            .retain(|start| open.iter().any(|(known, _)| known == start));
        if let Some(wrong) = &self.wrong {
            let reason = format!(
                "wrong about a row whose answer is known: {wrong}, as its version's file says (tolerance: none, it has to \
                 be the same class)"
            );
            let evidence = Evidence {
                reason: shortened(&reason),
                ..evidence_of(seen)
            };
            return Some(Seen::Judged(Judgement::RollBack(evidence)));
        }
        let (right, asked) = (self.right.len(), open.len());
        self.ask(open);
        Some(match seen {
            Seen::Judged(Judgement::Pass(evidence)) if asked == 0 || right < asked => {
                let reason = format!(
                    "{right} of {asked} replicas have answered the candidate's sentinels; {}",
                    evidence.reason
                );
                Seen::Waits(Evidence {
                    reason: shortened(&reason),
                    ..evidence
                })
            }
            seen => seen,
        })
    }

    /// Takes what was answered by now.
    fn hear(&mut self) {
        let was_under_way = !self.round.is_empty();
        while let Some(ended) = self.round.try_join_next() {
            match ended {
                Ok((start, Some(classes))) => match self.sentinels.mismatch(start.0, &classes) {
                    Some(wrong) => {
                        self.wrong.get_or_insert(wrong);
                    }
                    None => {
                        self.right.insert(start);
                    }
                },
                Ok(((replica, _), None)) => {
                    tracing::debug!(
                        replica,
                        "a candidate's replica did not answer the sentinels"
                    );
                    self.has_gap = true;
                }
                Err(error) => {
                    tracing::error!(%error, "a candidate's replica was not asked; it is asked again");
                    self.has_gap = true;
                }
            }
        }
        if was_under_way && self.round.is_empty() {
            let now = Instant::now();
            let has_gap = std::mem::take(&mut self.has_gap);
            (self.rests_until, self.due) = if has_gap {
                (now + SENTINEL_PAUSE, now + SENTINEL_PAUSE)
            } else {
                (now, now + SENTINEL_INTERVAL)
            };
        }
    }

    /// Begins a round with all replicas that take requests, if it is time for one, or one of them has not answered at this
    /// step.
    fn ask<B: Backend>(&mut self, open: Vec<(Start, B)>) {
        let now = Instant::now();
        let has_new = open.iter().any(|(start, _)| !self.right.contains(start));
        if !self.round.is_empty() || now < self.rests_until || now < self.due && !has_new {
            return;
        }
        for (start, replica) in open {
            let rows = self.sentinels.batch();
            self.round.spawn(async move {
                let asked = replica.infer_within(rows, SENTINEL_TIMEOUT);
                let answer = timeout(SENTINEL_TIMEOUT, asked).await.ok();
                let answer = answer.and_then(Result::ok);
                // Another answer than a classifier's is none to a sentinel, and wrong.
                let classes = answer.map(|answer| classes_of(&answer.outputs).unwrap_or_default());
                (start, classes)
            });
        }
    }
}

/// The replicas of the candidate that take requests.
fn open_replicas<B: Backend>(routes: &Routes<B>) -> Vec<(Start, B)> {
    let shadowed = routes.shadowed.as_ref().map(|shadowed| &shadowed.arm);
    let tried = routes.tried.as_ref().map(|tried| &tried.arm);
    let Some(arm) = shadowed.or(tried) else {
        return Vec::new();
    };
    let berths = arm.fleet().berths();
    let open = |(number, berth): (u32, Arc<Berth<B>>)| {
        let (opened, replica) = berth.opened()?;
        Some(((number, opened), replica))
    };
    berths.filter_map(open).collect()
}

/// The same, where it says that the candidate was not asked.
fn noted(seen: Seen) -> Seen {
    let note = |evidence: Evidence| {
        let room = EVIDENCE_TEXT_BYTES_MAX - NONE.len();
        let end = evidence.reason.floor_char_boundary(room);
        Evidence {
            reason: format!("{}{NONE}", &evidence.reason[..end]),
            ..evidence
        }
    };
    match seen {
        Seen::Judged(Judgement::Pass(evidence)) => Seen::Judged(Judgement::Pass(note(evidence))),
        Seen::Judged(Judgement::Hold(evidence)) => Seen::Judged(Judgement::Hold(note(evidence))),
        seen => seen,
    }
}

fn evidence_of(seen: Seen) -> Evidence {
    match seen {
        Seen::Waits(evidence)
        | Seen::Judged(
            Judgement::Pass(evidence) | Judgement::Hold(evidence) | Judgement::RollBack(evidence),
        ) => evidence,
    }
}

#[cfg(test)]
#[path = "sentinels_tests.rs"]
mod tests;
