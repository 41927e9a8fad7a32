//! How a job tells its progress: a line after the first step of each start of its driver, one a second, and one after as many steps
//! as the job says, which people and `mobula train status` read.
//!
//! Invariant: what [`ProgressLine`] writes, it reads back; so a job's log is all that its status needs, and
//! no step's numbers pass through the head's tables.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::first_step::FirstStep;
use super::job::now_ms;
use super::job_log::JobLog;
use super::meters::Meters;
use super::optimizer::StepReport;
use super::pauses::{Pause, Pauses};
use super::spec::TrainSpec;
use super::trainable::Evaluation;

const LINE_EVERY: Duration = Duration::from_secs(1);

/// Where a step's time went, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StepBreakdown {
    /// Samples were fetched, where nothing else could be done meanwhile.
    pub data: Duration,
    /// Gradients were computed, the update made and the state hashed, by the slowest of those who were needed.
    pub compute: Duration,
    /// Sums were on their way.
    pub exchange: Duration,
    /// Trainers or an order were waited for.
    pub wait: Duration,
    /// A state was taken for a checkpoint.
    pub checkpoint: Duration,
}

impl StepBreakdown {
    /// A step that took so long, of which the slowest trainer waited for samples and computed so much, and
    /// trainers were waited for before it began. The rest was the exchange.
    #[must_use]
    pub fn of(took: Duration, data: Duration, compute: Duration, wait: Duration) -> Self {
        let data = data.min(took);
        let compute = compute.min(took - data);
        let wait = wait.min(took - data - compute);
        StepBreakdown {
            data,
            compute,
            exchange: took - data - compute - wait,
            wait,
            checkpoint: Duration::ZERO,
        }
    }

    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.parts().iter().map(|(_, part)| *part).sum()
    }

    /// The parts by name, in the order in which they are shown.
    #[must_use]
    pub fn parts(&self) -> [(&'static str, Duration); 5] {
        [
            ("data", self.data),
            ("compute", self.compute),
            ("exchange", self.exchange),
            ("wait", self.wait),
            ("checkpoint", self.checkpoint),
        ]
    }

    fn add(&mut self, other: &StepBreakdown) {
        self.data += other.data;
        self.compute += other.compute;
        self.exchange += other.exchange;
        self.wait += other.wait;
        self.checkpoint += other.checkpoint;
    }

    /// The mean of what was added up for `steps` steps.
    fn mean(&self, steps: u32) -> StepBreakdown {
        let mean = |total: Duration| total / steps.max(1);
        StepBreakdown {
            data: mean(self.data),
            compute: mean(self.compute),
            exchange: mean(self.exchange),
            wait: mean(self.wait),
            checkpoint: mean(self.checkpoint),
        }
    }
}

/// One line of a job's progress.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ProgressLine {
    /// Steps taken.
    pub step: u64,
    /// Steps of the job.
    pub steps: u64,
    /// Mean loss of the last step's batch.
    pub loss: f64,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Norm of the last step's mean gradient, before clipping.
    pub gradient_norm: f64,
    /// Samples in a second since the line before.
    pub samples_per_second: f64,
    /// Trainers that take part.
    pub workers: u64,
    /// The share of the driver's time so far in which steps were taken that count.
    pub goodput: f64,
    /// Processor cores that the trainers kept busy together since the line before.
    pub cpu_cores: f64,
    /// Mean milliseconds of a step since the line before, part by part as in [`StepBreakdown::parts`].
    pub parts_ms: [f64; 5],
    /// The share of the last moments, a second at most, in which a trainer's GPU computed, from 0 to 1: the mean of those
    /// that say so. Absent where none does, as on CPUs.
    pub gpu_utilization: Option<f64>,
}

/// What the trainers that take part use, as far as they have said.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainerUsage {
    /// How many they are.
    pub trainers: usize,
    /// CPU time that they have used together.
    pub cpu: Duration,
    /// As in [`ProgressLine::gpu_utilization`].
    pub gpu_utilization: Option<f64>,
}

impl fmt::Display for ProgressLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "step {}/{} loss {:.4} rate {:.3e} gradient {:.3e} samples/s {:.0} workers {} goodput {:.3} cores {:.2} ms",
            self.step,
            self.steps,
            self.loss,
            self.learning_rate,
            self.gradient_norm,
            self.samples_per_second,
            self.workers,
            self.goodput,
            self.cpu_cores,
        )?;
        let names = StepBreakdown::default().parts();
        for ((name, _), part) in names.iter().zip(self.parts_ms) {
            write!(f, " {name} {part:.3}")?;
        }
        if let Some(gpu) = self.gpu_utilization {
            write!(f, " gpu {gpu:.3}")?;
        }
        Ok(())
    }
}

/// A line that tells no progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a line of progress")]
pub struct NotProgress;

impl FromStr for ProgressLine {
    type Err = NotProgress;

