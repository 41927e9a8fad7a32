use candle_core::{DType, Device, Var};
use proptest::prelude::*;

use super::*;
use crate::kernels::execution::all_executions;
use crate::training::random::{Purpose, Stream};

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
fn chain(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
    let element =
        |i: usize, j: usize| (0..k).fold(0.0f32, |sum, l| a[i * k + l].mul_add(b[l * n + j], sum));
    (0..m * n)
        .map(|index| element(index / n, index % n))
        .collect()
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns)
        .map(|index| values[index % rows * columns + index / rows])
        .collect()
}

/// Every execution and every way of storing the operands gives the chain's bits, whatever was in the result.
fn check(shape: [usize; 3]) {
    let [m, k, n] = shape;
    let (a, b) = (values("a", m * k), values("b", k * n));
    let expected = bits(&chain(&a, &b, shape));
    let (a_columns, b_columns) = (transposed(&a, m, k), transposed(&b, k, n));
    // Neither rows nor columns lie together.
    let spread: Vec<f32> = b.iter().flat_map(|value| [*value, f32::NAN]).collect();
    let ways = [
        (
            MatrixView::row_major(&a, m, k),
            MatrixView::row_major(&b, k, n),
        ),
        (
            MatrixView::row_major(&a_columns, k, m).transposed(),
            MatrixView::row_major(&b, k, n),
        ),
        (
            MatrixView::row_major(&a, m, k),
            MatrixView::row_major(&b_columns, n, k).transposed(),
        ),
        (
            MatrixView::row_major(&a_columns, k, m).transposed(),
            MatrixView::new(&spread, [k, n], [2 * n, 2]),
        ),
    ];
    for execution in all_executions() {
        for (way, (a, b)) in ways.iter().enumerate() {
            let mut c = vec![f32::NAN; m * n];
            multiply(execution, a, b, &mut c);
            assert_eq!(bits(&c), expected, "{shape:?}, way {way}, {execution:?}");
            let prepared = PreparedMatrix::new(execution, b);
            c.fill(f32::NAN);
            multiply_prepared(execution, a, &prepared, &mut c);
            assert_eq!(
                bits(&c),
                expected,
                "prepared {shape:?}, way {way}, {execution:?}"
            );
        }
    }
}

