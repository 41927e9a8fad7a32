//! The worker's side of its lease: how long it may believe that the leader counts it as alive.
//!
//! Invariants:
//! 1. The lease counts from when the acknowledged renewal was *sent*: the leader's own clock for it
//!    started later, so the worker always gives up first.
//! 2. The worker gives up a fifth before the end, which covers clocks that run at different speed
//!    and the time to notice.
//! 3. Nothing here is what makes side effects safe: receivers refuse a stale incarnation. A lost
//!    lease tells people and the session, and ends no host.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Renewals under way. One is sent each renewal period, so a lease has room for a handful; an
/// answer to one that fell out is of no use any more.
const PENDING_MAX: usize = 64;

/// The lease of one session.
#[derive(Debug)]
pub(crate) struct Lease {
    duration: Duration,
    /// When the newest acknowledged renewal was sent.
    renewed_at: Instant,
    next_sequence: u64,
    pending: VecDeque<(u64, Instant)>,
}

impl Lease {
    /// A lease that the leader granted in answer to what was sent at `sent_at`.
    pub(crate) fn granted(duration_ms: u64, sent_at: Instant) -> Lease {
        Lease {
            duration: Duration::from_millis(duration_ms),
            renewed_at: sent_at,
            next_sequence: 1,
            pending: VecDeque::new(),
        }
    }

    /// The sequence number of a renewal that is sent at `now`.
    pub(crate) fn renew(&mut self, now: Instant) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        if self.pending.len() == PENDING_MAX {
            self.pending.pop_front();
        }
        self.pending.push_back((sequence, now));
        sequence
    }

    /// The leader acknowledged renewal `sequence`.
    pub(crate) fn acknowledge(&mut self, sequence: u64) {
        while let Some((pending, sent_at)) = self.pending.front().copied() {
            if pending > sequence {
                break;
            }
            if pending == sequence {
                self.renewed_at = self.renewed_at.max(sent_at);
            }
            self.pending.pop_front();
        }
    }

    /// Whether the oldest renewal that is not acknowledged was sent longer than `limit` ago.
    pub(crate) fn is_answer_overdue(&self, limit: Duration, now: Instant) -> bool {
        let oldest = self.pending.front();
        oldest.is_some_and(|(_, sent_at)| now.duration_since(*sent_at) > limit)
    }

    /// Until when the worker holds its lease.
    pub(crate) fn held_until(&self) -> Instant {
        self.renewed_at + self.duration * 4 / 5
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_from_the_sending_of_what_was_acknowledged() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut lease = Lease::granted(10_000, start);
        assert_eq!(lease.held_until(), at(8_000));
        let first = lease.renew(at(1_000));
        let second = lease.renew(at(2_000));
        lease.acknowledge(second);
        assert_eq!(lease.held_until(), at(10_000));
        assert!(!lease.is_answer_overdue(Duration::ZERO, at(9_000)));
        let third = lease.renew(at(3_000));
        assert!(!lease.is_answer_overdue(Duration::from_millis(2_500), at(5_500)));
        assert!(lease.is_answer_overdue(Duration::from_millis(2_500), at(5_501)));
        lease.acknowledge(third);
        assert_eq!(lease.held_until(), at(11_000));
        // An older answer that comes late changes nothing, nor does one to nothing.
        lease.acknowledge(first);
        lease.acknowledge(99);
        assert_eq!(lease.held_until(), at(11_000));
    }

    #[test]
    fn renewals_that_nobody_answers_stay_bounded() {
        let start = Instant::now();
        let mut lease = Lease::granted(1_000, start);
        for _ in 0..1_000 {
            lease.renew(start);
        }
        assert!(lease.pending.len() <= PENDING_MAX);
    }
}
