//! The samples of a data set, and a batch of them.

use super::array::Array;
use super::error::DataError;
use super::numbers::OnDisk;
use super::text::Text;

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
        targets: Features,
    },
    /// Text, cut into windows that overlap by one token: the last of one is the first of the next.
    Tokens { text: Text, context: usize },
}

/// The numbers of all samples.
#[derive(Debug)]
pub(super) enum Features {
    Memory(Vec<f32>),
    /// Rows in a file of this process.
    Disk(OnDisk),
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

    /// Whether rows are read from a file each time.
    fn is_read_late(&self) -> bool {
        !matches!(self, Features::Memory(_))
    }

    /// How many rows of `width` there are.
    fn count(&self, width: usize) -> usize {
        let width = width.max(1);
        match self {
            Features::Memory(values) => values.len() / width,
            Features::Disk(numbers) => (numbers.len() / width as u64) as usize,
            Features::Arrays { arrays, .. } => arrays.iter().map(|array| array.place.rows()).sum(),
        }
    }

    fn gather(&self, rows: &[u64], width: usize) -> Result<Vec<f32>, DataError> {
        let mut gathered = Vec::with_capacity(rows.len() * width);
        for row in rows {
            match self {
                Features::Memory(values) => {
                    gathered.extend_from_slice(&values[*row as usize * width..][..width]);
                }
                Features::Disk(numbers) => numbers.read_row(*row, width, &mut gathered)?,
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
            Rows::Classified { features, .. } => features.is_read_late(),
            Rows::Measured { features, targets } => {
                features.is_read_late() || targets.is_read_late()
            }
            Rows::Tokens { text, .. } => text.is_read_late(),
        }
    }

    /// How many samples there are.
    pub(super) fn count(&self, outputs: usize) -> usize {
        match self {
            Rows::Classified { labels, .. } => labels.len(),
            Rows::Measured { targets, .. } => targets.count(outputs),
            Rows::Tokens { text, context } => text.window_count(*context),
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
                targets: targets.gather(rows, outputs)?,
            },
            Rows::Tokens { text, context } => Samples::Tokens {
                windows: text.windows(rows, *context)?,
            },
        };
        Ok(Batch {
            count: rows.len(),
            samples,
        })
    }
}
