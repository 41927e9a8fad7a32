//! Tiles in AVX2 with FMA: six rows of two vectors, 12 of the 16 registers.

use std::arch::x86_64::{
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use super::tiles::{Kernels, TURNED, Tile, TileKernel};

/// Values in a vector.
const LANES: usize = 8;

/// Functions that compute tiles, with every row written out: the sums then stay in registers at every
/// optimisation level.
macro_rules! tiles {
    ($($rows:literal $wide:ident $narrow:ident [$($row:literal)*];)*) => {
        pub(super) static KERNELS: Kernels = Kernels {
            turn,
            wide: &[$(TileKernel { rows: $rows, columns: 2 * LANES, run: $wide }),*],
            narrow: &[$(TileKernel { rows: $rows, columns: LANES, run: $narrow }),*],
        };
        $(
            #[target_feature(enable = "avx2,fma")]
            unsafe fn $wide(tile: &Tile) {
                let (mut left, mut right) = ([_mm256_setzero_ps(); $rows], [_mm256_setzero_ps(); $rows]);
                let (mut a, mut b) = (tile.a, tile.b);
                // SAFETY: the caller promises panels and a target of these sizes.
                unsafe {
                    if tile.goes_on {
                        $(
                            let from = tile.c.add($row * tile.c_stride);
                            left[$row] = _mm256_loadu_ps(from);
                            right[$row] = _mm256_loadu_ps(from.add(LANES));
                        )*
                    }
                    for _ in 0..tile.inner {
                        let (b_left, b_right) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(LANES)));
                        $(
                            let factor = _mm256_set1_ps(*a.add($row));
                            left[$row] = _mm256_fmadd_ps(factor, b_left, left[$row]);
                            right[$row] = _mm256_fmadd_ps(factor, b_right, right[$row]);
                        )*
                        a = a.wrapping_add(tile.a_step);
                        b = b.wrapping_add(tile.b_step);
                    }
                    $(
                        let to = tile.c.add($row * tile.c_stride);
                        _mm256_storeu_ps(to, left[$row]);
                        _mm256_storeu_ps(to.add(LANES), right[$row]);
                    )*
                }
            }

            #[target_feature(enable = "avx2,fma")]
            unsafe fn $narrow(tile: &Tile) {
                let mut sums = [_mm256_setzero_ps(); $rows];
                let (mut a, mut b) = (tile.a, tile.b);
                // SAFETY: as above.
                unsafe {
                    if tile.goes_on {
                        $(sums[$row] = _mm256_loadu_ps(tile.c.add($row * tile.c_stride));)*
                    }
                    for _ in 0..tile.inner {
                        let values = _mm256_loadu_ps(b);
                        $(sums[$row] = _mm256_fmadd_ps(_mm256_set1_ps(*a.add($row)), values, sums[$row]);)*
                        a = a.wrapping_add(tile.a_step);
                        b = b.wrapping_add(tile.b_step);
                    }
                    $(_mm256_storeu_ps(tile.c.add($row * tile.c_stride), sums[$row]);)*
                }
            }
        )*
    };
}

tiles! {
    6 six_by_two six_by_one [0 1 2 3 4 5];
    4 four_by_two four_by_one [0 1 2 3];
    2 two_by_two two_by_one [0 1];
    1 one_by_two one_by_one [0];
}

/// Transposes a square of eight: pairs, then fours, then halves of registers are exchanged.
///
/// Safety: the CPU has AVX2, and all of the squares may be read and written.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn turn(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    let mut rows = [_mm256_setzero_ps(); TURNED];
    for (index, row) in rows.iter_mut().enumerate() {
        // SAFETY: the caller promises the square.
        *row = unsafe { _mm256_loadu_ps(from.add(index * from_stride)) };
    }
    let [r0, r1, r2, r3, r4, r5, r6, r7] = rows;
    let (p0, p1) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
    let (p2, p3) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
    let (p4, p5) = (_mm256_unpacklo_ps(r4, r5), _mm256_unpackhi_ps(r4, r5));
    let (p6, p7) = (_mm256_unpacklo_ps(r6, r7), _mm256_unpackhi_ps(r6, r7));
    let fours = [
        _mm256_shuffle_ps::<0x44>(p0, p2),
        _mm256_shuffle_ps::<0xee>(p0, p2),
        _mm256_shuffle_ps::<0x44>(p1, p3),
        _mm256_shuffle_ps::<0xee>(p1, p3),
        _mm256_shuffle_ps::<0x44>(p4, p6),
        _mm256_shuffle_ps::<0xee>(p4, p6),
        _mm256_shuffle_ps::<0x44>(p5, p7),
        _mm256_shuffle_ps::<0xee>(p5, p7),
    ];
    for index in 0..TURNED / 2 {
        let (low, high) = (fours[index], fours[index + 4]);
        // SAFETY: as above.
        unsafe {
            let (upper, lower) = (to.add(index * to_stride), to.add((index + 4) * to_stride));
            _mm256_storeu_ps(upper, _mm256_permute2f128_ps::<0x20>(low, high));
            _mm256_storeu_ps(lower, _mm256_permute2f128_ps::<0x31>(low, high));
        }
    }
}
