//! Tiles in plain Rust: the definition, and what runs where there are no vectors.

use super::tiles::{Kernels, TURNED, Tile, TileKernel};

pub(super) static KERNELS: Kernels = Kernels {
    turn,
    wide: &[kernel::<4, 8>(), kernel::<2, 8>(), kernel::<1, 8>()],
    narrow: &[kernel::<4, 4>(), kernel::<2, 4>(), kernel::<1, 4>()],
};

const fn kernel<const ROWS: usize, const COLUMNS: usize>() -> TileKernel {
    TileKernel {
        rows: ROWS,
        columns: COLUMNS,
        run: tile::<ROWS, COLUMNS>,
    }
}

unsafe fn tile<const ROWS: usize, const COLUMNS: usize>(tile: &Tile) {
    let mut sums = [[0.0f32; COLUMNS]; ROWS];
    // SAFETY: the caller promises panels and a target of these sizes.
    unsafe {
        if tile.goes_on {
            for (row, sums) in sums.iter_mut().enumerate() {
                *sums = tile
                    .c
                    .add(row * tile.c_stride)
                    .cast::<[f32; COLUMNS]>()
                    .read();
            }
        }
        for k in 0..tile.inner {
            let factors = tile.a.add(k * tile.a_step).cast::<[f32; ROWS]>().read();
            let values = tile.b.add(k * tile.b_step).cast::<[f32; COLUMNS]>().read();
            for (sums, factor) in sums.iter_mut().zip(factors) {
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = factor.mul_add(value, *sum);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            tile.c
                .add(row * tile.c_stride)
                .cast::<[f32; COLUMNS]>()
                .write(sums);
        }
    }
}

unsafe fn turn(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    for row in 0..TURNED {
        for column in 0..TURNED {
            // SAFETY: the caller promises the squares.
            unsafe { *to.add(column * to_stride + row) = *from.add(row * from_stride + column) };
        }
    }
}
