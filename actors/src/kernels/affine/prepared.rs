//! A dense layer of a model that is only asked: its weight lies in panels, and nothing is differentiated.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{Activation, add_bias};
use crate::kernels::product::{MatrixView, PreparedMatrix, multiply_prepared};
use crate::kernels::{Execution, contiguous_values, last_dimension};

/// `x · weight + bias`, with the bits of [`affine`](super::affine()).
#[derive(Debug)]
pub struct PreparedAffine {
    weight: PreparedMatrix,
    bias: Vec<f32>,
}

impl PreparedAffine {
    /// A layer of `weight`, inputs × outputs, for products as `execution` computes them.
    ///
    /// # Panics
    /// If the bias has not as many values as there are outputs.
    #[must_use]
    pub fn new(execution: Execution, weight: &MatrixView<'_>, bias: &[f32]) -> Self {
        assert_eq!(bias.len(), weight.columns(), "a bias for each output");
        Self {
            weight: PreparedMatrix::new(execution, weight),
            bias: bias.to_vec(),
        }
    }

    /// Values of a row that it takes.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.weight.rows()
    }

    /// Values of a row that it gives.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.weight.columns()
    }

    /// Of rows of [`inputs`](Self::inputs) values, one after the other, as many rows of [`outputs`](Self::outputs) values.
    ///
    /// # Panics
    /// If the last row is not whole.
    #[must_use]
    pub fn forward_rows(
        &self,
        execution: Execution,
        values: &[f32],
        activation: Activation,
    ) -> Vec<f32> {
        let inputs = self.inputs().max(1);
        assert!(
            values.len().is_multiple_of(inputs),
            "rows of {inputs} values"
        );
        let rows = values.len() / inputs;
        let mut result = vec![0.0; rows * self.outputs()];
        let values = MatrixView::row_major(values, rows, self.inputs());
        multiply_prepared(execution, &values, &self.weight, &mut result);
        add_bias(execution, &mut result, &self.bias, activation);
        result
    }

    /// The same of a tensor on the CPU, `(…, inputs)` to `(…, outputs)`, in candle's graph, where it has no gradient.
    ///
    /// # Errors
    /// If the tensor is elsewhere, or its rows have another length.
    pub fn apply(&self, values: &Tensor, activation: Activation) -> Result<Tensor> {
        let layer = PreparedLayer {
            affine: self,
            activation,
        };
        values.contiguous()?.apply_op1_no_bwd(&layer)
    }
}

struct PreparedLayer<'a> {
    affine: &'a PreparedAffine,
    activation: Activation,
}

impl CustomOp1 for PreparedLayer<'_> {
    fn name(&self) -> &'static str {
        "prepared-affine"
    }

    fn cpu_fwd(&self, values: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (columns, inputs) = (last_dimension(layout), self.affine.inputs());
        if columns != inputs {
            bail!("rows of {columns} values do not fit a dense layer of {inputs} inputs")
        }
        let values = contiguous_values(values, layout, self.name())?;
        let result = self
            .affine
            .forward_rows(Execution::current(), values, self.activation);
        let mut dims = layout.dims().to_vec();
        *dims.last_mut().expect("rows have a dimension") = self.affine.outputs();
        Ok((CpuStorage::F32(result), Shape::from(dims)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::affine;
    use super::*;
    use crate::kernels::execution::all_executions;
    use crate::kernels::test_values::{bits, normal};

    #[test]
    fn a_prepared_layer_has_the_bits_of_one_that_is_not() {
        let device = Device::Cpu;
        for (leading, inputs, outputs) in [(vec![2, 3], 70, 45), (vec![1], 300, 130)] {
            let rows: usize = leading.iter().product();
            let dims: Vec<usize> = leading.iter().copied().chain([inputs]).collect();
            let x = Tensor::from_vec(normal("x", rows * inputs, 1.0), dims, &device).unwrap();
            let (weight, bias) = (
                normal("w", inputs * outputs, 0.3),
                normal("b", outputs, 1.0),
            );
            let w = Tensor::from_slice(&weight, (inputs, outputs), &device).unwrap();
            let b = Tensor::from_slice(&bias, outputs, &device).unwrap();
            let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for activation in [Activation::Identity, Activation::Relu] {
                let expected = affine(&x, &w, &b, activation).unwrap();
                for execution in all_executions() {
                    let weight = MatrixView::row_major(&weight, inputs, outputs);
                    let prepared = PreparedAffine::new(execution, &weight, &bias);
                    let found = execution.run(|| prepared.apply(&x, activation)).unwrap();
                    assert_eq!(found.dims(), expected.dims());
                    assert_eq!(bits(&flat(&found)), bits(&flat(&expected)), "{execution:?}");
                }
            }
            let error = PreparedAffine::new(
                Execution::current(),
                &MatrixView::row_major(&weight, inputs, outputs),
                &bias,
            )
            .apply(&b, Activation::Relu)
            .unwrap_err()
            .to_string();
            assert!(error.contains("values do not fit a dense layer"), "{error}");
        }
    }
}