#[test]
fn every_path_has_the_bits_of_the_chain() {
    for shape in [
        [1, 1, 1],
        [8, 64, 128],
        [8, 128, 10],
        [7, 33, 29],
        [4, 3, 16],
        [12, 256, 32],
        // Read where they are, with all heights of tiles.
        [151, 600, 32],
        [9, 700, 16],
        [13, 257, 33],
        [5, 700, 24],
        [3, 0, 9],
        [0, 3, 9],
        [3, 9, 0],
        // Few rows of a matrix that is read as it lies, with every number of streams at the end.
        [1, 301, 2100],
        [2, 38, 1030],
        [3, 259, 65],
        [4, 600, 100],
        // More than a block each way.
        [485, 40, 37],
        [3, 11, 2100],
        // Two threads, each with more than a block of columns, and two blocks of the inner dimension.
        [3, 330, 4400],
        // Enough work for two threads, which divide columns, then rows.
        [128, 300, 130],
        [130, 300, 128],
    ] {
        check(shape);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn so_do_shapes_that_nobody_thought_of(m in 1usize..40, k in 1usize..600, n in 1usize..80) {
        check([m, k, n]);
    }
}

#[test]
fn few_rows_of_a_large_matrix_have_these_bits_too() {
    let [m, k, n] = [8, 1030, 4100];
    let (a, b) = (values("a", m * k), values("b", k * n));
    let view = (
        MatrixView::row_major(&a, m, k),
        MatrixView::row_major(&b, k, n),
    );
    assert!(streamed::is_better(m, &view.1));
    let expected = bits(&chain(&a, &b, [m, k, n]));
    for execution in all_executions() {
        let mut c = vec![f32::NAN; m * n];
        multiply(execution, &view.0, &view.1, &mut c);
        assert!(bits(&c) == expected, "{execution:?}");
    }
}

#[test]
fn a_prepared_matrix_has_these_bits_whoever_multiplies() {
    let [m, k, n] = [14, 300, 70];
    let (a, b) = (values("a", m * k), values("b", k * n));
    let expected = bits(&chain(&a, &b, [m, k, n]));
    for execution in all_executions() {
        let prepared = PreparedMatrix::new(execution, &MatrixView::row_major(&b, k, n));
        assert_eq!((prepared.rows(), prepared.columns()), (k, n));
        for other in all_executions() {
            let mut c = vec![f32::NAN; m * n];
            multiply_prepared(other, &MatrixView::row_major(&a, m, k), &prepared, &mut c);
            assert_eq!(bits(&c), expected, "{execution:?}, {other:?}");
        }
    }
}

#[test]
fn chains_go_on_from_what_is_there() {
    for [m, k, n] in [[1, 37, 100], [4, 37, 1100], [5, 37, 100], [9, 37, 20]] {
        let (a, b) = (values("a", m * k), values("b", k * n));
        let expected = bits(&chain(&a, &b, [m, k, n]));
        for execution in all_executions() {
            let mut c = vec![f32::NAN; m * n];
            let (a, b) = (
                MatrixView::row_major(&a, m, k).transposed(),
                MatrixView::row_major(&b, k, n),
            );
            for (start, count) in [(0, 10), (10, 5), (15, 22)] {
                let (a, b) = (
                    a.rows_from(start, count).transposed(),
                    b.rows_from(start, count),
                );
                match start {
                    0 => multiply(execution, &a, &b, &mut c),
                    _ => multiply_add(execution, &a, &b, &mut c),
                }
            }
            assert_eq!(bits(&c), expected, "{m}x{k}x{n}, {execution:?}");
        }
    }
}

#[test]
fn batches_are_products_of_their_matrices() {
    let device = Device::Cpu;
    let (heads, m, k, n) = (6, 70, 90, 120);
    // Leading dimensions out of order, as attention makes them.
    let a = Tensor::from_vec(values("a", heads * m * k), (3, m, 2, k), &device).unwrap();
    let a = a.transpose(1, 2).unwrap();
    let b = Tensor::from_vec(values("b", heads * k * n), (3, 2, n, k), &device).unwrap();
    let b = b.transpose(2, 3).unwrap();
    for execution in all_executions() {
        let c = execution.run(|| product(&a, &b)).unwrap();
        assert_eq!(c.dims(), [3, 2, m, n]);
        for index in 0..heads {
            let one = |tensor: &Tensor| tensor.get(index / 2).unwrap().get(index % 2).unwrap();
            let flat = |tensor: Tensor| {
                let tensor = tensor.contiguous().unwrap().flatten_all().unwrap();
                tensor.to_vec1::<f32>().unwrap()
            };
            let expected = chain(&flat(one(&a)), &flat(one(&b)), [m, k, n]);
            assert_eq!(bits(&flat(one(&c))), bits(&expected), "{execution:?}");
        }
    }
}

#[test]
fn gradients_are_those_of_candles_own_product() {
    for (a_shape, b_shape) in [
        (vec![6, 20], vec![20, 11]),
        (vec![2, 3, 6, 20], vec![2, 3, 20, 11]),
    ] {
        let var = |name: &str, shape: &[usize]| {
            let values = values(name, shape.iter().product());
            Var::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let (a, b) = (var("a", &a_shape), var("b", &b_shape));
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
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    for (a, b, reason) in [
        (&[2, 3][..], &[4, 2][..], "2x3 matrix cannot multiply a 4x2"),
        (
            &[2, 2, 3],
            &[3, 3, 2],
            "2x2x3 matrix cannot multiply a 3x3x2",
        ),
        (
            &[2, 3],
            &[3],
            "a product needs matrices, not [2, 3] and [3]",
        ),
    ] {
        let error = product(&zeros(a), &zeros(b)).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}
