//! The requests that wait for a batch: which of them leave together, and when.
//!
//! The oldest is part of the next batch whatever comes behind it, so nobody is overtaken for ever. Those that do not fit it, because
//! their tensors have other shapes, wait for a batch of their own kind, and keep nobody behind them from this one.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::super::patience::{Arrivals, BatchCost, patience};
use super::{BatchRunner, BatcherConfig, Delay, Pending};

/// Waits shorter than this are not made: the runtime's clock counts milliseconds, and would make them as long.
pub(super) const WAIT_MIN: Duration = Duration::from_millis(1);

/// As many batches of rows are looked at, to find those that fit the oldest request: the others wait in the bounded queue.
const BATCHES_SEEN: usize = 4;

/// A request of a runner.
type Waiting<B> = Pending<<B as BatchRunner>::Row, <B as BatchRunner>::Output>;

pub(super) struct Line<B: BatchRunner> {
    config: BatcherConfig,
    waiting: VecDeque<Waiting<B>>,
    /// Rows of all of them.
    rows: usize,
    /// What batches take.
    cost: BatchCost,
    /// When requests come.
    arrivals: Arrivals,
    last_arrival: Option<Instant>,
}

/// Which of the waiting requests would be one batch now.
struct Pick {
    /// Their places, the oldest first.
    places: Vec<usize>,
    rows: usize,
    /// Nothing more can join it: it is full, or the next one of its kind is too large.
    is_full: bool,
    /// How many of them make up the largest preferred size, if one is reached.
    preferred: Option<usize>,
}

impl<B: BatchRunner> Line<B> {
    pub(super) fn new(config: BatcherConfig) -> Self {
        Line {
            config,
            waiting: VecDeque::new(),
            rows: 0,
            cost: BatchCost::default(),
            arrivals: Arrivals::default(),
            last_arrival: None,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether one more may be taken out of the queue before the batch leaves.
    pub(super) fn has_room(&self) -> bool {
        let max_rows = self.config.max_batch_rows;
        self.waiting.len() < max_rows && self.rows < BATCHES_SEEN * max_rows
    }

    pub(super) fn arrived(&mut self, pending: Waiting<B>) {
        let at = pending.queued_at;
        if let Some(last) = self.last_arrival.replace(at) {
            let gap = at.saturating_duration_since(last);
            self.arrivals.record(gap, pending.rows.len());
        }
        self.rows += pending.rows.len();
        self.waiting.push_back(pending);
    }

    /// Learns what a batch took.
    pub(super) fn ran(&mut self, rows: usize, taken: Duration) {
        self.cost.record(rows, taken);
    }

    /// When a batch should leave, if anybody waits.
    pub(super) fn due(&self) -> Option<Instant> {
        let oldest = self.waiting.front()?.queued_at;
        let now = Instant::now();
        let pick = self.pick();
        let others_wait = pick.places.len() < self.waiting.len();
        if pick.is_full || others_wait || pick.preferred.is_some() {
            return Some(now);
        }
        let due = match self.config.delay {
            Delay::Fixed(delay) => oldest + delay,
            Delay::Adaptive { max } => {
                let since_last = self.last_arrival.map_or(Duration::ZERO, |last| now - last);
                let requests = pick.places.len();
                let wait = patience(&self.cost, &self.arrivals, requests, since_last);
                if wait < WAIT_MIN {
                    return Some(now);
                }
                (now + wait).min(oldest + max)
            }
        };
        // The answer has to be there in time, and one batch is not like the other.
        let expected = self.cost.expected(pick.rows + 1) * 2;
        let deadlines = self.waiting.iter().filter_map(|pending| pending.until);
        let latest = deadlines
            .min()
            .and_then(|until| until.checked_sub(expected));
        Some(latest.map_or(due, |latest| due.min(latest)))
    }

    /// Takes what leaves as one batch; nothing if all callers have gone.
    pub(super) fn take(&mut self) -> Vec<Waiting<B>> {
        self.waiting.retain(|pending| !pending.reply.is_closed());
        let Pick {
            mut places,
            preferred,
            ..
        } = self.pick();
        places.truncate(preferred.unwrap_or(places.len()));
        let Some(last) = places.last() else {
            return Vec::new();
        };
        let mut batch = Vec::with_capacity(places.len());
        let mut stay = VecDeque::with_capacity(self.waiting.len());
        let rest = self.waiting.split_off(last + 1);
        let mut leaving = places.into_iter().peekable();
        for (place, pending) in std::mem::take(&mut self.waiting).into_iter().enumerate() {
            if leaving.next_if_eq(&place).is_some() {
                batch.push(pending);
            } else {
                stay.push_back(pending);
            }
        }
        stay.extend(rest);
        self.rows = stay.iter().map(|pending| pending.rows.len()).sum();
        self.waiting = stay;
        batch
    }

    /// All that wait.
    pub(super) fn take_all(&mut self) -> VecDeque<Waiting<B>> {
        std::mem::take(&mut self.waiting)
    }

    fn pick(&self) -> Pick {
        let max_rows = self.config.max_batch_rows;
        let mut pick = Pick {
            places: Vec::new(),
            rows: 0,
            is_full: false,
            preferred: None,
        };
        let Some(first) = self.waiting.front() else {
            return pick;
        };
        // A preferred size is worth less than an answer that has waited long enough.
        let is_patient = match self.config.delay {
            Delay::Fixed(delay) => first.queued_at.elapsed() < delay,
            Delay::Adaptive { .. } => true,
        };
        // The rows of one request fit each other, so its first speaks for all.
        let first = &first.rows[0];
        for (place, next) in self.waiting.iter().enumerate() {
            let with_next = pick.rows + next.rows.len();
            if place > 0 && !B::joins(first, 0, &next.rows[0]) {
                continue;
            }
            // Nobody of its kind comes before one that has to wait for the next batch.
            let has_room = place == 0 || B::joins(first, with_next - 1, &next.rows[0]);
            if with_next > max_rows || !has_room {
                pick.is_full = true;
                break;
            }
            pick.places.push(place);
            pick.rows = with_next;
            if is_patient && self.config.preferred_rows.contains(&with_next) {
                pick.preferred = Some(pick.places.len());
            }
        }
        pick.is_full |= pick.rows >= max_rows || !B::joins(first, pick.rows, first);
        pick
    }
}
