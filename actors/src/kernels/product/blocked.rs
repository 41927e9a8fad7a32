//! Cuts a product into blocks that fit the caches and tiles that fit the registers.
//!
//! Operands are copied into panels: of `a`, a few rows, one column after the other; of `b`, a few columns,
//! one row after the other. A tile then reads both from front to back, and strides matter only to the copy.
//! What a panel lacks at the edge of a matrix is filled with zeros, and the sums made with them are dropped.

use std::cell::RefCell;

use super::{PARALLEL_WORK_MIN, scalar};
use crate::kernels::{Execution, InstructionSet};

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Inner dimension of a block, at most: a panel of 32 columns is then 32 KiB, and stays in a first-level
/// cache of 48 KiB with the rows that meet it.
const BLOCK_INNER_MAX: usize = 256;
/// Rows of a block, at most: 480 KiB of panels, about half of a second-level cache. Divisible by the rows of
/// every kernel's tile.
const BLOCK_ROWS_MAX: usize = 480;
/// Columns of a block, at most: 2 MiB of panels, which stay in the third-level cache.
const BLOCK_COLUMNS_MAX: usize = 2048;
/// Rows and columns of the largest tile.
pub(super) const TILE_ROWS_MAX: usize = 12;
pub(super) const TILE_COLUMNS_MAX: usize = 32;

/// A matrix of `f32` with any strides.
#[derive(Debug, Clone, Copy)]
pub struct MatrixView<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> MatrixView<'a> {
    /// A view of `values`, `[rows, columns]` large, with the distances between neighbouring rows and
    /// neighbouring columns.
    ///
    /// # Panics
    /// If the last element lies outside `values`.
    #[must_use]
    pub fn new(
        values: &'a [f32],
        [rows, columns]: [usize; 2],
        [row_stride, column_stride]: [usize; 2],
    ) -> Self {
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * row_stride + (columns - 1) * column_stride;
            assert!(
                last < values.len(),
                "a {rows}x{columns} matrix ends at value {last} of {}",
                values.len()
            );
        }
        Self {
            values,
            rows,
            columns,
            row_stride,
            column_stride,
        }
    }

    /// A view of a matrix whose rows follow one another.
    ///
    /// # Panics
    /// If `values` is too short.
    #[must_use]
    pub fn row_major(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::new(values, [rows, columns], [columns, 1])
    }

    /// The same with rows and columns exchanged.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// How many rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    fn part(&self, rows: Span, columns: Span) -> Self {
        let start = rows.start * self.row_stride + columns.start * self.column_stride;
        Self::new(
            self.values.get(start..).unwrap_or_default(),
            [rows.length, columns.length],
            [self.row_stride, self.column_stride],
        )
    }
}

/// Some neighbouring rows or columns.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: usize,
    length: usize,
}

/// `0..total` in spans of `length` and a shorter last one.
fn spans(total: usize, length: usize) -> impl Iterator<Item = Span> + Clone {
    (0..total).step_by(length.max(1)).map(move |start| Span {
        start,
        length: length.min(total - start),
    })
}

/// `total` divided into equal blocks of at most `max`.
fn balanced(total: usize, max: usize) -> usize {
    total.div_ceil(total.div_ceil(max).max(1)).max(1)
}

/// What one tile is computed from.
pub(super) struct Tile {
    /// Length of the chains in this block.
    pub(super) inner: usize,
    /// A panel: `inner` times the kernel's rows.
    pub(super) a: *const f32,
    /// A panel: `inner` times the kernel's columns.
    pub(super) b: *const f32,
    /// The sums: the kernel's rows, `c_stride` apart, of the kernel's columns.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Whether chains go on from what is in `c`, or start at zero.
    pub(super) goes_on: bool,
}

/// A function that computes tiles of one size.
#[derive(Clone, Copy)]
pub(super) struct TileKernel {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Safety: the CPU has the kernel's instructions; `a` and `b` may be read and `c` read and written as
    /// [`Tile`] says.
    pub(super) run: unsafe fn(&Tile),
}

/// Rows and columns of a block that is transposed in registers.
pub(super) const TURNED: usize = 8;

/// The tiles of one instruction set: for each number of columns, kernels with ever fewer rows.
pub(super) struct Kernels {
    /// Transposes a square of [`TURNED`]: from, distance of its rows; to, distance of its rows.
    ///
    /// Safety: the CPU has the instructions, and all of the squares may be read and written.
    pub(super) turn: unsafe fn(*const f32, usize, *mut f32, usize),
    /// The widest tiles, those with most rows first.
    pub(super) wide: &'static [TileKernel],
    /// Tiles of half the width, for what is left at the right edge.
    pub(super) narrow: &'static [TileKernel],
}

