//! Adaptive windowing.
//!
//! The window is kept as buckets that hold 1, 2, 4, … numbers, at most six of each size: two buckets of one size that
//! are too many become one of the next. The window is cut between two buckets where the means of the two sides differ
//! by more than chance allows.

use super::Change;

/// The probability of finding a change in a window without one.
const DELTA: f64 = 0.002;

/// Numbers between two looks for a cut: a look costs a pass over the buckets.
const CLOCK: u64 = 32;

/// Buckets of one size, before the two oldest become one of the next.
const BUCKETS_MAX: usize = 5;

/// Numbers on each side of a cut, at least.
const SIDE_MIN: u64 = 5;

/// Numbers before the first look.
const GRACE: u64 = 10;

/// Some neighbouring numbers of the window.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    sum: f64,
    /// The sum of the squared distances from their mean.
    scatter: f64,
}

/// ADWIN2 with the bound that uses the variance.
#[derive(Clone, Debug, Default)]
pub struct Adwin {
    /// Buckets of `2^index` numbers, oldest first; the largest are the oldest.
    rows: Vec<Vec<Bucket>>,
    width: u64,
    sum: f64,
    scatter: f64,
    updates: u64,
    found: bool,
}

impl Adwin {
    /// A detector that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Adwin::default()
    }

    /// Numbers in the window.
    #[must_use]
    pub fn width(&self) -> u64 {
        self.width
    }

    /// Buckets that the window takes.
    #[must_use]
    pub fn buckets(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }

    /// Takes a number; the change that shows with it.
    pub fn update(&mut self, value: f64) -> Option<Change> {
        if !value.is_finite() {
            return None;
        }
        if self.found {
            *self = Adwin::new();
        }
        self.insert(value);
        self.updates += 1;
        if !self.updates.is_multiple_of(CLOCK) || self.width <= GRACE {
            return None;
        }
        let (width, sum) = (self.width, self.sum);
        let mut last = None;
        while let Some(cut) = self.find_cut() {
            last = Some(cut);
            self.drop_oldest();
        }
        self.found = last.is_some();
        last.map(|(statistic, threshold)| Change {
            statistic,
            threshold,
            before: (sum - self.sum) / (width - self.width) as f64,
            after: self.sum / self.width as f64,
            observations: self.updates,
        })
    }

    fn insert(&mut self, value: f64) {
        if self.rows.is_empty() {
            self.rows.push(Vec::with_capacity(BUCKETS_MAX + 1));
        }
        self.rows[0].push(Bucket {
            sum: value,
            scatter: 0.0,
        });
        if self.width > 0 {
            let width = self.width as f64;
            let distance = value - self.sum / width;
            self.scatter += width * distance.powi(2) / (width + 1.0);
        }
        self.width += 1;
        self.sum += value;
        self.compress();
    }

    fn compress(&mut self) {
        let mut size = 1.0;
        let mut index = 0;
        while index < self.rows.len() && self.rows[index].len() > BUCKETS_MAX {
            if index + 1 == self.rows.len() {
                self.rows.push(Vec::with_capacity(BUCKETS_MAX + 1));
            }
            let (first, second) = (self.rows[index][0], self.rows[index][1]);
            self.rows[index].drain(..2);
            let apart = (first.sum - second.sum) / size;
            self.rows[index + 1].push(Bucket {
                sum: first.sum + second.sum,
                scatter: first.scatter + second.scatter + size * apart.powi(2) / 2.0,
            });
            size *= 2.0;
            index += 1;
        }
    }

    /// By how much the window falls apart where it first does, from its old end on, and what would be chance.
    fn find_cut(&self) -> Option<(f64, f64)> {
        let (mut old, mut old_sum) = (0u64, 0.0);
        for (index, row) in self.rows.iter().enumerate().rev() {
            for bucket in row {
                old += 1 << index;
                old_sum += bucket.sum;
                let new = self.width - old;
                if new < SIDE_MIN {
                    return None;
                }
                if old < SIDE_MIN {
                    continue;
                }
                let (before, after) = (old_sum / old as f64, (self.sum - old_sum) / new as f64);
                let (statistic, threshold) = ((before - after).abs(), self.bound(old, new));
                if statistic > threshold {
                    return Some((statistic, threshold));
                }
            }
        }
        None
    }

    /// By how much the means of two sides of so many numbers may differ by chance.
    fn bound(&self, old: u64, new: u64) -> f64 {
        let width = self.width as f64;
        let looks = (2.0 * width.ln() / DELTA).ln();
        let share = |side: u64| 1.0 / (side - SIDE_MIN + 1) as f64;
        let harmonic = share(old) + share(new);
        (2.0 * harmonic * (self.scatter / width) * looks).sqrt() + 2.0 / 3.0 * looks * harmonic
    }

    fn drop_oldest(&mut self) {
        let Some(index) = self.rows.iter().rposition(|row| !row.is_empty()) else {
            return;
        };
        let bucket = self.rows[index].remove(0);
        let size = (1u64 << index) as f64;
        self.width -= 1 << index;
        self.sum -= bucket.sum;
        // A cut leaves numbers on its new side.
        let rest = self.width as f64;
        let apart = bucket.sum / size - self.sum / rest;
        let between = size * rest * apart.powi(2) / (size + rest);
        // Rounding must not make it negative.
        self.scatter = (self.scatter - bucket.scatter - between).max(0.0);
        self.rows.truncate(index + 1);
    }
}
