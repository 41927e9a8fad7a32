//! DDSketch (Masson, Rim and Lee, 2019): a histogram whose bins grow with their distance from a centre.
//!
//! The paper measures from zero. Measured from somewhere near the mean instead, an error relative to the distance is an error relative
//! to the spread, which is what distances between distributions are compared with; a year or a price does not spoil it.
//!
//! 1. What a value is kept as differs from it by at most [`RELATIVE_ACCURACY`] of its distance from the centre, but for those
//!    nearest to it once a side has more than [`BINS_MAX`] bins.
//! 2. Those are in the side's lowest bin, at most `e^(−20)` as far from the centre as the side's farthest value.
//! 3. The bins depend on which values came, not on their order nor on how parts of them were merged.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::kernels::math;

/// By how much of its distance from the centre a value may be off.
pub const RELATIVE_ACCURACY: f64 = 0.01;

/// Bins of a side: they span a factor of `e^20.48`, eight decimal orders of magnitude, in 8 KiB.
pub const BINS_MAX: usize = 1024;

/// By what a bin's upper end is larger than its lower one.
const GAMMA: f64 = (1.0 + RELATIVE_ACCURACY) / (1.0 - RELATIVE_ACCURACY);

/// Its natural logarithm.
const LN_GAMMA: f64 = 0.020_000_666_706_669_524;

/// No finite distance has a key beyond this, on either side of zero.
const KEY_MAX: i32 = 40_000;

/// Distances on one side of the centre: bin `i` counts those in `(γ^(lowest + i − 1), γ^(lowest + i)]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Bins {
    lowest: i32,
    counts: VecDeque<u64>,
    has_collapsed: bool,
}

impl Bins {
    fn add(&mut self, key: i32, count: u64) {
        let place = self.make_room(key);
        self.counts[place] += count;
    }

    /// The place of a key, which is that of the lowest bin for all that are too low.
    fn make_room(&mut self, key: i32) -> usize {
        if self.counts.is_empty() {
            self.lowest = key;
        }
        let highest = self.highest().max(key);
        let lowest_kept = highest - (BINS_MAX as i32 - 1);
        self.collapse_below(lowest_kept);
        self.has_collapsed |= key < lowest_kept;
        let key = key.max(lowest_kept);
        for _ in key..self.lowest {
            self.counts.push_front(0);
        }
        self.lowest = self.lowest.min(key);
        let place = (key - self.lowest) as usize;
        if place >= self.counts.len() {
            self.counts.resize(place + 1, 0);
        }
        place
    }

    fn highest(&self) -> i32 {
        self.lowest + (self.counts.len() as i32 - 1).max(0)
    }

    fn collapse_below(&mut self, lowest: i32) {
        if lowest <= self.lowest {
            return;
        }
        let low = ((lowest - self.lowest) as usize).min(self.counts.len());
        let collapsed: u64 = self.counts.drain(..low).sum();
        self.lowest = lowest;
        if collapsed > 0 {
            self.has_collapsed = true;
            self.add(lowest, collapsed);
        }
    }

    fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The distance that stands for each bin with anything in it, ascending, and how many it counts.
    fn distances(&self) -> impl DoubleEndedIterator<Item = (f64, u64)> + '_ {
        let bins = self.counts.iter().enumerate();
        bins.filter(|(_, count)| **count > 0)
            .map(|(bin, count)| (distance(self.lowest + bin as i32), *count))
    }

    fn merge(&mut self, other: &Bins) {
        // From the highest on, so that what must collapse does so once.
        for (bin, count) in other.counts.iter().enumerate().rev() {
            if *count > 0 {
                self.add(other.lowest + bin as i32, *count);
            }
        }
        self.has_collapsed |= other.has_collapsed;
    }

    fn is_sound(&self) -> bool {
        self.counts.len() <= BINS_MAX && (-KEY_MAX..=KEY_MAX).contains(&self.lowest)
    }
}

fn key(distance: f64) -> i32 {
    (math::ln(distance) / LN_GAMMA).ceil() as i32
}

/// The distance from which both ends of a bin differ by the same share.
fn distance(key: i32) -> f64 {
    upper_end(key) * (2.0 / (1.0 + GAMMA))
}

fn upper_end(key: i32) -> f64 {
    (f64::from(key) * LN_GAMMA).exp()
}

/// Why sketches cannot be merged.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("a sketch around {this} cannot take in one around {other}: their bins differ")]
pub struct CenterMismatch {
    this: f64,
    other: f64,
}

