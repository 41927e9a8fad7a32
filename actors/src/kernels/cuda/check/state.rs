//! The state of a training: AdamW in place with its digest, and sums of partial gradients in the tree.

use candle_core::{CudaDevice, DType, Device, Result, Tensor};

use super::candle;
use super::{Outcome, Work, time};
use crate::kernels::Execution;
use crate::kernels::cuda::device::{FlatState, tree_add, tree_fold};
use crate::kernels::cuda::digest::WrittenDigest;
use crate::kernels::elementwise::add_to;
use crate::kernels::test_values::{ADAMW, bits, normal, relative_error};

pub(super) fn check(device: &CudaDevice, tell: &mut impl FnMut(Outcome)) -> Result<()> {
    for count in [1003, 1 << 20, 1 << 26] {
        tell(check_adamw(device, count)?);
        tell(check_tree_add(device, count)?);
    }
    for (level, count) in [(3, 1003), (4, 1 << 22), (8, 1 << 18)] {
        tell(check_tree_fold(device, level, count)?);
    }
    Ok(())
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

fn check_adamw(device: &CudaDevice, count: usize) -> Result<Outcome> {
    let [p, mut m, mut s, g] = ["p", "m", "s", "g"].map(|name| normal(name, count, 1.0));
    m.iter_mut().for_each(|mean| *mean *= 0.1);
    s.iter_mut().for_each(|square| *square *= *square);
    let on = |values: &Vec<f32>| device.clone_htod(values);
    let mut state = FlatState {
        params: on(&p)?,
        means: on(&m)?,
        squares: on(&s)?,
    };
    let grads = on(&g)?;
    let first = 1 << 33;
    let digest = state.adamw(device, &ADAMW, &grads, first)?;
    let found = [
        device.clone_dtoh(&state.params)?,
        device.clone_dtoh(&state.means)?,
        device.clone_dtoh(&state.squares)?,
    ];

    let tensors = [&p, &m, &s, &g].map(|values| Tensor::from_slice(values, count, &Device::Cpu));
    let [tp, tm, ts, tg] = tensors;
    let tensors = [tp?, tm?, ts?, tg?];
    let [wp, wm, ws, wg] = tensors.each_ref().map(|tensor| tensor.to_dtype(DType::F64));
    let reference = candle::adamw(&ADAMW, [&wp?, &wm?, &ws?, &wg?])?;
    let mut error = 0.0;
    for (found, reference) in found.iter().zip(&reference) {
        let one = relative_error(found, &candle::wide(reference)?);
        error = if one <= error { error } else { one };
    }
    let mut expected = [p, m, s];
    let [p, m, s] = &mut expected;
    ADAMW.apply(Execution::current(), p, m, s, &g);
    let has_cpu_bits = found.each_ref().map(|values| bits(values))
        == expected.each_ref().map(|values| bits(values))
        && digest == WrittenDigest::of(first, &expected[0], &expected[1], &expected[2]);

    let gpu = Device::Cuda(device.clone());
    let mut sums = device.alloc_zeros::<u64>(2)?;
    let ours = time(&gpu, || {
        state.adamw_into(device, &ADAMW, &grads, first, &mut sums)
    })?;
    let [tp, tm, ts, tg] = tensors.each_ref().map(|tensor| tensor.to_device(&gpu));
    let (tp, tm, ts, tg) = (tp?, tm?, ts?, tg?);
    let candles = time(&gpu, || {
        candle::adamw(&ADAMW, [&tp, &tm, &ts, &tg]).map(drop)
    })?;
    Ok(Outcome {
        kernel: "AdamW with digest".to_owned(),
        shape: count.to_string(),
        error,
        error_max: 1e-6,
        has_cpu_bits,
        times: Some([ours, candles]),
        work: Work::Bytes(7.0 * 4.0 * count as f64),
    })
}

fn check_tree_add(device: &CudaDevice, count: usize) -> Result<Outcome> {
    let [mut left, right] = ["left", "right"].map(|name| normal(name, count, 1.0));
    let reference: Vec<f64> = wide(&left)
        .iter()
        .zip(wide(&right))
        .map(|(a, b)| a + b)
        .collect();
    let (mut sum, addend) = (device.clone_htod(&left)?, device.clone_htod(&right)?);
    tree_add(device, &mut sum, &addend)?;
    let found = device.clone_dtoh(&sum)?;
    add_to(Execution::current(), &mut left, &right);
    let gpu = Device::Cuda(device.clone());
    let ours = time(&gpu, || tree_add(device, &mut sum, &addend))?;
    let a = Tensor::from_slice(&left, count, &gpu)?;
    let b = Tensor::from_slice(&right, count, &gpu)?;
    let candles = time(&gpu, || (&a + &b).map(drop))?;
    Ok(Outcome {
        kernel: "left + right, in place".to_owned(),
        shape: count.to_string(),
        error: relative_error(&found, &reference),
        error_max: 1e-7,
        has_cpu_bits: bits(&found) == bits(&left),
        times: Some([ours, candles]),
        work: Work::Bytes(3.0 * 4.0 * count as f64),
    })
}

fn check_tree_fold(device: &CudaDevice, level: u32, count: usize) -> Result<Outcome> {
    let partials = normal("partials", count << level, 1.0);
    let mut reference = vec![0.0; count];
    for partial in partials.chunks(count) {
        for (sum, value) in reference.iter_mut().zip(partial) {
            *sum += f64::from(*value);
        }
    }
    let stored = device.clone_htod(&partials)?;
    let found = device.clone_dtoh(&tree_fold(device, &stored, level)?)?;
    // On the CPU, level by level: each left one and its right neighbour.
    let mut subtrees: Vec<Vec<f32>> = partials.chunks(count).map(<[f32]>::to_vec).collect();
    while subtrees.len() > 1 {
        subtrees = subtrees
            .chunks(2)
            .map(|pair| {
                let mut left = pair[0].clone();
                add_to(Execution::current(), &mut left, &pair[1]);
                left
            })
            .collect();
    }
    let gpu = Device::Cuda(device.clone());
    let ours = time(&gpu, || tree_fold(device, &stored, level).map(drop))?;
    let tensor = Tensor::from_slice(&partials, (1 << level, count), &gpu)?;
    let candles = time(&gpu, || tensor.sum(0).map(drop))?;
    Ok(Outcome {
        kernel: "sum of a subtree".to_owned(),
        shape: format!("{}x{count}", 1 << level),
        error: relative_error(&found, &reference),
        error_max: 1e-6,
        has_cpu_bits: bits(&found) == bits(&subtrees[0]),
        times: Some([ours, candles]),
        work: Work::Bytes(4.0 * ((1 << level) + 1) as f64 * count as f64),
    })
}
