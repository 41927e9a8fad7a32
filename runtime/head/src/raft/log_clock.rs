//! The time that a leader stamps commands with, and decides by.
//!
//! Time in the log never goes back. A leader whose clock is behind the newest stamp (its own clock was
//! put back, or the one of the leader before was ahead) must therefore not use it as it is: every
//! stamp would be lifted to one and the same moment, and what waits for a later one, such as a restart
//! after a back-off, would wait until the clock has caught up. So as long as the log is ahead its time
//! goes on at half speed: it moves, and the clock catches up.
//!
//! Invariants:
//! 1. [`LogClock::now_ms`] never goes back, and is never behind what was observed.
//! 2. It moves whenever the clock below it does.
//! 3. As soon as the clock below is ahead, it is that clock.

use std::sync::Arc;

use mobula_core::clock::Clock;
use parking_lot::Mutex;

#[derive(Debug, Default)]
struct State {
    newest_ms: u64,
    /// While the clock is behind: what it showed when it was looked at last, and the millisecond that was
    /// left over from halving then.
    behind: Option<(u64, u64)>,
}

/// A clock that goes on from the newest time in the log.
pub(crate) struct LogClock {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

impl LogClock {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        LogClock {
            clock,
            state: Mutex::default(),
        }
    }

    /// Takes note of a time in the log.
    pub(super) fn observe(&self, log_time_ms: u64) {
        let mut state = self.state.lock();
        state.newest_ms = state.newest_ms.max(log_time_ms);
    }

    /// Milliseconds since the Unix epoch, as near to it as the log allows.
    pub(crate) fn now_ms(&self) -> u64 {
        let own_ms = self.clock.now_ms();
        let mut state = self.state.lock();
        if own_ms >= state.newest_ms {
            state.newest_ms = own_ms;
            state.behind = None;
            return own_ms;
        }
        // From look to look: the clock may jump forth and back again and be behind all the time.
        let (before_ms, rest) = state.behind.unwrap_or((own_ms, 0));
        let passed = own_ms.saturating_sub(before_ms) + rest;
        state.newest_ms += passed / 2;
        state.behind = Some((own_ms, passed % 2));
        state.newest_ms
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[derive(Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn now_ms(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// A leader's clock was two hours ahead for a moment. Time in the log stood still for two hours
    /// then, and so did every restart that was put off by a tenth of a second.
    #[test]
    fn time_goes_on_where_the_clock_is_behind_the_log() {
        let hand = Arc::new(Hand::default());
        let clock = LogClock::new(hand.clone());
        let at = |own_ms: u64| {
            hand.0.store(own_ms, Ordering::Relaxed);
            clock.now_ms()
        };
        assert_eq!(at(1_000), 1_000);
        clock.observe(9_000);
        assert_eq!(at(1_100), 9_000);
        assert_eq!(at(1_300), 9_100);
        // Put back once more: it goes on from where it is.
        assert_eq!(at(500), 9_100);
        assert_eq!(at(700), 9_200);
        // Old news changes nothing.
        clock.observe(5_000);
        assert_eq!(at(900), 9_300);
        // Put forward, and back: it does not wait for what it has counted already.
        assert_eq!(at(3_000), 10_350);
        assert_eq!(at(1_000), 10_350);
        assert_eq!(at(1_001), 10_350);
        assert_eq!(at(1_002), 10_351);
        // It has caught up.
        assert_eq!(at(10_352), 10_352);
        assert_eq!(at(10_353), 10_353);
    }
}
