//! The Page-Hinkley test, in both directions.

use super::Change;

/// Numbers before the first alarm.
const OBSERVATIONS_MIN: u64 = 30;

/// The change of the mean that does not count.
const TOLERANCE: f64 = 0.005;

/// What the cumulative sum may move away from its extreme.
const THRESHOLD: f64 = 50.0;

/// What is left of the cumulative sum with each number.
const FORGETTING: f64 = 1.0 - 0.0001;

/// How many numbers there were, and their sum.
#[derive(Clone, Copy, Debug, Default)]
struct Total {
    count: u64,
    sum: f64,
}

/// One direction: a cumulative sum, and its extreme with what had been seen by then, which is where the change began.
#[derive(Clone, Copy, Debug)]
struct Side {
    sum: f64,
    extreme: f64,
    at_extreme: Total,
}

impl Side {
    fn new(extreme: f64) -> Self {
        Side {
            sum: 0.0,
            extreme,
            at_extreme: Total::default(),
        }
    }

    fn add(&mut self, step: f64, seen: Total, is_beyond: fn(f64, f64) -> bool) {
        self.sum = FORGETTING * self.sum + step;
        if is_beyond(self.sum, self.extreme) {
            self.extreme = self.sum;
            self.at_extreme = seen;
        }
    }
}

/// The test.
#[derive(Clone, Debug)]
pub struct PageHinkley {
    seen: Total,
    /// By its own recurrence, so that the test's numbers are those that others have.
    mean: f64,
    increase: Side,
    decrease: Side,
    found: bool,
}

impl Default for PageHinkley {
    fn default() -> Self {
        PageHinkley {
            seen: Total::default(),
            mean: 0.0,
            increase: Side::new(f64::INFINITY),
            decrease: Side::new(f64::NEG_INFINITY),
            found: false,
        }
    }
}

impl PageHinkley {
    /// A test that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        PageHinkley::default()
    }

    /// Takes a number; the change that shows with it.
    pub fn update(&mut self, value: f64) -> Option<Change> {
        if !value.is_finite() {
            return None;
        }
        if self.found {
            *self = PageHinkley::new();
        }
        self.seen.count += 1;
        self.seen.sum += value;
        self.mean += (value - self.mean) / self.seen.count as f64;
        let distance = value - self.mean;
        self.increase
            .add(distance - TOLERANCE, self.seen, |sum, least| sum < least);
        self.decrease
            .add(distance + TOLERANCE, self.seen, |sum, most| sum > most);
        if self.seen.count < OBSERVATIONS_MIN {
            return None;
        }
        let sides = [
            (self.increase.sum - self.increase.extreme, self.increase),
            (self.decrease.extreme - self.decrease.sum, self.decrease),
        ];
        let (statistic, side) = sides
            .into_iter()
            .find(|(statistic, _)| *statistic > THRESHOLD)?;
        self.found = true;
        let before = side.at_extreme;
        let since = (self.seen.count - before.count).max(1) as f64;
        Some(Change {
            statistic,
            threshold: THRESHOLD,
            before: before.sum / before.count.max(1) as f64,
            after: (self.seen.sum - before.sum) / since,
            observations: self.seen.count,
        })
    }
}
