//! Operands copied into panels: what a tile needs at a time lies together there, whatever the strides were.
//! What a panel lacks at the edge of a matrix is filled with zeros.

use std::cell::RefCell;

use super::matrix::{MatrixView, Span, spans};
use super::tiles::{Kernels, TURNED};

/// Panels begin at a cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct CacheLine([f32; 16]);

#[derive(Default)]
pub(super) struct Panels {
    pub(super) a: Vec<CacheLine>,
    pub(super) b: Vec<CacheLine>,
}

thread_local! {
    /// Kept from product to product; at most 2.5 MiB, by the bounds of a block.
    pub(super) static PANELS: RefCell<Panels> = RefCell::default();
}

pub(super) fn room(lines: &mut Vec<CacheLine>, values: usize) -> &mut [f32] {
    let needed = values.div_ceil(16);
    if lines.len() < needed {
        lines.resize(needed, CacheLine([0.0; 16]));
    }
    // SAFETY: a cache line is sixteen floats without padding, and `needed` of them are there.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), values) }
}

/// What is in cache lines, one after the other.
pub(super) fn values_of(lines: &[CacheLine]) -> &[f32] {
    // SAFETY: a cache line is sixteen floats without padding.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 16) }
}

pub(super) fn copy_a(kernels: &'static Kernels, a: &MatrixView<'_>, panels: &mut [f32]) {
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

pub(super) fn copy_b(kernels: &'static Kernels, b: &MatrixView<'_>, panels: &mut [f32]) {
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
