//! A dense layer, `x · w + b`, with a rectifier if asked: one pass forward, and gradients without a copy.
//!
//! Order: the product's chains, then one addition of the bias. Backward, the bias' gradient goes through the
//! rows in ascending order.

mod prepared;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};

#[cfg(feature = "cuda")]
use super::cuda::device;
use super::division::{Shared, divide, divide_rows};
use super::elementwise::{Add, Pairwise, pairwise};
use super::lanes::{LANES, LaneOperation, Lanes, dispatch, sixteens, sixteens_mut};
use super::product::{MatrixView, multiply, product_without_gradient};
use super::{Execution, contiguous_values, gradients, last_dimension};

pub use prepared::PreparedAffine;

/// What follows the sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `max(0, x)`; its slope at zero is zero.
    Relu,
}

impl Activation {
    /// Nothing less than this is left, but NaN: `max(0, x)` with a lower bound of −∞ is the identity.
    pub(super) fn floor(self) -> f32 {
        match self {
            Activation::Identity => f32::NEG_INFINITY,
            Activation::Relu => 0.0,
        }
    }
}

/// `(…, inputs) · (inputs, outputs) + (outputs)`, then the activation.
pub fn affine(
    values: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    let (&[.., columns], &[inputs, outputs]) = (values.dims(), weight.dims()) else {
        bail!(
            "a dense layer needs rows and a matrix, not {:?} and {:?}",
            values.dims(),
            weight.dims()
        )
    };
    if columns != inputs || bias.dims() != [outputs] {
        bail!(
            "rows of {columns} values do not fit a dense layer of {inputs} inputs, {outputs} outputs and a bias of {:?}",
            bias.dims()
        )
    }
    values
        .contiguous()?
        .apply_op3(weight, &bias.contiguous()?, Affine(activation))
}

#[derive(Debug, Clone, Copy)]
struct Affine(Activation);

impl CustomOp3 for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let values = contiguous_values(values, layout, self.name())?;
        let bias = contiguous_values(bias, bias_layout, self.name())?;
        let (inputs, outputs) = weight_layout.shape().dims2()?;
        let weight = &weight.as_slice::<f32>()?[weight_layout.start_offset()..];
        let &[row_stride, column_stride] = weight_layout.stride() else {
            bail!("a weight has two dimensions")
        };
        let rows = layout
            .shape()
            .elem_count()
            .checked_div(inputs)
            .unwrap_or_default();
        let execution = Execution::current();
        let mut result = vec![0.0; rows * outputs];
        multiply(
            execution,
            &MatrixView::row_major(values, rows, inputs),
            &MatrixView::new(weight, [inputs, outputs], [row_stride, column_stride]),
            &mut result,
        );
        add_bias(execution, &mut result, bias, self.0);
        let mut dims = layout.dims().to_vec();
        *dims.last_mut().expect("rows have a dimension") = outputs;
        Ok((CpuStorage::F32(result), Shape::from(dims)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        values: &CudaStorage,
        layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let operands = [
            (values, layout),
            (weight, weight_layout),
            (bias, bias_layout),
        ];
        device::affine_forward(operands, self.0)
    }

    fn bwd(
        &self,
        values: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (inputs, outputs) = weight.dims2()?;
        let gradient = slope(self.0, result, &gradient.contiguous()?)?;
        let gradient = gradient.reshape(((), outputs))?;
        // The input of the first layer needs no gradient; computing it would cost a third of the step.
        let for_values = match values.track_op() {
            true => {
                let rows = product_without_gradient(&gradient, &weight.t()?)?;
                Some(rows.reshape(values.dims())?)
            }
            false => None,
        };
        let for_weight = match weight.track_op() {
            true => {
                let rows = values.reshape(((), inputs))?;
                gradients::product_into(weight, &rows.t()?, &gradient)?
            }
            false => None,
        };
        let for_bias = match bias.track_op() {
            true => gradients::keep(bias, bias_gradient(&gradient)?)?,
            false => None,
        };
        Ok((for_values, for_weight, for_bias))
    }
}

/// Adds the bias to each row of `values`, and applies the activation.
pub(super) fn add_bias(
    execution: Execution,
    values: &mut [f32],
    bias: &[f32],
    activation: Activation,
) {
    divide_rows(execution, values, bias.len(), |_, part| {
        let operation = AddBias {
            values: part,
            bias,
            activation,
        };
        dispatch(execution.instructions(), operation);
    });
}

/// Of the gradient of a layer's `result`, that of what its activation was applied to.
pub(super) fn slope(activation: Activation, result: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Identity => Ok(gradient.clone()),
        Activation::Relu => gradient.apply_op2_no_bwd(result, &ReluBackward),
    }
}

/// Of the gradient of rows, that of the bias that was added to each.
pub(super) fn bias_gradient(rows: &Tensor) -> Result<Tensor> {
    rows.apply_op1_no_bwd(&ColumnSums)
}

struct AddBias<'a> {
    values: &'a mut [f32],
    bias: &'a [f32],
    activation: Activation,
}

impl LaneOperation for AddBias<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let floor = L::splat(self.activation.floor());
        let (bias, bias_rest) = sixteens(self.bias);
        for row in self.values.chunks_exact_mut(self.bias.len()) {
            let (row, row_rest) = sixteens_mut(row);
            for (value, bias) in row.iter_mut().zip(bias) {
                let sum = L::load(value).add(L::load(bias));
                sum.if_nan(sum.max(floor)).store(value);
            }
            let sum = L::load_part(row_rest).add(L::load_part(bias_rest));
            sum.if_nan(sum.max(floor)).store_part(row_rest);
        }
    }
}

