//! What a model version was trained on, kept small enough to travel with the version.
//!
//! 1. Every column has the same number of rows, sorted ascending and finite; deserialising checks it again, because a
//!    reference is read from storage.
//! 2. At most [`MAX_REFERENCE_ROWS`] rows are kept. A longer training set is thinned evenly over its order, which needs
//!    no randomness; rows sorted by class still thin to the same class shares.
//! 3. A reference may know more rows than it keeps, by a [`Population`], which has the same features.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::sketches::Population;

/// Rows kept of each column. At 4 bytes each this is 40 kB a feature; the tests gain nothing visible from more.
pub const MAX_REFERENCE_ROWS: usize = 10_000;

/// Columns a reference may have; with the row bound it limits a reference to 160 MB.
pub const MAX_REFERENCE_COLUMNS: usize = 4_096;

/// Why training data cannot serve as a reference.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ReferenceError {
    /// The data has no row or no column.
    #[error(
        "a drift reference needs at least one row and one column, got {rows} rows and {columns} columns"
    )]
    Empty {
        /// Rows given.
        rows: usize,
        /// Columns given.
        columns: usize,
    },
    /// There are too many columns.
    #[error(
        "{columns} columns, at most {MAX_REFERENCE_COLUMNS} can be watched: choose the features that matter"
    )]
    TooManyColumns {
        /// Columns given.
        columns: usize,
    },
    /// The values do not divide into rows.
    #[error("{values} values do not form rows of {columns} columns")]
    Ragged {
        /// Values given.
        values: usize,
        /// Columns given.
        columns: usize,
    },
    /// Two columns share a name.
    #[error("feature {feature:?} appears twice: feature names must differ")]
    DuplicateFeature {
        /// The name given twice.
        feature: String,
    },
    /// A value is NaN or infinite.
    #[error(
        "feature {feature:?} has the value {value}: a drift reference holds finite values only"
    )]
    NotFinite {
        /// The column.
        feature: String,
        /// The value.
        value: f32,
    },
    /// A stored column is not ascending or has a different length than the first.
    #[error(
        "stored column {feature:?} is not sorted or not of the same length as the others: the reference is damaged"
    )]
    Damaged {
        /// The column.
        feature: String,
    },
    /// The distribution of all rows is not one of these columns.
    #[error(
        "the stored distribution of all training rows does not fit {feature:?}: the reference is damaged"
    )]
    DamagedPopulation {
        /// The first column at fault.
        feature: String,
    },
    /// There is no prediction to compare with.
    #[error("a drift reference needs the model's predictions on its reference data, got none")]
    NoPredictions,
}

/// One feature's reference sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReferenceColumn {
    feature: String,
    sorted_values: Vec<f32>,
}

impl ReferenceColumn {
    /// The feature's name.
    #[must_use]
    pub fn feature(&self) -> &str {
        &self.feature
    }

    /// The sample, ascending.
    #[must_use]
    pub fn sorted_values(&self) -> &[f32] {
        &self.sorted_values
    }
}

/// The reference statistics of a model version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StoredReference", into = "StoredReference")]
pub struct Reference {
    columns: Vec<ReferenceColumn>,
    prediction_counts: BTreeMap<u32, u64>,
    population: Option<Population>,
}

/// The persisted form, checked on the way in.
#[derive(Serialize, Deserialize)]
struct StoredReference {
    columns: Vec<ReferenceColumn>,
    prediction_counts: BTreeMap<u32, u64>,
    population: Option<Population>,
}

