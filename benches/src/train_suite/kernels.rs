//! Kernels by themselves, beside what memory allows.

use std::hint::black_box;

use candle_core::{Device, Tensor, Var};
use mobula_actors::kernels::attention::CausalAttention;
use mobula_actors::kernels::elementwise::add_to;
use mobula_actors::kernels::gradients::backward_from;
use mobula_actors::kernels::product::{MatrixView, multiply};
use mobula_actors::kernels::update::{AdamwUpdate, square_sum};
use mobula_actors::kernels::{Execution, gelu, layer_norm, softmax};
use mobula_actors::training::random::{Purpose, Stream};
use mobula_benches::measure::repeat;
use mobula_benches::results::Results;
use serde_json::json;

use crate::{Options, Outcome, thread_counts};

/// Values of the vectors that are updated: beyond every cache.
const PARAMETERS: usize = 1 << 23;
/// Rows and columns of what is normalised.
const ROWS: usize = 4096;
const COLUMNS: usize = 256;

fn values(name: &str, count: usize) -> Vec<f32> {
    let stream = Stream::new(3, Purpose::Initialise, name, 0);
    (0..count as u64)
        .map(|i| stream.normal(i, 0) as f32)
        .collect()
}

pub(crate) fn measure(options: &Options, results: &mut Results) -> Outcome {
    for threads in thread_counts() {
        let execution = Execution::current().with_threads(threads);
        let suffix = format!("{threads} thread(s)");
        let mut row = Row {
            options,
            results,
            suffix,
        };
        products(execution, &mut row);
        execution.run(|| normalisations(&mut row))?;
        execution.run(|| attention(&mut row))?;
        updates(execution, &mut row);
    }
    Ok(())
}

struct Row<'a> {
    options: &'a Options,
    results: &'a mut Results,
    suffix: String,
}

impl Row<'_> {
    /// Measures `operation` and prints `amount` of `unit` a second, at the median.
    fn rate(&mut self, name: &str, amount: f64, unit: &str, operation: impl FnMut()) {
        let name = format!("{name}, {}", self.suffix);
        if !self.options.wants(&name) {
            return;
        }
        let mut settings = self.options.settings();
        settings.length /= 3;
        settings.warm_up /= 3;
        let samples = repeat(settings, operation);
        let seconds = samples.quantile(0.5).as_secs_f64();
        let rate = amount / seconds.max(1e-9);
        self.results.row(
            &format!("{name:<64} {rate:>10.2} {unit}"),
            json!({ "name": name, "unit": unit, "p50": rate, "count": samples.count() }),
        );
    }
}

/// Each layer's three products, a shard's, and a square one.
fn products(execution: Execution, row: &mut Row<'_>) {
    for [m, k, n] in [
        [512, 512, 512],
        [256, 1024, 2048],
        [128, 784, 512],
        [8, 784, 512],
        [1, 4096, 4096],
        [128, 512, 10],
    ] {
        let (a, b) = (values("a", m * k), values("b", k * n));
        let mut c = vec![0.0; m * n];
        let (a_rows, a_columns) = (
            MatrixView::row_major(&a, m, k),
            MatrixView::row_major(&a, k, m).transposed(),
        );
        let (b_rows, b_columns) = (
            MatrixView::row_major(&b, k, n),
            MatrixView::row_major(&b, n, k).transposed(),
        );
        for (way, a, b) in [
            ("NN", a_rows, b_rows),
            ("NT", a_rows, b_columns),
            ("TN", a_columns, b_rows),
        ] {
            let name = format!("product {m}x{k}x{n} {way}");
            row.rate(&name, 2e-9 * (m * k * n) as f64, "GFLOP/s", || {
                multiply(execution, &a, &b, black_box(&mut c));
            });
        }
    }
}

type Forward<'a> = &'a dyn Fn() -> candle_core::Result<Tensor>;

