//! Predictions that wait for the truth, and truths that wait for their prediction.
//!
//! Invariants:
//! 1. Entries have a fixed size and their number is bounded, so memory is: the oldest entry makes room.
//! 2. A prediction is joined with at most one label, and a label with at most one prediction.
//! 3. Every label that was taken is counted exactly once in the end: as joined, late, unmatched, or of another version.
//! 4. What another version answered is known by name alone: its labels are no outcomes of this one.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;

use serde::{Deserialize, Serialize};

/// Predictions that wait for a label: with their keys and places in line some 10 MB.
pub const PREDICTIONS_MAX: usize = 100_000;

/// For how long they do: truth that takes longer is counted as late.
pub const PREDICTION_TTL_MS: u64 = 24 * 60 * 60 * 1000;

/// Labels that wait for a prediction. A client may be faster than the way from the router to the monitor; not by much.
pub const LABELS_MAX: usize = 10_000;

/// For how long they do.
pub const LABEL_TTL_MS: u64 = 60_000;

/// Predictions that are gone and whose labels are told from labels of nothing, 16 bytes each.
pub const FORGOTTEN_MAX: usize = 100_000;

/// Names a row of a request: the beginning of a hash of both, because ids may be long.
pub type Key = [u8; 16];

/// The name of a row of a request.
#[must_use]
pub fn key(id: &str, row: u32) -> Key {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&row.to_le_bytes());
    hasher.update(id.as_bytes());
    let mut key = Key::default();
    key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    key
}

/// What was predicted of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Predicted {
    /// The class.
    pub class: u32,
    /// Its probability.
    pub confidence: f32,
    /// The place of its slice among the slices, if the request named one.
    pub slice: Option<u8>,
}

/// A prediction and the truth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// What was predicted.
    pub predicted: Predicted,
    /// The class that it really was.
    pub truth: u32,
}

/// What became of labels and predictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct JoinCounts {
    /// Labels that found their prediction.
    pub joined: u64,
    /// Labels whose prediction had made room for others, or was too old.
    pub late: u64,
    /// Labels of which no prediction was ever known.
    pub unmatched: u64,
    /// Predictions that went without a label.
    pub expired: u64,
    /// Predictions whose name another one had: the later one counts.
    pub repeated: u64,
}

/// Entries that leave in the order in which they came.
#[derive(Debug)]
struct Line<K, T> {
    entries: HashMap<K, (u64, T)>,
    /// Also has entries that were taken out since; each is here once for each time that it was put in.
    order: VecDeque<(u64, K)>,
    entries_max: usize,
    ttl_ms: u64,
}

impl<K: Copy + Eq + Hash, T> Line<K, T> {
    fn new(entries_max: usize, ttl_ms: u64) -> Self {
        Line {
            entries: HashMap::new(),
            order: VecDeque::new(),
            entries_max,
            ttl_ms,
        }
    }

    /// Puts an entry in; the one of the same key that it replaces.
    fn insert(&mut self, key: K, value: T, now_ms: u64) -> Option<T> {
        self.order.push_back((now_ms, key));
        self.entries
            .insert(key, (now_ms, value))
            .map(|(_, value)| value)
    }

    fn take(&mut self, key: &K) -> Option<T> {
        self.entries.remove(key).map(|(_, value)| value)
    }

    /// The key of an entry whose time is over, or that must make room.
    fn overdue(&mut self, now_ms: u64) -> Option<K> {
        loop {
            let (put_ms, key) = *self.order.front()?;
            let is_old = now_ms.saturating_sub(put_ms) >= self.ttl_ms;
            if !is_old && self.order.len() <= self.entries_max {
                return None;
            }
            self.order.pop_front();
            if self.entries.get(&key).is_some_and(|(at, _)| *at == put_ms) {
                self.entries.remove(&key);
                return Some(key);
            }
        }
    }
}

/// Joins predictions with labels that come later.
#[derive(Debug)]
pub struct JoinTable {
    /// Nothing of what another version predicted.
    predictions: Line<Key, Option<Predicted>>,
    labels: Line<Key, u32>,
    forgotten: HashSet<Key>,
    forgotten_order: VecDeque<Key>,
    counts: JoinCounts,
    of_other_versions: u64,
}

