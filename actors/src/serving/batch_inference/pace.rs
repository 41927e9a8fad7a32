//! How many requests of a batch are under way: additive increase, multiplicative decrease.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// After a decrease, refusals of requests that were sent before it are no news for so long.
const DECREASE_PAUSE: Duration = Duration::from_millis(500);

/// How many requests may be under way.
#[derive(Debug)]
pub struct Pace {
    max: usize,
    state: Mutex<State>,
    room: Notify,
}

#[derive(Debug)]
struct State {
    under_way: usize,
    limit: f64,
    decreased: Option<Instant>,
}

/// A request that is under way.
#[derive(Debug)]
pub struct UnderWay<'a>(&'a Pace);

impl Pace {
    /// At most `max` requests at once, and as many at first.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Pace {
            max: max.max(1),
            state: Mutex::new(State {
                under_way: 0,
                limit: max.max(1) as f64,
                decreased: None,
            }),
            room: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole after every single update, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more may be under way.
    pub async fn enter(&self) -> UnderWay<'_> {
        loop {
            // From before we look, so that no room is missed.
            let room = self.room.notified();
            {
                let mut state = self.state();
                if state.under_way < state.limit as usize {
                    state.under_way += 1;
                    return UnderWay(self);
                }
            }
            room.await;
        }
    }

    /// A request was answered: after as many as are under way, one more may be.
    pub fn answered(&self) {
        let mut state = self.state();
        state.limit = (state.limit + 1.0 / state.limit).min(self.max as f64);
        drop(state);
        self.room.notify_one();
    }

    /// The endpoint has no room: half as many, and one at least.
    pub fn refused(&self) {
        let mut state = self.state();
        let now = Instant::now();
        let is_news = state
            .decreased
            .is_none_or(|decreased| now >= decreased + DECREASE_PAUSE);
        if is_news {
            state.limit = (state.limit / 2.0).max(1.0);
            state.decreased = Some(now);
        }
    }

    /// How many may be under way now.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.state().limit as usize
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.state().under_way -= 1;
        self.0.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn refusals_halve_it_and_answers_bring_it_back() {
        let pace = Pace::new(8);
        pace.refused();
        // Those that were under way then say the same.
        pace.refused();
        assert_eq!(pace.limit(), 4);
        for expected in [2, 1, 1] {
            tokio::time::advance(DECREASE_PAUSE).await;
            pace.refused();
            assert_eq!(pace.limit(), expected);
        }
        for _ in 0..100 {
            pace.answered();
        }
        assert_eq!(pace.limit(), 8);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_are_under_way_than_may_be() {
        let pace = Pace::new(2);
        let (one, two) = (pace.enter().await, pace.enter().await);
        let third = tokio::time::timeout(Duration::from_secs(1), pace.enter()).await;
        assert!(third.is_err());
        drop(one);
        let third = pace.enter().await;
        tokio::time::advance(DECREASE_PAUSE).await;
        pace.refused();
        drop(two);
        let waits = tokio::time::timeout(Duration::from_secs(1), pace.enter()).await;
        assert!(waits.is_err());
        drop(third);
        let _fourth = pace.enter().await;
    }
}
