//! How long a batch should wait for one more request: only while what that saves exceeds what it costs.
//!
//! A batch of `n` rows takes `a·n + b`: `b` is what a batch costs however small it is. With `k` requests waiting, and the next
//! one of `r` rows coming in a time `w`, sending now makes that one wait for this batch and pay `b` again; waiting
//! makes all of them later by `w` and by its rows. The sum of the latencies is smaller by `b − k·a·r − (k + 1)·w`. Who waits
//! a time `t` and sees nobody come has lost `k·t`. When the next one comes is known from when others came:
//! `t` is what makes the expected gain largest, and nothing is waited for if none is to be had.
//!
//! Invariants:
//! 1. Memory and time are constant: sums and counts that forget, no history.
//! 2. Nothing is waited for while `a` and `b` are not told apart, which takes batches of different sizes.
//! 3. A batch that took unusually long moves the fit by no more than `OUTLIER` usual deviations.

use std::f64::consts::SQRT_2;
use std::time::Duration;

/// What a new observation counts; the weight of the older ones shrinks by this share, so that some fifty count.
const FORGETTING: f64 = 0.02;

/// How many usual deviations a batch may be from the fit and count in full.
const OUTLIER: f64 = 3.0;

/// The variance of sizes, relative to the square of their mean, below which the two costs are not told apart.
const SPREAD_MIN: f64 = 1e-3;

/// Observations before the fit is believed.
const OBSERVATIONS_MIN: u32 = 8;

/// A value that follows its observations.
#[derive(Debug, Clone, Copy, Default)]
struct Average {
    value: f64,
    weight: f64,
}

impl Average {
    fn record(&mut self, value: f64) {
        self.weight = self.weight * (1.0 - FORGETTING) + FORGETTING;
        // The first ones count as what they are, not as if there had been zeros before.
        self.value += (value - self.value) * (FORGETTING / self.weight);
    }
}

/// What batches take, by their size: `a·n + b`, fitted while they run.
#[derive(Debug, Clone, Default)]
pub struct BatchCost {
    rows: Average,
    rows_squared: Average,
    time: Average,
    rows_times_time: Average,
    deviation: Average,
    observations: u32,
}

impl BatchCost {
    /// Learns what a batch took.
    pub fn record(&mut self, rows: usize, taken: Duration) {
        let rows = rows.max(1) as f64;
        let mut seconds = taken.as_secs_f64();
        if self.observations >= OBSERVATIONS_MIN {
            let expected = self.seconds(rows);
            let usual = self.deviation.value.max(expected * 0.01);
            seconds = seconds.clamp(expected - OUTLIER * usual, expected + OUTLIER * usual);
            self.deviation.record((seconds - expected).abs());
        } else {
            // How far the first ones are from each other is the best guess of what is usual.
            self.deviation.record((seconds - self.time.value).abs());
        }
        self.observations = self.observations.saturating_add(1);
        self.rows.record(rows);
        self.rows_squared.record(rows * rows);
        self.time.record(seconds);
        self.rows_times_time.record(rows * seconds);
    }

    /// `a` and `b`, in seconds; none while they are not told apart.
    fn fit(&self) -> Option<(f64, f64)> {
        let mean = self.rows.value;
        let variance = self.rows_squared.value - mean * mean;
        if self.observations < OBSERVATIONS_MIN || variance <= SPREAD_MIN * mean * mean {
            return None;
        }
        let covariance = self.rows_times_time.value - mean * self.time.value;
        let a = covariance / variance;
        if a <= 0.0 {
            return Some((0.0, self.time.value));
        }
        let b = self.time.value - a * mean;
        if b < 0.0 {
            return Some((self.rows_times_time.value / self.rows_squared.value, 0.0));
        }
        Some((a, b))
    }

    fn seconds(&self, rows: f64) -> f64 {
        match self.fit() {
            Some((a, b)) => a * rows + b,
            // In proportion, at the worst.
            None => self.time.value * (rows / self.rows.value.max(1.0)).max(1.0),
        }
    }

    /// What a batch of so many rows is likely to take, in seconds: the average of all while the two costs are not told apart.
    #[must_use]
    pub fn likely_seconds(&self, rows: usize) -> f64 {
        let (a, b) = self.fit().unwrap_or((0.0, self.time.value));
        a * rows as f64 + b
    }

    /// What a batch of so many rows takes at the worst; nothing before the first.
    #[must_use]
    pub fn expected(&self, rows: usize) -> Duration {
        Duration::try_from_secs_f64(self.seconds(rows as f64)).unwrap_or(Duration::ZERO)
    }
}

/// Ranges of times between two requests: each ends at √2 times the end of the one before, the first at 1 µs, the last at
/// 36 minutes.
const RANGES: usize = 64;

/// When requests come, and how large they are.
#[derive(Debug, Clone)]
pub struct Arrivals {
    /// How many came so long after the one before, by range.
    gaps: [f64; RANGES],
    rows: Average,
    observations: u32,
}

impl Default for Arrivals {
    fn default() -> Self {
        Arrivals {
            gaps: [0.0; RANGES],
            rows: Average::default(),
            observations: 0,
        }
    }
}

/// Where a range ends, in seconds.
fn end_of(range: usize) -> f64 {
    let doubled = (1u64 << (range / 2)) as f64;
    let factor = if range.is_multiple_of(2) { 1.0 } else { SQRT_2 };
    1e-6 * doubled * factor
}

impl Arrivals {
    /// Learns of a request, and how long after the one before it came.
    pub fn record(&mut self, gap: Duration, rows: usize) {
        for count in &mut self.gaps {
            *count *= 1.0 - FORGETTING;
        }
        let micros = gap.as_secs_f64() * 1e6;
        let range = (2.0 * micros.max(1.0).log2()).ceil();
        self.gaps[(range as usize).min(RANGES - 1)] += FORGETTING;
        self.rows.record(rows as f64);
        self.observations = self.observations.saturating_add(1);
    }
}

/// How long the next request is worth waiting for, with so many waiting and the last one having come this long ago; zero:
/// not at all.
#[must_use]
pub fn patience(
    cost: &BatchCost,
    arrivals: &Arrivals,
    requests: usize,
    since_last: Duration,
) -> Duration {
    let Some((a, b)) = cost.fit() else {
        return Duration::ZERO;
    };
    let waiting = requests as f64;
    let saved = b - waiting * a * arrivals.rows.value;
    let since_last = since_last.as_secs_f64();
    // Those that would have come by now tell nothing any more.
    let later = (0..RANGES).filter(|range| end_of(*range) > since_last);
    let of_later: f64 = later.clone().map(|range| arrivals.gaps[range]).sum();
    if saved <= 0.0 || arrivals.observations < OBSERVATIONS_MIN || of_later < FORGETTING * 0.5 {
        return Duration::ZERO;
    }
    let (mut best, mut best_gain) = (0.0, 0.0);
    let (mut come, mut gain) = (0.0, 0.0);
    for range in later {
        let wait = end_of(range) - since_last;
        if wait * waiting > saved {
            break;
        }
        let share = arrivals.gaps[range] / of_later;
        come += share;
        gain += share * (saved - (waiting + 1.0) * wait);
        let expected = gain - (1.0 - come) * waiting * wait;
        if expected > best_gain {
            (best, best_gain) = (wait, expected);
        }
    }
    Duration::try_from_secs_f64(best).unwrap_or(Duration::ZERO)
}

#[cfg(test)]
#[path = "patience_tests.rs"]
mod tests;