/// Forward and backward, in millions of values a second.
fn normalisations(row: &mut Row<'_>) -> Outcome {
    let amount = 1e-6 * (ROWS * COLUMNS) as f64;
    let device = Device::Cpu;
    let input = Var::from_vec(values("x", ROWS * COLUMNS), (ROWS, COLUMNS), &device)?;
    let scale = Var::from_vec(values("scale", COLUMNS), COLUMNS, &device)?;
    let shift = Var::from_vec(values("shift", COLUMNS), COLUMNS, &device)?;
    let operations: [(&str, Forward<'_>); 3] = [
        ("softmax", &|| softmax(&input)),
        ("layer-norm", &|| layer_norm(&input, &scale, &shift, 1e-5)),
        ("gelu", &|| gelu(&input)),
    ];
    for (name, forward) in operations {
        let name = format!("{name} {ROWS}x{COLUMNS}");
        both_ways(row, &name, (amount, "Mvalues/s"), &input, forward)?;
    }
    Ok(())
}

/// Causal attention forward and backward: six products of every pair of tokens that see each other.
fn attention(row: &mut Row<'_>) -> Outcome {
    for (windows, context, heads, size) in [(8, 256, 8, 64), (16, 64, 4, 16)] {
        let (tokens, width) = (windows * context, heads * size);
        let projected = values("projected", tokens * 3 * width);
        let projected = Var::from_vec(projected, (tokens, 3 * width), &Device::Cpu)?;
        let layer = CausalAttention { context, heads };
        let pairs = (tokens * (context + 1)) as f64 / 2.0;
        let amount = (12e-9 * pairs * width as f64, "GFLOP/s");
        let name = format!("causal attention {windows}x{context}, {heads} heads of {size}");
        both_ways(row, &name, amount, &projected, &|| layer.apply(&projected))?;
    }
    Ok(())
}

/// Measures an operation with its gradient for `input`.
fn both_ways(
    row: &mut Row<'_>,
    name: &str,
    (amount, unit): (f64, &str),
    input: &Var,
    forward: Forward<'_>,
) -> Outcome {
    let shape = forward()?.shape().clone();
    let seed = Tensor::from_vec(values("seed", shape.elem_count()), shape, &Device::Cpu)?;
    let mut failure = None;
    row.rate(
        &format!("{name}, forward and backward"),
        amount,
        unit,
        || {
            let pass = || {
                let result = forward()?;
                let parameters = [("x", input.as_tensor())];
                let gradients = backward_from(&result, seed.clone(), parameters, Vec::new());
                gradients.map_err(|error| candle_core::Error::msg(error.to_string()))
            };
            if let Err(error) = pass() {
                failure = Some(error);
            }
        },
    );
    match failure {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

/// What goes over all parameters, in bytes read and written a second.
fn updates(execution: Execution, row: &mut Row<'_>) {
    let vector_gb = 4e-9 * PARAMETERS as f64;
    let grads = values("g", PARAMETERS);
    let mut params = grads.clone();
    row.rate("limit: copying 32 MiB", 2.0 * vector_gb, "GB/s", || {
        params.copy_from_slice(black_box(&grads));
        black_box(&mut params);
    });
    let (mut means, mut squares) = (vec![0.0; PARAMETERS], vec![0.0; PARAMETERS]);
    let update = AdamwUpdate {
        scale: 0.01,
        beta1: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        epsilon: 1e-8,
        inverse_square_correction: 1.0,
        keep: 0.999_99,
        rate: 1e-4,
    };
    row.rate("adamw, 8 Mi parameters", 7.0 * vector_gb, "GB/s", || {
        update.apply(
            execution,
            &mut params,
            &mut means,
            &mut squares,
            black_box(&grads),
        );
    });
    row.rate(
        "tree addition, 8 Mi values",
        3.0 * vector_gb,
        "GB/s",
        || {
            add_to(execution, &mut means, black_box(&grads));
        },
    );
    row.rate("norm, 8 Mi values", vector_gb, "GB/s", || {
        black_box(square_sum(execution, black_box(&grads)));
    });
}