impl Reference {
    /// Takes the training features, row-major (`rows × feature_names.len()`), and the class the model predicts for each
    /// of the rows it is judged by (they need not be the same rows).
    ///
    /// # Errors
    /// [`ReferenceError`] names the column at fault.
    pub fn new(
        feature_names: Vec<String>,
        values: &[f32],
        predicted_classes: &[u32],
    ) -> Result<Self, ReferenceError> {
        let columns = feature_names.len();
        if columns == 0 || values.is_empty() {
            let rows = values.len().checked_div(columns).unwrap_or(0);
            return Err(ReferenceError::Empty { rows, columns });
        }
        if !values.len().is_multiple_of(columns) {
            return Err(ReferenceError::Ragged {
                values: values.len(),
                columns,
            });
        }
        let rows = values.len() / columns;
        let kept = rows.min(MAX_REFERENCE_ROWS);
        let columns = feature_names
            .into_iter()
            .enumerate()
            .map(|(column, feature)| {
                let value_at = |index: usize| values[(index * rows / kept) * columns + column];
                let mut sorted_values: Vec<f32> = (0..kept).map(value_at).collect();
                sorted_values.sort_by(f32::total_cmp);
                ReferenceColumn {
                    feature,
                    sorted_values,
                }
            })
            .collect();
        let mut prediction_counts = BTreeMap::new();
        for class in predicted_classes {
            *prediction_counts.entry(*class).or_insert(0u64) += 1;
        }
        Self::checked(StoredReference {
            columns,
            prediction_counts,
            population: None,
        })
    }

    /// With the distribution of all rows, of which the columns are a sample.
    ///
    /// # Errors
    /// [`ReferenceError::DamagedPopulation`] if it is not one of these columns, or of fewer rows.
    pub fn with_population(self, population: Population) -> Result<Self, ReferenceError> {
        Self::checked(StoredReference {
            population: Some(population),
            ..self.into()
        })
    }

    fn checked(stored: StoredReference) -> Result<Self, ReferenceError> {
        let StoredReference {
            columns,
            prediction_counts,
            population,
        } = stored;
        let rows = columns
            .first()
            .map_or(0, |column| column.sorted_values.len());
        if rows == 0 {
            return Err(ReferenceError::Empty {
                rows,
                columns: columns.len(),
            });
        }
        if columns.len() > MAX_REFERENCE_COLUMNS {
            return Err(ReferenceError::TooManyColumns {
                columns: columns.len(),
            });
        }
        if prediction_counts.values().all(|count| *count == 0) {
            return Err(ReferenceError::NoPredictions);
        }
        let mut names = std::collections::BTreeSet::new();
        for ReferenceColumn {
            feature,
            sorted_values,
        } in &columns
        {
            if !names.insert(feature) {
                return Err(ReferenceError::DuplicateFeature {
                    feature: feature.clone(),
                });
            }
            if let Some(value) = sorted_values
                .iter()
                .copied()
                .find(|value| !value.is_finite())
            {
                return Err(ReferenceError::NotFinite {
                    feature: feature.clone(),
                    value,
                });
            }
            let fits = sorted_values.len() == rows && rows <= MAX_REFERENCE_ROWS;
            if !fits || !sorted_values.is_sorted() {
                return Err(ReferenceError::Damaged {
                    feature: feature.clone(),
                });
            }
        }
        if let Some(population) = &population {
            let features = population.features().len();
            let fits = features == columns.len() && population.rows() >= rows as u64;
            let at_fault = (!fits).then(|| features.min(columns.len() - 1));
            if let Some(at) = at_fault.or_else(|| population.damaged_feature()) {
                let feature = columns[at].feature.clone();
                return Err(ReferenceError::DamagedPopulation { feature });
            }
        }
        Ok(Self {
            columns,
            prediction_counts,
            population,
        })
    }

    /// The columns, in the order of the model's features.
    #[must_use]
    pub fn columns(&self) -> &[ReferenceColumn] {
        &self.columns
    }

    /// Rows kept of each column.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.columns
            .first()
            .map_or(0, |column| column.sorted_values.len())
    }

    /// The distribution of all rows, if there are more than are kept.
    #[must_use]
    pub fn population(&self) -> Option<&Population> {
        self.population.as_ref()
    }

    /// How often the model predicted each class on its reference data.
    #[must_use]
    pub fn prediction_counts(&self) -> &BTreeMap<u32, u64> {
        &self.prediction_counts
    }
}

impl TryFrom<StoredReference> for Reference {
    type Error = ReferenceError;

