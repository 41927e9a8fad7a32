//! Every kernel, emulated, against the CPU's.

mod attention;
mod convolution;
mod dense;
mod tokens;

use candle_core::{Device, Shape, Tensor, Var};

use super::call::{Address, Argument, Call, Kernel};
use super::calls::{self, Matrices, Moved, ProductShape, Rows};
use super::digest::WrittenDigest;
use super::emulation::{Guarded, check, run};
use crate::kernels::product::{MatrixView, multiply};
use crate::kernels::softmax::SoftmaxBackward;
use crate::kernels::test_values::{ADAMW, bits, normal};
use crate::kernels::{Execution, layer_norm, product, softmax};

/// A batch of matrices in memory, as they are or transposed.
struct Stored {
    values: Guarded,
    plain: Vec<f32>,
    strides: [usize; 2],
    size: usize,
}

impl Stored {
    fn new(values: Vec<f32>, [rows, columns]: [usize; 2], is_transposed: bool) -> Self {
        Self {
            values: Guarded::new(&values),
            plain: values,
            strides: if is_transposed {
                [1, rows]
            } else {
                [columns, 1]
            },
            size: rows * columns,
        }
    }

    fn matrices(&mut self) -> Matrices {
        Matrices {
            values: self.values.address(),
            row_stride: self.strides[0] as i64,
            column_stride: self.strides[1] as i64,
            batch_stride: self.size as i64,
        }
    }

    fn view(&self, item: usize, dims: [usize; 2]) -> MatrixView<'_> {
        MatrixView::new(&self.plain[item * self.size..], dims, self.strides)
    }
}

#[test]
fn products_have_the_bits_of_the_cpu_in_every_tile_and_with_transposed_operands() {
    let execution = Execution::current();
    let mut seen = Vec::new();
    for (batch, rows, inner, columns) in [
        (1, 1, 1, 1),
        (1, 3, 0, 2),
        (1, 130, 33, 129),
        (3, 20, 50, 70),
        (1, 70, 16, 200),
        (2, 64, 32, 64),
    ] {
        for transposed in 0..4 {
            let shape = ProductShape {
                batch,
                rows,
                inner,
                columns,
            };
            let mut a = Stored::new(
                normal("a", batch * rows * inner, 1.0),
                [rows, inner],
                transposed & 1 != 0,
            );
            let mut b = Stored::new(
                normal("b", batch * inner * columns, 1.0),
                [inner, columns],
                transposed & 2 != 0,
            );
            let mut expected = vec![0.0; batch * rows * columns];
            for (item, c) in expected.chunks_mut(rows * columns).enumerate() {
                let (a, b) = (a.view(item, [rows, inner]), b.view(item, [inner, columns]));
                multiply(execution, &a, &b, c);
            }
            let (a, b) = (a.matrices(), b.matrices());
            let large_tiles = rows.div_ceil(128) * columns.div_ceil(128) * batch;
            for multiprocessors in [1, large_tiles as u32 + 1, u32::MAX] {
                check(expected.len(), &expected, |c| {
                    calls::product(shape, &a, &b, c, multiprocessors).unwrap()
                });
                let call = calls::product(shape, &a, &b, Address(0), multiprocessors).unwrap();
                seen.push(call.kernel);
            }
        }
    }
    for kernel in [Kernel::Product128, Kernel::Product64, Kernel::Product32] {
        assert!(seen.contains(&kernel), "{kernel:?} was never chosen");
    }
}

#[test]
fn a_batch_is_read_as_its_layout_says() {
    let device = &Device::Cpu;
    let values = normal("values", 2 * 3 * 20 * 7, 1.0);
    let tensor = Tensor::from_slice(&values, (2, 3, 20, 7), device).unwrap();
    let mut stored = Guarded::new(&values);
    let storage = stored.address();
    let repeated = Tensor::from_slice(&values[..140], (1, 1, 20, 7), device)
        .unwrap()
        .broadcast_as((2, 3, 20, 7))
        .unwrap();
    let views = [
        tensor.clone(),
        tensor.narrow(1, 0, 1).unwrap(),
        tensor.narrow(0, 1, 1).unwrap(),
        tensor.narrow(2, 3, 9).unwrap(),
        tensor.transpose(0, 1).unwrap().narrow(0, 2, 1).unwrap(),
        repeated,
    ];
    for view in views {
        let right = view.transpose(2, 3).unwrap();
        let expected = flat(&product(&view, &right).unwrap());
        let (batch, heads, rows, inner) = view.dims4().unwrap();
        let shape = ProductShape {
            batch: batch * heads,
            rows,
            inner,
            columns: rows,
        };
        let a = Matrices::of(storage, view.layout()).unwrap();
        let b = Matrices::of(storage, right.layout()).unwrap();
        check(expected.len(), &expected, |c| {
            calls::product(shape, &a, &b, c, 1).unwrap()
        });
    }
    // Three matrices of each of two, which neither follow each other nor lie at one distance.
    for scattered in [
        tensor.transpose(0, 1).unwrap(),
        tensor.narrow(1, 0, 2).unwrap(),
        tensor.flatten_all().unwrap(),
    ] {
        assert!(Matrices::of(storage, scattered.layout()).is_none());
    }
}

