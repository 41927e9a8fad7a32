//! Some steps of a small network, forward, backward and update: on the GPU, and again on the CPU.
//!
//! product → layer-norm → product → softmax. The loss is a weighted sum of the probabilities, so that its gradient passes
//! through our kernels and candle's elementwise operations only. All weights must end in the same bits.

use candle_core::{Device, Result, Tensor};

use super::candle::with_gradients;
use super::{Outcome, Work};
use crate::kernels::cuda::device::FlatState;
use crate::kernels::test_values::{ADAMW, bits, normal, relative_error};
use crate::kernels::{Execution, layer_norm, product, softmax};

const STEPS: usize = 20;
const BATCH: usize = 96;
const WIDTHS: [usize; 3] = [70, 130, 11];

/// Parameters, means and squares of one tensor.
type State = [Vec<f32>; 3];

pub(super) fn check(device: &Device, tell: &mut impl FnMut(Outcome)) -> Result<()> {
    let (gpu, cpu) = (train(device)?, train(&Device::Cpu)?);
    let has_cpu_bits = gpu
        .iter()
        .flatten()
        .zip(cpu.iter().flatten())
        .all(|(gpu, cpu)| bits(gpu) == bits(cpu));
    let weights =
        |state: &[State]| -> Vec<f32> { state.iter().flat_map(|s| s[0].clone()).collect() };
    let reference: Vec<f64> = weights(&cpu).into_iter().map(f64::from).collect();
    tell(Outcome {
        kernel: "training, replayed on the CPU".to_owned(),
        shape: format!("{STEPS} steps"),
        error: relative_error(&weights(&gpu), &reference),
        error_max: 0.0,
        has_cpu_bits,
        times: None,
        work: Work::Operations(0.0),
    });
    Ok(())
}

fn train(device: &Device) -> Result<Vec<State>> {
    let [inputs, hidden, outputs] = WIDTHS;
    let shapes = [
        vec![inputs, hidden],
        vec![hidden],
        vec![hidden],
        vec![hidden, outputs],
    ];
    let mut states: Vec<State> = shapes
        .iter()
        .zip(["first", "scale", "shift", "second"])
        .map(|(shape, name)| {
            let count = shape.iter().product();
            [normal(name, count, 0.3), vec![0.0; count], vec![0.0; count]]
        })
        .collect();
    for step in 0..STEPS {
        let batch = normal(&format!("batch {step}"), BATCH * inputs, 1.0);
        let batch = Tensor::from_vec(batch, (BATCH, inputs), device)?;
        let weights = normal(&format!("weights {step}"), BATCH * outputs, 1.0);
        let weights = Tensor::from_vec(weights, (BATCH, outputs), device)?;
        let parameters: Vec<Tensor> = states
            .iter()
            .zip(&shapes)
            .map(|(state, shape)| Tensor::from_slice(&state[0], &shape[..], device))
            .collect::<Result<_>>()?;
        let results = with_gradients(&parameters, &weights, |of| {
            let hidden = layer_norm(&product(&batch, &of[0])?, &of[1], &of[2], 1e-5)?;
            softmax(&product(&hidden, &of[3])?)
        })?;
        for (state, gradient) in states.iter_mut().zip(&results[1..]) {
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            update(device, state, &gradient)?;
        }
    }
    Ok(states)
}

fn update(device: &Device, state: &mut State, gradient: &[f32]) -> Result<()> {
    let [params, means, squares] = state;
    let Device::Cuda(device) = device else {
        ADAMW.apply(Execution::current(), params, means, squares, gradient);
        return Ok(());
    };
    let mut flat = FlatState {
        params: device.clone_htod(&*params)?,
        means: device.clone_htod(&*means)?,
        squares: device.clone_htod(&*squares)?,
    };
    let gradient = device.clone_htod(gradient)?;
    flat.adamw(device, &ADAMW, &gradient, 0)?;
    *params = device.clone_dtoh(&flat.params)?;
    *means = device.clone_dtoh(&flat.means)?;
    *squares = device.clone_dtoh(&flat.squares)?;
    Ok(())
}
