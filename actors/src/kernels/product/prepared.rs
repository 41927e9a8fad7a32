//! A matrix that many products have on their right, such as the weight of a model in service: it is copied into panels once,
//! where `multiply` copies it for each product. For a few rows that copy costs more than the product does.
//!
//! Layout: block after block of the inner dimension, as `blocked` cuts it; in a block, panel after panel of columns. So any
//! columns that begin with a panel have their panels together.

use super::blocked::inner_of_blocks;
use super::matrix::{MatrixView, Span, spans};
use super::panels::{CacheLine, copy_b, room, values_of};
use super::tiles::Kernels;
use crate::kernels::Execution;

/// The right operand of many products.
pub struct PreparedMatrix {
    kernels: &'static Kernels,
    rows: usize,
    columns: usize,
    panels: Vec<CacheLine>,
}

impl std::fmt::Debug for PreparedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedMatrix")
            .field("rows", &self.rows)
            .field("columns", &self.columns)
            .finish_non_exhaustive()
    }
}

impl PreparedMatrix {
    /// Copies a matrix for the instructions of `execution`, which every product with it is computed by. It takes four bytes a
    /// value, of up to 15 columns more than there are.
    #[must_use]
    pub fn new(execution: Execution, matrix: &MatrixView<'_>) -> Self {
        let kernels = Kernels::of(execution.instructions());
        let (rows, columns) = (matrix.rows, matrix.columns);
        let width = width_of_panels(kernels, columns);
        let mut panels = Vec::new();
        let mut rest = room(&mut panels, width * rows);
        for inner in spans(rows, inner_of_blocks(rows)) {
            let whole = Span {
                start: 0,
                length: columns,
            };
            let (block, behind) = std::mem::take(&mut rest).split_at_mut(width * inner.length);
            copy_b(kernels, &matrix.part(inner, whole), block);
            rest = behind;
        }
        Self {
            kernels,
            rows,
            columns,
            panels,
        }
    }

    /// How many rows: the inner dimension of its products.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn whole(&self) -> PreparedPart<'_> {
        PreparedPart {
            matrix: self,
            first: 0,
            columns: self.columns,
        }
    }
}

/// What the panels of so many columns have together.
fn width_of_panels(kernels: &Kernels, columns: usize) -> usize {
    let last = columns % kernels.tile_columns();
    match last {
        0 => columns,
        last => columns - last + kernels.panel_columns(last),
    }
}

/// Some neighbouring columns of a prepared matrix, from the beginning of a panel on.
#[derive(Clone, Copy)]
pub(super) struct PreparedPart<'a> {
    matrix: &'a PreparedMatrix,
    first: usize,
    pub(super) columns: usize,
}

impl<'a> PreparedPart<'a> {
    pub(super) fn rows(&self) -> usize {
        self.matrix.rows
    }

    pub(super) fn kernels(&self) -> &'static Kernels {
        self.matrix.kernels
    }

    /// Columns of this part.
    pub(super) fn part(self, columns: Span) -> Self {
        PreparedPart {
            first: self.first + columns.start,
            columns: columns.length,
            ..self
        }
    }

    /// The panels of these columns in one of the blocks that `blocked` cuts, and what lies behind them.
    pub(super) fn panels(&self, inner: Span, columns: Span) -> &'a [f32] {
        let first = self.first + columns.start;
        // Others would be panels of some columns, without a word.
        assert!(first.is_multiple_of(self.matrix.kernels.tile_columns()));
        let width = width_of_panels(self.matrix.kernels, self.matrix.columns);
        let start = width * inner.start + first * inner.length;
        &values_of(&self.matrix.panels)[start..]
    }
}
