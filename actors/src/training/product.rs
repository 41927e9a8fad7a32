//! The matrix product, with bits that no machine, thread count or shape of the work can change.
//!
//! Invariant: each element of a product is one chain of fused multiply-adds from zero over the inner
//! dimension, in ascending order. A fused multiply-add is exactly rounded, so a chain has the same bits
//! in scalar code and in vectors. candle's own product sums in blocks whose size depends on the CPU's
//! caches, and may use several threads; ours runs on the caller's thread only.
//!
//! Vectors run along the columns of the result, so the order along the inner dimension costs nothing.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

/// `a · b` for matrices of `f32`, differentiable in both.
pub(super) fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.apply_op2(b, FixedOrderProduct)
}

struct FixedOrderProduct;

impl CustomOp2 for FixedOrderProduct {
    fn name(&self) -> &'static str {
        "fixed-order-product"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (&[rows, inner], &[b_rows, columns]) = (a_layout.dims(), b_layout.dims()) else {
            bail!(
                "a product needs two matrices, not {:?} and {:?}",
                a_layout,
                b_layout
            )
        };
        if inner != b_rows {
            bail!("a {rows}x{inner} matrix cannot multiply a {b_rows}x{columns} one")
        }
        let a = Matrix::new(a.as_slice::<f32>()?, a_layout);
        let b = Matrix::new(b.as_slice::<f32>()?, b_layout);
        let packed;
        let b = if b.column_stride == 1 {
            b
        } else {
            packed = b.packed();
            Matrix {
                values: &packed,
                rows: inner,
                columns,
                row_stride: columns,
                column_stride: 1,
            }
        };
        let mut c = vec![0.0; rows * columns];
        multiply(&a, &b, &mut c);
        Ok((CpuStorage::F32(c), Shape::from((rows, columns))))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // The input of the first layer needs no gradient; computing it would cost a third of the step.
        let for_a = match a.track_op() {
            true => Some(gradient.apply_op2_no_bwd(&b.t()?, &FixedOrderProduct)?),
            false => None,
        };
        let for_b = match b.track_op() {
            true => Some(a.t()?.apply_op2_no_bwd(gradient, &FixedOrderProduct)?),
            false => None,
        };
        Ok((for_a, for_b))
    }
}

/// A view of a matrix with any strides.
struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    fn new(values: &'a [f32], layout: &Layout) -> Self {
        Self {
            values: &values[layout.start_offset()..],
            rows: layout.dims()[0],
            columns: layout.dims()[1],
            row_stride: layout.stride()[0],
            column_stride: layout.stride()[1],
        }
    }

    fn packed(&self) -> Vec<f32> {
        let mut packed = Vec::with_capacity(self.rows * self.columns);
        for row in 0..self.rows {
            packed.extend((0..self.columns).map(|column| self.at(row, column)));
        }
        packed
    }

    #[inline(always)]
    fn at(&self, row: usize, column: usize) -> f32 {
        self.values[row * self.row_stride + column * self.column_stride]
    }
}

/// `c = a · b`, where the rows of `b` are contiguous and `c` is zero.
fn multiply(a: &Matrix<'_>, b: &Matrix<'_>, c: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the CPU has the two features that the function is compiled for.
        unsafe { avx2::multiply(a, b, c) };
        return;
    }
    multiply_scalar(a, b, c);
}

