//! What a trained version remembers of its data, for drift detection to compare with.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::data::{Batch, DataError, Dataset, SampleShape};
use super::model::{Model, ModelError};
use super::permutation::Permutation;
use super::random::Purpose;
use super::workload::WorkloadError;
use crate::drift::sketches::Population;

/// A sample of the training part, column by column, with what the model predicts for it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ReferenceData {
    /// Name of each feature: `pixel_<row>_<column>` of an image, `feature_<index>` otherwise, counted
    /// from 0. None where samples have no classes, or the model gives no outputs: then there is no reference.
    pub feature_names: Vec<String>,
    /// The values of each feature, scaled as the model sees them; the same rows in each column.
    pub columns: Vec<Vec<f32>>,
    /// The predicted class of each row.
    pub predictions: Vec<u32>,
}

/// Rows that are sketched together: what is gathered of a file at once.
const PART_ROWS: usize = 4096;

/// Values that are sketched at most: so many are enough for anything that is asked of them, and a job of many wide rows ends soon after its
/// last step.
const VALUES_MAX: usize = 1 << 26;

/// The names of the features of samples that look like this, in the order of the model's input.
#[must_use]
pub fn feature_names(shape: &SampleShape) -> Vec<String> {
    match shape {
        SampleShape::Classified { features, .. } => match features[..] {
            [height, width] => (0..height * width)
                .map(|index| format!("pixel_{}_{}", index / width, index % width))
                .collect(),
            _ => (0..shape.feature_count())
                .map(|index| format!("feature_{index}"))
                .collect(),
        },
        _ => Vec::new(),
    }
}

/// At most `rows_max` rows of `train`, chosen by `seed`; all of them if there are no more.
pub fn reference_sample(
    model: &Model,
    train: &Dataset,
    rows_max: usize,
    seed: u64,
) -> Result<ReferenceData, WorkloadError> {
    let shape = train.shape();
    if !matches!(shape, SampleShape::Classified { .. }) {
        return Ok(ReferenceData::default());
    }
    let count = train.len() as u64;
    let mut rows: Vec<usize> = if count == 0 {
        Vec::new()
    } else {
        let permutation = Permutation::keyed(seed, Purpose::Reference, 0, count);
        (0..count.min(rows_max as u64))
            .map(|at| permutation.at(at) as usize)
            .collect()
    };
    rows.sort_unstable();
    let batch = train.gather(&rows)?;
    let (values, width) = (batch.features(), shape.feature_count());
    let predictions = match model.predictions(values) {
        // It cannot be served, so nobody will compare its traffic with anything.
        Err(ModelError::NoOutputs) => return Ok(ReferenceData::default()),
        predictions => predictions?,
    };
    let column = |feature: usize| {
        values
            .iter()
            .skip(feature)
            .step_by(width)
            .copied()
            .collect()
    };
    Ok(ReferenceData {
        feature_names: feature_names(shape),
        columns: (0..width).map(column).collect(),
        predictions,
    })
}

/// All rows of `train`, feature by feature, around the means of the sample; of more than 64 Mi values rows at equal distances. Nothing if
/// there is no sample, or if it has all rows.
pub fn population(
    train: &Dataset,
    sample: &ReferenceData,
    seed: u64,
) -> Result<Option<Population>, WorkloadError> {
    let columns = sample.columns.iter();
    if columns
        .clone()
        .all(|column| column.is_empty() || column.len() >= train.len())
    {
        return Ok(None);
    }
    let mean = |column: &Vec<f32>| {
        let sum: f64 = column.iter().copied().map(f64::from).sum();
        sum / column.len() as f64
    };
    let centers: Vec<f64> = columns.map(mean).collect();
    if centers.iter().any(|center| !center.is_finite()) {
        // Such a sample is no reference either, and the monitor says which feature is at fault.
        return Ok(None);
    }
    let chosen = Chosen {
        train,
        count: sketched_rows(train.len(), centers.len()),
    };
    population_of(&chosen, 0..chosen.count, &centers, seed).map(Some)
}

/// How many of so many rows are sketched: more than are sampled, however wide they are.
fn sketched_rows(rows: usize, width: usize) -> usize {
    rows.min((VALUES_MAX / width).max(PART_ROWS))
}

/// So many rows of a data set, at equal distances.
struct Chosen<'a> {
    train: &'a Dataset,
    count: usize,
}

impl Chosen<'_> {
    fn gather(&self, places: Range<usize>) -> Result<Batch, DataError> {
        let row = |place| (place as u128 * self.train.len() as u128 / self.count as u128) as usize;
        self.train.gather(&places.map(row).collect::<Vec<_>>())
    }
}

