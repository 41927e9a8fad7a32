//! How fast a replica is: what its batches take, by their size, and what it says of itself with them.
//!
//! Whether a request's answer will be in time is judged by this. What batches take by their size is fitted to some fifty of them;
//! a replica that gets slower or faster does so at all sizes, which a few batches show.
//!
//! Invariant: a batch whose callers have all gone before its end counts as well, by the time that it had until then, if that is longer
//! than expected, and for twice of that at the most. Otherwise only those that were fast enough would, and a replica would be taken for
//! one that is.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::serving::arm::lock;
use crate::serving::patience::BatchCost;

/// How long it is believed how much memory a replica had in use: it says so only with answers.
const MEMORY_AGE_MAX: Duration = Duration::from_secs(10);

/// What the last batch counts in how much slower than the fit the last ones were.
const LAST: f64 = 0.125;

/// How much slower, or faster, a single batch may say that a replica has become.
const CHANGE_MAX: f64 = 16.0;

/// How fast a replica is.
#[derive(Default)]
pub(super) struct Pace {
    speed: Mutex<Speed>,
    /// Batches that it answered.
    answered: AtomicU64,
    /// The memory that its process had in use at its last answer, in percent, and when that was.
    memory: Mutex<Option<(u8, Instant)>>,
}

struct Speed {
    cost: BatchCost,
    /// What the last batches took, in shares of what the fit says.
    lately: f64,
}

impl Default for Speed {
    fn default() -> Self {
        Speed {
            cost: BatchCost::default(),
            lately: 1.0,
        }
    }
}

impl Speed {
    /// What a batch of so many rows takes, in seconds; 0 before the first.
    fn seconds(&self, rows: usize) -> f64 {
        self.cost.likely_seconds(rows) * self.lately
    }

    fn record(&mut self, rows: usize, taken: Duration) {
        let fitted = self.cost.likely_seconds(rows);
        if fitted > 0.0 {
            let ratio = taken.as_secs_f64() / fitted;
            let ratio = ratio.clamp(CHANGE_MAX.recip(), CHANGE_MAX);
            self.lately += (ratio - self.lately) * LAST;
        }
        self.cost.record(rows, taken);
    }
}

impl Pace {
    /// What a batch of so many rows takes; nothing before the first.
    pub(super) fn batch(&self, rows: usize) -> Duration {
        let seconds = lock(&self.speed).seconds(rows);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO)
    }

    /// A batch of so many rows begins now.
    pub(super) fn begin(&self, rows: usize) -> Running<'_> {
        Running {
            pace: self,
            rows,
            began: Instant::now(),
        }
    }

    /// How many batches it has answered.
    pub(super) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// The memory that its process has in use now, in percent, if it says so.
    pub(super) fn uses_memory(&self, percent: Option<u8>) {
        let now = Instant::now();
        *lock(&self.memory) = percent.map(|percent| (percent, now));
    }

    /// The memory that its process had in use at its last answer, in percent; 0 if that is not known, or was long ago.
    pub(super) fn memory_percent(&self) -> u8 {
        let known = *lock(&self.memory);
        let fresh = known.filter(|(_, at)| at.elapsed() < MEMORY_AGE_MAX);
        fresh.map_or(0, |(percent, _)| percent)
    }

    /// Batches take so long, whatever their size.
    #[cfg(test)]
    pub(super) fn set(&self, taken: Duration) {
        let mut speed = Speed::default();
        speed.record(1, taken);
        *lock(&self.speed) = speed;
    }
}

/// A batch that is computed. Dropped before its end, nobody waits for it any more.
pub(super) struct Running<'a> {
    pace: &'a Pace,
    rows: usize,
    began: Instant,
}

impl Running<'_> {
    /// It was answered.
    pub(super) fn answered(self) {
        lock(&self.pace.speed).record(self.rows, self.began.elapsed());
        self.pace.answered.fetch_add(1, Ordering::Relaxed);
        std::mem::forget(self);
    }

    /// It failed, which says nothing of what it would have taken.
    pub(super) fn failed(self) {
        std::mem::forget(self);
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let had = self.began.elapsed();
        let mut speed = lock(&self.pace.speed);
        let expected = Duration::try_from_secs_f64(speed.seconds(self.rows));
        let expected = expected.unwrap_or(Duration::ZERO);
        // One that hangs has not become slower: it takes several such batches to tell.
        if had > expected && !expected.is_zero() {
            speed.record(self.rows, had.min(expected * 2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Answers a batch that takes so long.
    async fn answer(pace: &Pace, rows: usize, takes: Duration) {
        let running = pace.begin(rows);
        tokio::time::advance(takes).await;
        running.answered();
    }

    fn is_near(found: Duration, expected: Duration) -> bool {
        found > expected.mul_f64(0.8) && found < expected.mul_f64(1.25)
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_batch_is_known_to_take_longer_than_the_small_ones_before_it() {
        let pace = Pace::default();
        assert_eq!(pace.batch(100), Duration::ZERO);
        answer(&pace, 1, 3 * MS).await;
        assert!(is_near(pace.batch(100), 3 * MS), "nothing else is known");
        for rows in (1..=16).cycle().take(64) {
            answer(&pace, rows, 2 * MS + MS / 4 * rows as u32).await;
        }
        assert!(is_near(pace.batch(1), 2 * MS + MS / 4));
        assert!(is_near(pace.batch(128), 34 * MS), "{:?}", pace.batch(128));
        assert_eq!(pace.answered(), 65);
        // A few batches show that it has become slower, of whatever size.
        for _ in 0..16 {
            answer(&pace, 4, 12 * MS).await;
        }
        assert!(pace.batch(128) > 100 * MS, "{:?}", pace.batch(128));
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_waited_for_counts_by_the_time_it_had() {
        let pace = Pace::default();
        pace.set(10 * MS);
        for _ in 0..40 {
            let running = pace.begin(64);
            tokio::time::advance(50 * MS).await;
            drop(running);
        }
        assert!(pace.batch(64) > 40 * MS, "{:?}", pace.batch(64));
        assert_eq!(pace.answered(), 0);
        // A single one that hangs says little.
        let hung = pace.begin(64);
        tokio::time::advance(2_000 * MS).await;
        drop(hung);
        assert!(pace.batch(64) < 100 * MS, "{:?}", pace.batch(64));
        // Who goes away earlier says nothing, nor does what failed.
        let before = pace.batch(64);
        for _ in 0..40 {
            let running = pace.begin(64);
            tokio::time::advance(MS).await;
            drop(running);
            let failed = pace.begin(64);
            tokio::time::advance(900 * MS).await;
            failed.failed();
        }
        assert_eq!(pace.batch(64), before);
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_process_said_of_its_memory_is_believed_for_a_while() {
        let pace = Pace::default();
        assert_eq!(pace.memory_percent(), 0);
        pace.uses_memory(Some(70));
        assert_eq!(pace.memory_percent(), 70);
        tokio::time::advance(MEMORY_AGE_MAX).await;
        assert_eq!(pace.memory_percent(), 0);
    }
}
