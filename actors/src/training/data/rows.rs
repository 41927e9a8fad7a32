//! The samples of a data set, and a batch of them.

use super::array::Array;
use super::error::DataError;

/// Some samples, as a model gets them: sample by sample, the first one first.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// How many samples there are.
    pub count: usize,
    /// What they are.
    pub samples: Samples,
}

/// The values of some samples.
#[derive(Debug, Clone, PartialEq)]
pub enum Samples {
    /// Numbers with classes.
    Classified {
        /// The numbers, sample by sample.
        features: Vec<f32>,
        /// The class of each sample.
        labels: Vec<u32>,
    },
    /// Numbers with numbers to predict.
    Measured {
        /// The numbers, sample by sample.
        features: Vec<f32>,
        /// The numbers to predict, sample by sample.
        targets: Vec<f32>,
    },
    /// Windows of tokens.
    Tokens {
        /// The windows, each one token longer than the context.
        windows: Vec<u32>,
    },
}

impl Batch {
    /// The numbers of the samples; none where they are tokens.
    #[must_use]
    pub fn features(&self) -> &[f32] {
        match &self.samples {
            Samples::Classified { features, .. } | Samples::Measured { features, .. } => features,
            Samples::Tokens { .. } => &[],
        }
    }

    /// The classes of the samples; none where they have no class.
    #[must_use]
    pub fn labels(&self) -> &[u32] {
        match &self.samples {
            Samples::Classified { labels, .. } => labels,
            _ => &[],
        }
    }
}

/// The samples of a whole data set.
#[derive(Debug)]
pub(super) enum Rows {
    Classified {
        features: Features,
        labels: Vec<u32>,
    },
    Measured {
        features: Features,
        targets: Vec<f32>,
    },
    /// Text, cut into windows that overlap by one token: the last of one is the first of the next.
    Tokens { text: Vec<u8>, context: usize },
}

/// The numbers of all samples.
#[derive(Debug)]
pub(super) enum Features {
    Memory(Vec<f32>),
    /// Arrays of rows, one after the other, that are read as they are needed.
    Arrays {
        arrays: Vec<Array>,
        /// The number of each array's first row.
        firsts: Vec<u64>,
        divisor: f32,
    },
}

impl Features {
    /// The rows of `arrays`, divided by `divisor`.
    pub(super) fn arrays(arrays: Vec<Array>, divisor: f32) -> Self {
        let mut next = 0;
        let first = |array: &Array| {
            let first = next;
            next += array.place.rows() as u64;
            first
        };
        Features::Arrays {
            firsts: arrays.iter().map(first).collect(),
            arrays,
            divisor,
        }
    }

    fn gather(&self, rows: &[u64], width: usize) -> Result<Vec<f32>, DataError> {
        let mut gathered = Vec::with_capacity(rows.len() * width);
        for row in rows {
            match self {
                Features::Memory(values) => {
                    gathered.extend_from_slice(&values[*row as usize * width..][..width]);
                }
                Features::Arrays {
                    arrays,
                    firsts,
                    divisor,
                } => {
                    let which = firsts.partition_point(|first| first <= row) - 1;
                    let within = (row - firsts[which]) as usize;
                    arrays[which].read_row(within, *divisor, &mut gathered)?;
                }
            }
        }
        Ok(gathered)
    }
}

impl Rows {
    /// Whether samples are read from a file each time.
    pub(super) fn is_read_late(&self) -> bool {
        match self {
            Rows::Classified { features, .. } | Rows::Measured { features, .. } => {
                matches!(features, Features::Arrays { .. })
            }
            Rows::Tokens { .. } => false,
        }
    }

    /// How many samples there are.
    pub(super) fn count(&self, outputs: usize) -> usize {
        match self {
            Rows::Classified { labels, .. } => labels.len(),
            Rows::Measured { targets, .. } => targets.len() / outputs.max(1),
            Rows::Tokens { text, context } => text.len().saturating_sub(1) / context,
        }
    }

    /// The samples at `rows`, each of which must exist, with so many numbers and outputs each.
    pub(super) fn gather(
        &self,
        rows: &[u64],
        width: usize,
        outputs: usize,
    ) -> Result<Batch, DataError> {
        let samples = match self {
            Rows::Classified { features, labels } => Samples::Classified {
                features: features.gather(rows, width)?,
                labels: rows.iter().map(|row| labels[*row as usize]).collect(),
            },
            Rows::Measured { features, targets } => Samples::Measured {
                features: features.gather(rows, width)?,
                targets: rows
                    .iter()
                    .flat_map(|row| &targets[*row as usize * outputs..][..outputs])
                    .copied()
                    .collect(),
            },
            Rows::Tokens { text, context } => {
                let mut windows = Vec::with_capacity(rows.len() * (context + 1));
                for row in rows {
                    let start = *row as usize * context;
                    windows.extend(text[start..=start + context].iter().copied().map(u32::from));
                }
                Samples::Tokens { windows }
            }
        };
        Ok(Batch {
            count: rows.len(),
            samples,
        })
    }
}