/// The definition: slow where the CPU has no fused multiply-add, equal everywhere.
fn multiply_scalar(a: &Matrix<'_>, b: &Matrix<'_>, c: &mut [f32]) {
    if b.columns == 0 {
        return;
    }
    for (row, out) in c.chunks_exact_mut(b.columns).enumerate() {
        for k in 0..a.columns {
            let factor = a.at(row, k);
            let b_row = &b.values[k * b.row_stride..][..b.columns];
            for (sum, value) in out.iter_mut().zip(b_row) {
                *sum = factor.mul_add(*value, *sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::Matrix;
    use std::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_storeu_ps,
    };

    /// Values in a vector.
    const LANES: usize = 8;
    /// Rows and vectors of a block: eight accumulators hide the latency of the multiply-add.
    const BLOCK_ROWS: usize = 4;
    const BLOCK_COLUMNS: usize = 2 * LANES;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn multiply(a: &Matrix<'_>, b: &Matrix<'_>, c: &mut [f32]) {
        let whole_rows = a.rows - a.rows % BLOCK_ROWS;
        let whole_blocks = b.columns - b.columns % BLOCK_COLUMNS;
        for row in (0..whole_rows).step_by(BLOCK_ROWS) {
            for column in (0..whole_blocks).step_by(BLOCK_COLUMNS) {
                block(a, b, c, row, column);
            }
        }
        for row in 0..a.rows {
            let from = if row < whole_rows { whole_blocks } else { 0 };
            let vectors_end = from + (b.columns - from) / LANES * LANES;
            for column in (from..vectors_end).step_by(LANES) {
                let mut sum = _mm256_setzero_ps();
                for k in 0..a.columns {
                    let factor = _mm256_set1_ps(a.at(row, k));
                    sum = _mm256_fmadd_ps(factor, load(b, k, column), sum);
                }
                store(c, row * b.columns + column, sum);
            }
            for column in vectors_end..b.columns {
                let mut sum = 0.0f32;
                for k in 0..a.columns {
                    sum = a.at(row, k).mul_add(b.at(k, column), sum);
                }
                c[row * b.columns + column] = sum;
            }
        }
    }

    /// Four rows by two vectors. The accumulators are named one by one so that they stay in registers
    /// at every optimisation level.
    #[target_feature(enable = "avx2,fma")]
    fn block(a: &Matrix<'_>, b: &Matrix<'_>, c: &mut [f32], row: usize, column: usize) {
        let zero = _mm256_setzero_ps();
        let (mut c00, mut c01, mut c10, mut c11) = (zero, zero, zero, zero);
        let (mut c20, mut c21, mut c30, mut c31) = (zero, zero, zero, zero);
        for k in 0..a.columns {
            let b0 = load(b, k, column);
            let b1 = load(b, k, column + LANES);
            let a0 = _mm256_set1_ps(a.at(row, k));
            c00 = _mm256_fmadd_ps(a0, b0, c00);
            c01 = _mm256_fmadd_ps(a0, b1, c01);
            let a1 = _mm256_set1_ps(a.at(row + 1, k));
            c10 = _mm256_fmadd_ps(a1, b0, c10);
            c11 = _mm256_fmadd_ps(a1, b1, c11);
            let a2 = _mm256_set1_ps(a.at(row + 2, k));
            c20 = _mm256_fmadd_ps(a2, b0, c20);
            c21 = _mm256_fmadd_ps(a2, b1, c21);
            let a3 = _mm256_set1_ps(a.at(row + 3, k));
            c30 = _mm256_fmadd_ps(a3, b0, c30);
            c31 = _mm256_fmadd_ps(a3, b1, c31);
        }
        for (index, (low, high)) in [(c00, c01), (c10, c11), (c20, c21), (c30, c31)]
            .into_iter()
            .enumerate()
        {
            let at = (row + index) * b.columns + column;
            store(c, at, low);
            store(c, at + LANES, high);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn load(b: &Matrix<'_>, row: usize, column: usize) -> __m256 {
        let lanes = &b.values[row * b.row_stride + column..][..LANES];
        // SAFETY: the slice is eight floats long; the load needs no alignment.
        unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn store(c: &mut [f32], at: usize, sum: __m256) {
        let lanes = &mut c[at..][..LANES];
        // SAFETY: the slice is eight floats long; the store needs no alignment.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::{Purpose, Stream};
    use super::*;
    use candle_core::{Device, Var};

    fn values(name: &str, count: usize) -> Vec<f32> {
        let stream = Stream::new(5, Purpose::Initialise, name, 0);
        (0..count)
            .map(|index| stream.normal(index as u64, 0) as f32)
            .collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// One element after another, as the invariant words it.
    fn chain(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f32> {
        let element = |i: usize, j: usize| {
            (0..k).fold(0.0f32, |sum, l| a[i * k + l].mul_add(b[l * n + j], sum))
        };
        (0..m * n)
            .map(|index| element(index / n, index % n))
            .collect()
    }

    #[test]
    fn every_path_has_the_bits_of_the_chain() {
        let shapes = [
            (1, 1, 1),
            (8, 64, 128),
            (8, 128, 10),
            (7, 33, 29),
            (4, 3, 16),
            (5, 700, 24),
            (3, 0, 9),
        ];
        for (m, k, n) in shapes {
            let (a, b) = (values("a", m * k), values("b", k * n));
            let expected = bits(&chain(&a, &b, m, k, n));
            let left = Tensor::from_slice(&a, (m, k), &Device::Cpu).unwrap();
            let right = Tensor::from_slice(&b, (k, n), &Device::Cpu).unwrap();
            let ours = product(&left, &right).unwrap().flatten_all().unwrap();
            assert_eq!(bits(&ours.to_vec1().unwrap()), expected, "{m}x{k}x{n}");
            let mut scalar = vec![0.0; m * n];
            multiply_scalar(
                &Matrix::new(&a, left.layout()),
                &Matrix::new(&b, right.layout()),
                &mut scalar,
            );
            assert_eq!(bits(&scalar), expected, "scalar {m}x{k}x{n}");
            // The same matrices seen through transposed memory.
            let left = left.t().unwrap().contiguous().unwrap().t().unwrap();
            let right = right.t().unwrap().contiguous().unwrap().t().unwrap();
            let ours = product(&left, &right).unwrap().flatten_all().unwrap();
            assert_eq!(
                bits(&ours.to_vec1().unwrap()),
                expected,
                "transposed {m}x{k}x{n}"
            );
        }
    }

    #[test]
    fn gradients_are_those_of_candles_own_product() {
        let a = Var::from_vec(values("a", 6 * 20), (6, 20), &Device::Cpu).unwrap();
        let b = Var::from_vec(values("b", 20 * 11), (20, 11), &Device::Cpu).unwrap();
        let gradients = |result: Tensor| {
            let store = result.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&a, &b].map(|var| {
                let gradient = store.get(var.as_tensor()).unwrap().flatten_all().unwrap();
                gradient.to_vec1::<f32>().unwrap()
            })
        };
        let ours = gradients(product(&a, &b).unwrap());
        let theirs = gradients(a.matmul(&b).unwrap());
        for (ours, theirs) in ours.iter().flatten().zip(theirs.iter().flatten()) {
            assert!(
                (ours - theirs).abs() < 1e-3 * theirs.abs().max(1.0),
                "{ours} {theirs}"
            );
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let zeros = |shape| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        let error = product(&zeros((2, 3)), &zeros((4, 2)))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("2x3 matrix cannot multiply a 4x2"),
            "{error}"
        );
    }
}
