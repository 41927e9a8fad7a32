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
//! 5. A wrong answer names the node on which that start of the replica ran, as soon as that is known, and no other.
//!
//! How far a version is asked, [`state`] shows, which hears of it when `noting` says; `meters` counts the answers.

#[cfg(test)]
pub(super) mod fixture;
pub(super) mod noting;
pub mod state;

use std::collections::BTreeSet;
use std::sync::Arc;

use mobula_core::id::NodeId;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use self::state::Standing;
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
    /// The version whose replicas were looked at last; 0 before the first look.
    version: u64,
    /// How many of them took requests then; absent before the first look.
    open: Option<usize>,
    /// What was answered since it was last taken.
    counts: AnswerCounts,
    /// The questions of the round that is under way; aborted when dropped.
    round: JoinSet<Heard>,
    /// Whether one of them was not answered.
    has_gap: bool,
    /// Replicas that have answered as they should, and take requests.
    right: BTreeSet<Start>,
    wrong: Option<Wrong>,
    /// No round begins before.
    rests_until: Instant,
    /// When a round begins though all are known to be right.
    due: Instant,
}

/// A question, and what came of it.
struct Heard {
    start: Start,
    /// Where that start runs, if it was known when it was asked.
    node: Option<NodeId>,
    /// The classes that it answered, if it did.
    classes: Option<Vec<u32>>,
}

/// A replica that takes requests.
struct Open<B> {
    start: Start,
    /// Where that start runs, if it is known.
    node: Option<NodeId>,
    replica: B,
}

/// A wrong answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wrong {
    mismatch: Mismatch,
    start: Start,
    /// Where that start ran, if it is known.
    node: Option<NodeId>,
}

/// How often a replica was asked all rows, by what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct AnswerCounts {
    /// It answered as it should.
    pub(super) right: u64,
    /// It answered otherwise.
    pub(super) wrong: u64,
    /// It did not answer.
    pub(super) unanswered: u64,
}

