//! Cuts a product into blocks that fit the caches and tiles that fit the registers.
//!
//! Operands are copied into panels: of `a`, a few rows, one column after the other; of `b`, a few columns,
//! one row after the other. A tile then reads both from front to back, and strides matter only to the copy.
//! What a panel lacks at the edge of a matrix is filled with zeros, and the sums made with them are dropped.
//!
//! Where `b` is as narrow as a tile, every value of `a` is used once, and a copy costs as much as the product.
//! Then an operand that lies as a panel would is read where it is: this is the gradient of a convolution's weights.
//! Where `a` has few rows, every value of `b` is used few times, and nothing is copied (`streamed`). What is multiplied
//! again and again may be copied once (`prepared`).

use super::PARALLEL_WORK_MIN;
use super::matrix::{MatrixView, Span, spans};
use super::panels::{PANELS, copy_a, copy_b, room};
use super::prepared::{PreparedMatrix, PreparedPart};
use super::streamed::{self, Streamed};
use super::tiles::{Kernels, TILE_COLUMNS_MAX, TILE_ROWS_MAX, Tile, TileKernel};
use crate::kernels::lanes::dispatch;
use crate::kernels::{Execution, InstructionSet};

/// Inner dimension of a block, at most: a panel of 32 columns is then 32 KiB, and stays in a first-level
/// cache of 48 KiB with the rows that meet it.
const BLOCK_INNER_MAX: usize = 256;
/// Rows of a block, at most: 480 KiB of panels, about half of a second-level cache. Divisible by the rows of
/// every kernel's tile.
const BLOCK_ROWS_MAX: usize = 480;
/// Columns of a block, at most: 2 MiB of panels, which stay in the third-level cache.
const BLOCK_COLUMNS_MAX: usize = 2048;

/// The inner dimension of a product's blocks.
pub(super) fn inner_of_blocks(inner: usize) -> usize {
    balanced(inner, BLOCK_INNER_MAX)
}

/// `total` divided into equal blocks of at most `max`.
fn balanced(total: usize, max: usize) -> usize {
    total.div_ceil(total.div_ceil(max).max(1)).max(1)
}

/// The result while several threads write to it.
#[derive(Clone, Copy)]
struct Target {
    values: *mut f32,
    stride: usize,
}

// SAFETY: each thread writes to rows and columns of its own (see `multiply`).
unsafe impl Send for Target {}
// SAFETY: as above; a target is only ever copied out of a shared reference.
unsafe impl Sync for Target {}

impl Target {
    /// The part from `row` and `column` on. Both must lie in the result.
    fn at(self, row: usize, column: usize) -> Self {
        Self {
            // Wrapping, since a part without rows or columns may begin at the end of the result.
            values: self.values.wrapping_add(row * self.stride + column),
            ..self
        }
    }
}

/// `c = a · b`, row-major, as one chain of fused multiply-adds an element.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn multiply(execution: Execution, a: &MatrixView<'_>, b: &MatrixView<'_>, c: &mut [f32]) {
    multiply_from(execution, a, Right::View(*b), c, false);
}

/// As [`multiply`], of the same bits, by a matrix that was prepared for it. Of the execution only the threads count: the
/// instructions are those that the matrix was prepared for.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn multiply_prepared(
    execution: Execution,
    a: &MatrixView<'_>,
    b: &PreparedMatrix,
    c: &mut [f32],
) {
    multiply_from(execution, a, Right::Prepared(b.whole()), c, false);
}

/// `c += a · b`: the chains go on from what is in `c`. So a product may come in parts of its inner dimension.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn multiply_add(execution: Execution, a: &MatrixView<'_>, b: &MatrixView<'_>, c: &mut [f32]) {
    multiply_from(execution, a, Right::View(*b), c, true);
}

/// The right operand of a product.
#[derive(Clone, Copy)]
enum Right<'a> {
    /// As it lies in memory.
    View(MatrixView<'a>),
    /// In panels.
    Prepared(PreparedPart<'a>),
}

impl Right<'_> {
    /// Rows and columns.
    fn sizes(&self) -> (usize, usize) {
        match self {
            Right::View(b) => (b.rows, b.columns),
            Right::Prepared(b) => (b.rows(), b.columns),
        }
    }

    fn columns(self, columns: Span) -> Self {
        match self {
            Right::View(b) => {
                let rows = Span {
                    start: 0,
                    length: b.rows,
                };
                Right::View(b.part(rows, columns))
            }
            Right::Prepared(b) => Right::Prepared(b.part(columns)),
        }
    }
}

