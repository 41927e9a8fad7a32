//! Which rows of a batch a model fails on: a value that breaks it costs its own request the answer, and no other.

use std::fmt::Display;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::replica::{InferError, RefusedRow};
use super::rows::{Batch, Row};

/// After so many rows that fail, and none that is answered, the model fails on everything: rows are looked at no further.
const FAILING_MAX: usize = 8;

/// How often the model is asked at the most, and for how long: the callers wait for the replica no longer than for one
/// batch. Rows that are not looked at by then fail with the others.
const RUNS_MAX: u32 = 48;
const SEARCH_MAX: Duration = Duration::from_millis(500);

/// The model's answer to a batch; or which of its rows it fails on alone as well, if those are not all.
pub(super) fn run<E: Display>(
    batch: Batch,
    model: impl Fn(Batch) -> Result<Batch, E>,
) -> Result<Batch, InferError> {
    let is_joined = batch.rows.is_some_and(|rows| rows > 1);
    let kept = is_joined.then(|| batch.clone());
    let failed = match model(batch) {
        Ok(answer) => return Ok(answer),
        Err(error) => InferError::Model(error.to_string()),
    };
    let Some(Ok(rows)) = kept.map(Batch::split) else {
        return Err(failed);
    };
    let mut search = Search {
        rows: &rows,
        model,
        failing: Vec::new(),
        has_answered: false,
        runs: 0,
        began: Instant::now(),
    };
    search.look_into_halves(0..rows.len());
    match search.has_answered && !search.failing.is_empty() {
        true => Err(InferError::RowsFailed(search.failing)),
        false => Err(failed),
    }
}

struct Search<'a, M> {
    rows: &'a [Row],
    model: M,
    failing: Vec<RefusedRow>,
    has_answered: bool,
    runs: u32,
    began: Instant,
}

impl<E: Display, M: Fn(Batch) -> Result<Batch, E>> Search<'_, M> {
    fn look_into_halves(&mut self, range: Range<usize>) {
        let middle = range.start + range.len() / 2;
        self.look_into(range.start..middle);
        self.look_into(middle..range.end);
    }

    fn look_into(&mut self, range: Range<usize>) {
        if self.failing.len() >= FAILING_MAX && !self.has_answered {
            return;
        }
        if self.runs >= RUNS_MAX || self.began.elapsed() >= SEARCH_MAX {
            let unseen = range.map(|row| RefusedRow {
                row: row as u64,
                reason: "it was in a batch with too many rows that fail to be tried alone"
                    .to_owned(),
            });
            self.failing.extend(unseen);
            return;
        }
        self.runs += 1;
        match (self.model)(Batch::join(self.rows[range.clone()].to_vec())) {
            Ok(_) => self.has_answered = true,
            Err(error) if range.len() == 1 => self.failing.push(RefusedRow {
                row: range.start as u64,
                reason: error.to_string(),
            }),
            Err(_) => self.look_into_halves(range),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::super::oip::TensorData;
    use super::super::onnx::OnnxModel;
    use super::super::rows::Cell;
    use super::*;

    /// Asks for these numbers, of which the model takes none below 0, and says how many rows each run had.
    fn asked(numbers: &[f32]) -> (Result<Batch, InferError>, Vec<u64>) {
        let runs = RefCell::new(Vec::new());
        let model = |batch: Batch| {
            runs.borrow_mut().push(batch.rows.unwrap());
            let TensorData::Fp32(values) = &batch.cells[0].data else {
                unreachable!("the rows are numbers")
            };
            match values.iter().find(|value| **value < 0.0) {
                Some(value) => Err(format!("{value} is below 0")),
                None => Ok(batch),
            }
        };
        let rows = numbers.iter();
        let rows = rows.map(|number| Row::numbers(vec![*number], 1024));
        let answer = run(Batch::join(rows.collect()), model);
        (answer, runs.into_inner())
    }

    #[test]
    fn rows_that_fail_alone_are_named() {
        let mut numbers = [1.0; 128];
        (numbers[17], numbers[90]) = (-2.0, -3.0);
        let (answer, runs) = asked(&numbers);
        let Err(InferError::RowsFailed(rows)) = answer else {
            panic!("{answer:?}")
        };
        let named: Vec<_> = rows.iter().map(|row| (row.row, &*row.reason)).collect();
        assert_eq!(named, [(17, "-2 is below 0"), (90, "-3 is below 0")]);
        // All, and two for each halving on the way to either of them.
        assert_eq!(runs.len(), 1 + 2 * 13);
        let (answer, runs) = asked(&[1.0; 128]);
        assert!(answer.is_ok());
        assert_eq!(runs, [128]);
    }

    #[test]
    fn a_model_that_fails_on_everything_is_not_asked_for_every_row() {
        let (answer, runs) = asked(&[-1.0; 1024]);
        assert_eq!(answer, Err(InferError::Model("-1 is below 0".to_owned())));
        assert!(runs.len() < 40, "{runs:?}");
        let (answer, runs) = asked(&[-1.0]);
        assert!(matches!(answer, Err(InferError::Model(_))));
        assert_eq!(runs, [1]);
    }

    #[test]
    fn a_batch_of_many_rows_that_fail_is_not_searched_for_ever() {
        let mut numbers = [1.0; 128];
        numbers
            .iter_mut()
            .step_by(2)
            .for_each(|number| *number = -1.0);
        let (answer, runs) = asked(&numbers);
        let Err(InferError::RowsFailed(rows)) = answer else {
            panic!("{answer:?}")
        };
        assert!(runs.len() <= 1 + RUNS_MAX as usize, "{}", runs.len());
        // All that fail are named, and of the others those that were not looked at.
        assert!((64..128).contains(&rows.len()), "{}", rows.len());
        assert!(
            (0..128)
                .step_by(2)
                .all(|row| rows.iter().any(|named| named.row == row))
        );
    }

    #[test]
    fn a_token_that_a_graph_does_not_know_is_found_in_its_row() {
        let bytes = include_bytes!("onnx/golden/attention.onnx");
        let model = OnnxModel::load(bytes).unwrap();
        let row = |token| Row {
            cells: vec![
                Cell {
                    shape: vec![2],
                    data: TensorData::Int64(vec![1, token]),
                },
                Cell {
                    shape: vec![2],
                    data: TensorData::Fp32(vec![1.0, 1.0]),
                },
            ],
            batch_rows_max: Some(8),
            energy: None,
        };
        let batch = Batch::join(vec![row(3), row(4), row(1 << 40), row(5)]);
        let answer = run(batch, |batch| model.run(batch));
        let Err(InferError::RowsFailed(rows)) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].row, 2);
    }
}
