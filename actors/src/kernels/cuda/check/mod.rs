//! Every kernel on the GPU against `f64` and against the CPU, and its time beside that of candle's own operations.
//!
//! * `candle`: the same functions as candle composes them, in any precision.
//! * `operations`: products, softmax, layer normalisation, forward and backward; `layers`: the other layers of the
//!   built-in models; `loss`: the loss at their end.
//! * `state`: AdamW with its digest, and sums in the tree.
//! * `replay`: some steps of a small network, on both; `training`: some steps of jobs as trainers take them; `answers`: models
//!   as replicas ask them.
//!
//! A check passes if the result is within its bound of `f64` and has the bits of this crate's kernels on the CPU. Times
//! are medians, with both sides' allocations; they are told, not judged.

mod answers;
mod candle;
mod layers;
mod loss;
mod operations;
mod replay;
mod state;
mod training;

use std::fmt;
use std::time::{Duration, Instant};

use candle_core::cuda_backend::cudarc::driver::sys::CUresult;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError};
use candle_core::{CudaDevice, Device, Error, Result};

/// What is known after one check.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was computed.
    pub kernel: String,
    /// Of which sizes.
    pub shape: String,
    /// Largest difference from `f64`, as a share of the largest value.
    pub error: f64,
    /// What that may be.
    pub error_max: f64,
    /// Whether all bits are those of the CPU.
    pub has_cpu_bits: bool,
    /// Time of our kernels, and of candle's.
    pub times: Option<[Duration; 2]>,
    /// What our kernels did meanwhile.
    pub work: Work,
}

/// What an operation costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Work {
    /// Bytes that must be read and written at least.
    Bytes(f64),
    /// Additions and multiplications.
    Operations(f64),
}

impl Outcome {
    /// Whether the result is right.
    #[must_use]
    pub fn passed(&self) -> bool {
        // A NaN is no pass.
        self.error <= self.error_max && self.has_cpu_bits
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [ours, candles, ratio, rate] = match self.times {
            None => ["–", "–", "–", "–"].map(str::to_owned),
            Some([ours, candles]) => {
                let seconds = ours.as_secs_f64().max(1e-9);
                let micros = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1e6);
                let rate = match self.work {
                    Work::Bytes(bytes) => format!("{:.0} GB/s", bytes / seconds / 1e9),
                    Work::Operations(count) => format!("{:.0} GFLOP/s", count / seconds / 1e9),
                };
                let ratio = format!("{:.2}", candles.as_secs_f64() / seconds);
                [micros(ours), micros(candles), ratio, rate]
            }
        };
        let bits = if self.has_cpu_bits { "yes" } else { "NO" };
        let verdict = if self.passed() { "ok" } else { "FAILED" };
        write!(
            formatter,
            "{:<34} {:<26} {:>9.1e} {:>8.0e} {bits:>8} {ours:>10} {candles:>10} {ratio:>7} {rate:>14}  {verdict}",
            self.kernel, self.shape, self.error, self.error_max
        )
    }
}

/// The heading of a table of outcomes.
#[must_use]
pub fn heading() -> String {
    format!(
        "{:<34} {:<26} {:>9} {:>8} {:>8} {:>10} {:>10} {:>7} {:>14}  verdict",
        "kernel", "shape", "error", "bound", "CPU bits", "ours µs", "candle µs", "ratio", "rate"
    )
}

/// How many GPUs the driver knows; zero where it knows none.
///
/// # Errors
/// If there is a driver, and it fails.
pub fn gpu_count() -> Result<usize> {
    match CudaContext::device_count() {
        Ok(count) => Ok(usize::try_from(count).unwrap_or_default()),
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
        Err(error) => Err(Error::wrap(error)),
    }
}

/// Name and compute capability of a GPU.
///
/// # Errors
/// If the driver fails.
pub fn describe(ordinal: usize) -> Result<String> {
    let context = CudaContext::new(ordinal).map_err(Error::wrap)?;
    let name = context.name().map_err(Error::wrap)?;
    let (major, minor) = context.compute_capability().map_err(Error::wrap)?;
    Ok(format!("{name}, compute capability {major}.{minor}"))
}

/// Runs all checks on one GPU; `told` gets each outcome as it is known.
///
/// # Errors
/// If the GPU or an operation fails; a wrong result is an outcome.
pub fn run(ordinal: usize, mut told: impl FnMut(&Outcome)) -> Result<Vec<Outcome>> {
    let device = Device::new_cuda(ordinal)?;
    let mut outcomes = Vec::new();
    let mut tell = |outcome: Outcome| {
        told(&outcome);
        outcomes.push(outcome);
    };
    operations::check(&device, &mut tell)?;
    state::check(cuda(&device)?, &mut tell)?;
    loss::check(&device, &mut tell)?;
    replay::check(&device, &mut tell)?;
    training::check(&device, &mut tell)?;
    answers::check(&device, &mut tell)?;
    Ok(outcomes)
}

fn cuda(device: &Device) -> Result<&CudaDevice> {
    device.as_cuda_device()
}

/// Calls that are timed together, so that starting them is no part of it.
const TOGETHER: Duration = Duration::from_millis(20);

/// The time of `work`, which the GPU may do later: the median of five series.
fn time(device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut series = |count: u32| {
        let start = Instant::now();
        for _ in 0..count {
            work()?;
        }
        device.synchronize()?;
        Ok::<_, Error>(start.elapsed() / count)
    };
    series(3)?;
    let once = series(1)?.max(Duration::from_micros(1));
    let count = (TOGETHER.as_nanos() / once.as_nanos()).clamp(1, 500) as u32;
    let mut times = [Duration::ZERO; 5];
    for time in &mut times {
        *time = series(count)?;
    }
    times.sort();
    Ok(times[2])
}
