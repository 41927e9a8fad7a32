//! Operations on each value by itself: addition and replacement in place, and GELU with its gradient.

use std::marker::PhantomData;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, InplaceOp1, Layout, Result, Shape, Tensor, Var, bail,
};

#[cfg(feature = "cuda")]
use super::cuda::device;
use super::division::{Shared, divide};
use super::elementary::{gelu as gelu_of, gelu_slope};
use super::lanes::{LANES, LaneOperation, Lanes, dispatch, sixteens, sixteens_mut};
use super::{Execution, by_rows, contiguous_values};

/// `sums[i] += values[i]`.
///
/// # Panics
/// If the lengths differ.
pub fn add_to(execution: Execution, sums: &mut [f32], values: &[f32]) {
    assert_eq!(sums.len(), values.len(), "vectors of different lengths");
    let count = sums.len();
    let shared = Shared::new(sums);
    divide(execution, count, 1, LANES, |range| {
        // SAFETY: the ranges do not overlap.
        let sums = unsafe { shared.part(range.clone()) };
        let values = &values[range];
        dispatch(execution.instructions(), Add { sums, values });
    });
}

/// Adds one vector to another of its length.
pub(super) struct Add<'a> {
    pub(super) sums: &'a mut [f32],
    pub(super) values: &'a [f32],
}

impl LaneOperation for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (sums, sums_rest) = sixteens_mut(self.sums);
        let (values, values_rest) = sixteens(self.values);
        for (sum, value) in sums.iter_mut().zip(values) {
            L::load(sum).add(L::load(value)).store(sum);
        }
        let last = L::load_part(sums_rest).add(L::load_part(values_rest));
        last.store_part(sums_rest);
    }
}

/// Replaces a variable's values, in place.
pub fn overwrite(variable: &Var, values: &[f32]) -> Result<()> {
    variable.inplace_op1(&Overwrite(values))
}

struct Overwrite<'a>(&'a [f32]);

impl InplaceOp1 for Overwrite<'_> {
    fn name(&self) -> &'static str {
        "overwrite"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(place), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            bail!("only contiguous f32 variables are overwritten, not {layout:?}")
        };
        if end - start != self.0.len() {
            bail!("{} values for a variable of {}", self.0.len(), end - start)
        }
        place[start..end].copy_from_slice(self.0);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        device::overwrite(storage, layout, self.0)
    }
}

/// GELU by its usual approximation, `½x(1 + tanh(√(2/π)(x + 0.044715 x³)))`, of each value; differentiable.
pub fn gelu(values: &Tensor) -> Result<Tensor> {
    values.contiguous()?.apply_op1(Gelu)
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = contiguous_values(storage, layout, self.name())?;
        Ok(by_rows(layout, 1, |instructions, range, result| {
            let values = &values[range];
            dispatch(instructions, GeluForward { values, result });
        }))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        device::gelu_forward((storage, layout))
    }

    fn bwd(&self, values: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        Ok(Some(values.apply_op2_no_bwd(&gradient, &GeluBackward)?))
    }
}

struct GeluForward<'a> {
    values: &'a [f32],
    result: &'a mut [f32],
}

impl LaneOperation for GeluForward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (values, values_rest) = sixteens(self.values);
        let (result, result_rest) = sixteens_mut(self.result);
        for (value, result) in values.iter().zip(result) {
            gelu_of(L::load(value)).store(result);
        }
        gelu_of(L::load_part(values_rest)).store_part(result_rest);
    }
}

/// Of values and gradient, the gradient of the values.
pub(super) struct GeluBackward;

impl CustomOp2 for GeluBackward {
    fn name(&self) -> &'static str {
        "gelu-backward"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let values = contiguous_values(values, layout, self.name())?;
        let gradient = contiguous_values(gradient, gradient_layout, self.name())?;
        Ok(pairwise::<GeluSlope>(layout, values, gradient))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        values: &CudaStorage,
        layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        device::gelu_backward((values, layout), (gradient, gradient_layout))
    }
}

struct GeluSlope;

impl Pairwise for GeluSlope {
    #[inline(always)]
    fn of<L: Lanes>(value: L, gradient: L) -> L {
        gradient.multiply(gelu_slope(value))
    }
}

/// What becomes of two values.
pub(super) trait Pairwise {
    fn of<L: Lanes>(left: L, right: L) -> L;
}

/// `P` of each value and its counterpart; both vectors lie as `layout` says.
pub(super) fn pairwise<P: Pairwise>(
    layout: &Layout,
    left: &[f32],
    right: &[f32],
) -> (CpuStorage, Shape) {
    by_rows(layout, 1, |instructions, range, result| {
        let operation = Pairs::<P> {
            left: &left[range.clone()],
            right: &right[range],
            result,
            what: PhantomData,
        };
        dispatch(instructions, operation);
    })
}

struct Pairs<'a, P> {
    left: &'a [f32],
    right: &'a [f32],
    result: &'a mut [f32],
    what: PhantomData<P>,
}

impl<P: Pairwise> LaneOperation for Pairs<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (left, left_rest) = sixteens(self.left);
        let (right, right_rest) = sixteens(self.right);
        let (result, result_rest) = sixteens_mut(self.result);
        for ((left, right), result) in left.iter().zip(right).zip(result) {
            P::of(L::load(left), L::load(right)).store(result);
        }
        P::of(L::load_part(left_rest), L::load_part(right_rest)).store_part(result_rest);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::kernels::execution::all_executions;
    use crate::kernels::test_values::{bits, normal, relative_error};

    #[test]
    fn sums_are_those_of_plain_additions() {
        for count in [0, 1, 15, 16, 300_003] {
            let (a, b) = (normal("a", count, 1.0), normal("b", count, 1.0));
            let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            for execution in all_executions() {
                let mut sums = a.clone();
                add_to(execution, &mut sums, &b);
                assert_eq!(bits(&sums), bits(&expected), "{execution:?}");
            }
        }
    }

    #[test]
    fn a_variable_is_overwritten_in_place_or_not_at_all() {
        let variable = Var::from_vec(vec![1.0f32; 6], (2, 3), &Device::Cpu).unwrap();
        let view = variable.as_tensor().clone();
        overwrite(&variable, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        assert_eq!(
            view.to_vec2::<f32>().unwrap(),
            [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
        );
        let error = overwrite(&variable, &[0.0; 5]).unwrap_err().to_string();
        assert!(error.contains("5 values for a variable of 6"), "{error}");
    }

    #[test]
    fn gelu_and_its_gradient_agree_with_candles() {
        let values = Var::from_vec(normal("x", 300_007, 2.0), 300_007, &Device::Cpu).unwrap();
        let all = |result: Tensor| {
            let gradients = result.sum_all().unwrap().backward().unwrap();
            [&result, gradients.get(values.as_tensor()).unwrap()]
                .map(|x| x.to_vec1::<f32>().unwrap())
        };
        let theirs = all(values.gelu().unwrap());
        let mut seen = None;
        for execution in all_executions() {
            let ours = execution.run(|| all(gelu(&values).unwrap()));
            for (ours, theirs) in ours.iter().zip(&theirs) {
                let theirs: Vec<f64> = theirs.iter().map(|x| f64::from(*x)).collect();
                assert!(relative_error(ours, &theirs) < 1e-5);
            }
            let ours = ours.map(|values| bits(&values));
            assert_eq!(
                *seen.get_or_insert_with(|| ours.clone()),
                ours,
                "{execution:?}"
            );
        }
    }
}