impl Default for JoinTable {
    fn default() -> Self {
        JoinTable {
            predictions: Line::new(PREDICTIONS_MAX, PREDICTION_TTL_MS),
            labels: Line::new(LABELS_MAX, LABEL_TTL_MS),
            forgotten: HashSet::new(),
            forgotten_order: VecDeque::new(),
            counts: JoinCounts::default(),
            of_other_versions: 0,
        }
    }
}

impl JoinTable {
    /// Takes a prediction; the outcome, if its label was there already.
    pub fn predict(&mut self, key: Key, predicted: Predicted, now_ms: u64) -> Option<Outcome> {
        self.take(key, Some(predicted), now_ms)
    }

    /// Takes that another version predicted it: its label is counted, and is no outcome.
    pub fn predict_elsewhere(&mut self, key: Key, now_ms: u64) {
        self.take(key, None, now_ms);
    }

    fn take(&mut self, key: Key, predicted: Option<Predicted>, now_ms: u64) -> Option<Outcome> {
        self.expire(now_ms);
        if let Some(truth) = self.labels.take(&key) {
            return self.join(predicted, truth);
        }
        let before = self.predictions.insert(key, predicted, now_ms);
        self.counts.repeated += u64::from(before.is_some());
        self.expire(now_ms);
        None
    }

    /// Takes a label; the outcome, if its prediction is there.
    pub fn label(&mut self, key: Key, truth: u32, now_ms: u64) -> Option<Outcome> {
        self.expire(now_ms);
        if let Some(predicted) = self.predictions.take(&key) {
            return self.join(predicted, truth);
        }
        if self.forgotten.contains(&key) {
            self.counts.late += 1;
        } else if self.labels.insert(key, truth, now_ms).is_some() {
            // Of two labels of one row, the one of before is the one that nothing will match.
            self.counts.unmatched += 1;
        }
        self.expire(now_ms);
        None
    }

    fn join(&mut self, predicted: Option<Predicted>, truth: u32) -> Option<Outcome> {
        let Some(predicted) = predicted else {
            self.of_other_versions += 1;
            return None;
        };
        self.counts.joined += 1;
        Some(Outcome { predicted, truth })
    }

    /// What became of labels and predictions.
    #[must_use]
    pub fn counts(&self) -> JoinCounts {
        self.counts
    }

    /// Labels of what other versions predicted.
    #[must_use]
    pub fn of_other_versions(&self) -> u64 {
        self.of_other_versions
    }

    /// Predictions that wait for a label.
    #[must_use]
    pub fn predictions_waiting(&self) -> usize {
        self.predictions.entries.len()
    }

    /// Labels that wait for a prediction.
    #[must_use]
    pub fn labels_waiting(&self) -> usize {
        self.labels.entries.len()
    }