impl Kernels {
    fn of(instructions: InstructionSet) -> &'static Kernels {
        match instructions {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => &avx2::KERNELS,
            _ => &scalar::KERNELS,
        }
    }

    fn tile_rows(&self) -> usize {
        self.wide[0].rows
    }

    fn tile_columns(&self) -> usize {
        self.wide[0].columns
    }

    /// Columns of the panel that holds the last `columns`.
    fn panel_columns(&self, columns: usize) -> usize {
        if columns <= self.narrow[0].columns {
            self.narrow[0].columns
        } else {
            self.tile_columns()
        }
    }

    /// The smallest tile with at least `rows`; every width has the same numbers of rows.
    fn with_rows(kernels: &'static [TileKernel], rows: usize) -> TileKernel {
        *kernels
            .iter()
            .rev()
            .find(|kernel| kernel.rows >= rows)
            .unwrap_or(&kernels[0])
    }
}

/// Panels begin at a cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct CacheLine([f32; 16]);

#[derive(Default)]
struct Panels {
    a: Vec<CacheLine>,
    b: Vec<CacheLine>,
}

thread_local! {
    /// Kept from product to product; at most 2.5 MiB, by the bounds of a block.
    static PANELS: RefCell<Panels> = RefCell::default();
}

fn room(lines: &mut Vec<CacheLine>, values: usize) -> &mut [f32] {
    let needed = values.div_ceil(16);
    if lines.len() < needed {
        lines.resize(needed, CacheLine([0.0; 16]));
    }
    // SAFETY: a cache line is sixteen floats without padding, and `needed` of them are there.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), values) }
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
    assert_eq!(a.columns, b.rows, "the inner dimensions differ");
    assert_eq!(c.len(), a.rows * b.columns, "the result has another size");
    if a.columns == 0 {
        c.fill(0.0);
    }
    if a.columns == 0 || c.is_empty() {
        return;
    }
    let kernels = Kernels::of(execution.instructions());
    let target = Target {
        values: c.as_mut_ptr(),
        stride: b.columns,
    };
    let work = a.rows * a.columns * b.columns;
    let parts = execution.threads().min(work / PARALLEL_WORK_MIN).max(1);
    // Each thread copies all of the operand that is not divided: so the smaller one.
    let by_columns = b.columns >= a.rows;
    let (total, tile) = if by_columns {
        (b.columns, kernels.tile_columns())
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
            (span, whole(b.columns))
        };
        let a = a.part(rows, whole(a.columns));
        let b = b.part(whole(b.rows), columns);
        // SAFETY: the spans are disjoint, so no two threads get the same elements of `c`, which is borrowed
        // until all of them have ended.
        unsafe { multiply_part(kernels, &a, &b, target.at(rows.start, columns.start)) };
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
unsafe fn multiply_part(
    kernels: &'static Kernels,
    a: &MatrixView<'_>,
    b: &MatrixView<'_>,
    target: Target,
) {
    PANELS.with_borrow_mut(|panels| {
        let block_inner = balanced(a.columns, BLOCK_INNER_MAX);
        for columns in spans(b.columns, BLOCK_COLUMNS_MAX) {
            for inner in spans(a.columns, block_inner) {
                let b = b.part(inner, columns);
                let b_values = columns.length.next_multiple_of(TILE_COLUMNS_MAX) * inner.length;
                let b_panels = room(&mut panels.b, b_values);
                copy_b(kernels, &b, b_panels);
                for rows in spans(a.rows, BLOCK_ROWS_MAX) {
                    let a = a.part(rows, inner);
                    let a_values = rows.length.next_multiple_of(TILE_ROWS_MAX) * inner.length;
                    let a_panels = room(&mut panels.a, a_values);
                    copy_a(kernels, &a, a_panels);
                    let target = target.at(rows.start, columns.start);
                    // SAFETY: as promised by the caller; this block is a part of it.
                    unsafe {
                        multiply_block(
                            kernels,
                            [rows.length, inner.length, columns.length],
                            a_panels,
                            b_panels,
                            target,
                            inner.start > 0,
                        );
                    }
                }
            }
        }
    });
}

/// Safety: as for [`multiply_part`].
unsafe fn multiply_block(
    kernels: &'static Kernels,
    [rows, inner, columns]: [usize; 3],
    a_panels: &[f32],
    b_panels: &[f32],
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
        let b = &b_panels[b_at..][..width * inner];
        b_at += b.len();
        let mut a_at = 0;
        for row_span in spans(rows, kernels.tile_rows()) {
            let kernel = Kernels::with_rows(family, row_span.length);
            let a = &a_panels[a_at..][..kernel.rows * inner];
            a_at += a.len();
            let part = target.at(row_span.start, column_span.start);
            let tile = Tile {
                inner,
                a: a.as_ptr(),
                b: b.as_ptr(),
                c: part.values,
                c_stride: part.stride,
                goes_on,
            };
            let is_whole = kernel.rows == row_span.length && width == column_span.length;
            // SAFETY: the CPU has the instructions, for an execution is made only of such; the panels have
            // the lengths that the kernel reads; a whole tile lies in the target.
            unsafe {
                if is_whole {
                    (kernel.run)(&tile);
                } else {
                    run_at_edge(kernel, tile, row_span.length, column_span.length);
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

fn copy_a(kernels: &'static Kernels, a: &MatrixView<'_>, panels: &mut [f32]) {
    let mut rest = panels;
    for span in spans(a.rows, kernels.tile_rows()) {
        let rows = Kernels::with_rows(kernels.wide, span.length).rows;
        let (panel, behind) = std::mem::take(&mut rest).split_at_mut(rows * a.columns);
        rest = behind;
        let whole = Span {
            start: 0,
            length: a.columns,
        };
        copy_panel(kernels, &a.part(span, whole).transposed(), rows, panel);
    }
}

fn copy_b(kernels: &'static Kernels, b: &MatrixView<'_>, panels: &mut [f32]) {
    let mut rest = panels;
    for span in spans(b.columns, kernels.tile_columns()) {
        let columns = kernels.panel_columns(span.length);
        let (panel, behind) = std::mem::take(&mut rest).split_at_mut(columns * b.rows);
        rest = behind;
        let whole = Span {
            start: 0,
            length: b.rows,
        };
        copy_panel(kernels, &b.part(whole, span), columns, panel);
    }
}

/// Copies `from` into rows of `width`, and fills them up with zeros.
fn copy_panel(kernels: &Kernels, from: &MatrixView<'_>, width: usize, panel: &mut [f32]) {
    if from.columns < width {
        panel.fill(0.0);
    }
    if from.column_stride == 1 {
        for (row, to) in panel.chunks_exact_mut(width).enumerate() {
            copy_row(
                &from.values[row * from.row_stride..][..from.columns],
                &mut to[..from.columns],
            );
        }
    } else if from.row_stride == 1 {
        copy_transposed(kernels, from, width, panel);
    } else {
        for (row, to) in panel.chunks_exact_mut(width).enumerate() {
            for (column, value) in to[..from.columns].iter_mut().enumerate() {
                *value = from.values[row * from.row_stride + column * from.column_stride];
            }
        }
    }
}

/// Copies a short row without a call to `memmove`, which takes longer than the copy.
#[inline(always)]
pub(in crate::kernels) fn copy_row(from: &[f32], to: &mut [f32]) {
    let (from, from_rest) = from.as_chunks::<8>();
    let (to, to_rest) = to.as_chunks_mut::<8>();
    for (from, to) in from.iter().zip(to) {
        *to = *from;
    }
    for (from, to) in from_rest.iter().zip(to_rest) {
        *to = *from;
    }
}

/// As [`copy_panel`], where it is columns that lie together: square blocks are turned in registers.
fn copy_transposed(kernels: &Kernels, from: &MatrixView<'_>, width: usize, panel: &mut [f32]) {
    let (rows, columns) = (from.rows, from.columns);
    let (whole_rows, whole_columns) = (rows - rows % TURNED, columns - columns % TURNED);
    for row in (0..whole_rows).step_by(TURNED) {
        for column in (0..whole_columns).step_by(TURNED) {
            let last = (column + TURNED - 1) * from.column_stride + row + TURNED;
            let values = &from.values[column * from.column_stride + row..last];
            let to = &mut panel[row * width + column..(row + TURNED - 1) * width + column + TURNED];
            // SAFETY: both slices begin at their block and reach its last value; the CPU has the kernels'
            // instructions.
            unsafe {
                (kernels.turn)(values.as_ptr(), from.column_stride, to.as_mut_ptr(), width);
            }
        }
    }
    for column in 0..columns {
        let first = if column < whole_columns {
            whole_rows
        } else {
            0
        };
        let values = &from.values[column * from.column_stride..][..rows];
        for (row, value) in values.iter().enumerate().skip(first) {
            panel[row * width + column] = *value;
        }
    }
}
