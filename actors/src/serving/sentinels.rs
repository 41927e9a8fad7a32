//! Sentinels of a version beside the active one: the known rows of that version, which each of its replicas is asked, at once and
//! again and again.
//!
//! They find what no guardrail does: a version that answers in time and with numbers, and other than it did when it was
//! registered, as one does that computes on a machine or a device that is broken. What follows is said where they are asked for:
//! `rollout::sentinels` for a candidate, `experiment::sentinels` for a treatment.
//!
//! Invariants:
//! 1. Each start of each replica that takes requests is asked, and asked again by the clock.
//! 2. A wrong answer is known until another version is asked, or the same one for another reason. No answer is no wrong one: the
//!    replica is asked again.
//! 3. Replicas are asked past their queues: a sentinel is no request, neither to what counts requests nor to the autoscaler nor
//!    to a monitor and its log.
//! 4. A look never waits: answers are waited for beside it, one round at a time.

#[cfg(test)]
pub(super) mod fixture;

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::arm::Arm;
use super::fleet::{Backend, Berth};
use super::replica::classes_of;
use super::rollout::trial::{EVIDENCE_TEXT_BYTES_MAX, shortened};
use crate::drift::vitals::sentinels::{
    Mismatch, SENTINEL_INTERVAL, SENTINEL_PAUSE, SENTINEL_TIMEOUT, Sentinels,
};

/// What is said of a version that cannot be asked.
pub(super) const NONE: &str = "; its version has no sentinels to be asked";

/// A replica's number, and which of its starts it is.
type Start = (u32, u64);

/// Asks the replicas of a version; `K` is what for.
pub(super) struct Asker<K> {
    /// What the version is asked for.
    at: Option<K>,
    sentinels: Arc<Sentinels>,
    /// The questions of the round that is under way, each with its replica and the classes that it answered, if it did; aborted
    /// when dropped.
    round: JoinSet<(Start, Option<Vec<u32>>)>,
    /// Whether one of them was not answered.
    has_gap: bool,
    /// Replicas that have answered as they should, and take requests.
    right: BTreeSet<Start>,
    wrong: Option<Mismatch>,
    /// No round begins before.
    rests_until: Instant,
    /// When a round begins though all are known to be right.
    due: Instant,
}

/// What is known of the replicas that take requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answers {
    /// How many there are.
    pub(super) open: usize,
    /// How many of them have answered as they should.
    pub(super) right: usize,
    /// The first answer that was another; of a replica that may be gone since.
    pub(super) wrong: Option<Mismatch>,
}

impl<K: PartialEq> Asker<K> {
    /// Asks nobody yet.
    pub(super) fn new() -> Self {
        Self::of(None, Arc::default())
    }

    fn of(at: Option<K>, sentinels: Arc<Sentinels>) -> Self {
        let now = Instant::now();
        Asker {
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

    /// Asks for this from now on, a version that has these sentinels. What is asked for something else begins anew.
    pub(super) fn at(&mut self, at: K, sentinels: Arc<Sentinels>) {
        let at = Some(at);
        if self.at != at {
            *self = Self::of(at, sentinels);
        }
    }

    /// Whether the version is known to have nothing that it could be asked.
    pub(super) fn has_none(&self) -> bool {
        self.at.is_some() && self.sentinels.count() == 0
    }

    /// What the replicas of the version have answered by now. Another round begins if it is time for one.
    pub(super) fn look<B: Backend>(&mut self, arm: Option<&Arm<B>>) -> Answers {
        let open = arm.map(open_replicas).unwrap_or_default();
        self.hear();
        self.right
            .retain(|start| open.iter().any(|(known, _)| known == start));
        let answers = Answers {
            open: open.len(),
            right: self.right.len(),
            wrong: self.wrong,
        };
        if answers.wrong.is_none() {
            self.ask(open);
        }
        answers
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
                    tracing::debug!(replica, "a replica did not answer its version's sentinels");
                    self.has_gap = true;
                }
                Err(error) => {
                    tracing::error!(%error, "a replica was not asked its version's sentinels; it is asked again");
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

    /// Begins a round with all replicas that take requests, if it is time for one, or one of them has not answered yet.
    fn ask<B: Backend>(&mut self, open: Vec<(Start, B)>) {
        if self.sentinels.count() == 0 {
            return;
        }
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

/// The replicas of a version that take requests.
fn open_replicas<B: Backend>(arm: &Arm<B>) -> Vec<(Start, B)> {
    let berths = arm.fleet().berths();
    let open = |(number, berth): (u32, Arc<Berth<B>>)| {
        let (opened, replica) = berth.opened()?;
        Some(((number, opened), replica))
    };
    berths.filter_map(open).collect()
}

/// Why a version that answered so is gone on with no more.
pub(super) fn why(wrong: &Mismatch) -> String {
    shortened(&format!(
        "wrong about a row whose answer is known: {wrong}, as its version's file says (tolerance: none, it has to be the \
         same class)"
    ))
}

/// As much of a reason as there is room for, and that the version was not asked.
pub(super) fn not_asked(reason: &str) -> String {
    let room = EVIDENCE_TEXT_BYTES_MAX - NONE.len();
    let end = reason.floor_char_boundary(room);
    format!("{}{NONE}", &reason[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_a_version_is_not_asked_is_said_behind_as_much_as_there_is_room_for() {
        let told = not_asked("10 requests");
        assert_eq!(
            told,
            "10 requests; its version has no sentinels to be asked"
        );
        let told = not_asked(&"ü".repeat(EVIDENCE_TEXT_BYTES_MAX));
        assert!(told.len() <= EVIDENCE_TEXT_BYTES_MAX && told.starts_with('ü'));
        assert!(told.ends_with(NONE));
    }

    #[tokio::test]
    async fn that_a_version_has_none_is_not_said_before_it_is_known() {
        let mut asker = Asker::new();
        assert!(!asker.has_none());
        asker.at(1, Arc::default());
        assert!(asker.has_none());
    }
}
