//! Rows: what requests, batches and answers are made of, whatever the model takes and gives.
//!
//! Invariants:
//! 1. A row has one cell for each input, or output, of the model, in the model's order.
//! 2. Only rows that are alike in types and shapes are joined, and no more of them than each of them allows.
//! 3. Splitting undoes joining, bit by bit.

use serde::{Deserialize, Serialize};

use super::oip::{DecodeError, Tensor, TensorData};

/// Bytes of a batch's inputs, or of its outputs: half of what a call between processes holds.
pub const BATCH_BYTES_MAX: usize = 4 << 20;

/// Rows in one call. The router sends less; this bounds what anybody else may ask for, or answer.
pub const ROWS_MAX: u64 = 1024;

/// What one row, or one batch, holds of one tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The dimensions; of a row, without that of the batch.
    pub shape: Vec<u64>,
    /// The elements, row-major, as many as the shape says.
    pub data: TensorData,
}

/// One row of a request or of an answer; for a model that does not batch, all of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// A cell for each tensor.
    pub cells: Vec<Cell>,
    /// Rows that a batch may have which this one is part of; none for a model that does not batch, whose
    /// cells have no other dimension than their own.
    pub batch_rows_max: Option<usize>,
    /// Of an answer, the energy of the logits behind it, where they were seen. It is for the monitor: neither joined nor split, and
    /// nothing that a client is answered with.
    pub energy: Option<f32>,
}

/// Rows that are computed at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// How many, which is the first dimension of each cell; none for the request of a model that does not batch.
    pub rows: Option<u64>,
    /// A cell for each tensor.
    pub cells: Vec<Cell>,
}

/// What a model answered does not fit what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "tensor {index} of the answer has shape {shape:?} and {elements} elements, asked were {rows} rows"
)]
pub struct RowMisfit {
    /// Which output.
    pub index: usize,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its elements.
    pub elements: usize,
    /// The rows of the batch.
    pub rows: u64,
}

impl Row {
    /// A row of numbers, for a model with one FP32 input.
    #[must_use]
    pub fn numbers(values: Vec<f32>, batch_rows_max: usize) -> Self {
        let cell = Cell {
            shape: vec![values.len() as u64],
            data: TensorData::Fp32(values),
        };
        Row {
            cells: vec![cell],
            batch_rows_max: Some(batch_rows_max),
            energy: None,
        }
    }

    /// Bytes of its cells.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.cells.iter().map(|cell| cell.data.size_bytes()).sum()
    }

    /// Whether this row may be joined to a batch that begins with `first` and has `rows` rows.
    #[must_use]
    pub fn joins(&self, first: &Row, rows: usize) -> bool {
        let is_room = |row: &Row| row.batch_rows_max.is_some_and(|max| rows < max);
        let alike = |(one, other): (&Cell, &Cell)| {
            one.shape == other.shape && one.data.datatype() == other.data.datatype()
        };
        is_room(self)
            && is_room(first)
            && self.cells.len() == first.cells.len()
            && self.cells.iter().zip(&first.cells).all(alike)
    }
}

impl Batch {
    /// Joins rows that fit each other, at least one.
    #[must_use]
    pub fn join(rows: Vec<Row>) -> Self {
        let count = rows.len() as u64;
        let mut rows = rows.into_iter();
        let Some(first) = rows.next() else {
            return Batch {
                rows: Some(0),
                cells: Vec::new(),
            };
        };
        let is_whole = first.batch_rows_max.is_none();
        let mut cells = first.cells;
        for row in rows {
            for (cell, more) in cells.iter_mut().zip(row.cells) {
                cell.data.append(more.data);
            }
        }
        if is_whole {
            return Batch { rows: None, cells };
        }
        for cell in &mut cells {
            cell.shape.insert(0, count);
        }
        Batch {
            rows: Some(count),
            cells,
        }
    }

