//! The sketch of Karp, Lang and Liberty (2016): a sample whose values stand for as many as their level says.
//!
//! Values wait at level 0. When there are too many, those of a level are sorted and every other one goes a level up, where it
//! stands for twice as many; a coin says whether the odd ones go or the even.
//!
//! 1. The weights of what is kept add up to the count.
//! 2. A compaction at level `h` moves a rank by nothing or by `2^h` up or down, as the coin falls: the variance of a rank is at most the sum
//!    of `4^h`, which the sketch carries along, through merges too.
//! 3. At most [`RETAINED_MAX`] values are kept.

use serde::{Deserialize, Serialize};

use crate::training::random::Stream;

/// Values that the highest level may have. Ranks are then off by one percent or so.
pub const CAPACITY: usize = 256;

/// Levels: enough for `2^40` values and more.
pub const LEVELS_MAX: usize = 40;

/// A level with fewer would do little but flip coins.
const LEVEL_MIN: usize = 8;

/// What a level may have, by how far it is below the highest: two thirds of the one above.
const CAPACITIES: [usize; LEVELS_MAX] = {
    let mut capacities = [CAPACITY; LEVELS_MAX];
    let mut depth = 1;
    while depth < LEVELS_MAX {
        let next = capacities[depth - 1] * 2 / 3;
        capacities[depth] = if next < LEVEL_MIN { LEVEL_MIN } else { next };
        depth += 1;
    }
    capacities
};

/// What so many levels may have together.
const ROOM: [usize; LEVELS_MAX + 1] = {
    let mut room = [0; LEVELS_MAX + 1];
    let mut levels = 0;
    while levels < LEVELS_MAX {
        room[levels + 1] = room[levels] + CAPACITIES[levels];
        levels += 1;
    }
    room
};

/// Values that a sketch keeps at most, whatever it has taken: some 4 KiB.
pub const RETAINED_MAX: usize = ROOM[LEVELS_MAX];

/// Ranks are as close as [`Kll::rank_error`] says in this share of all draws of the coins.
pub const CONFIDENCE: f64 = 0.99;

/// A sketch with bounded errors of ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kll {
    coins: Stream,
    compactions: u64,
    /// From weight 1 on; only what has been compacted was ever sorted.
    levels: Vec<Vec<f32>>,
    retained: usize,
    count: u64,
    smallest: f32,
    largest: f32,
    variance_max: f64,
    not_finite: u64,
}

impl Kll {
    /// An empty sketch. Sketches that will be merged need streams of their own: coins that fall alike would add up their errors.
    #[must_use]
    pub fn new(coins: Stream) -> Self {
        Kll {
            coins,
            compactions: 0,
            levels: vec![Vec::new()],
            retained: 0,
            count: 0,
            smallest: f32::INFINITY,
            largest: f32::NEG_INFINITY,
            variance_max: 0.0,
            not_finite: 0,
        }
    }

    /// Takes a value.
    pub fn add(&mut self, value: f32) {
        if !value.is_finite() {
            self.not_finite += 1;
            return;
        }
        self.smallest = self.smallest.min(value);
        self.largest = self.largest.max(value);
        self.count += 1;
        self.levels[0].push(value);
        self.retained += 1;
        self.make_room();
    }

    /// Takes all that another sketch has taken.
    pub fn merge(&mut self, other: &Kll) {
        let levels = self.levels.len().max(other.levels.len());
        self.levels.resize_with(levels, Vec::new);
        for (level, values) in self.levels.iter_mut().zip(&other.levels) {
            level.extend(values);
        }
        self.compactions += other.compactions;
        self.retained += other.retained;
        self.count += other.count;
        self.smallest = self.smallest.min(other.smallest);
        self.largest = self.largest.max(other.largest);
        self.variance_max += other.variance_max;
        self.not_finite += other.not_finite;
        self.make_room();
    }

    fn make_room(&mut self) {
        while self.retained > ROOM[self.levels.len()] {
            let full = self
                .levels
                .iter()
                .zip(CAPACITIES[..self.levels.len()].iter().rev());
            let level = full
                .map(|(values, capacity)| values.len() > *capacity)
                .position(|is_over| is_over)
                .expect("levels that have more than their room together have one that has");
            self.compact(level);
        }
    }

    fn compact(&mut self, level: usize) {
        if level + 1 == self.levels.len() {
            self.levels.push(Vec::new());
        }
        let mut values = std::mem::take(&mut self.levels[level]);
        values.sort_unstable_by(f32::total_cmp);
        if values.len() % 2 == 1 {
            // The one that has no partner stays.
            self.levels[level].extend(values.pop());
        }
        let coin = self.coins.bits(self.compactions, level as u32) & 1;
        self.retained -= values.len() / 2;
        let raised = values.into_iter().skip(coin as usize).step_by(2);
        self.levels[level + 1].extend(raised);
        self.compactions += 1;
        self.variance_max += (1u128 << (2 * level)) as f64;
    }

    /// Finite values taken.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// NaN and infinities, which are in nothing else.
    #[must_use]
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    /// Values kept, at most [`RETAINED_MAX`].
    #[must_use]
    pub fn retained(&self) -> usize {
        self.retained
    }

    /// The smallest and the largest value, which are exact; nothing if the sketch is empty.
    #[must_use]
    pub fn ends(&self) -> Option<(f32, f32)> {
        (self.count > 0).then_some((self.smallest, self.largest))
    }

    /// The values kept, ascending, each with how many it stands for.
    #[must_use]
    pub fn points(&self) -> Vec<(f64, u64)> {
        let weighted = |(level, values): (usize, &Vec<f32>)| {
            let weight = 1u64 << level;
            values
                .iter()
                .map(move |value| (f64::from(*value), weight))
                .collect::<Vec<_>>()
        };
        let mut points: Vec<_> = self.levels.iter().enumerate().flat_map(weighted).collect();
        points.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        points
    }

    /// By how much the share of values up to some value may be off, with a probability of [`CONFIDENCE`] for each such value: Hoeffding's
    /// bound over the coins. Nothing was compacted, nothing is off.
    #[must_use]
    pub fn rank_error(&self) -> f64 {
        let deviations = (2.0 * (2.0 / (1.0 - CONFIDENCE)).ln()).sqrt();
        let error = deviations * self.variance_max.sqrt() / self.count.max(1) as f64;
        error.min(1.0)
    }

    /// Whether this can have been made by taking values: what is read from storage may be anything.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let retained: usize = self.levels.iter().map(Vec::len).sum();
        let has_levels = (1..=LEVELS_MAX).contains(&self.levels.len());
        if !has_levels || retained != self.retained || retained > ROOM[self.levels.len()] {
            return false;
        }
        let is_inside = |value: &f32| (self.smallest..=self.largest).contains(value);
        let weights = self.levels.iter().enumerate();
        let weight: u64 = weights
            .map(|(level, values)| (values.len() as u64) << level)
            .sum();
        weight == self.count
            && self.variance_max >= 0.0
            && (self.count == 0 || (self.smallest.is_finite() && self.largest.is_finite()))
            && self.levels.iter().flatten().all(is_inside)
    }
}