#[test]
fn products_keep_negative_zeros_and_what_is_not_finite() {
    let execution = Execution::current();
    // The sum underflows to −0, which an addition of zeros beyond the end would turn into +0.
    let (rows, inner, columns) = (2, 17, 3);
    let mut a = vec![0.0; rows * inner];
    a[..inner].fill(-1e-30);
    a[inner + 2] = f32::INFINITY;
    let mut b = vec![0.0; inner * columns];
    (0..inner).for_each(|k| b[k * columns] = 1e-30);
    b[2 * columns + 1] = f32::NAN;
    let mut expected = vec![1.0; rows * columns];
    multiply(
        execution,
        &MatrixView::row_major(&a, rows, inner),
        &MatrixView::row_major(&b, inner, columns),
        &mut expected,
    );
    assert_eq!(expected[0].to_bits(), (-0.0f32).to_bits());
    assert!(expected[columns].is_infinite() && expected[1].is_nan());
    let shape = ProductShape {
        batch: 1,
        rows,
        inner,
        columns,
    };
    let mut a = Stored::new(a, [rows, inner], false);
    let mut b = Stored::new(b, [inner, columns], false);
    let (a, b) = (a.matrices(), b.matrices());
    check(expected.len(), &expected, |c| {
        calls::product(shape, &a, &b, c, u32::MAX).unwrap()
    });
}

#[test]
fn adamw_has_the_bits_of_the_cpu_and_the_digest_of_what_it_wrote() {
    for (count, first, multiprocessors) in
        [(0, 0, 1), (1, 7, 1), (5003, 0, 1), (5003, 1 << 40, 132)]
    {
        let [params, means, squares, grads] =
            ["p", "m", "s", "g"].map(|name| normal(name, count, 1.0));
        let squares: Vec<f32> = squares.iter().map(|x| x.abs()).collect();
        let mut expected = [params.clone(), means.clone(), squares.clone()];
        let [p, m, s] = &mut expected;
        ADAMW.apply(Execution::current(), &mut *p, &mut *m, &mut *s, &grads);
        let expected_digest = WrittenDigest::of(first, p, m, s);
        for descending in [false, true] {
            let [mut p, mut m, mut s, mut g] =
                [&params, &means, &squares, &grads].map(|values| Guarded::new(values));
            // What is there already is added to.
            let mut digest = [5u64, u64::MAX];
            let moved = Moved {
                params: p.address(),
                means: m.address(),
                squares: s.address(),
                grads: g.address(),
                count: count as u64,
                first,
            };
            let to = Address(digest.as_mut_ptr() as u64);
            run(
                &calls::adamw(&ADAMW, &moved, to, multiprocessors),
                descending,
            );
            let found = [p.values(), m.values(), s.values()].map(bits);
            assert_eq!(found, expected.each_ref().map(|values| bits(values)));
            assert_eq!(bits(g.values()), bits(&grads));
            let before = WrittenDigest {
                low: 5,
                high: u64::MAX,
            };
            let found = WrittenDigest {
                low: digest[0],
                high: digest[1],
            };
            assert_eq!(found, before + expected_digest);
        }
    }
}

#[test]
fn partials_are_added_in_the_canonical_tree() {
    /// Left half + right half, down to single vectors.
    fn tree(partials: &[&[f32]]) -> Vec<f32> {
        match partials {
            [one] => one.to_vec(),
            all => {
                let (left, right) = all.split_at(all.len() / 2);
                let (left, right) = (tree(left), tree(right));
                left.iter().zip(right).map(|(a, b)| a + b).collect()
            }
        }
    }
    let count = 700;
    for level in [0, 1, 2, 5, 8] {
        let values = normal("partials", count << level, 1e3);
        let partials: Vec<&[f32]> = values.chunks(count).collect();
        let mut stored = Guarded::new(&values);
        let address = stored.address();
        check(count, &tree(&partials), |sum| {
            calls::tree_fold(address, sum, count as u64, level, 2).unwrap()
        });
    }
    assert!(calls::tree_fold(Address(0), Address(0), 1, 9, 1).is_err());
    let (left, right) = (normal("left", count, 1.0), normal("right", count, 1.0));
    let expected = tree(&[&left, &right]);
    for descending in [false, true] {
        let (mut sum, mut right) = (Guarded::new(&left), Guarded::new(&right));
        let call = calls::tree_add(sum.address(), right.address(), count as u64, 1);
        run(&call, descending);
        assert_eq!(bits(sum.values()), bits(&expected));
    }
}