fn multiply_from(
    execution: Execution,
    a: &MatrixView<'_>,
    b: Right<'_>,
    c: &mut [f32],
    goes_on: bool,
) {
    let (b_rows, b_columns) = b.sizes();
    assert_eq!(a.columns, b_rows, "the inner dimensions differ");
    assert_eq!(c.len(), a.rows * b_columns, "the result has another size");
    if a.columns == 0 && !goes_on {
        c.fill(0.0);
    }
    if a.columns == 0 || c.is_empty() {
        return;
    }
    let kernels = match b {
        Right::View(_) => Kernels::of(execution.instructions()),
        Right::Prepared(b) => b.kernels(),
    };
    // What fits one tile lies in the result's registers, which no stream beats.
    let is_streamed = matches!(b, Right::View(b)
        if b.columns > kernels.tile_columns() && streamed::is_better(a.rows, &b));
    let target = Target {
        values: c.as_mut_ptr(),
        stride: b_columns,
    };
    let work = a.rows * a.columns * b_columns;
    let parts = execution.threads().min(work / PARALLEL_WORK_MIN).max(1);
    // Each thread copies all of the operand that is not divided: so the smaller one; nothing is copied of one that is prepared.
    let by_columns = match b {
        Right::View(_) => b_columns >= a.rows,
        Right::Prepared(_) => a.rows < parts * kernels.tile_rows(),
    };
    let (total, tile) = if by_columns {
        (b_columns, kernels.tile_columns())
    } else {
        (a.rows, kernels.tile_rows())
    };
    let length = total.div_ceil(parts).next_multiple_of(tile);
    let whole = |total| Span {
        start: 0,
        length: total,
    };
    let one = |span: Span| {
        let (rows, columns) = if by_columns {
            (whole(a.rows), span)
        } else {
            (span, whole(b_columns))
        };
        let a = a.part(rows, whole(a.columns));
        let b = b.columns(columns);
        let target = target.at(rows.start, columns.start);
        // SAFETY: the spans are disjoint, so no two threads get the same elements of `c`, which is borrowed
        // until all of them have ended.
        unsafe {
            match b {
                Right::View(b) if is_streamed => {
                    multiply_streamed(execution.instructions(), a, b, target, goes_on);
                }
                b => multiply_part(kernels, &a, b, target, goes_on),
            }
        }
    };
    if length >= total {
        return one(whole(total));
    }
    rayon::scope(|scope| {
        let one = &one;
        for span in spans(total, length) {
            scope.spawn(move |_| one(span));
        }
    });
}

/// Safety: nobody else uses the `a.rows` by `b.columns` elements of the target meanwhile, and they exist.
unsafe fn multiply_streamed(
    instructions: InstructionSet,
    a: MatrixView<'_>,
    b: MatrixView<'_>,
    target: Target,
    goes_on: bool,
) {
    let sums = |row: usize| {
        // SAFETY: by the caller, these are there and nobody else's; rows do not overlap.
        unsafe { std::slice::from_raw_parts_mut(target.at(row, 0).values, b.columns) }
    };
    let c = (0..a.rows).map(sums).collect();
    dispatch(instructions, Streamed { a, b, c, goes_on });
}

/// Safety: nobody else uses the `a.rows` by `b.columns` elements of the target meanwhile, and they exist.
unsafe fn multiply_part(
    kernels: &'static Kernels,
    a: &MatrixView<'_>,
    b: Right<'_>,
    target: Target,
    goes_on: bool,
) {
    PANELS.with_borrow_mut(|panels| {
        let (_, b_columns) = b.sizes();
        let is_narrow = b_columns <= kernels.tile_columns();
        let a_lies_right = is_narrow && a.row_stride == 1;
        let b_lies_right = |b: &MatrixView<'_>| {
            is_narrow && b.column_stride == 1 && b.columns == kernels.panel_columns(b.columns)
        };
        for columns in spans(b_columns, BLOCK_COLUMNS_MAX) {
            for inner in spans(a.columns, inner_of_blocks(a.columns)) {
                let b = match b {
                    Right::Prepared(b) => Operand::Panels(b.panels(inner, columns)),
                    Right::View(b) if b_lies_right(&b) => Operand::InPlace(b.part(inner, columns)),
                    Right::View(b) => {
                        let b = b.part(inner, columns);
                        let values =
                            columns.length.next_multiple_of(TILE_COLUMNS_MAX) * inner.length;
                        let copied = room(&mut panels.b, values);
                        copy_b(kernels, &b, copied);
                        Operand::Panels(copied)
                    }
                };
                for rows in spans(a.rows, BLOCK_ROWS_MAX) {
                    let a = a.part(rows, inner);
                    let a = if a_lies_right {
                        Operand::InPlace(a)
                    } else {
                        let values = rows.length.next_multiple_of(TILE_ROWS_MAX) * inner.length;
                        let copied = room(&mut panels.a, values);
                        copy_a(kernels, &a, copied);
                        Operand::Panels(copied)
                    };
                    let target = target.at(rows.start, columns.start);
                    // SAFETY: as promised by the caller; this block is a part of it.
                    unsafe {
                        multiply_block(
                            kernels,
                            [rows.length, inner.length, columns.length],
                            a,
                            b,
                            target,
                            goes_on || inner.start > 0,
                        );
                    }
                }
            }
        }
    });
}

