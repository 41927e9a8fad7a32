//! Cross-entropy: its gradient, and the sum that the CPU makes of what the GPU says of each row.

use candle_core::{DType, Device, Result, Tensor};

use super::operations::worse;
use super::{Outcome, Work, candle, time};
use crate::kernels::Execution;
use crate::kernels::loss::cross_entropy_of;
use crate::kernels::test_values::{bits, normal, relative_error};

/// Not a power of two, so that multiplying by it rounds.
const SCALE: f32 = 0.3;

pub(super) fn check(device: &Device, tell: &mut impl FnMut(Outcome)) -> Result<()> {
    for (rows, classes) in [(8, 10), (515, 257), (512, 32_000)] {
        tell(check_shape(device, rows, classes)?);
    }
    Ok(())
}

fn check_shape(device: &Device, rows: usize, classes: usize) -> Result<Outcome> {
    let logits = normal("logits", rows * classes, 3.0);
    let logits = Tensor::from_vec(logits, (rows, classes), &Device::Cpu)?;
    let labels: Vec<u32> = (0..rows).map(|row| (row * 7 % classes) as u32).collect();
    let on_gpu = logits.to_device(device)?;
    let gpu = cross_entropy_of(&on_gpu, &labels, SCALE)?;
    let threads = std::thread::available_parallelism().unwrap_or(std::num::NonZeroUsize::MIN);
    let execution = Execution::current().with_threads(threads);
    let cpu = execution.run(|| cross_entropy_of(&logits, &labels, SCALE))?;
    let flat = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let (gradient, expected) = (flat(&gpu.logit_gradients)?, flat(&cpu.logit_gradients)?);

    let one_hot = one_hot(&labels, classes)?;
    let wide = logits.to_dtype(DType::F64)?;
    let probabilities = candle::softmax(&wide)?;
    let reference = ((&probabilities - one_hot.to_dtype(DType::F64)?)? * f64::from(SCALE))?;
    let of_labels = (probabilities.log()? * one_hot.to_dtype(DType::F64)?)?;
    let loss = -of_labels.sum_all()?.to_scalar::<f64>()?;
    let error = worse(
        relative_error(&gradient, &candle::wide(&reference)?),
        (gpu.loss_sum - loss).abs() / loss.abs(),
    );

    let ours = time(device, || {
        cross_entropy_of(&on_gpu, &labels, SCALE).map(drop)
    })?;
    let one_hot = one_hot.to_device(device)?;
    let candles = time(device, || {
        let probabilities = candle::softmax(&on_gpu)?;
        let loss = (probabilities.log()? * &one_hot)?.sum_all()?;
        let gradient = ((probabilities - &one_hot)? * f64::from(SCALE))?;
        // Ours fetches what the loss is made of, so this does too.
        loss.to_scalar::<f32>()?;
        drop(gradient);
        Ok(())
    })?;
    Ok(Outcome {
        kernel: "cross-entropy with gradient".to_owned(),
        shape: format!("{rows}x{classes}"),
        error,
        error_max: (8.0 * (classes as f64 / 16.0).sqrt() / f64::from(1u32 << 24)).max(1e-6),
        has_cpu_bits: bits(&gradient) == bits(&expected)
            && gpu.loss_sum.to_bits() == cpu.loss_sum.to_bits(),
        times: Some([ours, candles]),
        work: Work::Bytes(8.0 * (rows * classes) as f64),
    })
}

/// One at each row's label, zero elsewhere.
fn one_hot(labels: &[u32], classes: usize) -> Result<Tensor> {
    let mut values = vec![0.0f32; labels.len() * classes];
    for (row, label) in values.chunks_exact_mut(classes).zip(labels) {
        row[*label as usize] = 1.0;
    }
    Tensor::from_vec(values, (labels.len(), classes), &Device::Cpu)
}
