//! All rows of a training set, feature by feature, where they are too many to be kept.

use mobula_core::codec;
use serde::{Deserialize, Serialize};

use super::{DdSketch, Kll};
use crate::training::random::{Purpose, Stream};

/// What a feature takes encoded, at the most: both sides' bins and the values kept are less than half of it.
const FEATURE_BYTES_MAX: usize = 64 << 10;

/// Mean and spread, added up so that a mean far from zero costs no precision (Chan, Golub and LeVeque, 1983).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Moments {
    count: u64,
    mean: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, value: f64) {
        self.count += 1;
        let offset = value - self.mean;
        self.mean += offset / self.count as f64;
        self.squares += offset * (value - self.mean);
    }

    fn merge(&mut self, other: &Moments) {
        let count = self.count + other.count;
        if count == 0 {
            return;
        }
        let (share, offset) = (other.count as f64 / count as f64, other.mean - self.mean);
        self.mean += offset * share;
        self.squares += other.squares + offset * offset * self.count as f64 * share;
        self.count = count;
    }
}

/// One feature of a training set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FeaturePopulation {
    moments: Moments,
    values: DdSketch,
    ranks: Kll,
}

impl FeaturePopulation {
    fn add(&mut self, value: f32) {
        let wide = f64::from(value);
        if wide.is_finite() {
            self.moments.add(wide);
        }
        self.values.add(wide);
        self.ranks.add(value);
    }

    /// Finite values taken.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.moments.count
    }

    /// Their standard deviation, of the population.
    #[must_use]
    pub fn deviation(&self) -> f64 {
        (self.moments.squares / self.count().max(1) as f64).sqrt()
    }

    /// Their values: what distances are computed from.
    #[must_use]
    pub fn values(&self) -> &DdSketch {
        &self.values
    }

    /// Their ranks: what shares of bins are computed from.
    #[must_use]
    pub fn ranks(&self) -> &Kll {
        &self.ranks
    }

    fn is_sound(&self, rows: u64) -> bool {
        let Moments {
            count,
            mean,
            squares,
        } = self.moments;
        self.values.is_sound()
            && self.ranks.is_sound()
            && mean.is_finite()
            && squares.is_finite()
            && squares >= 0.0
            && (1..=rows).contains(&count)
            && [self.values.count(), self.ranks.count()] == [count; 2]
    }
}

/// All features of a training set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Population {
    rows: u64,
    features: Vec<FeaturePopulation>,
}

impl Population {
    /// No rows yet, of features around these `centers`. Populations that will be merged have the same centres and seed, and each another
    /// `part`.
    #[must_use]
    pub fn new(centers: &[f64], seed: u64, part: u64) -> Self {
        let feature = |(index, center): (usize, &f64)| FeaturePopulation {
            moments: Moments::default(),
            values: DdSketch::new(*center),
            ranks: Kll::new(Stream::new(
                seed,
                Purpose::Compaction,
                &index.to_string(),
                part,
            )),
        };
        Population {
            rows: 0,
            features: centers.iter().enumerate().map(feature).collect(),
        }
    }

    /// Takes rows, one after the other.
    pub fn add_rows(&mut self, values: &[f32]) {
        for row in values.chunks_exact(self.features.len().max(1)) {
            self.rows += 1;
            for (feature, value) in self.features.iter_mut().zip(row) {
                feature.add(*value);
            }
        }
    }

    /// Takes all rows of another part of the same set.
    ///
    /// # Panics
    /// If its centres are others.
    pub fn merge(&mut self, other: &Population) {
        self.rows += other.rows;
        for (feature, more) in self.features.iter_mut().zip(&other.features) {
            feature.moments.merge(&more.moments);
            feature
                .values
                .merge(&more.values)
                .expect("parts of a set have the same centres");
            feature.ranks.merge(&more.ranks);
        }
    }

    /// As it is stored: the rows (u64, little-endian), then of each feature its length (u32, little-endian) and itself. Features are
    /// decoded one by one, because many small numbers become so much larger that together they would exceed what decoding may take.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.rows.to_le_bytes().to_vec();
        for feature in &self.features {
            let feature = codec::encode_plain(feature);
            bytes.extend((feature.len() as u32).to_le_bytes());
            bytes.extend(feature);
        }
        bytes
    }

    /// What [`Self::to_bytes`] has written.
    ///
    /// # Errors
    /// What is wrong with the bytes, for people.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let cut = || "the distribution of its training rows is cut off".to_owned();
        let (rows, mut rest) = bytes.split_first_chunk().ok_or_else(cut)?;
        let mut features = Vec::new();
        while !rest.is_empty() {
            let (length, behind) = rest.split_first_chunk().ok_or_else(cut)?;
            let length = u32::from_le_bytes(*length) as usize;
            let (feature, behind) = behind.split_at_checked(length).ok_or_else(cut)?;
            let decoded = codec::decode(feature, FEATURE_BYTES_MAX);
            features.push(decoded.map_err(|error| error.to_string())?);
            rest = behind;
        }
        Ok(Population {
            rows: u64::from_le_bytes(*rows),
            features,
        })
    }

    /// Rows taken.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The features, in their order.
    #[must_use]
    pub fn features(&self) -> &[FeaturePopulation] {
        &self.features
    }

    /// The first feature that no rows can have made, if there is one: what is read from storage may be anything.
    #[must_use]
    pub fn damaged_feature(&self) -> Option<usize> {
        let is_damaged = |feature: &FeaturePopulation| !feature.is_sound(self.rows);
        self.features.iter().position(is_damaged)
    }
}