/// A sketch with bounded errors of values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DdSketch {
    center: f64,
    below: Bins,
    at_center: u64,
    above: Bins,
    /// The ends; infinite the wrong way round while nothing has come.
    smallest: f64,
    largest: f64,
    not_finite: u64,
}

impl DdSketch {
    /// An empty sketch around a finite `center`; best near the mean of what will come.
    #[must_use]
    pub fn new(center: f64) -> Self {
        DdSketch {
            center,
            below: Bins::default(),
            at_center: 0,
            above: Bins::default(),
            smallest: f64::INFINITY,
            largest: f64::NEG_INFINITY,
            not_finite: 0,
        }
    }

    /// Takes a value.
    pub fn add(&mut self, value: f64) {
        if !value.is_finite() {
            self.not_finite += 1;
            return;
        }
        self.smallest = self.smallest.min(value);
        self.largest = self.largest.max(value);
        let offset = (value - self.center).clamp(f64::MIN, f64::MAX);
        if offset > 0.0 {
            self.above.add(key(offset), 1);
        } else if offset < 0.0 {
            self.below.add(key(-offset), 1);
        } else {
            self.at_center += 1;
        }
    }

    /// Takes all that another sketch has taken.
    ///
    /// # Errors
    /// [`CenterMismatch`] if it is around another centre; nothing is taken then.
    pub fn merge(&mut self, other: &DdSketch) -> Result<(), CenterMismatch> {
        if self.center != other.center {
            return Err(CenterMismatch {
                this: self.center,
                other: other.center,
            });
        }
        self.below.merge(&other.below);
        self.at_center += other.at_center;
        self.above.merge(&other.above);
        self.smallest = self.smallest.min(other.smallest);
        self.largest = self.largest.max(other.largest);
        self.not_finite += other.not_finite;
        Ok(())
    }

    /// Finite values taken.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.below.total() + self.at_center + self.above.total()
    }

    /// NaN and infinities, which are in nothing else.
    #[must_use]
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    /// Bins of both sides, at most `2 ·` [`BINS_MAX`].
    #[must_use]
    pub fn bin_count(&self) -> usize {
        self.below.counts.len() + self.above.counts.len()
    }

    /// What the values are kept as, ascending, each with how many it stands for.
    #[must_use]
    pub fn points(&self) -> Vec<(f64, u64)> {
        let below = self.below.distances().rev().map(|(d, n)| (-d, n));
        let center = std::iter::once((0.0, self.at_center)).filter(|(_, count)| *count > 0);
        below
            .chain(center)
            .chain(self.above.distances())
            .map(|(offset, count)| {
                let value = self.center + offset;
                (value.clamp(self.smallest, self.largest), count)
            })
            .collect()
    }

    /// The value of which a share `q` in `[0, 1]` of all is smaller, within the accuracy of that value's distance from the centre;
    /// nothing if the sketch is empty.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let rank = (q.clamp(0.0, 1.0) * self.count().checked_sub(1)? as f64) as u64;
        let mut seen = 0;
        let reached = |(_, count): &(f64, u64)| {
            seen += count;
            seen > rank
        };
        self.points()
            .into_iter()
            .find(reached)
            .map(|(value, _)| value)
    }

    /// By how much a Wasserstein distance to [`Self::points`] may differ from one to the values, in their unit. Each
    /// value moved by no more than its error, and a distance by no more than their mean.
    #[must_use]
    pub fn distance_error_max(&self) -> f64 {
        let sides = [&self.below, &self.above];
        let of_side = |bins: &&Bins| {
            let sum: f64 = bins.distances().map(|(d, n)| d * n as f64).sum();
            // What a bin stands for may be smaller than what it counts by that much.
            sum * RELATIVE_ACCURACY / (1.0 - RELATIVE_ACCURACY)
        };
        let mean = sides.iter().map(of_side).sum::<f64>() / self.count().max(1) as f64;
        let collapsed = |bins: &&&Bins| bins.has_collapsed;
        let nearest = sides.iter().filter(collapsed);
        mean + nearest.map(|bins| upper_end(bins.lowest)).sum::<f64>()
    }

    /// Whether this can have been made by taking values: what is read from storage may be anything.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let counts = self.below.counts.iter().chain(&self.above.counts);
        let total = counts.copied().try_fold(self.at_center, u64::checked_add);
        let is_bounded = self.below.is_sound() && self.above.is_sound();
        let has_ends = self.smallest.is_finite() && self.largest.is_finite();
        is_bounded
            && self.center.is_finite()
            && total.is_some_and(|total| (total == 0) != has_ends)
            && (!has_ends || self.smallest <= self.largest)
    }
}
