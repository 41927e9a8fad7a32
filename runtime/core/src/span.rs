//! What took how long: the pieces of a job's timeline, recorded where they happen.
//!
//! Spans are for people who look for lost time. They are kept in memory, in rings of bounded size,
//! and never pass through the log; what a process recorded is lost with it.
//!
//! Invariants:
//! 1. A ring holds at most its capacity; the oldest go first, and how many went is counted.
//! 2. A span ends no earlier than it began, whatever the clock did in between.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::id::{ActorId, Incarnation, JobId};

/// The longest name of a span, in bytes; a longer one is cut.
pub const SPAN_NAME_BYTES_MAX: usize = 128;

/// Spans that one process keeps: at some 200 bytes each, a megabyte.
pub const SPANS_KEPT_MAX: usize = 4096;

/// Something that took time, or still does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// What it was, for people: `run`, `launch host`, a task's name.
    pub name: String,
    /// Which kind of thing it was, to be filtered by: `actor`, `host`, `task`,
    /// `queue`, `lease`, `transfer`, `user`.
    pub category: String,
    /// Whose it was.
    pub job: JobId,
    /// Which actor did it, where it was one.
    pub actor: Option<(ActorId, Incarnation)>,
    /// When it began, in microseconds since the Unix epoch.
    pub start_us: u64,
    /// When it ended; `None` if it had not when it was asked for.
    pub end_us: Option<u64>,
    /// More about it.
    pub detail: BTreeMap<String, String>,
}

impl Span {
    /// A span that has ended.
    #[must_use]
    pub fn new(name: &str, category: &str, job: JobId, start_us: u64, end_us: u64) -> Self {
        let cut = name.floor_char_boundary(SPAN_NAME_BYTES_MAX);
        Span {
            name: name[..cut].to_owned(),
            category: category.to_owned(),
            job,
            actor: None,
            start_us,
            end_us: Some(end_us.max(start_us)),
            detail: BTreeMap::new(),
        }
    }

    /// The same, done by an actor.
    #[must_use]
    pub fn by(mut self, actor: ActorId, incarnation: Incarnation) -> Self {
        self.actor = Some((actor, incarnation));
        self
    }

    /// The same, with one more thing to say about it.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        self.detail.insert(key.to_owned(), value.into());
        self
    }
}

/// The latest spans of a process.
#[derive(Debug, Clone, Default)]
pub struct SpanRing {
    spans: VecDeque<Span>,
    dropped: u64,
}

impl SpanRing {
    /// Keeps `span`, and forgets the oldest beyond [`SPANS_KEPT_MAX`].
    pub fn push(&mut self, span: Span) {
        if self.spans.len() >= SPANS_KEPT_MAX {
            self.spans.pop_front();
            self.dropped += 1;
        }
        self.spans.push_back(span);
    }

    /// The latest `limit` spans of `job`, oldest first.
    #[must_use]
    pub fn of_job(&self, job: JobId, limit: usize) -> Vec<Span> {
        let newest = self.spans.iter().rev().filter(|span| span.job == job);
        let mut found: Vec<Span> = newest.take(limit).cloned().collect();
        found.reverse();
        found
    }

    /// How many were forgotten.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_the_latest_and_counts_the_rest() {
        let mut ring = SpanRing::default();
        for number in 0..SPANS_KEPT_MAX as u64 + 3 {
            let job = JobId(number % 2);
            ring.push(Span::new(
                &format!("s{number}"),
                "user",
                job,
                number,
                number,
            ));
        }
        assert_eq!(ring.dropped(), 3);
        let names: Vec<_> = ring
            .of_job(JobId(0), 2)
            .into_iter()
            .map(|s| s.name)
            .collect();
        assert_eq!(names, ["s4096", "s4098"]);
    }

    #[test]
    fn a_clock_that_went_back_gives_an_empty_span() {
        let span = Span::new(&"ü".repeat(100), "user", JobId(1), 10, 5);
        assert_eq!(span.end_us, Some(10));
        assert!(span.name.len() <= SPAN_NAME_BYTES_MAX);
    }
}