    /// Lets go of what is too old or too much.
    pub fn expire(&mut self, now_ms: u64) {
        while let Some(key) = self.predictions.overdue(now_ms) {
            self.counts.expired += 1;
            if self.forgotten.insert(key) {
                self.forgotten_order.push_back(key);
            }
        }
        while self.forgotten_order.len() > FORGOTTEN_MAX
            && let Some(key) = self.forgotten_order.pop_front()
        {
            self.forgotten.remove(&key);
        }
        while self.labels.overdue(now_ms).is_some() {
            self.counts.unmatched += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn predicted(class: u32) -> Predicted {
        Predicted {
            class,
            confidence: 0.9,
            slice: None,
        }
    }

    #[test]
    fn truth_is_joined_whichever_comes_first() {
        let mut table = JoinTable::default();
        assert_eq!(table.predict(key("a", 0), predicted(3), 1), None);
        let outcome = table.label(key("a", 0), 4, 2).unwrap();
        assert_eq!((outcome.predicted.class, outcome.truth), (3, 4));
        assert_eq!(table.label(key("b", 1), 5, 3), None);
        let outcome = table.predict(key("b", 1), predicted(5), 4).unwrap();
        assert_eq!((outcome.predicted.class, outcome.truth), (5, 5));
        // Neither is there for a second label.
        assert_eq!(table.label(key("a", 0), 4, 5), None);
        assert_eq!(
            (table.predictions_waiting(), table.labels_waiting()),
            (0, 1)
        );
        assert_eq!(table.counts().joined, 2);
    }

    #[test]
    fn rows_of_one_request_are_told_apart() {
        let mut table = JoinTable::default();
        for row in 0..3 {
            table.predict(key("a", row), predicted(row), 1);
        }
        assert_eq!(table.label(key("a", 2), 0, 2).unwrap().predicted.class, 2);
        assert_eq!(table.label(key("a", 3), 0, 2), None);
        assert_ne!(key("a", 0), key("b", 0));
    }

    #[test]
    fn late_and_unmatched_labels_are_counted_apart() {
        let mut table = JoinTable::default();
        table.predict(key("slow", 0), predicted(1), 0);
        assert_eq!(table.label(key("slow", 0), 1, PREDICTION_TTL_MS), None);
        table.label(key("nobody", 0), 1, PREDICTION_TTL_MS);
        table.expire(PREDICTION_TTL_MS + LABEL_TTL_MS);
        assert_eq!(
            table.counts(),
            JoinCounts {
                late: 1,
                unmatched: 1,
                expired: 1,
                ..JoinCounts::default()
            }
        );
        assert_eq!(
            (table.predictions_waiting(), table.labels_waiting()),
            (0, 0)
        );
    }

    #[test]
    fn labels_of_what_another_version_answered_are_known_and_no_outcomes() {
        let mut table = JoinTable::default();
        table.predict_elsewhere(key("a", 0), 1);
        assert_eq!(table.label(key("a", 0), 4, 2), None);
        // The label first.
        assert_eq!(table.label(key("b", 0), 4, 3), None);
        table.predict_elsewhere(key("b", 0), 4);
        assert_eq!((table.of_other_versions(), table.labels_waiting()), (2, 0));
        // Too late, as any other is.
        table.predict_elsewhere(key("c", 0), 5);
        table.label(key("c", 0), 4, 5 + PREDICTION_TTL_MS);
        table.expire(5 + PREDICTION_TTL_MS + LABEL_TTL_MS);
        assert_eq!(
            table.counts(),
            JoinCounts {
                late: 1,
                expired: 1,
                ..JoinCounts::default()
            }
        );
        assert_eq!(table.of_other_versions(), 2);
    }

    #[test]
    fn a_name_that_comes_twice_is_the_later_one() {
        let mut table = JoinTable::default();
        table.predict(key("a", 0), predicted(1), 1);
        table.predict(key("a", 0), predicted(2), 2);
        // The first one's place in line does not take the second one along.
        table.expire(1 + PREDICTION_TTL_MS);
        assert_eq!(table.predictions_waiting(), 1);
        let outcome = table.label(key("a", 0), 2, 3).unwrap();
        assert_eq!(outcome.predicted.class, 2);
        assert_eq!(table.counts().repeated, 1);
    }

    #[test]
    fn everything_is_bounded_and_every_label_is_counted_once() {
        let mut table = JoinTable::default();
        let count = (PREDICTIONS_MAX + FORGOTTEN_MAX + 500) as u64;
        for number in 0..count {
            table.predict(key(&number.to_string(), 0), predicted(0), number / 1000);
        }
        assert_eq!(table.predictions_waiting(), PREDICTIONS_MAX);
        assert_eq!(table.predictions.order.len(), PREDICTIONS_MAX);
        assert_eq!(table.forgotten.len(), FORGOTTEN_MAX);
        let label =
            |table: &mut JoinTable, number: u64| table.label(key(&number.to_string(), 0), 0, count);
        assert_eq!(label(&mut table, 600), None);
        assert!(label(&mut table, count - 1).is_some());
        for number in 0..2 * LABELS_MAX as u64 {
            table.label(key("unknown", number as u32), 0, count);
        }
        assert_eq!(table.labels_waiting(), LABELS_MAX);
        assert_eq!(table.labels.order.len(), LABELS_MAX);
        table.expire(count + LABEL_TTL_MS);
        let counts = table.counts();
        assert_eq!(
            (counts.joined, counts.late, counts.unmatched),
            (1, 1, 2 * LABELS_MAX as u64)
        );
    }
}