/// Of a gradient and the rectifier's result: the gradient where the result is above zero.
struct ReluBackward;

impl CustomOp2 for ReluBackward {
    fn name(&self) -> &'static str {
        "relu-backward"
    }

    fn cpu_fwd(
        &self,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
        result: &CpuStorage,
        layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gradient = contiguous_values(gradient, gradient_layout, self.name())?;
        let result = contiguous_values(result, layout, self.name())?;
        Ok(pairwise::<WherePositive>(layout, gradient, result))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
        result: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        device::rectifier_backward((gradient, gradient_layout), (result, layout))
    }
}

struct WherePositive;

impl Pairwise for WherePositive {
    #[inline(always)]
    fn of<L: Lanes>(gradient: L, result: L) -> L {
        let zero = L::splat(0.0);
        zero.if_less(result, gradient, zero)
    }
}

/// The sum of each column of a matrix, through the rows in ascending order.
struct ColumnSums;

impl CustomOp1 for ColumnSums {
    fn name(&self) -> &'static str {
        "column-sums"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let values = contiguous_values(storage, layout, self.name())?;
        let columns = last_dimension(layout);
        let rows = values.len().checked_div(columns).unwrap_or_default();
        let execution = Execution::current();
        let mut sums = vec![0.0; columns];
        let shared = Shared::new(&mut sums);
        divide(execution, columns, rows, LANES, |range| {
            // SAFETY: the ranges do not overlap.
            let sums = unsafe { shared.part(range.clone()) };
            let operation = AddRows {
                values,
                columns,
                first: range.start,
                sums,
            };
            dispatch(execution.instructions(), operation);
        });
        Ok((CpuStorage::F32(sums), Shape::from(columns)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        device::column_sums((storage, layout))
    }
}

struct AddRows<'a> {
    values: &'a [f32],
    columns: usize,
    first: usize,
    sums: &'a mut [f32],
}

impl LaneOperation for AddRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let width = self.sums.len();
        for row in self.values.chunks_exact(self.columns.max(1)) {
            let values = &row[self.first..][..width];
            Add {
                sums: &mut *self.sums,
                values,
            }
            .run::<L>();
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::kernels::execution::all_executions;
    use crate::kernels::product;
    use crate::kernels::test_values::{bits, normal, relative_error};

    /// candle's own product, addition and rectifier agree within `1e-5`; all paths agree in every bit.
    #[test]
    fn agrees_with_candle_forward_and_backward_on_every_path() {
        let device = Device::Cpu;
        for (leading, inputs, outputs) in [
            (vec![3], 5, 7),
            (vec![2, 40], 64, 33),
            (vec![3000], 130, 90),
        ] {
            let rows: usize = leading.iter().product();
            let shape: Vec<usize> = leading.iter().copied().chain([inputs]).collect();
            let x = Var::from_vec(normal("x", rows * inputs, 1.0), shape, &device).unwrap();
            let w = Var::from_vec(
                normal("w", inputs * outputs, 0.3),
                (inputs, outputs),
                &device,
            )
            .unwrap();
            let b = Var::from_vec(normal("b", outputs, 1.0), outputs, &device).unwrap();
            for activation in [Activation::Identity, Activation::Relu] {
                let all = |result: Tensor| {
                    let loss = result.sqr().unwrap().sum_all().unwrap();
                    let gradients = loss.backward().unwrap();
                    let of = |var: &Var| gradients.get(var.as_tensor()).unwrap().clone();
                    [result, of(&x), of(&w), of(&b)]
                        .map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap())
                };
                let theirs = {
                    let flat = x.reshape((rows, inputs)).unwrap();
                    let sum = flat.matmul(&w).unwrap().broadcast_add(&b).unwrap();
                    all(match activation {
                        Activation::Identity => sum,
                        Activation::Relu => sum.relu().unwrap(),
                    })
                };
                let mut seen = None;
                for execution in all_executions() {
                    let ours = execution.run(|| all(affine(&x, &w, &b, activation).unwrap()));
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
    }

    #[test]
    fn a_layer_is_its_product_and_one_addition_and_nan_stays() {
        let device = Device::Cpu;
        let x = Tensor::from_vec(normal("x", 6, 1.0), (2, 3), &device).unwrap();
        let w = Tensor::from_vec(normal("w", 12, 1.0), (3, 4), &device).unwrap();
        let b = Tensor::new(&[0.5f32, f32::NAN, -0.5, 0.0], &device).unwrap();
        let expected = product(&x, &w)
            .unwrap()
            .broadcast_add(&b)
            .unwrap()
            .relu()
            .unwrap();
        let ours = affine(&x, &w, &b, Activation::Relu).unwrap();
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (index, (ours, expected)) in flat(&ours).iter().zip(flat(&expected)).enumerate() {
            if index % 4 == 1 {
                assert!(ours.is_nan());
            } else {
                assert_eq!(ours.to_bits(), (expected + 0.0).to_bits());
            }
        }
        let error = affine(&x, &b, &b, Activation::Relu)
            .unwrap_err()
            .to_string();
        assert!(error.contains("needs rows and a matrix"), "{error}");
        let error = affine(&w, &w, &b, Activation::Relu)
            .unwrap_err()
            .to_string();
        assert!(error.contains("rows of 4 values do not fit"), "{error}");
    }
}
