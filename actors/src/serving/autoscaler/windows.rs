//! Averages of an endpoint's load over windows of time. Pure: the time comes in with each reading.
//!
//! Invariants:
//! 1. Readings are bounded: about a hundred to the longest window, however often it is looked.
//! 2. A window that is not full yet says so: who starts in the middle knows little.

use std::collections::VecDeque;

use super::load::Load;

/// Readings to a window: an average over the window then is off by a hundredth of it at the most.
const READINGS: u64 = 100;

#[derive(Debug, Clone, Copy)]
struct Reading {
    at_ms: u64,
    load: Load,
}

/// What an endpoint's load was lately.
#[derive(Debug, Default)]
pub struct Windows {
    readings: VecDeque<Reading>,
    /// When a request was last seen, or the first reading.
    busy_ms: u64,
}

/// Averages over one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Average {
    /// Requests in flight, in thousandths.
    pub in_flight_milli: u64,
    /// Requests that came, in thousandths a second.
    pub rate_milli: u64,
    /// The 99th percentile of answers, in microseconds, if there were any.
    pub p99_us: Option<u64>,
    /// Replicas whose model computed, in thousandths.
    pub busy_milli: u64,
    /// Requests that there was no room for, in thousandths a second.
    pub refused_milli: u64,
    /// Whether the whole window was seen.
    pub is_whole: bool,
}

impl Windows {
    /// Takes a reading; `keep_ms` is the longest window that will be asked for.
    pub fn observe(&mut self, now_ms: u64, load: Load, keep_ms: u64) {
        // A clock that was set back: what was seen before it cannot be placed.
        if self.readings.back().is_some_and(|last| last.at_ms > now_ms) {
            self.readings.clear();
        }
        let last = self.readings.back().map(|reading| reading.load);
        if load.in_flight > 0 || last.is_none_or(|last| last.arrived != load.arrived) {
            self.busy_ms = now_ms;
        }
        let spacing_ms = keep_ms / READINGS;
        let count = self.readings.len();
        if count >= 2 && now_ms - self.readings[count - 2].at_ms < spacing_ms {
            self.readings.pop_back();
        }
        self.readings.push_back(Reading {
            at_ms: now_ms,
            load,
        });
        // One reading from before the window stays: the window begins in it.
        while self.readings.len() > 2 && self.readings[1].at_ms + keep_ms <= now_ms {
            self.readings.pop_front();
        }
    }

    /// The average over the last `window_ms`; `None` before the second reading.
    #[must_use]
    pub fn average(&self, window_ms: u64) -> Option<Average> {
        let newest = self.readings.back()?;
        let begin_ms = newest.at_ms.saturating_sub(window_ms);
        let is_before = |reading: &&Reading| reading.at_ms <= begin_ms;
        let before = self.readings.iter().rev().find(is_before);
        let oldest = before.or_else(|| self.readings.front())?;
        let elapsed_ms = newest.at_ms - oldest.at_ms;
        if elapsed_ms == 0 {
            return None;
        }
        let spent_us = newest.load.spent_us - oldest.load.spent_us;
        let arrived = newest.load.arrived - oldest.load.arrived;
        let refused = newest.load.refused - oldest.load.refused;
        let computed_us = (newest.load.computed_ns - oldest.load.computed_ns) / 1_000;
        Some(Average {
            // Microseconds spent in a millisecond are thousandths of a request.
            in_flight_milli: spent_us / elapsed_ms,
            rate_milli: arrived.saturating_mul(1_000_000) / elapsed_ms,
            p99_us: newest.load.latencies.since(&oldest.load.latencies).p99_us(),
            busy_milli: computed_us / elapsed_ms,
            refused_milli: refused.saturating_mul(1_000_000) / elapsed_ms,
            is_whole: before.is_some(),
        })
    }

    /// How long nothing has been asked.
    #[must_use]
    pub fn idle_ms(&self) -> u64 {
        let newest = self.readings.back().map_or(0, |reading| reading.at_ms);
        newest.saturating_sub(self.busy_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(spent_us: u64, arrived: u64, in_flight: u64) -> Load {
        Load {
            in_flight,
            spent_us,
            arrived,
            ..Load::default()
        }
    }

    #[test]
    fn averages_are_over_the_window_and_readings_are_bounded() {
        let mut windows = Windows::default();
        assert_eq!(windows.average(1_000), None);
        // Two in flight for a minute, seen a hundred times a second, then ten.
        let (mut spent_us, mut arrived) = (0, 0);
        for tick in 0..=12_000_u64 {
            windows.observe(tick * 10, load(spent_us, arrived, 1), 60_000);
            let in_flight = if tick < 6_000 { 2 } else { 10 };
            spent_us += in_flight * 10_000;
            arrived += 1;
        }
        assert!(windows.readings.len() <= 104, "{}", windows.readings.len());
        let six = windows.average(6_000).unwrap();
        assert_eq!((six.in_flight_milli, six.rate_milli), (10_000, 100_000));
        assert!(six.is_whole);
        let all = windows.average(120_000).unwrap();
        assert!(!all.is_whole);
    }

    #[test]
    fn idleness_begins_after_the_last_request_also_one_that_fell_between_two_looks() {
        let mut windows = Windows::default();
        windows.observe(1_000, load(0, 0, 0), 10_000);
        windows.observe(5_000, load(0, 0, 0), 10_000);
        assert_eq!(windows.idle_ms(), 4_000);
        windows.observe(6_000, load(5, 1, 0), 10_000);
        assert_eq!(windows.idle_ms(), 0);
        windows.observe(9_000, load(5, 1, 0), 10_000);
        assert_eq!(windows.idle_ms(), 3_000);
    }

    #[test]
    fn a_clock_that_is_set_back_is_survived() {
        let mut windows = Windows::default();
        windows.observe(50_000, load(7, 1, 0), 10_000);
        windows.observe(20_000, load(9, 1, 0), 10_000);
        assert_eq!(windows.average(10_000), None);
        windows.observe(21_000, load(9, 1, 0), 10_000);
        assert_eq!(windows.average(10_000).unwrap().in_flight_milli, 0);
    }
}