    fn try_from(stored: StoredReference) -> Result<Self, ReferenceError> {
        Self::checked(stored)
    }
}

impl From<Reference> for StoredReference {
    fn from(reference: Reference) -> Self {
        let Reference {
            columns,
            prediction_counts,
            population,
        } = reference;
        Self {
            columns,
            prediction_counts,
            population,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("f{i}")).collect()
    }

    #[test]
    fn columns_are_taken_apart_and_sorted() {
        let reference =
            Reference::new(names(2), &[3.0, 0.0, 1.0, 5.0, 2.0, -1.0], &[7, 7, 1]).unwrap();
        assert_eq!(reference.columns()[0].sorted_values(), [1.0, 2.0, 3.0]);
        assert_eq!(reference.columns()[1].sorted_values(), [-1.0, 0.0, 5.0]);
        assert_eq!(reference.prediction_counts()[&7], 2);
        assert_eq!(reference.rows(), 3);
    }

    #[test]
    fn survives_storage_and_refuses_damage() {
        let reference = Reference::new(names(1), &[2.0, 1.0], &[0, 1]).unwrap();
        let stored = serde_json::to_string(&reference).unwrap();
        assert_eq!(
            serde_json::from_str::<Reference>(&stored).unwrap(),
            reference
        );
        let damaged = stored.replace("[1.0,2.0]", "[2.0,1.0]");
        assert_ne!(stored, damaged);
        let error = serde_json::from_str::<Reference>(&damaged).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
    }

    #[test]
    fn a_long_training_set_is_thinned_evenly() {
        let rows = MAX_REFERENCE_ROWS * 3;
        let values: Vec<f32> = (0..rows).map(|i| i as f32).collect();
        let reference = Reference::new(names(1), &values, &[0]).unwrap();
        assert_eq!(reference.rows(), MAX_REFERENCE_ROWS);
        assert_eq!(reference.columns()[0].sorted_values()[1..3], [3.0, 6.0]);
    }

    #[test]
    fn a_population_has_to_be_of_the_same_columns() {
        let reference = Reference::new(names(2), &[3.0, 0.0, 1.0, 5.0], &[0]).unwrap();
        let refused = |population: Population| {
            let error = reference.clone().with_population(population).unwrap_err();
            error.to_string()
        };
        let mut narrow = Population::new(&[0.0], 1, 0);
        narrow.add_rows(&[1.0, 2.0]);
        assert!(refused(narrow).contains("does not fit \"f1\""));
        let mut short = Population::new(&[0.0; 2], 1, 0);
        short.add_rows(&[1.0, 2.0]);
        assert!(refused(short.clone()).contains("does not fit \"f1\""));
        short.add_rows(&[1.0, f32::NAN]);
        let known = reference.clone().with_population(short).unwrap();
        assert_eq!((known.rows(), known.population().unwrap().rows()), (2, 2));
        let stored = serde_json::to_string(&known).unwrap();
        assert_eq!(serde_json::from_str::<Reference>(&stored).unwrap(), known);
    }

    #[test]
    fn bad_data_is_refused_with_the_column() {
        let refused = |names: Vec<String>, values: &[f32], classes: &[u32]| {
            Reference::new(names, values, classes)
                .unwrap_err()
                .to_string()
        };
        assert!(refused(names(0), &[1.0], &[0]).contains("0 columns"));
        assert!(refused(names(2), &[], &[0]).contains("0 rows"));
        assert!(refused(names(2), &[1.0, 2.0, 3.0], &[0]).contains("do not form rows of 2"));
        assert!(refused(names(2), &[1.0, f32::NAN], &[0]).contains("\"f1\" has the value NaN"));
        assert!(refused(names(1), &[1.0], &[]).contains("predictions"));
        let twice = vec!["a".to_owned(), "a".to_owned()];
        assert!(refused(twice, &[1.0, 2.0], &[0]).contains("appears twice"));
        let wide = vec![0.0; MAX_REFERENCE_COLUMNS + 1];
        assert!(refused(names(wide.len()), &wide, &[0]).contains("at most 4096"));
    }
}
