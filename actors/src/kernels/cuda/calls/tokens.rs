//! Embeddings, and dropout by the number of the sample.

use super::super::call::{Address, Argument, Call, Kernel, TooLarge, at_most};
use super::elementwise_grid;

use Argument::{Count, Float, Int};

/// Which row of a table is used where: its uses in ascending order, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Uses {
    /// Where each row's uses begin, and where the last one's end.
    pub(in super::super) starts: Vec<u32>,
    /// The uses.
    pub(in super::super) uses: Vec<u32>,
}

impl Uses {
    /// Of `rows[i]`, the row that is used at `i`, which must be below `count`.
    pub(in super::super) fn of(rows: &[u32], count: usize) -> Self {
        let mut starts = vec![0u32; count + 1];
        for row in rows {
            starts[*row as usize + 1] += 1;
        }
        for row in 0..count {
            starts[row + 1] += starts[row];
        }
        let mut next = starts.clone();
        let mut uses = vec![0; rows.len()];
        for (use_, row) in (0..).zip(rows) {
            let place = &mut next[*row as usize];
            uses[*place as usize] = use_;
            *place += 1;
        }
        Self { starts, uses }
    }
}

/// Row `rows[i]` (`u32`) of a table, for each of `count` places, in rows of `width` values.
pub(in super::super) fn embedding_forward(
    [table, rows]: [Address; 2],
    result: Address,
    count: usize,
    width: usize,
    multiprocessors: u32,
) -> Result<Call, TooLarge> {
    let addresses = [table, rows, result];
    rows_of_values(
        Kernel::EmbeddingForward,
        &addresses,
        count,
        width,
        multiprocessors,
    )
}

/// The gradient of a table of `count` rows: for each, the sum of the `gradient` at its uses, which are as in [`Uses`].
pub(in super::super) fn embedding_backward(
    [gradient, starts, uses]: [Address; 3],
    result: Address,
    count: usize,
    width: usize,
    multiprocessors: u32,
) -> Result<Call, TooLarge> {
    let addresses = [gradient, starts, uses, result];
    rows_of_values(
        Kernel::EmbeddingBackward,
        &addresses,
        count,
        width,
        multiprocessors,
    )
}

fn rows_of_values(
    kernel: Kernel,
    addresses: &[Address],
    rows: usize,
    width: usize,
    multiprocessors: u32,
) -> Result<Call, TooLarge> {
    let count = at_most("values", rows.saturating_mul(width), i32::MAX)?;
    let width = at_most("values of a row", width, i32::MAX)?;
    let mut arguments: Vec<Argument> = addresses.iter().copied().map(Argument::Address).collect();
    arguments.extend([count, width].map(Int));
    Ok(Call {
        kernel,
        grid: elementwise_grid(count as u64, multiprocessors),
        arguments,
    })
}

/// What is dropped out, and of what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropping {
    pub(crate) samples: usize,
    /// Values of a sample.
    pub(crate) sample_values: usize,
    /// The first sample's number.
    pub(crate) first_sample: u64,
    /// The key of the random numbers.
    pub(crate) key: [u32; 2],
    /// Values whose bits are below it are dropped.
    pub(crate) threshold: u32,
    /// What the others are multiplied by.
    pub(crate) scale: f32,
}

impl Dropping {
    pub(in super::super) fn call(
        &self,
        values: Address,
        result: Address,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        let draws = self
            .samples
            .saturating_mul(self.sample_values.div_ceil(4) * 4);
        at_most("values", draws, i32::MAX)?;
        let samples = at_most("samples", self.samples, i32::MAX)?;
        let sample_values = at_most("values of a sample", self.sample_values, i32::MAX)?;
        let [key, other_key] = self.key.map(u32::cast_signed);
        Ok(Call {
            kernel: Kernel::Dropout,
            grid: elementwise_grid(draws as u64 / 4, multiprocessors),
            arguments: vec![
                Argument::Address(values),
                Argument::Address(result),
                Int(samples),
                Int(sample_values),
                Count(self.first_sample),
                Int(key),
                Int(other_key),
                Int(self.threshold.cast_signed()),
                Float(self.scale),
            ],
        })
    }
}