/// What is known of the replicas that take requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answers {
    /// How many there are.
    pub(super) open: usize,
    /// How many of them have answered as they should.
    pub(super) right: usize,
    /// The first answer that was another; of a replica that may be gone since.
    pub(super) wrong: Option<Wrong>,
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
            version: 0,
            open: None,
            counts: AnswerCounts::default(),
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

    /// How far it is asked, for whoever looks at a status; absent before the first look.
    pub(super) fn standing(&self) -> Option<Standing> {
        let open = self.at.as_ref().and(self.open)?;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Some(Standing {
            sentinels: count(self.sentinels.count()),
            replicas: count(open),
            right: count(self.right.len()),
        })
    }

    /// What was answered since this was last asked, with the version that did, if anything was.
    pub(super) fn take_counts(&mut self) -> Option<(u64, AnswerCounts)> {
        let counts = std::mem::take(&mut self.counts);
        (counts != AnswerCounts::default()).then_some((self.version, counts))
    }

    /// What the replicas of the version have answered by now. Another round begins if it is time for one.
    pub(super) fn look<B: Backend>(&mut self, arm: Option<&Arm<B>>) -> Answers {
        let open = arm.map(open_replicas).unwrap_or_default();
        self.version = arm.map_or(self.version, Arm::version);
        self.open = Some(open.len());
        self.hear();
        self.right
            .retain(|start| open.iter().any(|known| known.start == *start));
        if let Some(wrong) = &mut self.wrong
            && wrong.node.is_none()
        {
            let same = open.iter().find(|known| known.start == wrong.start);
            wrong.node = same.and_then(|known| known.node);
        }
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
            let (start, node, classes) = match ended {
                Ok(Heard {
                    start,
                    node,
                    classes: Some(classes),
                }) => (start, node, classes),
                Ok(Heard { start, .. }) => {
                    let (replica, _) = start;
                    tracing::debug!(replica, "a replica did not answer its version's sentinels");
                    self.counts.unanswered += 1;
                    self.has_gap = true;
                    continue;
                }
                Err(error) => {
                    tracing::error!(%error, "a replica was not asked its version's sentinels; it is asked again");
                    self.counts.unanswered += 1;
                    self.has_gap = true;
                    continue;
                }
            };
            match self.sentinels.mismatch(start.0, &classes) {
                Some(mismatch) => {
                    self.counts.wrong += 1;
                    self.wrong.get_or_insert(Wrong {
                        mismatch,
                        start,
                        node,
                    });
                }
                None => {
                    self.counts.right += 1;
                    self.right.insert(start);
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
    fn ask<B: Backend>(&mut self, open: Vec<Open<B>>) {
        if self.sentinels.count() == 0 {
            return;
        }
        let now = Instant::now();
        let has_new = open.iter().any(|known| !self.right.contains(&known.start));
        if !self.round.is_empty() || now < self.rests_until || now < self.due && !has_new {
            return;
        }
        for Open {
            start,
            node,
            replica,
        } in open
        {
            let rows = self.sentinels.batch();
            self.round.spawn(async move {
                let asked = replica.infer_within(rows, SENTINEL_TIMEOUT);
                let answer = timeout(SENTINEL_TIMEOUT, asked).await.ok();
                let answer = answer.and_then(Result::ok);
                // Another answer than a classifier's is none to a sentinel, and wrong.
                let classes = answer.map(|answer| classes_of(&answer.outputs).unwrap_or_default());
                Heard {
                    start,
                    node,
                    classes,
                }
            });
        }
    }
}

/// The replicas of a version that take requests.
fn open_replicas<B: Backend>(arm: &Arm<B>) -> Vec<Open<B>> {
    let berths = arm.fleet().berths();
    let open = |(number, berth): (u32, Arc<Berth<B>>)| {
        let (opened, replica) = berth.opened()?;
        Some(Open {
            start: (number, opened),
            node: berth.node_of(opened),
            replica,
        })
    };
    berths.filter_map(open).collect()
}

/// Why a version that answered so is gone on with no more.
pub(super) fn why(wrong: &Wrong) -> String {
    let said = wrong.mismatch.sentence(wrong.node);
    shortened(&format!(
        "wrong about a row whose answer is known: {said}, as its version's file says (tolerance: none, it has to be the \
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
    use super::fixture::{Computing, answered, computed};
    use super::*;
    use crate::serving::rollout::fixture::arm;

    #[tokio::test(start_paused = true)]
    async fn a_wrong_answer_names_the_node_on_which_that_start_ran_and_no_other() {
        let known = computed();
        let broken = Computing::with(Some(&known.broken));
        let arm = arm(2, vec![broken.clone()]);
        let (_, berth) = arm.fleet().berths().next().unwrap();
        let mut asker = Asker::new();
        asker.at(1, Arc::clone(&known.sentinels));
        let mut why_now = || asker.look(Some(&*arm)).wrong.map(|wrong| why(&wrong));
        assert_eq!(why_now(), None);
        answered().await;
        // The head has not said yet where it runs.
        let said = why_now().unwrap();
        assert!(said.contains(": replica 1 answered sentinel "), "{said}");
        berth.runs_on(NodeId(2));
        let placed = why_now().unwrap();
        assert_eq!(
            placed.replace("replica 1 on node-2 ", "replica 1 "),
            said,
            "{placed}"
        );
        // What answers now is another start, on a machine of which nothing is known.
        berth.open(broken.clone());
        berth.runs_on(NodeId(3));
        assert_eq!(why_now(), Some(placed));
    }

    #[tokio::test(start_paused = true)]
    async fn where_a_replica_runs_is_said_though_it_takes_no_requests_any_more() {
        let known = computed();
        let arm = arm(2, vec![Computing::with(Some(&known.broken))]);
        let (_, berth) = arm.fleet().berths().next().unwrap();
        berth.runs_on(NodeId(2));
        let mut asker = Asker::new();
        asker.at(1, Arc::clone(&known.sentinels));
        asker.look(Some(&*arm));
        answered().await;
        berth.close();
        let said = why(&asker.look(Some(&*arm)).wrong.unwrap());
        assert!(said.contains(": replica 1 on node-2 answered "), "{said}");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_counted_by_what_they_were_and_how_far_a_version_is_asked_is_said() {
        let known = computed();
        let (right, other) = (Computing::with(Some(&known.sound)), Computing::with(None));
        let arm = arm(2, vec![right, other.clone()]);
        let mut asker = Asker::new();
        assert_eq!(asker.standing(), None);
        asker.at(1, Arc::clone(&known.sentinels));
        assert_eq!(asker.standing(), None, "nobody has looked");
        let standing = |replicas, right| {
            Some(Standing {
                sentinels: 8,
                replicas,
                right,
            })
        };
        asker.look(Some(&*arm));
        assert_eq!(asker.standing(), standing(2, 0));
        assert_eq!(asker.take_counts(), None);
        answered().await;
        asker.look(Some(&*arm));
        assert_eq!(asker.standing(), standing(2, 1));
        tokio::time::advance(2 * SENTINEL_TIMEOUT).await;
        answered().await;
        asker.look(Some(&*arm));
        let counts = AnswerCounts {
            right: 1,
            unanswered: 1,
            ..AnswerCounts::default()
        };
        assert_eq!(asker.take_counts(), Some((2, counts)));
        assert_eq!(asker.take_counts(), None, "each is counted once");
        other.has(&known.broken);
        tokio::time::advance(SENTINEL_PAUSE).await;
        asker.look(Some(&*arm));
        answered().await;
        asker.look(Some(&*arm));
        let counts = AnswerCounts {
            right: 1,
            wrong: 1,
            ..AnswerCounts::default()
        };
        assert_eq!(asker.take_counts(), Some((2, counts)));
        assert_eq!(asker.standing(), standing(2, 1));
        // Of another step nothing is known.
        asker.at(2, Arc::clone(&known.sentinels));
        assert_eq!((asker.standing(), asker.take_counts()), (None, None));
        // A version that has none is not asked, and that is said.
        asker.at(3, Arc::default());
        asker.look(Some(&*arm));
        let none = asker.standing().unwrap();
        assert_eq!((none.sentinels, none.replicas, none.right), (0, 2, 0));
    }

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