/// Shapes of rows: of one value, of a whole number of sixteens, ragged, and more rows than a block has.
const SHAPES: [(usize, usize); 6] = [(1, 1), (2, 16), (3, 5), (17, 100), (40, 33), (200, 70)];

fn variable(values: &[f32], shape: impl Into<Shape>) -> Var {
    let tensor = Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
    Var::from_tensor(&tensor).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// The gradients of the variables where `gradient` is that of the result.
fn gradients<const N: usize>(
    result: &Tensor,
    gradient: &[f32],
    variables: [&Var; N],
) -> [Vec<f32>; N] {
    let gradient = Tensor::from_slice(gradient, result.shape(), &Device::Cpu).unwrap();
    let loss = (result * gradient).unwrap().sum_all().unwrap();
    let store = loss.backward().unwrap();
    variables.map(|variable| flat(store.get(variable).unwrap()))
}

#[test]
fn softmax_has_the_bits_of_the_cpu_forward_and_backward() {
    for (rows, columns) in SHAPES {
        let shape = Rows { rows, columns };
        let count = rows * columns;
        let mut logits = normal("logits", count, 8.0);
        let special = [f32::NEG_INFINITY, -1e30, 120.0, f32::NAN, f32::INFINITY];
        if rows > 16 {
            for (row, value) in special.into_iter().enumerate() {
                logits[row * columns + 2] = value;
            }
            logits[9 * columns..10 * columns].fill(f32::NEG_INFINITY);
        }
        let gradient = normal("gradient", count, 1.0);
        let tensor =
            |values: &[f32]| Tensor::from_slice(values, (rows, columns), &Device::Cpu).unwrap();
        let result = softmax(&tensor(&logits)).unwrap();
        // Not by candle's backward pass, which adds the slope to zero, and so turns −0 into +0.
        let slope = tensor(&gradient).apply_op2_no_bwd(&result, &SoftmaxBackward);
        let (expected, slope) = (flat(&result), flat(&slope.unwrap()));
        let mut stored = Guarded::new(&logits);
        let address = stored.address();
        check(count, &expected, |result| {
            shape.softmax_forward(address, result).unwrap()
        });

        let [mut gradient, mut probabilities] = [&gradient, &expected].map(|x| Guarded::new(x));
        let addresses = (gradient.address(), probabilities.address());
        check(count, &slope, |result| {
            shape
                .softmax_backward(addresses.0, addresses.1, result)
                .unwrap()
        });
    }
}

#[test]
fn layer_norm_has_the_bits_of_the_cpu_forward_and_backward() {
    const EPSILON: f32 = 1e-5;
    for (rows, columns) in SHAPES {
        let shape = Rows { rows, columns };
        let count = rows * columns;
        let values = normal("values", count, 3.0);
        let gradient = normal("gradient", count, 1.0);
        let [scale, shift] = ["scale", "shift"].map(|name| normal(name, columns, 1.0));
        let variables = [
            variable(&values, (rows, columns)),
            variable(&scale, columns),
            variable(&shift, columns),
        ];
        let result = layer_norm(&variables[0], &variables[1], &variables[2], EPSILON).unwrap();
        let slopes = gradients(&result, &gradient, variables.each_ref());
        let forward = flat(&result);
        let [
            mut stored_values,
            mut stored_scale,
            mut stored_shift,
            mut stored_gradient,
        ] = [&values, &scale, &shift, &gradient].map(|x| Guarded::new(x));
        let values = stored_values.address();
        let (scale, shift) = (stored_scale.address(), stored_shift.address());
        let gradient = stored_gradient.address();
        check(count, &forward, |result| {
            shape
                .layer_norm_forward([values, scale, shift], result, EPSILON)
                .unwrap()
        });
        check(count, &slopes[0], |result| {
            shape
                .layer_norm_backward([values, scale, gradient], result, EPSILON)
                .unwrap()
        });
        let mut moments = Guarded::unwritten(2 * rows);
        let moments_address = moments.address();
        run(
            &shape
                .layer_norm_moments(values, moments_address, EPSILON)
                .unwrap(),
            false,
        );
        assert!(moments.values().iter().all(|value| value.is_finite()));
        check(
            2 * columns,
            &[slopes[1].clone(), slopes[2].clone()].concat(),
            |result| {
                shape
                    .layer_norm_parameters_backward([values, gradient, moments_address], result)
                    .unwrap()
            },
        );
    }
}

#[test]
fn an_emulated_kernel_with_other_arguments_is_refused() {
    let wrong = Call {
        kernel: Kernel::TreeAdd,
        grid: [1, 1, 1],
        arguments: vec![Argument::Count(0), Argument::Int(0)],
    };
    let refused = std::panic::catch_unwind(|| run(&wrong, false)).unwrap_err();
    let message = refused.downcast_ref::<String>().unwrap();
    assert!(message.contains("it takes other arguments"), "{message}");
}
