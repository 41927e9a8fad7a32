//! A product of few rows, as a request by itself asks for: it uses each value of `b` once for each of them, so a panel of
//! `b` would cost more than the product.
//!
//! The rows of `b` are read as they lie, from front to back, a few at a time, and the sums stay in a first-level cache.
//! That a sum is stored and loaded between two steps of its chain rounds nothing.

use super::matrix::{MatrixView, spans};
use crate::kernels::lanes::{LANES, LaneOperation, Lanes, sixteens, sixteens_mut};

/// Rows of `a`, at most: with more of them, what a tile does with a panel pays for the copy.
const ROWS_MAX: usize = 4;

/// The same where `b` comes from memory, and a panel of it would go there and back.
const ROWS_MAX_OF_LARGE: usize = 8;

/// Values from which on `b` is large: 16 MiB, half of a usual third-level cache.
const LARGE: usize = 4 << 20;

/// Columns of a block: with eight rows, sums and what is read of `b` at a time are 24 KiB.
const BLOCK_COLUMNS: usize = 512;

/// Rows of `b` at a time: as many streams from memory, for one load and store of the sums.
const STREAMS: usize = 4;

/// Whether so many rows times such a matrix is better done here than by tiles.
pub(super) fn is_better(rows: usize, b: &MatrixView<'_>) -> bool {
    let is_large = b.rows * b.columns >= LARGE;
    let rows_max = if is_large {
        ROWS_MAX_OF_LARGE
    } else {
        ROWS_MAX
    };
    rows <= rows_max && b.column_stride == 1
}

/// Few rows times a matrix whose rows lie together.
pub(super) struct Streamed<'a> {
    pub(super) a: MatrixView<'a>,
    pub(super) b: MatrixView<'a>,
    /// The sums of each row of `a`.
    pub(super) c: Vec<&'a mut [f32]>,
    /// Whether chains go on from what is in `c`, or start at zero.
    pub(super) goes_on: bool,
}

impl LaneOperation for Streamed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        if !self.goes_on {
            self.c.iter_mut().for_each(|sums| sums.fill(0.0));
        }
        let inner = self.a.columns;
        for columns in spans(self.b.columns, BLOCK_COLUMNS) {
            let of_b = |at: usize| {
                let start = at * self.b.row_stride + columns.start;
                &self.b.values[start..][..columns.length]
            };
            let whole = inner - inner % STREAMS;
            for at in (0..whole).step_by(STREAMS) {
                let streams: [&[f32]; STREAMS] = std::array::from_fn(|stream| of_b(at + stream));
                for (row, sums) in self.c.iter_mut().enumerate() {
                    let factors = std::array::from_fn(|stream| self.a.value(row, at + stream));
                    let sums = &mut sums[columns.start..][..columns.length];
                    go_on::<L, STREAMS>(factors, streams, sums);
                }
            }
            for at in whole..inner {
                for (row, sums) in self.c.iter_mut().enumerate() {
                    let sums = &mut sums[columns.start..][..columns.length];
                    go_on::<L, 1>([self.a.value(row, at)], [of_b(at)], sums);
                }
            }
        }
    }
}

/// `sums + factors[0] · streams[0] + …`, one after the other.
#[inline(always)]
fn go_on<L: Lanes, const N: usize>(factors: [f32; N], streams: [&[f32]; N], sums: &mut [f32]) {
    let factors = factors.map(L::splat);
    let (sums, sums_rest) = sixteens_mut(sums);
    let count = sums.len();
    let sixteens_of = |stream: usize| {
        let (values, rest) = sixteens(streams[stream]);
        // So that the loop below checks no index.
        (&values[..count], rest)
    };
    let values: [(&[[f32; LANES]], &[f32]); N] = std::array::from_fn(sixteens_of);
    for (at, sum) in sums.iter_mut().enumerate() {
        let mut chain = L::load(sum);
        for stream in 0..N {
            chain = factors[stream].multiply_add(L::load(&values[stream].0[at]), chain);
        }
        chain.store(sum);
    }
    if !sums_rest.is_empty() {
        let mut chain = L::load_part(sums_rest);
        for stream in 0..N {
            chain = factors[stream].multiply_add(L::load_part(values[stream].1), chain);
        }
        chain.store_part(sums_rest);
    }
}
