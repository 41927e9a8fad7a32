//! What all versions of an endpoint share: one load, one limit, one budget.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::budget::RetryBudget;
use super::lag::Lag;
use super::rate::RateLimiter;
use crate::serving::autoscaler::load::LoadMeter;
use crate::serving::oip::OipError;

/// What was refused or tried again, since the router started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Requests above the limit of their rate.
    pub rate_limited: u64,
    /// Requests refused because a queue was full or would have taken longer than their deadline.
    pub shed: u64,
    /// Requests whose deadline passed.
    pub late: u64,
    /// Second tries.
    pub retries: u64,
    /// Second tries that the budget did not allow.
    pub retries_refused: u64,
    /// Replicas that were ejected.
    pub ejections: u64,
}

/// What passes through an endpoint.
pub struct Traffic {
    /// What is in flight.
    pub load: LoadMeter,
    /// How late its router is.
    pub lag: Arc<Lag>,
    limiter: Mutex<Option<RateLimiter>>,
    retries: Mutex<RetryBudget>,
    counts: Mutex<Counts>,
    began: Instant,
}

impl Default for Traffic {
    fn default() -> Self {
        Traffic {
            load: LoadMeter::default(),
            lag: Arc::default(),
            limiter: Mutex::new(None),
            retries: Mutex::new(RetryBudget::new(0)),
            counts: Mutex::default(),
            began: Instant::now(),
        }
    }
}

/// All of these are whole after every single update, so a panic elsewhere does not spoil them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Traffic {
    /// The time that the rules go by, in milliseconds since this began.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Takes so many requests a second from now on; without a limit if `None`.
    pub fn limit_rate(&self, per_second: Option<u32>) {
        let now_ms = self.now_ms();
        let mut limiter = lock(&self.limiter);
        if limiter.as_ref().map(RateLimiter::per_second) != per_second {
            *limiter = per_second.map(|rate| RateLimiter::new(rate, now_ms));
        }
    }

    /// Takes a request, if there are not too many.
    ///
    /// # Errors
    /// [`OipError::RateLimited`].
    pub fn admit(&self) -> Result<(), OipError> {
        let mut limiter = lock(&self.limiter);
        let Some(limiter) = limiter.as_mut() else {
            return Ok(());
        };
        let per_second = limiter.per_second();
        limiter.take(self.now_ms()).map_err(|retry_after_ms| {
            self.count(|counts| counts.rate_limited += 1);
            OipError::RateLimited {
                per_second,
                retry_after_ms,
            }
        })
    }

    /// A request has come that may be tried again if it fails.
    pub fn earn_retry(&self) {
        lock(&self.retries).earn();
    }

    /// Whether a request may be tried again, which it then is.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        let may = lock(&self.retries).spend(self.now_ms());
        self.count(|counts| match may {
            true => counts.retries += 1,
            false => counts.retries_refused += 1,
        });
        may
    }

    /// Counts something.
    pub fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut lock(&self.counts));
    }

    /// What was counted.
    #[must_use]
    pub fn counts(&self) -> Counts {
        *lock(&self.counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_stays_is_not_begun_anew() {
        let traffic = Traffic::default();
        assert_eq!(traffic.admit(), Ok(()));
        traffic.limit_rate(Some(1));
        assert_eq!(traffic.admit(), Ok(()));
        traffic.limit_rate(Some(1));
        let error = traffic.admit().unwrap_err();
        assert_eq!(error.status(), 429);
        assert!(error.to_string().contains("1 requests a second"), "{error}");
        assert_eq!(traffic.counts().rate_limited, 1);
        traffic.limit_rate(None);
        assert_eq!(traffic.admit(), Ok(()));
    }
}
