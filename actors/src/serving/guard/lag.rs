//! How long what is ready waits until a thread of this process comes to it.
//!
//! A router with more to do than its threads can do reads requests late and writes answers late. A deadline is counted from when its
//! request was read and knows of neither, so whoever says beforehand whether there is time must add both.
//!
//! Invariants:
//! 1. It is measured where somebody asks, one at a time and at most every 5 ms, and costs nothing otherwise.
//! 2. What was measured long ago says nothing: then it counts as none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Between two measurements.
const PAUSE: Duration = Duration::from_millis(5);

/// How long one says something.
const AGE_MAX: Duration = Duration::from_millis(100);

/// What is known of it.
#[derive(Debug)]
pub struct Lag {
    began: Instant,
    /// When it was measured last, in microseconds since `began`; 0 before the first time.
    measured_us: AtomicU64,
    /// What it was lately, in microseconds.
    lag_us: AtomicU64,
    is_measured: AtomicBool,
}

impl Default for Lag {
    fn default() -> Self {
        Lag {
            began: Instant::now(),
            measured_us: AtomicU64::new(0),
            lag_us: AtomicU64::new(0),
            is_measured: AtomicBool::new(false),
        }
    }
}

impl Lag {
    /// What it was lately. Has it measured again for those who ask later.
    pub fn lately(self: &Arc<Self>) -> Duration {
        let measured_us = self.measured_us.load(Ordering::Relaxed);
        let age = Duration::from_micros(self.now_us().saturating_sub(measured_us));
        let is_known = measured_us > 0;
        if (age >= PAUSE || !is_known) && !self.is_measured.swap(true, Ordering::Relaxed) {
            tokio::spawn(Arc::clone(self).measure());
        }
        match is_known && age <= AGE_MAX {
            true => Duration::from_micros(self.lag_us.load(Ordering::Relaxed)),
            false => Duration::ZERO,
        }
    }

    /// Goes to the end of the line, behind what has come by then, as a request does that comes now.
    async fn measure(self: Arc<Self>) {
        let begin = Instant::now();
        tokio::task::yield_now().await;
        self.record(begin.elapsed());
        self.is_measured.store(false, Ordering::Relaxed);
    }

    fn record(&self, lag: Duration) {
        let lag_us = u64::try_from(lag.as_micros()).unwrap_or(u64::MAX);
        // One is measured at a time, so nobody else writes.
        let before_us = self.lag_us.load(Ordering::Relaxed);
        let after_us = before_us - before_us / 4 + lag_us / 4;
        self.lag_us.store(after_us, Ordering::Relaxed);
        self.measured_us
            .store(self.now_us().max(1), Ordering::Relaxed);
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_an_average_of_what_was_measured_lately() {
        let lag = Arc::new(Lag::default());
        assert_eq!(lag.lately(), Duration::ZERO);
        // That question has it measured, and there is no other work.
        while lag.is_measured.load(Ordering::Relaxed) {
            tokio::task::yield_now().await;
        }
        assert_eq!(lag.lately(), Duration::ZERO);
        for _ in 0..40 {
            lag.record(Duration::from_millis(8));
        }
        let steady = lag.lately();
        assert!(steady > Duration::from_millis(7) && steady <= Duration::from_millis(8));
        tokio::time::advance(AGE_MAX + Duration::from_millis(1)).await;
        assert_eq!(lag.lately(), Duration::ZERO, "it is too old");
    }

    #[tokio::test]
    async fn it_is_as_long_as_what_is_there_takes() {
        const WORK: Duration = Duration::from_millis(20);
        let lag = Arc::new(Lag::default());
        assert_eq!(lag.lately(), Duration::ZERO);
        // Comes while that question is measured, on the same thread.
        tokio::spawn(async {
            let begin = std::time::Instant::now();
            while begin.elapsed() < WORK {
                std::hint::spin_loop();
            }
        });
        while lag.is_measured.load(Ordering::Relaxed) {
            tokio::task::yield_now().await;
        }
        // The first one counts for a quarter.
        assert!(lag.lately() >= WORK / 4 - Duration::from_micros(1));
    }
}
