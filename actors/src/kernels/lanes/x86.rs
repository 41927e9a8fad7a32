//! [`Lanes`](super::Lanes) as one AVX-512 register and as two of AVX2.

use std::arch::x86_64::*;

use super::{LANES, LaneOperation, Lanes, ROOT_HALF};

/// Safety: the CPU has AVX-512F, AVX2 and FMA.
#[target_feature(enable = "avx512f,avx2,fma")]
pub(super) unsafe fn with_avx512<O: LaneOperation>(operation: O) -> O::Output {
    operation.run::<Avx512>()
}

/// Safety: the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn with_avx2<O: LaneOperation>(operation: O) -> O::Output {
    operation.run::<Avx2>()
}

#[derive(Clone, Copy)]
struct Avx512(__m512);

#[derive(Clone, Copy)]
struct Avx2(__m256, __m256);

/// An expression of intrinsics.
macro_rules! intrinsics {
    ($expression:expr) => {
        // SAFETY: values of these types exist only within `with_avx512` and `with_avx2`, whose callers have
        // checked the instructions; memory is only reached through references to whole arrays.
        unsafe { $expression }
    };
}

impl Lanes for Avx512 {
    type Double = (__m512d, __m512d);

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(intrinsics!(_mm512_set1_ps(value)))
    }
    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        Self(intrinsics!(_mm512_loadu_ps(values.as_ptr())))
    }
    #[inline(always)]
    fn store(self, values: &mut [f32; LANES]) {
        intrinsics!(_mm512_storeu_ps(values.as_mut_ptr(), self.0));
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_add_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn subtract(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_sub_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn multiply(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_mul_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn divide(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_div_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn square_root(self) -> Self {
        Self(intrinsics!(_mm512_sqrt_ps(self.0)))
    }
    #[inline(always)]
    fn multiply_add(self, factor: Self, addend: Self) -> Self {
        Self(intrinsics!(_mm512_fmadd_ps(self.0, factor.0, addend.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(intrinsics!(_mm512_min_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn if_less(self, limit: Self, below: Self, otherwise: Self) -> Self {
        Self(intrinsics!(_mm512_mask_blend_ps(
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, limit.0),
            otherwise.0,
            below.0
        )))
    }
    #[inline(always)]
    fn if_nan(self, otherwise: Self) -> Self {
        Self(intrinsics!(_mm512_mask_blend_ps(
            _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0),
            otherwise.0,
            self.0
        )))
    }
    #[inline(always)]
    fn magnitude(self) -> Self {
        Self(intrinsics!(_mm512_castsi512_ps(_mm512_and_si512(
            _mm512_castps_si512(self.0),
            _mm512_set1_epi32(i32::MAX)
        ))))
    }
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        let sign = intrinsics!(_mm512_and_si512(
            _mm512_castps_si512(other.0),
            _mm512_set1_epi32(i32::MIN)
        ));
        let bits = intrinsics!(_mm512_castps_si512(self.magnitude().0));
        Self(intrinsics!(_mm512_castsi512_ps(_mm512_or_si512(
            bits, sign
        ))))
    }
    #[inline(always)]
    fn scaled_by(self, shifted: Self) -> Self {
        Self(intrinsics!(_mm512_castsi512_ps(_mm512_add_epi32(
            _mm512_castps_si512(self.0),
            _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted.0))
        ))))
    }
    #[inline(always)]
    fn mantissa_and_exponent(self) -> (Self, Self) {
        let bits = intrinsics!(_mm512_castps_si512(self.0));
        let exponent = intrinsics!(_mm512_srai_epi32::<23>(_mm512_sub_epi32(
            bits,
            _mm512_set1_epi32(ROOT_HALF as i32)
        )));
        let mantissa = intrinsics!(_mm512_sub_epi32(bits, _mm512_slli_epi32::<23>(exponent)));
        (
            Self(intrinsics!(_mm512_castsi512_ps(mantissa))),
            Self(intrinsics!(_mm512_cvtepi32_ps(exponent))),
        )
    }
    #[inline(always)]
    fn double_zero() -> Self::Double {
        intrinsics!((_mm512_setzero_pd(), _mm512_setzero_pd()))
    }
    #[inline(always)]
    fn add_square(self, (low_sum, high_sum): Self::Double) -> Self::Double {
        let halves = intrinsics!((
            _mm512_castps512_ps256(self.0),
            _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)))
        ));
        let (low, high) = intrinsics!((_mm512_cvtps_pd(halves.0), _mm512_cvtps_pd(halves.1)));
        intrinsics!((
            _mm512_fmadd_pd(low, low, low_sum),
            _mm512_fmadd_pd(high, high, high_sum)
        ))
    }
    #[inline(always)]
    fn double_lanes((low, high): Self::Double) -> [f64; LANES] {
        let mut lanes = [0.0; LANES];
        intrinsics!({
            _mm512_storeu_pd(lanes.as_mut_ptr(), low);
            _mm512_storeu_pd(lanes.as_mut_ptr().add(8), high);
        });
        lanes
    }
}

impl Avx2 {
    #[inline(always)]
    fn both(self, operation: impl Fn(__m256) -> __m256) -> Self {
        Self(operation(self.0), operation(self.1))
    }

    #[inline(always)]
    fn with(self, other: Self, operation: impl Fn(__m256, __m256) -> __m256) -> Self {
        Self(operation(self.0, other.0), operation(self.1, other.1))
    }
}

impl Lanes for Avx2 {
    type Double = [__m256d; 4];

    #[inline(always)]
    fn splat(value: f32) -> Self {
        let half = intrinsics!(_mm256_set1_ps(value));
        Self(half, half)
    }
    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        let from = values.as_ptr();
        intrinsics!(Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))))
    }
    #[inline(always)]
    fn store(self, values: &mut [f32; LANES]) {
        let to = values.as_mut_ptr();
        intrinsics!({
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        });
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.with(other, |a, b| intrinsics!(_mm256_add_ps(a, b)))
    }
    #[inline(always)]
    fn subtract(self, other: Self) -> Self {
        self.with(other, |a, b| intrinsics!(_mm256_sub_ps(a, b)))
    }
    #[inline(always)]
    fn multiply(self, other: Self) -> Self {
        self.with(other, |a, b| intrinsics!(_mm256_mul_ps(a, b)))
    }
    #[inline(always)]
    fn divide(self, other: Self) -> Self {
        self.with(other, |a, b| intrinsics!(_mm256_div_ps(a, b)))
    }
    #[inline(always)]
    fn square_root(self) -> Self {
        self.both(|a| intrinsics!(_mm256_sqrt_ps(a)))
    }
    #[inline(always)]
    fn multiply_add(self, factor: Self, addend: Self) -> Self {
        intrinsics!(Self(
            _mm256_fmadd_ps(self.0, factor.0, addend.0),
            _mm256_fmadd_ps(self.1, factor.1, addend.1)
        ))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.with(other, |a, b| intrinsics!(_mm256_max_ps(a, b)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.with(other, |a, b| intrinsics!(_mm256_min_ps(a, b)))
    }
    #[inline(always)]
    fn if_less(self, limit: Self, below: Self, otherwise: Self) -> Self {
        let is_less = self.with(limit, |a, b| intrinsics!(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b)));
        intrinsics!(Self(
            _mm256_blendv_ps(otherwise.0, below.0, is_less.0),
            _mm256_blendv_ps(otherwise.1, below.1, is_less.1)
        ))
    }
    #[inline(always)]
    fn if_nan(self, otherwise: Self) -> Self {
        self.with(otherwise, |a, b| {
            intrinsics!(_mm256_blendv_ps(b, a, _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a)))
        })
    }
    #[inline(always)]
    fn magnitude(self) -> Self {
        self.both(|a| intrinsics!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a)))
    }
    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        self.magnitude().with(other, |a, b| {
            intrinsics!(_mm256_or_ps(a, _mm256_and_ps(_mm256_set1_ps(-0.0), b)))
        })
    }
    #[inline(always)]
    fn scaled_by(self, shifted: Self) -> Self {
        self.with(shifted, |value, n| {
            intrinsics!(_mm256_castsi256_ps(_mm256_add_epi32(
                _mm256_castps_si256(value),
                _mm256_slli_epi32::<23>(_mm256_castps_si256(n))
            )))
        })
    }
    #[inline(always)]
    fn mantissa_and_exponent(self) -> (Self, Self) {
        let exponent = self.both(|a| {
            intrinsics!(_mm256_castsi256_ps(_mm256_srai_epi32::<23>(
                _mm256_sub_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(ROOT_HALF as i32))
            )))
        });
        let mantissa = self.with(exponent, |a, exponent| {
            intrinsics!(_mm256_castsi256_ps(_mm256_sub_epi32(
                _mm256_castps_si256(a),
                _mm256_slli_epi32::<23>(_mm256_castps_si256(exponent))
            )))
        });
        let exponent = exponent.both(|a| intrinsics!(_mm256_cvtepi32_ps(_mm256_castps_si256(a))));
        (mantissa, exponent)
    }
    #[inline(always)]
    fn double_zero() -> Self::Double {
        [intrinsics!(_mm256_setzero_pd()); 4]
    }
    #[inline(always)]
    fn add_square(self, [sum0, sum1, sum2, sum3]: Self::Double) -> Self::Double {
        let add = |half: __m128, sum: __m256d| {
            intrinsics!({
                let wide = _mm256_cvtps_pd(half);
                _mm256_fmadd_pd(wide, wide, sum)
            })
        };
        intrinsics!([
            add(_mm256_castps256_ps128(self.0), sum0),
            add(_mm256_extractf128_ps::<1>(self.0), sum1),
            add(_mm256_castps256_ps128(self.1), sum2),
            add(_mm256_extractf128_ps::<1>(self.1), sum3),
        ])
    }
    #[inline(always)]
    fn double_lanes(sum: Self::Double) -> [f64; LANES] {
        let mut lanes = [0.0; LANES];
        for (quarter, to) in sum.into_iter().zip(lanes.chunks_exact_mut(4)) {
            intrinsics!(_mm256_storeu_pd(to.as_mut_ptr(), quarter));
        }
        lanes
    }
}
