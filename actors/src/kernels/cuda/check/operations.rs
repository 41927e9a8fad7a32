//! Differentiable operations: products with transposed operands, softmax, layer normalisation, and those of `layers`.

use candle_core::{DType, Device, Result, Tensor};

use super::candle;
use super::{Outcome, Work, layers, time};
use crate::kernels::test_values::{bits, normal, relative_error};
use crate::kernels::{Execution, layer_norm, product, softmax};

const EPSILON: f32 = 1e-5;

/// A function of some tensors, ours or candle's.
pub(super) type Function = fn(&[Tensor]) -> Result<Tensor>;

/// One operation of one shape.
pub(super) struct Case {
    pub(super) kernel: &'static str,
    pub(super) shape: String,
    /// Dimensions and deviation of each argument.
    pub(super) arguments: Vec<(Vec<usize>, f64)>,
    pub(super) ours: Function,
    pub(super) candles: Function,
    /// Numbers in the longest chain of additions, forward or backward.
    pub(super) chain: usize,
    /// Of the forward pass, and of forward and backward.
    pub(super) work: [Work; 2],
}

pub(super) fn check(device: &Device, tell: &mut impl FnMut(Outcome)) -> Result<()> {
    for case in cases().into_iter().chain(layers::cases()) {
        case.check(device, tell)?;
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, inner, columns) in [
        (128, 784, 512),
        (515, 1030, 770),
        (1024, 1024, 1024),
        (4096, 4096, 4096),
    ] {
        cases.push(product_case("product", [rows, inner, columns]));
    }
    cases.push(Case {
        arguments: vec![(vec![1030, 515], 1.0), (vec![770, 1030], 1.0)],
        ours: |of| product(&of[0].t()?, &of[1].t()?),
        candles: |of| of[0].t()?.matmul(&of[1].t()?),
        ..product_case("product, both transposed", [515, 1030, 770])
    });
    // Heads of attention: (batch, time, head, width) read as (batch, head, time, width).
    let operations = 2.0 * 4.0 * 8.0 * 256.0 * 64.0 * 256.0;
    cases.push(Case {
        kernel: "product, batch of heads",
        shape: "4x8x(256x64 · 64x256)".to_owned(),
        arguments: vec![(vec![4, 256, 8, 64], 1.0); 2],
        ours: |of| product(&heads(&of[0])?, &heads(&of[1])?.transpose(2, 3)?),
        candles: |of| {
            let values = heads(&of[1])?.transpose(2, 3)?;
            heads(&of[0])?.contiguous()?.matmul(&values.contiguous()?)
        },
        chain: 256,
        work: [operations, 3.0 * operations].map(Work::Operations),
    });
    for (rows, columns) in [(64, 10), (8192, 1024), (512, 32_000)] {
        let bytes = 4.0 * rows as f64 * columns as f64;
        cases.push(Case {
            kernel: "softmax",
            shape: format!("{rows}x{columns}"),
            arguments: vec![(vec![rows, columns], 3.0)],
            ours: |of| softmax(&of[0]),
            candles: |of| candle::softmax(&of[0]),
            chain: columns.div_ceil(16),
            work: [2.0 * bytes, 5.0 * bytes].map(Work::Bytes),
        });
    }
    for (rows, columns) in [(37, 100), (8192, 1024), (65_536, 128)] {
        let bytes = 4.0 * rows as f64 * columns as f64;
        cases.push(Case {
            kernel: "layer-norm",
            shape: format!("{rows}x{columns}"),
            arguments: vec![
                (vec![rows, columns], 2.0),
                (vec![columns], 1.0),
                (vec![columns], 1.0),
            ],
            ours: |of| layer_norm(&of[0], &of[1], &of[2], EPSILON),
            candles: |of| candle::layer_norm(&of[0], &of[1], &of[2], EPSILON),
            chain: rows.max(columns.div_ceil(16)),
            work: [2.0 * bytes, 8.0 * bytes].map(Work::Bytes),
        });
    }
    cases
}