    /// The rows again. Those of an answer are joined with nothing any more.
    pub fn split(self) -> Result<Vec<Row>, RowMisfit> {
        let Some(count) = self.rows else {
            let whole = Row {
                cells: self.cells,
                batch_rows_max: None,
                energy: None,
            };
            return Ok(vec![whole]);
        };
        let parts = usize::try_from(count.min(ROWS_MAX)).unwrap_or(1);
        for (index, cell) in self.cells.iter().enumerate() {
            let fits = (1..=ROWS_MAX).contains(&count)
                && cell.shape.first() == Some(&count)
                && cell.data.len().is_multiple_of(parts);
            if !fits {
                return Err(RowMisfit {
                    index,
                    elements: cell.data.len(),
                    shape: cell.shape.clone(),
                    rows: count,
                });
            }
        }
        let row = || Row {
            cells: Vec::with_capacity(self.cells.len()),
            batch_rows_max: Some(1),
            energy: None,
        };
        let mut rows: Vec<Row> = (0..parts).map(|_| row()).collect();
        for cell in self.cells {
            let shape = &cell.shape[1..];
            for (row, data) in rows.iter_mut().zip(cell.data.split(parts)) {
                row.cells.push(Cell {
                    shape: shape.to_vec(),
                    data,
                });
            }
        }
        Ok(rows)
    }

    /// The tensors of these names, in the order of the cells.
    pub fn into_tensors<'a>(
        self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Tensor>, DecodeError> {
        let cells = names.into_iter().zip(self.cells);
        cells
            .map(|(name, cell)| Tensor::new(name, cell.shape, cell.data))
            .collect()
    }

    /// What its elements take, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.cells.iter().map(|cell| cell.data.size_bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f32], number: i64) -> Row {
        let mut row = Row::numbers(values.to_vec(), 4);
        row.cells.push(Cell {
            shape: vec![1, 1],
            data: TensorData::Int64(vec![number]),
        });
        row
    }

    #[test]
    fn splitting_undoes_joining() {
        let rows = vec![
            row(&[1.0, 2.0], 3),
            row(&[4.0, 5.0], 6),
            row(&[7.0, 8.0], 9),
        ];
        let batch = Batch::join(rows.clone());
        assert_eq!(batch.rows, Some(3));
        assert_eq!(batch.cells[0].shape, [3, 2]);
        assert_eq!(batch.cells[1].shape, [3, 1, 1]);
        assert_eq!(batch.size_bytes(), 6 * 4 + 3 * 8);
        let cells =
            |rows: Vec<Row>| -> Vec<Vec<Cell>> { rows.into_iter().map(|row| row.cells).collect() };
        assert_eq!(cells(batch.split().unwrap()), cells(rows));

        let mut whole = row(&[1.0], 2);
        whole.batch_rows_max = None;
        let batch = Batch::join(vec![whole.clone()]);
        assert_eq!((batch.rows, &batch.cells), (None, &whole.cells));
        assert_eq!(batch.split().unwrap(), [whole]);
    }

    #[test]
    fn only_what_is_alike_is_joined_and_no_more_than_allowed() {
        let first = row(&[1.0, 2.0], 3);
        assert!(row(&[4.0, 5.0], 6).joins(&first, 3));
        assert!(!row(&[4.0, 5.0], 6).joins(&first, 4));
        assert!(!row(&[4.0], 6).joins(&first, 1));
        assert!(!Row::numbers(vec![4.0, 5.0], 4).joins(&first, 1));
        let mut other = row(&[4.0, 5.0], 6);
        other.cells[0].data = TensorData::Int32(vec![4, 5]);
        assert!(!other.joins(&first, 1));
        let mut whole = row(&[4.0, 5.0], 6);
        whole.batch_rows_max = None;
        assert!(!whole.joins(&first, 1) && !first.joins(&whole, 1));
    }

    #[test]
    fn an_answer_of_other_rows_is_refused() {
        let mut batch = Batch::join(vec![row(&[1.0], 2), row(&[3.0], 4)]);
        batch.cells[1].shape[0] = 1;
        let error = batch.split().unwrap_err();
        assert_eq!((error.index, error.rows), (1, 2));
        for (rows, shape) in [(0, vec![0]), (u64::MAX, vec![u64::MAX])] {
            let cells = vec![Cell {
                shape,
                data: TensorData::Fp32(vec![1.0]),
            }];
            let rows = Some(rows);
            assert!(Batch { rows, cells }.split().is_err());
        }
    }
}
