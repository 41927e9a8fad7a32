//! A table in the making: rows of numbers, each with a label or with numbers to predict.
//!
//! Invariants:
//! 1. All rows have as many columns as the first one, and all values are finite.
//! 2. The number of classes is what the job says, or one more than the largest label.

use super::error::DataError;
use super::rows::{Features, Rows};
use super::shape::SampleShape;

/// What the columns of a table are.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct TableSpec {
    pub(super) shape: Option<Vec<usize>>,
    pub(super) classes: Option<usize>,
    pub(super) targets: Option<usize>,
    pub(super) scale: Option<f64>,
}

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Number,
    Label,
}

/// A table to which rows are added.
#[derive(Debug)]
pub(super) struct Table {
    spec: TableSpec,
    /// Columns of a row, once it is known, and where it is known from.
    columns: Option<(usize, String)>,
    divisor: f32,
    features: Vec<f32>,
    labels: Vec<u32>,
    targets: Vec<f32>,
    rows: usize,
}

impl Table {
    pub(super) fn new(spec: TableSpec) -> Self {
        let after = spec.targets.unwrap_or(1);
        let columns = spec.shape.as_ref().map(|shape| {
            let numbers: usize = shape.iter().product();
            let why = format!(" ({numbers} numbers, as `shape` says, then {after} to predict)");
            (numbers + after, why)
        });
        Table {
            divisor: spec.scale.unwrap_or(1.0) as f32,
            spec,
            columns,
            features: Vec::new(),
            labels: Vec::new(),
            targets: Vec::new(),
            rows: 0,
        }
    }

    /// A row of so many columns begins at this line (or row) of the file.
    pub(super) fn begin_row(
        &mut self,
        file: &str,
        line: usize,
        found: usize,
    ) -> Result<(), DataError> {
        let after = self.spec.targets.unwrap_or(1);
        let (expected, why) = self.columns.get_or_insert_with(|| {
            let least = 1 + after;
            let why = match found < least {
                true => ": a number and what to predict, at least".to_owned(),
                false => format!(", as in {file}:{line}"),
            };
            (found.max(least), why)
        });
        if found != *expected {
            return Err(DataError::ColumnCount {
                file: file.to_owned(),
                line,
                found,
                expected: *expected,
                why: why.clone(),
            });
        }
        self.rows += 1;
        Ok(())
    }

    /// What is wanted in a column of the row that was begun.
    pub(super) fn wanted(&self, index: usize) -> Wanted {
        match self.spec.targets {
            None if index + 1 == self.column_count() => Wanted::Label,
            _ => Wanted::Number,
        }
    }

    pub(super) fn push_number(
        &mut self,
        file: &str,
        row: usize,
        index: usize,
        value: f32,
    ) -> Result<(), DataError> {
        if !value.is_finite() {
            return Err(DataError::NotFinite {
                file: file.to_owned(),
                row,
                column: index + 1,
                value,
            });
        }
        if index < self.column_count() - self.spec.targets.unwrap_or(1) {
            self.features.push(value / self.divisor);
        } else {
            self.targets.push(value);
        }
        Ok(())
    }

    pub(super) fn push_label(
        &mut self,
        file: &str,
        row: usize,
        label: i64,
    ) -> Result<(), DataError> {
        let label = checked_label(file, row, label, self.spec.classes)?;
        self.labels.push(label);
        Ok(())
    }

    /// The samples. `source` names them in errors.
    pub(super) fn finish(self, source: &str) -> Result<(SampleShape, Rows), DataError> {
        let numbers = self.column_count() - self.spec.targets.unwrap_or(1);
        let features = self.spec.shape.clone().unwrap_or_else(|| vec![numbers]);
        let values = Features::Memory(self.features);
        let (shape, rows) = match self.spec.targets {
            Some(targets) => (
                SampleShape::Measured { features, targets },
                Rows::Measured {
                    features: values,
                    targets: self.targets,
                },
            ),
            None => (
                SampleShape::Classified {
                    features,
                    classes: self
                        .spec
                        .classes
                        .unwrap_or_else(|| class_count(&self.labels)),
                },
                Rows::Classified {
                    features: values,
                    labels: self.labels,
                },
            ),
        };
        checked_shape(source, shape).map(|shape| (shape, rows))
    }

    fn column_count(&self) -> usize {
        self.columns.as_ref().map_or(0, |(columns, _)| *columns)
    }
}

/// One more than the largest label, but two at least.
pub(super) fn class_count(labels: &[u32]) -> usize {
    labels
        .iter()
        .max()
        .map_or(2, |label| *label as usize + 1)
        .max(2)
}

/// A label that is below the number of classes, where that is known.
pub(super) fn checked_label(
    file: &str,
    row: usize,
    label: i64,
    classes: Option<usize>,
) -> Result<u32, DataError> {
    let count = classes.unwrap_or(super::shape::CLASSES_MAX) as u64;
    match u32::try_from(label) {
        Ok(known) if u64::from(known) < count => Ok(known),
        _ => Err(DataError::Label {
            file: file.to_owned(),
            row,
            label,
            high: count - 1,
        }),
    }
}

/// The shape, if it is within its limits.
pub(super) fn checked_shape(source: &str, shape: SampleShape) -> Result<SampleShape, DataError> {
    match shape.check() {
        Ok(()) => Ok(shape),
        Err(rule) => Err(DataError::Misfit {
            file: source.to_owned(),
            reason: format!("its samples cannot be used: {rule}"),
        }),
    }
}
