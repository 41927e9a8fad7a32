//! One training step of the digits MLP, beside the arithmetic that one core can do.

use std::hint::black_box;

use candle_core::{Device, Tensor};
use mobula_actors::training::data::Files;
use mobula_actors::training::local::LocalTrainer;
use mobula_actors::training::models::ModelSpec;
use mobula_actors::training::spec::TrainSpec;
use mobula_actors::training::workload::Workload;
use mobula_benches::measure::{Samples, Settings, repeat};
use mobula_benches::report::Report;

const FEATURES: usize = 64;
const CLASSES: usize = 10;

/// Multiplications and additions of one step: two for each weight and sample forward, twice as many
/// backward (for the inputs and for the weights).
fn operations_per_step(spec: &TrainSpec) -> f64 {
    let ModelSpec::Mlp { hidden } = &spec.model else {
        panic!("the digits MLP is an MLP");
    };
    let sizes: Vec<usize> = [FEATURES]
        .into_iter()
        .chain(hidden.iter().copied())
        .chain([CLASSES])
        .collect();
    let weights: usize = sizes.windows(2).map(|pair| pair[0] * pair[1]).sum();
    6.0 * weights as f64 * spec.global_batch as f64
}

fn gflops(operations: f64, samples: &Samples) -> String {
    format!("{:.2} GFLOP/s", operations * samples.per_second() / 1e9)
}

/// A matrix product by the `gemm` crate (through candle), which is vectorised by hand.
fn product(
    settings: Settings,
    [rows, inner, columns]: [usize; 3],
) -> candle_core::Result<(Samples, String)> {
    let left = Tensor::rand(-1f32, 1f32, (rows, inner), &Device::Cpu)?;
    let right = Tensor::rand(-1f32, 1f32, (inner, columns), &Device::Cpu)?;
    left.matmul(&right)?;
    let samples = repeat(settings, || {
        black_box(left.matmul(&right).expect("it was possible before"));
    });
    let note = gflops(2.0 * (rows * inner * columns) as f64, &samples);
    Ok((samples, note))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // SAFETY: no other thread runs yet, so nobody reads the environment at the same time.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", "1") };
    let Some(settings) = Settings::from_args() else {
        return Ok(());
    };
    let spec = TrainSpec {
        // More than there is time for.
        steps: 1_000_000,
        ..TrainSpec::digits_mlp("bench")
    };
    let workload = Workload::load(&spec, &Files::local())?;
    let mut report = Report::new("training the digits MLP, one step, one core");
    for workers in [1, 4] {
        let mut trainer = LocalTrainer::new(&workload)?;
        let before = trainer.state().params.clone();
        let samples = repeat(settings, || {
            trainer.step(workers).expect("the digits are good data");
        });
        assert_ne!(
            trainer.state().params,
            before,
            "the steps must have trained something"
        );
        let note = gflops(operations_per_step(&spec), &samples);
        report.add_with(format!("step, reduced in {workers} part(s)"), samples, note);
    }
    // The largest layer of one virtual shard, and a size at which gemm is at its best.
    let shard = usize::try_from(spec.global_batch / u64::from(spec.virtual_shards))?;
    for [rows, inner, columns] in [[shard, 128, 64], [512, 512, 512]] {
        let (samples, note) = product(settings, [rows, inner, columns])?;
        report.add_with(
            format!("limit: gemm {rows}×{inner}·{inner}×{columns}"),
            samples,
            note,
        );
    }
    report.print();
    Ok(())
}
