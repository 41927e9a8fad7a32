//! A job's progress as metrics of its driver's process, and what a trainer's process uses.

use std::time::Duration;

use mobula::metrics::{Gauge, MetricError, gauge, remove};
use rustix::time::{ClockId, clock_gettime};

use super::progress::{ProgressLine, StepBreakdown};
use super::trainable::Evaluation;

/// The gauges; none of them where the process has no room for them.
pub(super) struct Meters {
    values: Vec<Option<Gauge>>,
    parts: Vec<Option<Gauge>>,
}

/// What is shown of a line, in the order of [`Meters::show`].
const NAMES: [&str; 10] = [
    "mobula_training_step",
    "mobula_training_steps",
    "mobula_training_loss",
    "mobula_training_learning_rate",
    "mobula_training_gradient_norm",
    "mobula_training_samples_per_second",
    "mobula_training_workers",
    "mobula_training_cpu_cores",
    "mobula_training_goodput_ratio",
    "ml_data_integration_records_processed",
];

/// Shown only where trainers compute on GPUs that say so.
const GPU_UTILIZATION: &str = "mobula_training_gpu_utilization_ratio";

impl Meters {
    pub(super) fn new() -> Self {
        let parts = StepBreakdown::default().parts();
        let part = |(name, _)| made(gauge("mobula_training_step_seconds", &[("part", name)]));
        Meters {
            values: NAMES.iter().map(|name| made(gauge(name, &[]))).collect(),
            parts: parts.into_iter().map(part).collect(),
        }
    }

    /// Shows a line, and how many records of the data this driver's trainers have learnt from by then.
    pub(super) fn show(&self, line: &ProgressLine, records: u64) {
        let records = records as f64;
        let values = [
            line.step as f64,
            line.steps as f64,
            line.loss,
            line.learning_rate,
            line.gradient_norm,
            line.samples_per_second,
            line.workers as f64,
            line.cpu_cores,
            line.goodput,
            records,
        ];
        let parts = line.parts_ms.map(|part| part / 1e3);
        let shown = self.values.iter().zip(values);
        for (gauge, value) in shown.chain(self.parts.iter().zip(parts)) {
            if let Some(gauge) = gauge {
                gauge.set(value);
            }
        }
        match line.gpu_utilization {
            Some(ratio) => {
                if let Some(gauge) = made(gauge(GPU_UTILIZATION, &[])) {
                    gauge.set(ratio);
                }
            }
            // What was so a while ago is not shown as what is.
            None => remove(GPU_UTILIZATION, &[]),
        }
    }

    pub(super) fn evaluated(&self, evaluation: &Evaluation) {
        let named = evaluation
            .metrics
            .iter()
            .map(|(name, value)| (&**name, *value));
        for (name, value) in std::iter::once(("loss", evaluation.loss)).chain(named) {
            let measured = gauge("mobula_training_evaluation", &[("measure", name)]);
            if let Some(gauge) = made(measured) {
                gauge.set(value);
            }
        }
    }
}

/// CPU time that this process has used, all of its threads together.
pub(super) fn process_cpu_time() -> Duration {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(used.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(used.tv_nsec).unwrap_or_default())
}

/// A job is not to fail for what cannot be shown of it.
fn made(gauge: Result<Gauge, MetricError>) -> Option<Gauge> {
    gauge
        .inspect_err(|error| tracing::warn!(%error, "a figure of the job is not shown"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn computing_is_counted_as_cpu_time() {
        let before = process_cpu_time();
        let mut sum = 0_u64;
        while process_cpu_time() < before + Duration::from_millis(5) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(process_cpu_time() > before);
    }
}
