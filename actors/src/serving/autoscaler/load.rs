//! What an endpoint's router has in flight: counted where requests come and go, exactly and without
//! samples.
//!
//! Invariants:
//! 1. A request is counted from its arrival until it is answered, refused or dropped.
//! 2. The time that requests spent here is their number integrated over time, so that an average over any
//!    window is a difference of two readings.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// Buckets of answers by their time: four to each doubling, from 50 µs to a minute.
const BUCKETS: usize = 82;

/// The upper edge of the first bucket, in microseconds.
const FIRST_EDGE_US: f64 = 50.0;

/// How many answers took how long, as numbers that only grow (and wrap).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latencies {
    counts: [u32; BUCKETS],
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies {
            counts: [0; BUCKETS],
        }
    }
}

impl Latencies {
    /// Counts an answer.
    pub fn record(&mut self, taken: Duration) {
        let micros = taken.as_secs_f64() * 1e6;
        let bucket = ((micros / FIRST_EDGE_US).log2() * 4.0).ceil().max(0.0) as usize;
        let count = &mut self.counts[bucket.min(BUCKETS - 1)];
        *count = count.wrapping_add(1);
    }

    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Latencies) -> Latencies {
        let mut counts = self.counts;
        for (count, before) in counts.iter_mut().zip(earlier.counts) {
            *count = count.wrapping_sub(before);
        }
        Latencies { counts }
    }

    /// The time that 99 of 100 answers did not exceed, in microseconds: the upper edge of a bucket, so at
    /// most 19 % too high. `None` without an answer.
    #[must_use]
    pub fn p99_us(&self) -> Option<u64> {
        let total: u64 = self.counts.iter().map(|count| u64::from(*count)).sum();
        let rank = (total * 99).div_ceil(100);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if *count > 0 && seen >= rank {
                return Some((FIRST_EDGE_US * (bucket as f64 / 4.0).exp2()) as u64);
            }
        }
        None
    }
}

/// A reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Requests that wait or are being answered.
    pub in_flight: u64,
    /// The time that requests spent here so far, in microseconds, all together.
    pub spent_us: u64,
    /// Requests that came so far.
    pub arrived: u64,
    /// How long answers took.
    pub latencies: Latencies,
    /// The time that models computed so far, in nanoseconds, all replicas together.
    pub computed_ns: u64,
    /// Requests that were refused so far because the replicas would not have answered them in time.
    pub refused: u64,
}

impl Load {
    /// Goes on to a later time, with as many in flight.
    fn elapse(&mut self, elapsed: Duration) {
        let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let spent = self.in_flight.saturating_mul(elapsed_us);
        self.spent_us = self.spent_us.saturating_add(spent);
    }
}

struct Counted {
    load: Load,
    at: Instant,
    /// Whoever watches is told when more than this are in flight; once.
    alarm_above: Option<u64>,
}

/// Counts the requests of an endpoint.
pub struct LoadMeter {
    counted: Mutex<Counted>,
    alarm: Notify,
}

impl Default for LoadMeter {
    fn default() -> Self {
        LoadMeter {
            counted: Mutex::new(Counted {
                load: Load::default(),
                at: Instant::now(),
                alarm_above: None,
            }),
            alarm: Notify::new(),
        }
    }
}

impl LoadMeter {
    fn now(&self) -> MutexGuard<'_, Counted> {
        // Whole after every single update, so a panic elsewhere does not spoil it.
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let elapsed = now - counted.at;
        // Whole microseconds only, so that nothing is lost to rounding.
        let whole = Duration::from_micros(elapsed.as_micros() as u64);
        counted.load.elapse(whole);
        counted.at += whole;
        counted
    }

    /// Counts a request for as long as the answer lives.
    #[must_use]
    pub fn enter(&self) -> Entered<'_> {
        let mut counted = self.now();
        counted.load.in_flight += 1;
        counted.load.arrived += 1;
        if counted
            .alarm_above
            .is_some_and(|above| counted.load.in_flight > above)
        {
            counted.alarm_above = None;
            self.alarm.notify_one();
        }
        Entered {
            meter: self,
            since: counted.at,
        }
    }

    /// Counts what a model computed.
    pub fn computed(&self, taken_ns: u64) {
        let mut counted = self.now();
        let so_far = counted.load.computed_ns;
        counted.load.computed_ns = so_far.saturating_add(taken_ns);
    }

    /// What is so now.
    #[must_use]
    pub fn read(&self) -> Load {
        self.now().load
    }

    /// Asks to be told once when more than `above` requests are in flight. Where there are so many already, who
    /// asks knows that, and nobody is told.
    pub fn alarm_above(&self, above: u64) {
        let mut counted = self.now();
        counted.alarm_above = (counted.load.in_flight <= above).then_some(above);
    }

    /// Waits for the alarm.
    pub async fn alarmed(&self) {
        self.alarm.notified().await;
    }
}

/// A request that is counted.
pub struct Entered<'a> {
    meter: &'a LoadMeter,
    since: Instant,
}

impl Entered<'_> {
    /// Counts that there was no room for it.
    pub fn refused(&self) {
        self.meter.now().load.refused += 1;
    }

    /// Counts its answer with the time that it took.
    pub fn answered(&self) {
        let taken = self.since.elapsed();
        self.meter.now().load.latencies.record(taken);
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.meter.now().load.in_flight -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_in_flight_is_counted_exactly_and_also_of_who_goes_away() {
        let meter = LoadMeter::default();
        let second = Duration::from_secs(1);
        let one = meter.enter();
        tokio::time::advance(second).await;
        let two = meter.enter();
        tokio::time::advance(second * 2).await;
        one.answered();
        drop(one);
        drop(two);
        tokio::time::advance(second).await;
        let load = meter.read();
        assert_eq!(
            (load.in_flight, load.arrived, load.spent_us),
            (0, 2, 5_000_000)
        );
        let p99 = load.latencies.p99_us().unwrap();
        assert!((3_000_000..3_600_000).contains(&p99), "{p99}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_alarm_goes_off_once_when_there_become_too_many() {
        let meter = LoadMeter::default();
        meter.alarm_above(1);
        let entered: Vec<Entered<'_>> = (0..3).map(|_| meter.enter()).collect();
        meter.alarmed().await;
        for above in [1, 2] {
            let again = tokio::time::timeout(Duration::from_secs(1), meter.alarmed());
            assert!(again.await.is_err());
            meter.alarm_above(above);
            let _more = meter.enter();
        }
        drop(entered);
        meter.alarm_above(0);
        let _one = meter.enter();
        meter.alarmed().await;
    }

    #[test]
    fn percentiles_are_at_most_a_bucket_too_high() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.p99_us(), None);
        for millis in 1..=1000 {
            latencies.record(Duration::from_millis(millis));
        }
        let p99 = latencies.p99_us().unwrap() as f64;
        assert!((990_000.0..990_000.0 * 1.19).contains(&p99), "{p99}");
        let before = latencies;
        latencies.record(Duration::from_micros(1));
        assert_eq!(latencies.since(&before).p99_us(), Some(50));
        latencies.record(Duration::from_secs(3600));
        assert!(latencies.since(&before).p99_us().unwrap() > 60_000_000);
    }
}
