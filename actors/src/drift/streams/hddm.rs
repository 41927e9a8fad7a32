//! Detectors of growth in a stream of errors, by bounds that hold whatever the distribution.
//!
//! Both remember the stream as it was at its best and compare what came since. They look at growth only: that a model
//! became better is no reason to act.

use super::Change;

/// The probability of an alarm without a change.
const CONFIDENCE: f64 = 0.001;

/// What the newest number counts in an average that forgets.
const LAMBDA: f64 = 0.05;

/// A plain average.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    count: u64,
    mean: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.count += 1;
        self.mean += (value - self.mean) / self.count as f64;
    }

    /// How far the true mean may lie from this one.
    fn bound(self) -> f64 {
        ((1.0 / CONFIDENCE).ln() / (2.0 * self.count as f64)).sqrt()
    }
}

/// HDDM with averages (A-test): finds sudden changes.
#[derive(Clone, Debug, Default)]
pub struct HddmA {
    all: Mean,
    /// The stream up to where its mean was lowest.
    best: Mean,
    found: bool,
}

impl HddmA {
    /// A detector that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        HddmA::default()
    }

    /// Takes a number in `[0, 1]`; the growth that shows with it.
    pub fn update(&mut self, value: f64) -> Option<Change> {
        if !value.is_finite() {
            return None;
        }
        if self.found {
            *self = HddmA::new();
        }
        self.all.add(value);
        if self.best.count == 0
            || self.best.mean + self.best.bound() >= self.all.mean + self.all.bound()
        {
            self.best = self.all;
        }
        let (all, best) = (self.all, self.best);
        let since = all.count - best.count;
        if since == 0 {
            return None;
        }
        let share = since as f64 / best.count as f64 / all.count as f64;
        let threshold = (share / 2.0 * (2.0 / CONFIDENCE).ln()).sqrt();
        let statistic = all.mean - best.mean;
        self.found = statistic >= threshold;
        self.found.then(|| Change {
            statistic,
            threshold,
            before: best.mean,
            after: (all.mean * all.count as f64 - best.mean * best.count as f64) / since as f64,
            observations: all.count,
        })
    }
}

/// An average that forgets, and the sum of its squared weights, which bounds it.
#[derive(Clone, Copy, Debug)]
struct Forgetting {
    mean: Option<f64>,
    squares: f64,
}

impl Default for Forgetting {
    fn default() -> Self {
        Forgetting {
            mean: None,
            squares: 1.0,
        }
    }
}

impl Forgetting {
    fn add(&mut self, value: f64) {
        let before = self.mean.unwrap_or(value);
        self.mean = Some(LAMBDA * value + (1.0 - LAMBDA) * before);
        self.squares = LAMBDA.powi(2) + (1.0 - LAMBDA).powi(2) * self.squares;
    }
}

/// McDiarmid's bound for averages with these squared weights.
fn mcdiarmid(squares: f64) -> f64 {
    (squares * (1.0 / CONFIDENCE).ln() / 2.0).sqrt()
}

/// HDDM with averages that forget (W-test): finds gradual changes.
#[derive(Clone, Debug)]
pub struct HddmW {
    all: Forgetting,
    best: Forgetting,
    since: Forgetting,
    /// The lowest upper bound of the mean so far.
    lowest: f64,
    observations: u64,
    found: bool,
}

impl Default for HddmW {
    fn default() -> Self {
        HddmW {
            all: Forgetting::default(),
            best: Forgetting::default(),
            since: Forgetting::default(),
            lowest: f64::INFINITY,
            observations: 0,
            found: false,
        }
    }
}

impl HddmW {
    /// A detector that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        HddmW::default()
    }

    /// Takes a number in `[0, 1]`; the growth that shows with it.
    pub fn update(&mut self, value: f64) -> Option<Change> {
        if !value.is_finite() {
            return None;
        }
        if self.found {
            *self = HddmW::new();
        }
        self.observations += 1;
        self.all.add(value);
        let upper = self.all.mean? + mcdiarmid(self.all.squares);
        if upper < self.lowest {
            self.lowest = upper;
            self.best = self.all;
            self.since = Forgetting::default();
        } else {
            self.since.add(value);
        }
        let (before, after) = (self.best.mean?, self.since.mean?);
        let threshold = mcdiarmid(self.best.squares + self.since.squares);
        self.found = after - before > threshold;
        self.found.then_some(Change {
            statistic: after - before,
            threshold,
            before,
            after,
            observations: self.observations,
        })
    }
}
