//! What a host process counts: calls, by what became of them, and how long they took.
//!
//! A process is a host once in its life, so these are statics: nothing has to be handed through the
//! hot path, and counting is a few relaxed additions. The agent asks for a snapshot when somebody
//! reads the node's metrics.
//!
//! Invariant: a call that was begun is ended once, at the latest when it is dropped, so that what is in flight comes back to zero.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use mobula_core::error::CallError;
use mobula_wire::host::{CALL_BUCKETS, CALL_OUTCOMES, HostMetrics};

static IN_FLIGHT: AtomicU64 = AtomicU64::new(0);
static OUTCOMES: [AtomicU64; CALL_OUTCOMES.len()] =
    [const { AtomicU64::new(0) }; CALL_OUTCOMES.len()];
static BUCKETS: [AtomicU64; CALL_BUCKETS] = [const { AtomicU64::new(0) }; CALL_BUCKETS];
static TOTAL_US: AtomicU64 = AtomicU64::new(0);

/// One call, from its arrival to its answer.
#[derive(Debug)]
pub(crate) struct CallTimer {
    arrived: Instant,
    has_ended: AtomicBool,
}

impl CallTimer {
    pub(crate) fn begin() -> Self {
        IN_FLIGHT.fetch_add(1, Relaxed);
        CallTimer {
            arrived: Instant::now(),
            has_ended: AtomicBool::new(false),
        }
    }

    /// The call is answered, or nobody is left who could; only the first time counts.
    pub(crate) fn end(&self, result: Result<(), &CallError>) {
        self.end_as(outcome(result));
    }

    fn end_as(&self, outcome: usize) {
        if self.has_ended.swap(true, Relaxed) {
            return;
        }
        IN_FLIGHT.fetch_sub(1, Relaxed);
        OUTCOMES[outcome].fetch_add(1, Relaxed);
        let took_us = u64::try_from(self.arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
        BUCKETS[bucket(took_us)].fetch_add(1, Relaxed);
        TOTAL_US.fetch_add(took_us, Relaxed);
    }
}

impl Drop for CallTimer {
    fn drop(&mut self) {
        self.end_as(CALL_OUTCOMES.len() - 1);
    }
}

/// The place of an outcome in [`CALL_OUTCOMES`].
fn outcome(result: Result<(), &CallError>) -> usize {
    match result {
        Ok(()) => 0,
        Err(CallError::User { .. }) => 1,
        Err(CallError::Panicked(_)) => 2,
        Err(CallError::Overloaded { .. }) => 3,
        Err(CallError::DeadlineExceeded { .. }) => 4,
        Err(CallError::BadCall(_)) => 5,
        Err(_) => 6,
    }
}

/// Bucket `n` holds what took less than 2ⁿ⁺² µs; the last one holds the rest.
fn bucket(took_us: u64) -> usize {
    let bits = (u64::BITS - (took_us >> 2).leading_zeros()) as usize;
    bits.min(CALL_BUCKETS - 1)
}

/// Everything that was counted until now.
pub(crate) fn snapshot(actors: usize) -> HostMetrics {
    let values = |counters: &[AtomicU64]| counters.iter().map(|c| c.load(Relaxed)).collect();
    HostMetrics {
        actors: actors as u64,
        calls_in_flight: IN_FLIGHT.load(Relaxed),
        calls: values(&OUTCOMES),
        call_buckets: values(&BUCKETS),
        call_total_us: TOTAL_US.load(Relaxed),
        spans_dropped: crate::spans::dropped(),
        own: crate::own_metrics::snapshot(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_the_bucket_whose_bound_is_above_them() {
        for (took_us, expected) in [
            (0, 0),
            (3, 0),
            (4, 1),
            (7, 1),
            (8, 2),
            (1 << 40, CALL_BUCKETS - 1),
        ] {
            assert_eq!(bucket(took_us), expected, "{took_us} us");
            if expected < CALL_BUCKETS - 1 {
                assert!(took_us < 4 << expected);
            }
        }
    }
}
