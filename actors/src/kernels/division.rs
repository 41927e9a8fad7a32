//! Work that several threads divide by position, so that who does what never shows.

use std::ops::Range;

use super::Execution;

/// Least work for which a thread is woken, in values read or written: some 25 microseconds.
const VALUES_MIN: usize = 1 << 17;

/// Calls `work` with ranges that cover `0..count`, on as many threads as the execution has and the work
/// (`values_each` for each of `count`) is worth. Ranges but the last are multiples of `granule`.
pub(super) fn divide(
    execution: Execution,
    count: usize,
    values_each: usize,
    granule: usize,
    work: impl Fn(Range<usize>) + Sync,
) {
    let worth = count.saturating_mul(values_each) / VALUES_MIN;
    let parts = execution.threads().min(worth).max(1);
    let length = count.div_ceil(parts).next_multiple_of(granule).max(1);
    if length >= count {
        return work(0..count);
    }
    rayon::scope(|scope| {
        let work = &work;
        for start in (0..count).step_by(length) {
            scope.spawn(move |_| work(start..count.min(start + length)));
        }
    });
}

/// As [`divide`] over the rows of `output`, of `row_length` values each: `work` gets some rows' indices and
/// their values.
pub(super) fn divide_rows(
    execution: Execution,
    output: &mut [f32],
    row_length: usize,
    work: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    if output.is_empty() {
        return;
    }
    let rows = output.len() / row_length;
    let shared = Shared::new(output);
    divide(execution, rows, row_length, 1, |range| {
        // SAFETY: the ranges do not overlap, and neither do their rows.
        let values = unsafe { shared.part(range.start * row_length..range.end * row_length) };
        work(range, values);
    });
}

/// A vector whose parts are given to several threads.
pub(super) struct Shared<'a> {
    values: *mut f32,
    length: usize,
    borrowed: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `part` gives out parts that do not overlap.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(values: &'a mut [f32]) -> Self {
        Self {
            values: values.as_mut_ptr(),
            length: values.len(),
            borrowed: std::marker::PhantomData,
        }
    }

    /// Safety: no two parts that are used at the same time overlap.
    #[expect(
        clippy::mut_from_ref,
        reason = "disjoint parts, as the caller promises"
    )]
    pub(super) unsafe fn part(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: within the borrowed vector, and not given out twice, by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.values.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::execution::all_executions;

    #[test]
    fn everything_is_done_once_by_whoever() {
        for execution in all_executions() {
            for rows in [0, 1, 2, 5, 4001] {
                let mut values = vec![0.0; rows * 70];
                divide_rows(execution, &mut values, 70, |range, part| {
                    assert_eq!(part.len(), range.len() * 70);
                    for (row, values) in range.zip(part.chunks_mut(70)) {
                        values.iter_mut().for_each(|value| *value += row as f32);
                    }
                });
                let expected = (0..rows).flat_map(|row| [row as f32; 70]);
                assert!(values.iter().copied().eq(expected));
            }
        }
    }
}