    fn from_str(line: &str) -> Result<Self, NotProgress> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let after = |name: &str| {
            let at = words.iter().position(|word| *word == name);
            at.and_then(|at| words.get(at + 1))
                .copied()
                .ok_or(NotProgress)
        };
        let number = |name: &str| after(name)?.parse::<f64>().map_err(|_| NotProgress);
        if words.first() != Some(&"step") {
            return Err(NotProgress);
        }
        let (step, steps) = after("step")?.split_once('/').ok_or(NotProgress)?;
        let gpu_utilization = match after("gpu") {
            Ok(_) => Some(number("gpu")?),
            Err(NotProgress) => None,
        };
        let mut parts_ms = [0.0; 5];
        for (part, (name, _)) in parts_ms.iter_mut().zip(StepBreakdown::default().parts()) {
            *part = number(name)?;
        }
        Ok(ProgressLine {
            step: step.parse().map_err(|_| NotProgress)?,
            steps: steps.parse().map_err(|_| NotProgress)?,
            loss: number("loss")?,
            learning_rate: number("rate")?,
            gradient_norm: number("gradient")?,
            samples_per_second: number("samples/s")?,
            workers: after("workers")?.parse().map_err(|_| NotProgress)?,
            goodput: number("goodput")?,
            cpu_cores: number("cores")?,
            parts_ms,
            gpu_utilization,
        })
    }
}

/// Counts steps and says how it goes.
pub struct Progress {
    log: JobLog,
    steps: u64,
    global_batch: u64,
    /// As in [`TrainSpec::log_every_steps`].
    line_every_steps: Option<u64>,
    begun: Instant,
    done: u64,
    /// Time in which steps were taken.
    busy: Duration,
    line_at: Instant,
    done_at_line: u64,
    since_line: StepBreakdown,
    last: Option<StepReport>,
    /// When the last step ended.
    last_at: Option<Instant>,
    pauses: Pauses,
    /// CPU time of the trainers at the last line.
    cpu_at_line: Duration,
    meters: Meters,
}

impl Progress {
    /// A job, from now on.
    #[must_use]
    pub fn new(spec: &TrainSpec, log: JobLog) -> Self {
        let begun = Instant::now();
        Progress {
            log,
            steps: spec.steps,
            global_batch: spec.global_batch,
            line_every_steps: spec.log_every_steps,
            begun,
            done: 0,
            busy: Duration::ZERO,
            line_at: begun,
            done_at_line: 0,
            since_line: StepBreakdown::default(),
            last: None,
            last_at: None,
            pauses: Pauses::default(),
            cpu_at_line: Duration::ZERO,
            meters: Meters::new(),
        }
    }

    /// The longest pauses between two steps of this driver.
    #[must_use]
    pub fn pauses(&self) -> Vec<Pause> {
        self.pauses.longest()
    }

    /// The last step that this driver took.
    #[must_use]
    pub fn last(&self) -> Option<StepReport> {
        self.last
    }

    /// Takes note of a step that took so long, part by part, and of what the trainers use by now. `last` says that no
    /// step follows.
    pub fn stepped(
        &mut self,
        report: StepReport,
        usage: TrainerUsage,
        took: &StepBreakdown,
        last: bool,
    ) {
        self.last = Some(report);
        let now = Instant::now();
        if let Some(before) = self.last_at.replace(now) {
            self.pauses.note(now - before, now_ms());
        }
        self.done += 1;
        if self.done == 1 {
            let first = FirstStep {
                step: report.step + 1,
                ended_ms: now_ms(),
            };
            self.log.line(format_args!("{first}"));
        }
        self.busy += took.total().saturating_sub(took.wait + took.checkpoint);
        self.since_line.add(took);
        let since = self.line_at.elapsed();
        if !last && !self.is_line_due(report.step, since) {
            return;
        }
        let steps = self.done - self.done_at_line;
        let mean = self
            .since_line
            .mean(u32::try_from(steps).unwrap_or(u32::MAX));
        let seconds = since.as_secs_f64().max(1e-9);
        // Less than before where a trainer is gone: then the next line knows again.
        let busy = usage.cpu.saturating_sub(self.cpu_at_line);
        let line = ProgressLine {
            step: report.step + 1,
            steps: self.steps,
            loss: report.loss_mean,
            learning_rate: report.learning_rate,
            gradient_norm: report.gradient_norm,
            samples_per_second: (steps * self.global_batch) as f64 / seconds,
            workers: usage.trainers as u64,
            goodput: self.goodput(),
            cpu_cores: busy.as_secs_f64() / seconds,
            parts_ms: mean.parts().map(|(_, part)| part.as_secs_f64() * 1e3),
            gpu_utilization: usage.gpu_utilization,
        };
        self.log.line(format_args!("{line}"));
        self.meters.show(&line, self.done * self.global_batch);
        self.cpu_at_line = usage.cpu;
        self.line_at = Instant::now();
        self.done_at_line = self.done;
        self.since_line = StepBreakdown::default();
    }

    /// Whether a step, counted from 0, that ended so long after the last line is told of. The first one of a driver is:
    /// then it is seen at once that a job goes on.
    fn is_line_due(&self, step: u64, since: Duration) -> bool {
        let every = self.line_every_steps;
        self.done == 1
            || since >= LINE_EVERY
            || every.is_some_and(|every| (step + 1).is_multiple_of(every))
    }

