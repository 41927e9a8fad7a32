//! What a dense layer needs beside its product: bias, rectifier, GELU, and the loss at its end.

use super::super::call::{Address, Argument, Call, Kernel, TooLarge, at_most};
use super::{Rows, elementwise_grid};

use Argument::{Count, Float, Int};

/// Adds the bias to each row of `count` values, in place; then nothing less than `floor` stays.
pub(in super::super) fn add_bias(
    values: Address,
    bias: Address,
    rows: Rows,
    floor: f32,
    multiprocessors: u32,
) -> Result<Call, TooLarge> {
    let columns = at_most("columns", rows.columns, i32::MAX)?;
    let count = at_most("values", rows.rows.saturating_mul(rows.columns), i32::MAX)?;
    Ok(Call {
        kernel: Kernel::AddBias,
        grid: elementwise_grid(count as u64, multiprocessors),
        arguments: vec![
            Argument::Address(values),
            Argument::Address(bias),
            Int(count),
            Int(columns),
            Float(floor),
        ],
    })
}

/// A kernel that takes some vectors of `count` values, the last of which is the result.
fn elementwise(kernel: Kernel, vectors: &[Address], count: u64, multiprocessors: u32) -> Call {
    let mut arguments: Vec<Argument> = vectors.iter().copied().map(Argument::Address).collect();
    arguments.push(Count(count));
    Call {
        kernel,
        grid: elementwise_grid(count, multiprocessors),
        arguments,
    }
}

/// Of the gradient and the rectifier's result, that of what the rectifier was applied to.
pub(in super::super) fn rectifier_backward(
    [gradient, result]: [Address; 2],
    slope: Address,
    count: u64,
    multiprocessors: u32,
) -> Call {
    let vectors = [gradient, result, slope];
    elementwise(Kernel::RectifierBackward, &vectors, count, multiprocessors)
}

/// GELU of each value.
pub(in super::super) fn gelu_forward(
    values: Address,
    result: Address,
    count: u64,
    multiprocessors: u32,
) -> Call {
    let vectors = [values, result];
    elementwise(Kernel::GeluForward, &vectors, count, multiprocessors)
}

/// Of values and gradient, the gradient of the values.
pub(in super::super) fn gelu_backward(
    [values, gradient]: [Address; 2],
    result: Address,
    count: u64,
    multiprocessors: u32,
) -> Call {
    let vectors = [values, gradient, result];
    elementwise(Kernel::GeluBackward, &vectors, count, multiprocessors)
}

/// Numbers that [`Rows::cross_entropy`] says of a row.
pub(in super::super) const FACTS: usize = 3;

impl Rows {
    /// The sum of each column.
    pub(in super::super) fn column_sums(
        self,
        values: Address,
        sums: Address,
    ) -> Result<Call, TooLarge> {
        self.call(Kernel::ColumnSums, &[values, sums], None)
    }

    /// Of logits and labels (`u32`, below the number of columns), the gradient of the summed loss times `scale`, and
    /// of each row the largest logit, the sum of the exponentials, and the label's logit.
    pub(in super::super) fn cross_entropy(
        self,
        [logits, labels]: [Address; 2],
        [gradient, facts]: [Address; 2],
        scale: f32,
    ) -> Result<Call, TooLarge> {
        let addresses = [logits, labels, gradient, facts];
        self.call(Kernel::CrossEntropy, &addresses, Some(scale))
    }
}
