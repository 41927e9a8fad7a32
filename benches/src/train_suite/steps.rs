//! Steps of whole networks: forward, backward and AdamW; and the first losses, for comparison.

use candle_core::Tensor;
use mobula_actors::kernels::Execution;
use mobula_actors::kernels::convolution::Images;
use mobula_benches::measure::{Samples, repeat};
use mobula_benches::results::Results;
use serde_json::json;

use crate::network::{Batches, Description, Layer, Network};
use crate::{Options, Outcome, exchange, thread_counts};

/// Steps whose losses are compared with the peer's.
pub(crate) const COMPARED_STEPS: usize = 200;
/// Different batches, taken in turn.
pub(crate) const BATCHES: usize = 8;

fn descriptions() -> Vec<Description> {
    let image = Images {
        height: 28,
        width: 28,
        channels: 1,
        stride: 1,
    };
    let half = Images {
        height: 28,
        width: 28,
        channels: 16,
        stride: 2,
    };
    let dense = Layer::Dense {
        inputs: half.output_len() * 32,
        outputs: 10,
    };
    let convolution = |images, outputs| Layer::Convolution { images, outputs };
    vec![
        Description::dense("mlp 64-128-64-10, batch 128", &[64, 128, 64, 10], 128),
        Description::dense("mlp 784-512-512-10, batch 128", &[784, 512, 512, 10], 128),
        Description::dense(
            "mlp 1024-2048-2048-1024, batch 256",
            &[1024, 2048, 2048, 1024],
            256,
        ),
        Description {
            name: "cnn 28x28, 16 and 32 channels, batch 64",
            layers: vec![convolution(image, 16), convolution(half, 32), dense],
            batch: 64,
        },
    ]
}

pub(crate) fn measure(options: &Options, results: &mut Results) -> Outcome {
    for description in descriptions() {
        let name = description.name;
        if !options.wants(name) {
            continue;
        }
        let batches = Batches::new(&description, BATCHES)?;
        let mut curves: Vec<Vec<f64>> = Vec::new();
        for threads in thread_counts() {
            let execution = Execution::current().with_threads(threads);
            let samples = execution.run(|| {
                let mut network = Network::new(&description)?;
                steps(options, &mut network, &batches)
            })?;
            report(
                results,
                name,
                description.operations(),
                threads.get(),
                &samples,
            );
            if options.exchange.is_some() {
                curves.push(execution.run(|| curve(&description, &batches))?);
            }
        }
        if let Some(folder) = &options.exchange {
            same_curve(name, &curves)?;
            exchange::write(folder, &description, &batches, &curves[0])?;
        }
    }
    Ok(())
}

/// The promise, while we are here: equal bits whatever the number of threads.
pub(crate) fn same_curve(name: &str, curves: &[Vec<f64>]) -> Outcome {
    match curves.iter().find(|curve| **curve != curves[0]) {
        Some(other) => Err(format!("{name}: {other:?} is not {:?}", curves[0]).into()),
        None => Ok(()),
    }
}

pub(crate) type StepResult<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn steps(options: &Options, network: &mut Network, batches: &Batches) -> StepResult<Samples> {
    let pairs: Vec<(&Tensor, &Vec<u32>)> = batches.samples.iter().zip(&batches.labels).collect();
    timed(options, |turn| {
        let (samples, labels) = pairs[turn % pairs.len()];
        network.step(samples, labels)
    })
}

/// How long steps take; `step` is told how many were before it, and says its loss.
pub(crate) fn timed(
    options: &Options,
    mut step: impl FnMut(usize) -> StepResult<f64>,
) -> StepResult<Samples> {
    let mut turn = 0;
    let mut failure = None;
    let samples = repeat(options.settings(), || {
        match step(turn) {
            Ok(loss) if loss.is_finite() => {}
            Ok(loss) => failure = Some(format!("the loss is {loss}").into()),
            Err(error) => failure = Some(error),
        }
        turn += 1;
    });
    match failure {
        Some(error) => Err(error),
        None => Ok(samples),
    }
}

/// A row of a network whose step multiplies and adds so often.
pub(crate) fn report(
    results: &mut Results,
    name: &str,
    operations: f64,
    threads: usize,
    samples: &Samples,
) {
    let name = format!("step, {name}, {threads} thread(s)");
    let ms = |share| samples.quantile(share).as_secs_f64() * 1e3;
    let (p50, p99) = (ms(0.5), ms(0.99));
    let gflops = operations / (p50 / 1e3) / 1e9;
    results.row(
        &format!("{name:<64} {p50:>10.3} ms  p99 {p99:.3} ms, {gflops:.1} GFLOP/s"),
        json!({ "name": name, "unit": "ms", "p50": p50, "p99": p99, "gflops": gflops, "count": samples.count() }),
    );
}

/// The losses of the first steps from the first values.
fn curve(description: &Description, batches: &Batches) -> StepResult<Vec<f64>> {
    let mut network = Network::new(description)?;
    (0..COMPARED_STEPS)
        .map(|step| {
            let batch = step % batches.samples.len();
            network.step(&batches.samples[batch], &batches.labels[batch])
        })
        .collect()
}
