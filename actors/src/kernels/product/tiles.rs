//! What a tile is, and the tiles of each instruction set.

use super::scalar;
use crate::kernels::InstructionSet;

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Rows and columns of the largest tile.
pub(super) const TILE_ROWS_MAX: usize = 12;
pub(super) const TILE_COLUMNS_MAX: usize = 32;

/// What one tile is computed from.
pub(super) struct Tile {
    /// Length of the chains in this block.
    pub(super) inner: usize,
    /// `inner` times the kernel's rows, `a_step` apart: in a panel these are the kernel's rows.
    pub(super) a: *const f32,
    pub(super) a_step: usize,
    /// `inner` times the kernel's columns, `b_step` apart.
    pub(super) b: *const f32,
    pub(super) b_step: usize,
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
    pub(super) fn of(instructions: InstructionSet) -> &'static Kernels {
        match instructions {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => &avx2::KERNELS,
            _ => &scalar::KERNELS,
        }
    }

    pub(super) fn tile_rows(&self) -> usize {
        self.wide[0].rows
    }

    pub(super) fn tile_columns(&self) -> usize {
        self.wide[0].columns
    }

    /// Columns of the panel that holds the last `columns`.
    pub(super) fn panel_columns(&self, columns: usize) -> usize {
        if columns <= self.narrow[0].columns {
            self.narrow[0].columns
        } else {
            self.tile_columns()
        }
    }

    /// The smallest tile with at least `rows`; every width has the same numbers of rows.
    pub(super) fn with_rows(kernels: &'static [TileKernel], rows: usize) -> TileKernel {
        *kernels
            .iter()
            .rev()
            .find(|kernel| kernel.rows >= rows)
            .unwrap_or(&kernels[0])
    }

    /// The largest tile with at most `rows`.
    pub(super) fn within_rows(kernels: &'static [TileKernel], rows: usize) -> TileKernel {
        *kernels
            .iter()
            .find(|kernel| kernel.rows <= rows)
            .expect("every width has a tile of one row")
    }
}
