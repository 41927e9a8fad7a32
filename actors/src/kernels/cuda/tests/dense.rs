//! Dense layers, GELU and the loss.

use candle_core::{Device, Tensor};

use super::super::call::Call;
use super::super::calls::{self, Matrices, ProductShape, Rows, dense};
use super::super::emulation::{Guarded, Numbers, check, check_all, run};
use super::{SHAPES, flat};
use crate::kernels::affine::{bias_gradient, slope};
use crate::kernels::elementwise::GeluBackward;
use crate::kernels::loss::{cross_entropy, row_loss};
use crate::kernels::test_values::{bits, normal};
use crate::kernels::{Activation, affine, gelu};

/// Values with some that are not finite, or zero with a sign, if there are enough.
fn with_special(mut values: Vec<f32>) -> Vec<f32> {
    let special = [-0.0, 0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    if values.len() >= 40 {
        for (index, value) in special.into_iter().enumerate() {
            values[7 * index] = value;
        }
    }
    values
}

fn matrix(values: &[f32], rows: usize, columns: usize) -> Tensor {
    Tensor::from_slice(values, (rows, columns), &Device::Cpu).unwrap()
}

#[test]
fn a_dense_layer_has_the_bits_of_the_cpu_forward_and_backward() {
    for (rows, inner, columns) in [(1, 1, 1), (3, 5, 7), (17, 20, 33), (40, 64, 300)] {
        let x = with_special(normal("x", rows * inner, 1.0));
        let (w, b) = (normal("w", inner * columns, 0.3), normal("b", columns, 1.0));
        let shape = ProductShape {
            batch: 1,
            rows,
            inner,
            columns,
        };
        let mut stored = [&x, &w, &b].map(|values| Guarded::new(values));
        let [x_at, w_at, b_at] = stored.each_mut().map(Guarded::address);
        let operand = |values, row_stride: usize| Matrices {
            values,
            row_stride: row_stride as i64,
            column_stride: 1,
            batch_stride: 0,
        };
        let bias = Tensor::from_slice(&b, columns, &Device::Cpu).unwrap();
        let gradient = with_special(normal("gradient", rows * columns, 1.0));
        for activation in [Activation::Identity, Activation::Relu] {
            let result = affine(
                &matrix(&x, rows, inner),
                &matrix(&w, inner, columns),
                &bias,
                activation,
            );
            let result = result.unwrap();
            let sizes = Rows { rows, columns };
            check_all(rows * columns, &flat(&result), |to| {
                let (a, b) = (operand(x_at, inner), operand(w_at, columns));
                vec![
                    calls::product(shape, &a, &b, to, 1).unwrap(),
                    dense::add_bias(to, b_at, sizes, activation.floor(), 2).unwrap(),
                ]
            });
            let gradient = matrix(&gradient, rows, columns);
            let expected = slope(activation, &result, &gradient).unwrap();
            let mut stored = [&gradient, &result].map(|values| Guarded::new(&flat(values)));
            let addresses = stored.each_mut().map(Guarded::address);
            if activation == Activation::Relu {
                let count = rows * columns;
                check(count, &flat(&expected), |to| {
                    dense::rectifier_backward(addresses, to, count as u64, 2)
                });
            }
            let mut stored = Guarded::new(&flat(&expected));
            let slopes = stored.address();
            check(columns, &flat(&bias_gradient(&expected).unwrap()), |to| {
                sizes.column_sums(slopes, to).unwrap()
            });
        }
    }
}

#[test]
fn gelu_has_the_bits_of_the_cpu_forward_and_backward() {
    for count in [1, 16, 700] {
        let mut values = with_special(normal("values", count, 3.0));
        values.extend([1e-30, -1e-30, 60.0, -60.0, 0.6, -0.79, 1e30, -1e30]);
        let count = values.len();
        let gradient = normal("gradient", count, 1.0);
        let tensor = |values: &[f32]| Tensor::from_slice(values, count, &Device::Cpu).unwrap();
        let (x, g) = (tensor(&values), tensor(&gradient));
        let forward = flat(&gelu(&x).unwrap());
        let backward = flat(&x.apply_op2_no_bwd(&g, &GeluBackward).unwrap());
        let mut stored = [&values, &gradient].map(|values| Guarded::new(values));
        let addresses = stored.each_mut().map(Guarded::address);
        check(count, &forward, |to| {
            dense::gelu_forward(addresses[0], to, count as u64, 1)
        });
        check(count, &backward, |to| {
            dense::gelu_backward(addresses, to, count as u64, 1)
        });
    }
}

#[test]
fn a_loss_has_the_bits_of_the_cpu_with_its_gradient() {
    for (rows, columns) in SHAPES {
        let logits = normal("logits", rows * columns, 8.0);
        let labels: Vec<u32> = (0..rows).map(|row| (row * 7 % columns) as u32).collect();
        let expected = cross_entropy(&logits, &labels, columns);
        let (mut stored, mut numbers) = (Guarded::new(&logits), Numbers::new(&labels));
        let addresses = [stored.address(), numbers.address()];
        let sizes = Rows { rows, columns };
        for scale in [1.0, 1.0 / 64.0, 0.3] {
            let gradients: Vec<f32> = expected.logit_gradients.iter().map(|x| x * scale).collect();
            let mut facts = Guarded::unwritten(dense::FACTS * rows);
            let facts_at = facts.address();
            check(rows * columns, &gradients, |gradient| {
                sizes
                    .cross_entropy(addresses, [gradient, facts_at], scale)
                    .unwrap()
            });
            let mut sum = 0.0;
            for row in facts.values().chunks_exact(dense::FACTS) {
                sum += row_loss(row[0], row[1], row[2]);
            }
            assert_eq!(sum.to_bits(), expected.loss_sum.to_bits());
        }
    }
}

#[test]
fn sizes_beyond_what_a_kernel_counts_are_refused() {
    let at = super::Address(0);
    let rows = |rows, columns| Rows { rows, columns };
    assert!(dense::add_bias(at, at, rows(1 << 16, 1 << 15), 0.0, 1).is_err());
    assert!(dense::add_bias(at, at, rows(1 << 16, (1 << 15) - 1), 0.0, 1).is_ok());
    assert!(rows(1, 1 << 31).column_sums(at, at).is_err());
    // Nothing to do is no call.
    let nothing: Call = dense::gelu_forward(at, at, 0, 1);
    run(&nothing, false);
    assert!(nothing.is_empty());
    assert_eq!(bits(&[]), [0u32; 0]);
}