/// A block of an operand, as its tiles read it.
#[derive(Clone, Copy)]
enum Operand<'a> {
    /// One panel after the other, the last filled up with zeros.
    Panels(&'a [f32]),
    /// Where it is: what a tile needs of it at a time lies together.
    InPlace(MatrixView<'a>),
}

/// Safety: as for [`multiply_part`].
unsafe fn multiply_block(
    kernels: &'static Kernels,
    [rows, inner, columns]: [usize; 3],
    a: Operand<'_>,
    b: Operand<'_>,
    target: Target,
    goes_on: bool,
) {
    let mut b_at = 0;
    for column_span in spans(columns, kernels.tile_columns()) {
        let width = kernels.panel_columns(column_span.length);
        let family = if width == kernels.tile_columns() {
            kernels.wide
        } else {
            kernels.narrow
        };
        let (b, b_step) = match b {
            Operand::Panels(panels) => (&panels[b_at..][..width * inner], width),
            Operand::InPlace(b) => (b.values, b.row_stride),
        };
        b_at += width * inner;
        let (mut row, mut a_at) = (0, 0);
        while row < rows {
            let left = rows - row;
            let (kernel, a, a_step) = match a {
                Operand::Panels(panels) => {
                    let kernel = Kernels::with_rows(family, left);
                    let panel = &panels[a_at..][..kernel.rows * inner];
                    (kernel, panel, kernel.rows)
                }
                Operand::InPlace(a) => {
                    let kernel = Kernels::within_rows(family, left);
                    (kernel, &a.values[row..], a.column_stride)
                }
            };
            a_at += kernel.rows * inner;
            let part = target.at(row, column_span.start);
            let length = kernel.rows.min(left);
            row += length;
            let tile = Tile {
                inner,
                a: a.as_ptr(),
                a_step,
                b: b.as_ptr(),
                b_step,
                c: part.values,
                c_stride: part.stride,
                goes_on,
            };
            let is_whole = kernel.rows == length && width == column_span.length;
            // SAFETY: the CPU has the instructions, for an execution, of which a prepared matrix was made too, is made only of
            // such. Panels have the
            // lengths that the kernel reads; in place it reads rows of `a` and columns of `b` that there are,
            // and a view holds its last value. A whole tile lies in the target.
            unsafe {
                if is_whole {
                    (kernel.run)(&tile);
                } else {
                    run_at_edge(kernel, tile, length, column_span.length);
                }
            }
        }
    }
}

/// Computes a tile of which only `rows` by `columns` lie in the target.
///
/// Safety: as for [`TileKernel::run`], but for the rest of the tile.
unsafe fn run_at_edge(kernel: TileKernel, tile: Tile, rows: usize, columns: usize) {
    let mut sums = [0.0f32; TILE_ROWS_MAX * TILE_COLUMNS_MAX];
    // SAFETY: by the caller, these rows and columns of `c` may be read and written, and the buffer is as
    // large as the largest tile.
    unsafe {
        if tile.goes_on {
            for row in 0..rows {
                let from = tile.c.add(row * tile.c_stride);
                let to = sums.as_mut_ptr().add(row * kernel.columns);
                std::ptr::copy_nonoverlapping(from, to, columns);
            }
        }
        (kernel.run)(&Tile {
            c: sums.as_mut_ptr(),
            c_stride: kernel.columns,
            ..tile
        });
        for row in 0..rows {
            let from = sums.as_ptr().add(row * kernel.columns);
            let to = tile.c.add(row * tile.c_stride);
            std::ptr::copy_nonoverlapping(from, to, columns);
        }
    }
}