fn product_case(kernel: &'static str, [rows, inner, columns]: [usize; 3]) -> Case {
    let operations = 2.0 * rows as f64 * inner as f64 * columns as f64;
    Case {
        kernel,
        shape: format!("{rows}x{inner} · {inner}x{columns}"),
        arguments: vec![(vec![rows, inner], 1.0), (vec![inner, columns], 1.0)],
        ours: |of| product(&of[0], &of[1]),
        candles: |of| of[0].matmul(&of[1]),
        chain: rows.max(inner).max(columns),
        work: [operations, 3.0 * operations].map(Work::Operations),
    }
}

fn heads(tensor: &Tensor) -> Result<Tensor> {
    tensor.transpose(1, 2)
}

impl Case {
    /// What rounding may come to, as a share of the largest value: eight times what each addition's error of up to 2⁻²⁴
    /// sums up to where signs are random, and no less than the polynomials' own error.
    fn error_max(&self) -> f64 {
        (8.0 * (self.chain as f64).sqrt() / (1u32 << 24) as f64).max(1e-6)
    }

    fn check(&self, device: &Device, tell: &mut impl FnMut(Outcome)) -> Result<()> {
        let cpu = &Device::Cpu;
        let arguments: Vec<Tensor> = self
            .arguments
            .iter()
            .zip(["first", "second", "third"])
            .map(|((dims, deviation), name)| {
                let values = normal(name, dims.iter().product(), *deviation);
                Tensor::from_vec(values, &dims[..], cpu)
            })
            .collect::<Result<_>>()?;
        let threads = std::thread::available_parallelism().unwrap_or(std::num::NonZeroUsize::MIN);
        let execution = Execution::current().with_threads(threads);
        // Random, so that no part of a sum can hide behind another.
        let dims = execution.run(|| (self.ours)(&arguments))?.dims().to_vec();
        let gradient = normal("gradient", dims.iter().product(), 1.0);
        let gradient = Tensor::from_vec(gradient, &dims[..], cpu)?;
        let on_cpu = execution.run(|| candle::with_gradients(&arguments, &gradient, self.ours))?;
        let moved = |tensor: &Tensor| tensor.to_device(device);
        let device_arguments: Vec<Tensor> = arguments.iter().map(moved).collect::<Result<_>>()?;
        let device_gradient = moved(&gradient)?;
        let on_gpu = candle::with_gradients(&device_arguments, &device_gradient, self.ours)?;
        let in_f64 = |tensor: &Tensor| tensor.to_dtype(DType::F64);
        let wide_arguments: Vec<Tensor> = arguments.iter().map(in_f64).collect::<Result<_>>()?;
        let reference = candle::with_gradients(&wide_arguments, &in_f64(&gradient)?, self.candles)?;

        let mut forward = (0.0, true);
        let mut all = (0.0, true);
        for (index, ((gpu, cpu), wide)) in on_gpu.iter().zip(&on_cpu).zip(&reference).enumerate() {
            let flat = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
            let (gpu, cpu) = (flat(gpu)?, flat(cpu)?);
            let error = relative_error(&gpu, &candle::wide(wide)?);
            let has_cpu_bits = bits(&gpu) == bits(&cpu);
            if index == 0 {
                forward = (error, has_cpu_bits);
            }
            all = (worse(all.0, error), all.1 && has_cpu_bits);
        }
        let time_of = |function: Function| {
            let forward = time(device, || function(&device_arguments).map(drop))?;
            let both = time(device, || {
                candle::with_gradients(&device_arguments, &device_gradient, function).map(drop)
            })?;
            Ok::<_, candle_core::Error>([forward, both])
        };
        let ours = time_of(self.ours)?;
        // On GPUs candle lacks some backward passes; then there is nothing to compare with, and the checks go on.
        let candles = time_of(self.candles).ok();
        for (index, (pass, (error, has_cpu_bits))) in
            [("", forward), (", and back", all)].into_iter().enumerate()
        {
            tell(Outcome {
                kernel: format!("{}{pass}", self.kernel),
                shape: self.shape.clone(),
                error,
                error_max: self.error_max(),
                has_cpu_bits,
                times: candles.map(|candles| [ours[index], candles[index]]),
                work: self.work[index],
            });
        }
        Ok(())
    }
}

/// The larger, or NaN if one is.
pub(super) fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}