/// That of some rows. Parts are merged in a tree that only their number decides, so the bits do not depend on the threads.
fn population_of(
    train: &Chosen<'_>,
    rows: Range<usize>,
    centers: &[f64],
    seed: u64,
) -> Result<Population, WorkloadError> {
    if rows.len() <= PART_ROWS {
        let mut population = Population::new(centers, seed, rows.start as u64);
        let batch = train.gather(rows)?;
        population.add_rows(batch.features());
        return Ok(population);
    }
    let middle = rows.start + rows.len() / 2;
    let (low, high) = rayon::join(
        || population_of(train, rows.start..middle, centers, seed),
        || population_of(train, middle..rows.end, centers, seed),
    );
    let mut whole = low?;
    whole.merge(&high?);
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::spec::TrainSpec;

    #[test]
    fn the_sample_is_seeded_bounded_and_column_wise() {
        let train = Dataset::digits().unwrap().split(7, 0.2).train;
        let spec = TrainSpec::digits_mlp("a");
        let model = Model::new(&spec.model, train.shape(), 7).unwrap();
        let reference = reference_sample(&model, &train, 100, 7).unwrap();
        assert_eq!(
            (reference.columns.len(), reference.feature_names.len()),
            (64, 64)
        );
        assert_eq!(reference.feature_names[10], "pixel_1_2");
        assert!(reference.columns.iter().all(|column| column.len() == 100));
        assert_eq!(reference.predictions.len(), 100);
        assert_eq!(reference, reference_sample(&model, &train, 100, 7).unwrap());
        assert_ne!(reference, reference_sample(&model, &train, 100, 8).unwrap());
        let all = reference_sample(&model, &train, usize::MAX, 7).unwrap();
        assert_eq!(all.columns[0].len(), train.len());
        assert_eq!(
            all.columns[20][5],
            train.gather(&[5]).unwrap().features()[20]
        );
        assert!(
            reference_sample(&model, &train.part(&[]), 9, 7)
                .unwrap()
                .predictions
                .is_empty()
        );
    }

    #[test]
    fn a_population_has_all_rows_and_is_left_out_where_the_sample_has_them() {
        let train = Dataset::digits().unwrap().split(7, 0.2).train;
        let spec = TrainSpec::digits_mlp("a");
        let model = Model::new(&spec.model, train.shape(), 7).unwrap();
        let sample = reference_sample(&model, &train, 100, 7).unwrap();
        let all = population(&train, &sample, 7).unwrap().unwrap();
        assert_eq!((all.rows(), all.features().len()), (train.len() as u64, 64));
        assert_eq!(all.damaged_feature(), None);
        let pixels = train.all().unwrap();
        let brightest = pixels.features().iter().skip(20).step_by(64).copied();
        let (_, largest) = all.features()[20].ranks().ends().unwrap();
        assert_eq!(largest, brightest.reduce(f32::max).unwrap());

        let whole = reference_sample(&model, &train, usize::MAX, 7).unwrap();
        assert_eq!(population(&train, &whole, 7).unwrap(), None);
        assert_eq!(
            population(&train, &ReferenceData::default(), 7).unwrap(),
            None
        );
    }

    #[test]
    fn wide_rows_are_thinned_evenly() {
        assert_eq!(sketched_rows(60_000, 784), 60_000);
        assert_eq!(sketched_rows(1 << 30, 64), 1 << 20);
        assert_eq!(sketched_rows(1 << 30, 1 << 20), PART_ROWS);
        let train = Dataset::digits().unwrap();
        let chosen = Chosen {
            train: &train,
            count: 100,
        };
        let batch = chosen.gather(99..100).unwrap();
        let last = train.gather(&[train.len() * 99 / 100]).unwrap();
        assert_eq!(batch.features(), last.features());
    }

    #[test]
    fn a_population_of_many_parts_has_the_same_bits_each_time() {
        let digits = Dataset::digits().unwrap();
        let rows: Vec<usize> = (0..3 * PART_ROWS + 5)
            .map(|row| row % digits.len())
            .collect();
        let train = digits.part(&rows);
        let spec = TrainSpec::digits_mlp("a");
        let model = Model::new(&spec.model, train.shape(), 7).unwrap();
        let sample = reference_sample(&model, &train, 1000, 7).unwrap();
        let once = population(&train, &sample, 7).unwrap();
        assert_eq!(once, population(&train, &sample, 7).unwrap());
        assert_eq!(once.unwrap().rows(), rows.len() as u64);
    }
}
