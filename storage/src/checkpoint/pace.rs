//! A limit on how fast a save may use the network, so that training keeps its share.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// Lets bytes pass at a steady rate: a piece may start when those before it have had their time.
/// The first one starts at once, and time that nobody used is not saved up.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        assert!(
            bytes_per_second > 0,
            "a rate of zero would never let anything pass"
        );
        Pace {
            bytes_per_second,
            free_at: Mutex::new(None),
        }
    }

    /// Waits until `bytes` more may be sent.
    pub(super) async fn admit(&self, bytes: u64) {
        tokio::time::sleep_until(self.reserve(bytes, Instant::now())).await;
    }

    /// When a piece of `bytes` that asks at `now` may start.
    fn reserve(&self, bytes: u64, now: Instant) -> Instant {
        let mut free_at = self
            .free_at
            .lock()
            .expect("no code panics while it holds this lock");
        let start = free_at.map_or(now, |free_at| free_at.max(now));
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        *free_at = Some(start + takes);
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_start_one_after_the_other_and_idle_time_is_not_saved_up() {
        let pace = Pace::new(1000);
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        assert_eq!(pace.reserve(500, at(0)), at(0));
        assert_eq!(pace.reserve(250, at(0)), at(500));
        assert_eq!(pace.reserve(1, at(100)), at(750));
        assert_eq!(pace.reserve(1000, at(5000)), at(5000));
        assert_eq!(pace.reserve(1, at(5000)), at(6000));
    }
}
