//! Embeddings and dropout.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Error, Result, Shape, bail};

use super::super::calls::tokens::{self, Uses};
use super::{Dropping, Operand, multiprocessors, of_contiguous, of_contiguous_and, rows_of};

/// The rows of a table that `rows` names.
pub(crate) fn embedding_forward(table: Operand<'_>, rows: &[u32]) -> Result<(CudaStorage, Shape)> {
    let (count, width) = table.1.shape().dims2()?;
    if let Some(row) = rows.iter().find(|row| **row as usize >= count) {
        bail!("row {row} of an embedding with {count} rows")
    }
    let multiprocessors = multiprocessors(table.0.device())?;
    let numbers = table.0.device().clone_htod(rows)?;
    let shape = Shape::from((rows.len(), width));
    let operands = ([table], [&numbers]);
    of_contiguous_and(
        "embedding",
        operands.0,
        operands.1,
        shape,
        |[table], [numbers], result| {
            let operands = [table, numbers];
            tokens::embedding_forward(operands, result, rows.len(), width, multiprocessors)
                .map_err(Error::wrap)
        },
    )
}

/// Of the gradient of the rows that `rows` names, that of a table of `count` rows.
pub(crate) fn embedding_backward(
    gradient: Operand<'_>,
    rows: &[u32],
    count: usize,
) -> Result<(CudaStorage, Shape)> {
    let sizes = rows_of(gradient.1);
    let is_below = |row: &u32| (*row as usize) < count;
    if sizes.rows != rows.len() || !rows.iter().all(is_below) {
        bail!(
            "{} rows of an embedding with {count} do not fit {sizes:?} of gradients",
            rows.len()
        )
    }
    let width = sizes.columns;
    let device = gradient.0.device();
    let multiprocessors = multiprocessors(device)?;
    let Uses { starts, uses } = Uses::of(rows, count);
    let (starts, uses) = (device.clone_htod(&starts)?, device.clone_htod(&uses)?);
    of_contiguous_and(
        "embedding-gradient",
        [gradient],
        [&starts, &uses],
        Shape::from((count, width)),
        |[gradient], [starts, uses], result| {
            let operands = [gradient, starts, uses];
            tokens::embedding_backward(operands, result, count, width, multiprocessors)
                .map_err(Error::wrap)
        },
    )
}

/// Drops values by the numbers of their samples.
pub(crate) fn dropout(values: Operand<'_>, dropping: &Dropping) -> Result<(CudaStorage, Shape)> {
    let shape = values.1.shape().clone();
    if shape.elem_count() != dropping.samples * dropping.sample_values {
        bail!("dropout of {:?} does not fit {dropping:?}", values.1.dims())
    }
    let multiprocessors = multiprocessors(values.0.device())?;
    of_contiguous("dropout", [values], shape, |[values], result| {
        dropping
            .call(values, result, multiprocessors)
            .map_err(Error::wrap)
    })
}
