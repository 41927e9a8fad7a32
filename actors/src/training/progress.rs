//! How a job tells its progress: a line a second at most.

use std::time::Duration;

use tokio::time::Instant;

use super::job_log::JobLog;
use super::optimizer::StepReport;

const LINE_EVERY: Duration = Duration::from_secs(1);

/// Counts steps and says how it goes.
pub struct Progress {
    log: JobLog,
    steps: u64,
    global_batch: u64,
    begun: Instant,
    done: u64,
    line_at: Instant,
    done_at_line: u64,
}

impl Progress {
    /// A job of `steps` steps, from now on.
    #[must_use]
    pub fn new(steps: u64, global_batch: u64, log: JobLog) -> Self {
        let begun = Instant::now();
        Progress {
            log,
            steps,
            global_batch,
            begun,
            done: 0,
            line_at: begun,
            done_at_line: 0,
        }
    }

    /// Takes note of a step.
    pub fn stepped(&mut self, report: &StepReport, trainers: usize) {
        self.done += 1;
        let since = self.line_at.elapsed();
        let last = report.step + 1 == self.steps;
        if since < LINE_EVERY && !last {
            return;
        }
        let samples = (self.done - self.done_at_line) * self.global_batch;
        self.log.line(format_args!(
            "step {}/{} loss {:.4} {:.0} samples/s workers {trainers}",
            report.step + 1,
            self.steps,
            report.loss_mean,
            samples as f64 / since.as_secs_f64().max(1e-9),
        ));
        (self.line_at, self.done_at_line) = (Instant::now(), self.done);
    }

    /// Samples in a second, since this driver began; none if it took no step.
    #[must_use]
    pub fn samples_per_second(&self) -> Option<f64> {
        let seconds = self.begun.elapsed().as_secs_f64().max(1e-9);
        (self.done > 0).then(|| (self.done * self.global_batch) as f64 / seconds)
    }
}
