//! So many requests a second (a token bucket): what was not used of a second may be used at once.

/// Takes requests at a rate.
#[derive(Debug)]
pub struct RateLimiter {
    per_second: u32,
    left_milli: u64,
    at_ms: u64,
}

impl RateLimiter {
    /// A limiter that takes a second's requests at once.
    #[must_use]
    pub fn new(per_second: u32, now_ms: u64) -> Self {
        RateLimiter {
            per_second,
            left_milli: u64::from(per_second) * 1_000,
            at_ms: now_ms,
        }
    }

    /// The limit.
    #[must_use]
    pub fn per_second(&self) -> u32 {
        self.per_second
    }

    /// Takes a request.
    ///
    /// # Errors
    /// In how many milliseconds the next will be taken.
    pub fn take(&mut self, now_ms: u64) -> Result<(), u64> {
        let rate = u64::from(self.per_second);
        let elapsed_ms = now_ms.saturating_sub(self.at_ms).min(1_000);
        self.at_ms = self.at_ms.max(now_ms);
        self.left_milli = (self.left_milli + rate * elapsed_ms).min(rate * 1_000);
        if self.left_milli >= 1_000 {
            self.left_milli -= 1_000;
            return Ok(());
        }
        Err((1_000 - self.left_milli).div_ceil(rate.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_requests_is_taken_at_once_and_then_so_many_a_second() {
        let mut limiter = RateLimiter::new(4, 0);
        assert!((0..4).all(|_| limiter.take(0).is_ok()));
        assert_eq!(limiter.take(0), Err(250));
        assert_eq!(limiter.take(100), Err(150));
        assert_eq!(limiter.take(250), Ok(()));
        assert_eq!(limiter.take(250), Err(250));
        // An hour saves up one second.
        let taken = (0..100).filter(|_| limiter.take(3_600_000).is_ok());
        assert_eq!(taken.count(), 4);
        // A clock that goes back gives nothing away.
        assert!(limiter.take(0).is_err());
    }

    #[test]
    fn over_a_long_time_the_rate_is_kept() {
        let mut limiter = RateLimiter::new(7, 0);
        let taken = (0..100_000).filter(|now_ms| limiter.take(*now_ms).is_ok());
        assert!((700..=707).contains(&taken.count()));
    }
}
