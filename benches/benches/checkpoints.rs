//! What a snapshot for a checkpoint costs training: 100 MB of parameters and two moments, one core.

use std::hint::black_box;

use mobula_actors::training::flat_vector::{FlatVector, update_blocks};
use mobula_benches::measure::{Settings, repeat};
use mobula_benches::report::Report;

/// Values of the parameters and of each moment: 100 MB of all three.
const VALUES: usize = 25_000_000 / 3;

/// An update like AdamW's: reads and writes all three, and divides by a root.
fn update(vectors: &mut [FlatVector; 3], grads: &[f32]) {
    let [params, means, squares] = vectors;
    update_blocks(&mut [params, means, squares], |range, blocks| {
        let [params, means, squares] = blocks else {
            unreachable!("three vectors are updated")
        };
        let values = params
            .iter_mut()
            .zip(means.iter_mut())
            .zip(squares.iter_mut())
            .zip(&grads[range]);
        for (((param, mean), square), grad) in values {
            *mean = 0.9 * *mean + 0.1 * grad;
            *square = 0.999 * *square + 0.001 * (grad * grad);
            *param = 0.9999 * *param - 0.001 * (*mean / (square.sqrt() + 1e-8));
        }
    });
}

fn main() {
    let Some(settings) = Settings::from_args() else {
        return;
    };
    let values = |from: f32| -> FlatVector {
        let values: Vec<f32> = (0..VALUES).map(|at| from + at as f32 * 1e-9).collect();
        values.into()
    };
    let mut vectors = [values(0.5), values(0.25), values(0.125)];
    let grads = values(0.01);
    let snapshot = |vectors: &[FlatVector; 3]| vectors.each_ref().map(FlatVector::snapshot);
    let mut report = Report::new("a snapshot of 100 MB, one core");
    let samples = repeat(settings, || {
        black_box(snapshot(&vectors));
    });
    report.add("snapshot", samples);
    let samples = repeat(settings, || update(&mut vectors, &grads));
    report.add("update, no snapshot open", samples);
    let samples = repeat(settings, || {
        let open = snapshot(&vectors);
        update(&mut vectors, &grads);
        drop(open);
    });
    report.add("update, a snapshot open each time", samples);
    let samples = repeat(settings, || {
        black_box(vectors.each_ref().map(|vector| vector.to_vec()));
    });
    report.add("limit: a copy of all of it", samples);
    report.print();
}
