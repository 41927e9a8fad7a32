//! Tiles in AVX-512: twelve rows of two vectors, 24 of the 32 registers.

use std::arch::x86_64::{
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::tiles::{Kernels, Tile, TileKernel};

/// Values in a vector.
const LANES: usize = 16;

/// Functions that compute tiles, with every row written out: the sums then stay in registers at every
/// optimisation level.
macro_rules! tiles {
    ($($rows:literal $wide:ident $narrow:ident [$($row:literal)*];)*) => {
        pub(super) static KERNELS: Kernels = Kernels {
            turn: super::avx2::turn,
            wide: &[$(TileKernel { rows: $rows, columns: 2 * LANES, run: $wide }),*],
            narrow: &[$(TileKernel { rows: $rows, columns: LANES, run: $narrow }),*],
        };
        $(
            #[target_feature(enable = "avx512f")]
            unsafe fn $wide(tile: &Tile) {
                let (mut left, mut right) = ([_mm512_setzero_ps(); $rows], [_mm512_setzero_ps(); $rows]);
                let (mut a, mut b) = (tile.a, tile.b);
                // SAFETY: the caller promises panels and a target of these sizes.
                unsafe {
                    if tile.goes_on {
                        $(
                            let from = tile.c.add($row * tile.c_stride);
                            left[$row] = _mm512_loadu_ps(from);
                            right[$row] = _mm512_loadu_ps(from.add(LANES));
                        )*
                    }
                    for _ in 0..tile.inner {
                        let (b_left, b_right) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(LANES)));
                        $(
                            let factor = _mm512_set1_ps(*a.add($row));
                            left[$row] = _mm512_fmadd_ps(factor, b_left, left[$row]);
                            right[$row] = _mm512_fmadd_ps(factor, b_right, right[$row]);
                        )*
                        a = a.wrapping_add(tile.a_step);
                        b = b.wrapping_add(tile.b_step);
                    }
                    $(
                        let to = tile.c.add($row * tile.c_stride);
                        _mm512_storeu_ps(to, left[$row]);
                        _mm512_storeu_ps(to.add(LANES), right[$row]);
                    )*
                }
            }

            #[target_feature(enable = "avx512f")]
            unsafe fn $narrow(tile: &Tile) {
                let mut sums = [_mm512_setzero_ps(); $rows];
                let (mut a, mut b) = (tile.a, tile.b);
                // SAFETY: as above.
                unsafe {
                    if tile.goes_on {
                        $(sums[$row] = _mm512_loadu_ps(tile.c.add($row * tile.c_stride));)*
                    }
                    for _ in 0..tile.inner {
                        let values = _mm512_loadu_ps(b);
                        $(sums[$row] = _mm512_fmadd_ps(_mm512_set1_ps(*a.add($row)), values, sums[$row]);)*
                        a = a.wrapping_add(tile.a_step);
                        b = b.wrapping_add(tile.b_step);
                    }
                    $(_mm512_storeu_ps(tile.c.add($row * tile.c_stride), sums[$row]);)*
                }
            }
        )*
    };
}

tiles! {
    12 twelve_by_two twelve_by_one [0 1 2 3 4 5 6 7 8 9 10 11];
    8 eight_by_two eight_by_one [0 1 2 3 4 5 6 7];
    4 four_by_two four_by_one [0 1 2 3];
    2 two_by_two two_by_one [0 1];
    1 one_by_two one_by_one [0];
}
