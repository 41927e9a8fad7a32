use candle_core::{Device, Var};

use super::*;
use crate::kernels::execution::all_executions;
use crate::kernels::test_values::{bits, normal, relative_error};

const EPSILON: f32 = 1e-5;

/// Result and the gradients of values, scale and shift, in `f64`.
fn reference(values: &[f32], scale: &[f32], shift: &[f32], gradient: &[f32]) -> [Vec<f64>; 4] {
    let columns = scale.len();
    let count = columns as f64;
    let mut out = [vec![], vec![], vec![0.0; columns], vec![0.0; columns]];
    for (row, gradient) in values.chunks(columns).zip(gradient.chunks(columns)) {
        let wide = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let (row, gradient) = (wide(row), wide(gradient));
        let mean = row.iter().sum::<f64>() / count;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        let deviation = (variance + f64::from(EPSILON)).sqrt();
        let normalised: Vec<f64> = row.iter().map(|x| (x - mean) / deviation).collect();
        let scaled: Vec<f64> = gradient
            .iter()
            .zip(scale)
            .map(|(g, s)| g * f64::from(*s))
            .collect();
        let sum_mean = scaled.iter().sum::<f64>() / count;
        let product_mean = scaled
            .iter()
            .zip(&normalised)
            .map(|(s, n)| s * n)
            .sum::<f64>()
            / count;
        for column in 0..columns {
            let (s, n) = (f64::from(scale[column]), normalised[column]);
            out[0].push(n * s + f64::from(shift[column]));
            out[1].push((scaled[column] - sum_mean - n * product_mean) / deviation);
            out[2][column] += gradient[column] * n;
            out[3][column] += gradient[column];
        }
    }
    out
}

/// Within `4e-6` of `f64`, relative to the largest, and equal bits on every path.
#[test]
fn agrees_with_f64_forward_and_backward_on_every_path() {
    for (rows, columns) in [(1, 2), (3, 10), (5, 16), (9, 77), (1400, 192)] {
        let values = normal("values", rows * columns, 2.0);
        let scale = normal("scale", columns, 1.0);
        let shift = normal("shift", columns, 1.0);
        let seed = normal("seed", rows * columns, 1.0);
        let expected = reference(&values, &scale, &shift, &seed);
        let mut seen = None;
        for execution in all_executions() {
            let device = Device::Cpu;
            let input = Var::from_slice(&values, (rows, columns), &device).unwrap();
            let [scale, shift] =
                [&scale, &shift].map(|x| Var::from_slice(x, columns, &device).unwrap());
            let seed = Tensor::from_slice(&seed, (rows, columns), &device).unwrap();
            let found = execution.run(|| {
                let result = layer_norm(&input, &scale, &shift, EPSILON).unwrap();
                let loss = (&result * &seed).unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let gradient = |var: &Var| gradients.get(var.as_tensor()).unwrap().clone();
                [result, gradient(&input), gradient(&scale), gradient(&shift)]
            });
            let found = found.map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            for (found, expected) in found.iter().zip(&expected) {
                let error = relative_error(found, expected);
                // Two columns are ±1 whatever they were: their slope is rounding.
                assert!(error < 4e-6 || columns == 2, "{rows}x{columns}: {error}");
            }
            let found = found.map(|values| bits(&values));
            assert_eq!(
                *seen.get_or_insert_with(|| found.clone()),
                found,
                "{execution:?}"
            );
        }
    }
}

#[test]
fn parameters_of_another_size_are_refused() {
    let zeros =
        |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let error = layer_norm(&zeros(&[2, 3]), &zeros(&[3]), &zeros(&[2]), EPSILON)
        .unwrap_err()
        .to_string();
    assert!(error.contains("rows of 3 values"), "{error}");
}

#[test]
fn rows_without_a_graph_have_the_same_bits() {
    for (rows, columns) in [(1, 2), (5, 77), (1400, 192)] {
        let values = normal("values", rows * columns, 2.0);
        let [scale, shift] = ["scale", "shift"].map(|name| normal(name, columns, 1.0));
        for execution in all_executions() {
            let found = layer_norm_rows(execution, &values, &scale, &shift, EPSILON);
            let device = Device::Cpu;
            let input = Tensor::from_slice(&values, (rows, columns), &device).unwrap();
            let [scale, shift] =
                [&scale, &shift].map(|x| Tensor::from_slice(x, columns, &device).unwrap());
            let expected = execution.run(|| layer_norm(&input, &scale, &shift, EPSILON).unwrap());
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(bits(&found), bits(&expected), "{execution:?}");
        }
    }
}