    /// Says what was measured after `step` steps.
    pub fn evaluated(&self, step: u64, evaluation: &Evaluation) {
        self.log
            .line(format_args!("evaluation after step {step}: {evaluation}"));
        self.meters.evaluated(evaluation);
    }

    /// The share of the time since this driver began in which steps were taken: not waiting, not saving,
    /// not measuring.
    #[must_use]
    pub fn goodput(&self) -> f64 {
        let all = self.begun.elapsed().as_secs_f64().max(1e-9);
        (self.busy.as_secs_f64() / all).min(1.0)
    }

    /// Samples in a second, since this driver began; none if it took no step.
    #[must_use]
    pub fn samples_per_second(&self) -> Option<f64> {
        let seconds = self.begun.elapsed().as_secs_f64().max(1e-9);
        (self.done > 0).then(|| (self.done * self.global_batch) as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_back_as_it_was_written() {
        let line = ProgressLine {
            step: 120,
            steps: 2400,
            loss: 0.125,
            learning_rate: 0.002,
            gradient_norm: 1.5,
            samples_per_second: 51200.0,
            workers: 3,
            goodput: 0.875,
            cpu_cores: 1.75,
            parts_ms: [0.125, 5.5, 1.25, 0.5, 0.0],
            gpu_utilization: None,
        };
        let text = line.to_string();
        assert_eq!(text.parse::<ProgressLine>().unwrap(), line);
        assert!(
            text.starts_with("step 120/2400 loss 0.1250 rate 2.000e-3"),
            "{text}"
        );
        for other in ["", "step", "step 3 waits: 1 trainers take part", &text[5..]] {
            assert_eq!(other.parse::<ProgressLine>(), Err(NotProgress), "{other}");
        }
        assert!(!text.contains("gpu"), "{text}");
        let on_gpus = ProgressLine {
            gpu_utilization: Some(0.875),
            ..line
        };
        let text = on_gpus.to_string();
        assert_eq!(text.parse::<ProgressLine>().unwrap(), on_gpus);
        let damaged = text.replace("gpu 0.875", "gpu x");
        assert_eq!(damaged.parse::<ProgressLine>(), Err(NotProgress));
        let diverged = ProgressLine {
            loss: f64::NAN,
            ..line
        };
        let read: ProgressLine = diverged.to_string().parse().unwrap();
        assert!(read.loss.is_nan());
    }

    #[test]
    fn a_line_comes_each_second_and_after_as_many_steps_as_the_job_says() {
        let mut spec = TrainSpec::digits_mlp("a");
        // Of a driver that took more than one step before.
        let told = |spec: &TrainSpec, since: Duration| -> Vec<u64> {
            let mut progress = Progress::new(spec, JobLog::Silent);
            progress.done = 2;
            (0..9)
                .filter(|step| progress.is_line_due(*step, since))
                .collect()
        };
        let soon = LINE_EVERY / 2;
        assert!(told(&spec, soon).is_empty());
        assert_eq!(told(&spec, LINE_EVERY).len(), 9);
        spec.log_every_steps = Some(4);
        assert_eq!(told(&spec, soon), [3, 7]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_step_of_a_driver_is_told_at_once_and_the_next_a_second_later() {
        let mut progress = Progress::new(&TrainSpec::digits_mlp("a"), JobLog::Silent);
        let mut told = Vec::new();
        for (step, pause) in [
            (420, Duration::ZERO),
            (421, Duration::ZERO),
            (422, LINE_EVERY),
        ] {
            tokio::time::advance(pause).await;
            let report = StepReport {
                step,
                loss_mean: 1.0,
                gradient_norm: 1.0,
                learning_rate: 0.1,
                took: Duration::ZERO,
            };
            let usage = TrainerUsage {
                trainers: 1,
                cpu: Duration::ZERO,
                gpu_utilization: None,
            };
            progress.stepped(report, usage, &StepBreakdown::default(), false);
            told.push(progress.done_at_line);
        }
        assert_eq!(told, [1, 1, 3]);
    }

    #[test]
    fn parts_never_exceed_the_step() {
        let ms = Duration::from_millis;
        let step = StepBreakdown::of(ms(10), ms(1), ms(6), ms(2));
        assert_eq!((step.exchange, step.total()), (ms(1), ms(10)));
        let waited = StepBreakdown::of(ms(10), ms(1), ms(6), ms(10));
        assert_eq!((waited.wait, waited.exchange), (ms(3), ms(0)));
        let odd = StepBreakdown::of(ms(10), ms(9), ms(9), ms(9));
        assert_eq!((odd.data, odd.compute, odd.total()), (ms(9), ms(1), ms(10)));
    }

    #[test]
    fn means_and_totals_are_those_of_the_parts() {
        let part = |ms| Duration::from_millis(ms);
        let mut sum = StepBreakdown::default();
        for ms in [1, 3] {
            sum.add(&StepBreakdown {
                data: part(ms),
                compute: part(10 * ms),
                exchange: part(ms),
                wait: part(0),
                checkpoint: part(2 * ms),
            });
        }
        assert_eq!(sum.total(), part(4 * 14));
        assert_eq!(sum.mean(2).compute, part(20));
    }
}
