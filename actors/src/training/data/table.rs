//! A table in the making: rows of numbers, each with a label or with numbers to predict.
//!
//! Invariants:
//! 1. All rows have as many columns as the first one, and all values are finite.
//! 2. The numbers are in memory up to a limit, and beyond it in a file: the samples are the same.
//! 3. The number of classes is what the job says, or one more than the largest label.

use super::error::DataError;
use super::numbers::Growing;
use super::rows::Rows;
use super::scratch::Room;
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
    features: Growing,
    labels: Vec<u32>,
    targets: Growing,
    rows: usize,
    room: Room,
}

impl Table {
    /// An empty table, with the room that its numbers may take.
    pub(super) fn new(spec: TableSpec, room: &Room) -> Self {
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
            features: Growing::new(),
            labels: Vec::new(),
            targets: Growing::new(),
            rows: 0,
            room: room.clone(),
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
        self.make_room(file)?;
        self.rows += 1;
        Ok(())
    }

    /// Room for one row more. What the rows before it take decides where it goes.
    fn make_room(&mut self, file: &str) -> Result<(), DataError> {
        let limits = self.room.limits();
        if self.rows >= limits.samples {
            return Err(DataError::Misfit {
                file: file.to_owned(),
                reason: format!(
                    "with it the data set has more than {} rows, the limit for files of rows; train on fewer",
                    limits.samples
                ),
            });
        }
        let in_memory = self.features.memory_bytes() + self.targets.memory_bytes();
        if in_memory > limits.memory_bytes {
            self.features.spill(file, &self.room)?;
            if self.spec.targets.is_some() {
                self.targets.spill(file, &self.room)?;
            }
        }
        let numbers = self.number_count();
        let targets = self.spec.targets.unwrap_or(0);
        match self.features.reserve(numbers) && self.targets.reserve(targets) {
            true => Ok(()),
            false => Err(self.room.too_large(file)),
        }
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
        let pushed = if index < self.number_count() {
            self.features.push(value / self.divisor)
        } else {
            self.targets.push(value)
        };
        pushed.map_err(|source| {
            let size_bytes = self.features.size_bytes() + self.targets.size_bytes();
            self.room.failed(file, size_bytes, source)
        })
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
        let numbers = self.number_count();
        let features = self.spec.shape.clone().unwrap_or_else(|| vec![numbers]);
        let values = self.features.finish(source, &self.room)?;
        let (shape, rows) = match self.spec.targets {
            Some(targets) => (
                SampleShape::Measured { features, targets },
                Rows::Measured {
                    features: values,
                    targets: self.targets.finish(source, &self.room)?,
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

    /// Columns of a row with numbers of the sample, once that is known.
    fn number_count(&self) -> usize {
        self.column_count() - self.spec.targets.unwrap_or(1)
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
