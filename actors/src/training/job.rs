//! The built-in job `train`: what its driver does from start to end.
//!
//! Invariants:
//! 1. The result's hash does not depend on what happened on the way.
//! 2. A driver that was started again fences the one before by its incarnation: trainers and
//!    checkpoints refuse the older one.
//! 3. A driver with notice saves within the grace, or says why it did not, and leaves.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mobula::Cluster;
use mobula_core::{ActorId, Incarnation, JobId};
use mobula_storage::blob::BlobError;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::chronicle::Chronicle;
use super::collective::{ClusterCollective, SharedMemory};
use super::coordinator::CoordinatorError;
use super::data::Files;
use super::departure::{Departure, Ear, Said};
use super::evaluation::{UnknownMetric, measured_as};
use super::job_log::JobLog;
use super::link::ClusterLink;
use super::messages::Epoch;
use super::permission;
use super::progress::Progress;
use super::publish::PublishVersionError;
use super::result::TrainResult;
use super::resume::{HISTORY_KEY, History, ResumeError, Resumed, TRACE_KEY, resume};
use super::save_schedule::SaveSchedule;
use super::saving::Saver;
use super::snapshot::StateSnapshot;
use super::spec::{SpecError, TrainSpec};
use super::start_from::StartError;
use super::state::TrainState;
use super::trace::StepTrace;
use super::workload::{Workload, WorkloadError};
use crate::checkpoint::KeepPolicy;
use crate::checkpoint::checkpointer::SaveOrder;
use crate::checkpoint::ledger::{CheckpointError, committed};
use crate::checkpoint::safetensors::SHAPES_KEY;
use crate::checkpoint::spread::Spread;
use crate::storage::open_blobs;

/// The coordinator of a job whose trainers are actors.
pub(super) type Coordinator = super::coordinator::Coordinator<ClusterLink, ClusterCollective>;

/// How far ahead of a save trainers are asked to keep its state, in multiples of what they may be ahead of the
/// driver: they must not have taken that step when they hear of it.
const HELP_STEPS: u64 = 3;

/// Why a training job failed.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The job file is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The model cannot be built or evaluated.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// Early stopping, or keeping the best, watches what nobody measures.
    #[error(transparent)]
    Metric(#[from] UnknownMetric),
    /// The object store cannot be opened.
    #[error(transparent)]
    Store(#[from] BlobError),
    /// There is nowhere to go on from.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// The weights to begin with cannot be used.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Training cannot go on.
    #[error(transparent)]
    Train(#[from] CoordinatorError),
    /// Checkpoints are refused.
    #[error("checkpoint: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// The model version is refused.
    #[error("model version: {0}")]
    Publish(#[from] PublishVersionError),
    /// The cluster refused something.
    // Not transparent: what a program's own `main` returns is looked through for it.
    #[error("{0}")]
    Cluster(#[from] mobula::Error),
    /// The policies forbid to train on the data.
    #[error("{0}")]
    Forbidden(String),
    /// It has left its node, but was not stopped there.
    #[error("the driver has left {0} and was not stopped: its agent may be gone")]
    NotStopped(ActorId),
}

impl JobError {
    /// Whether another start of the driver would come to the same: then the job has failed. Everything
    /// else is what may get into a job's way, and passes.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            JobError::Spec(_) | JobError::Metric(_) | JobError::Forbidden(_) => true,
            JobError::Workload(error) => !error.may_pass(),
            JobError::Train(error) => error.is_final(),
            _ => false,
        }
    }
}

/// Runs the job that `text` (TOML) describes, as its driver. `file` names it in errors.
pub async fn train(cluster: Cluster, text: &str, file: &str) -> Result<(), JobError> {
    train_spec(cluster, TrainSpec::from_toml(text, file)?)
        .await
        .map(drop)
}

/// Runs the job that `spec` describes, as its driver: what a program with models of its own calls from
/// its `main`.
pub async fn train_spec(cluster: Cluster, spec: TrainSpec) -> Result<TrainResult, JobError> {
    let files = match cluster.storage() {
        Some(location) => Files::with_store(open_blobs(location)?, Handle::current()),
        None => Files::local(),
    };
    spec.check_program().map_err(WorkloadError::Invalid)?;
    let workload = tokio::task::block_in_place(|| Workload::load(&spec, &files))?;
    let (Some(job), Some((actor, incarnation))) = (cluster.job(), cluster.driver()) else {
        let reason = "training is a job: start it with `mobula submit`".to_owned();
        return Err(mobula::Error::NotInCluster(reason).into());
    };
    permission::ask(&cluster, job, &spec, &workload).await?;
    let driver = Driver {
        cluster,
        spec,
        workload,
        job,
        actor,
        incarnation,
        log: JobLog::Stdout,
        trace: Mutex::new(None),
    };
    Box::pin(driver.run()).await
}

pub(super) struct Driver {
    pub(super) cluster: Cluster,
    pub(super) spec: TrainSpec,
    pub(super) workload: Workload,
    pub(super) job: JobId,
    pub(super) actor: ActorId,
    pub(super) incarnation: Incarnation,
    pub(super) log: JobLog,
    /// The states so far; set when it is known where to go on.
    pub(super) trace: Mutex<Option<StepTrace>>,
}

impl Driver {
    async fn run(&self) -> Result<TrainResult, JobError> {
        let log = self.log;
        let restarts = self.cluster.job_handle(self.job).status().await?.restarts;
        log.line(format_args!(
            "training `{}`: {} steps of {} samples in {} shards, {} to {} trainers; driver {} \
             incarnation {}, start {}",
            self.spec.name,
            self.spec.steps,
            self.spec.global_batch,
            self.spec.virtual_shards,
            self.spec.workers.min,
            self.spec.workers.max,
            self.actor,
            self.incarnation,
            restarts + 1,
        ));
        let mut saver = Saver::new(&self.cluster, &self.spec.checkpoints, log)?;
        let links: Vec<ClusterLink> = (0..self.spec.workers.max as usize)
            .map(|slot| ClusterLink::new(&self.cluster, &self.spec, slot))
            .collect();
        let resumed = self.resume(restarts, &mut saver, &links).await?;
        let Resumed {
            mut state,
            mut history,
            trace,
        } = resumed;
        if let (0, Some(from)) = (state.step, &self.spec.start_from) {
            let location = self.cluster.storage().expect("a driver is in a cluster");
            from.load(&mut state, || open_blobs(location), log).await?;
        }
        let checkpoints = &self.spec.checkpoints;
        let limit = checkpoints.check_limit(state.size_bytes());
        limit.map_err(WorkloadError::Invalid)?;
        let layout = self.workload.layout();
        let mut trace = trace.unwrap_or_else(|| StepTrace::new(self.spec.steps, &state, layout));
        trace.go_back_to(state.step);
        *self.trace.lock() = Some(trace);
        history.driver_restarts = u64::from(restarts);
        let policy = self.spec.checkpoints.policy();
        if policy != KeepPolicy::default() {
            saver.keep(self.incarnation, policy).await;
        }
        let ledger = Arc::new(self.cluster.clone());
        let node = self.node();
        let mut chronicle = Chronicle::new(ledger, self.job, self.incarnation, node, log);
        if restarts > 0 {
            chronicle.take_over(state.step).await;
        }
        let mut departure = Departure::new(chronicle);
        let epoch = Epoch::first_of(self.incarnation.0);
        let counters = history.counters;
        let collective = ClusterCollective::new(&self.cluster, Arc::new(SharedMemory::reader()));
        let workload = &self.workload;
        let mut coordinator = tokio::task::block_in_place(|| {
            Coordinator::new(workload, state, epoch, links, collective, counters, log)
        })?;
        let mut progress = Progress::new(&self.spec, log);
        self.take_steps(
            &mut coordinator,
            &mut saver,
            &mut progress,
            &mut departure,
            &mut history,
        )
        .await?;
        self.finish(coordinator, saver, &progress, history).await
    }

    /// The name of its machine.
    pub(super) fn node(&self) -> &str {
        self.cluster.node_name().unwrap_or("no node")
    }

    async fn resume(
        &self,
        restarts: u32,
        saver: &mut Saver,
        links: &[ClusterLink],
    ) -> Result<Resumed, JobError> {
        let initial = TrainState::initial(&self.workload);
        // A first start has nothing to find; asking the table is cheap and needs no checkpointer.
        if restarts == 0
            && committed(&self.cluster, self.job)
                .await?
                .checkpoints
                .is_empty()
        {
            return Ok(Resumed {
                state: initial,
                history: History::default(),
                trace: None,
            });
        }
        Ok(resume(
            initial,
            &self.spec,
            self.incarnation,
            saver,
            links,
            self.log,
        )
        .await?)
    }

    async fn take_steps(
        &self,
        coordinator: &mut Coordinator,
        saver: &mut Saver,
        progress: &mut Progress,
        departure: &mut Departure,
        history: &mut History,
    ) -> Result<(), JobError> {
        let layout = self.workload.layout();
        let mut ear = Ear::new(self.cluster.notices(), self.cluster.advice());
        let mut schedule = SaveSchedule::new(
            &self.spec.checkpoints,
            self.spec.checkpoint_every_steps,
            Duration::from_millis(history.trained_ms),
            Instant::now(),
        );
        self.evaluate(coordinator, progress, history)?;
        while coordinator.state().step < self.spec.steps && !history.watch.stop {
            let begun = Instant::now();
            let mut taken = None;
            let said = tokio::select! {
                biased;
                said = ear.next() => Some(said),
                () = departure.gathered(coordinator.state().step) => Some(Said::Gathered),
                report = coordinator.advance() => {
                    let report = report?;
                    history.loss_mean = Some(report.loss_mean);
                    if let Some(trace) = &mut *self.trace.lock() {
                        trace.record(coordinator.state(), layout, coordinator.digest());
                    }
                    let took = begun.elapsed();
                    schedule.step_taken(took, report.took, saver.is_busy());
                    note_stall(&schedule, history);
                    taken = Some((report, took));
                    None
                }
            };
            saver.poll()?;
            let step = coordinator.state().step;
            // What a save that is on its way is uploaded from must not be given up for the next one.
            if !departure.is_gathering() && !saver.is_busy() {
                self.ask_for_help(coordinator, &schedule);
            }
            let now = Instant::now();
            history.trained_ms = millis(schedule.trained(now));
            let failures = history.failures(coordinator.counters());
            // What was measured must not be lost with the driver.
            let measured = self.evaluate(coordinator, progress, history)?
                && self.spec.saved_evaluation().is_some();
            let mut saving = Duration::ZERO;
            let is_due = match said {
                Some(said) => {
                    let heeded = self.heed(said, departure, coordinator, saver, history);
                    heeded.await? && step > 0
                }
                None => {
                    let upload = saver.expected_time(coordinator.state().size_bytes());
                    schedule.is_due(step, now, failures, upload)
                }
            };
            if measured || is_due && !saver.is_busy() {
                let now = Instant::now();
                let has_time = said.is_none() && !departure.is_gathering();
                let spread = if has_time {
                    Spread::over(schedule.spread())
                } else {
                    Spread::default()
                };
                saver.offer(self.order(coordinator, saver, history, spread));
                saving = now.elapsed();
                schedule.snapshot_taken(now, Instant::now());
                note_stall(&schedule, history);
            }
            if let Some((report, took)) = taken {
                let mut took = coordinator.breakdown(took);
                took.checkpoint = saving;
                let last = step == self.spec.steps || history.watch.stop;
                progress.stepped(report, coordinator.usage(), &took, last);
            }
        }
        Ok(())
    }

    /// Has trainers keep the state of the next save, some steps ahead of it, where it has enough bytes to be shared.
    fn ask_for_help(&self, coordinator: &mut Coordinator, schedule: &SaveSchedule) {
        let step = coordinator.state().step;
        let due = schedule.next_save(step, self.spec.steps);
        let evaluation = self.spec.saved_evaluation();
        let measured = evaluation.map(|rule| rule.next_due(step));
        let Some(next) = due.into_iter().chain(measured).min() else {
            return;
        };
        let is_near = next - step <= HELP_STEPS * coordinator.lead_max();
        if is_near && coordinator.can_be_shared() {
            coordinator.prepare_save(next, self.node());
        }
    }

    /// Measures the model if that is due, and finds out whether it is time to stop; whether it was
    /// measured.
    fn evaluate(
        &self,
        coordinator: &Coordinator,
        progress: &Progress,
        history: &mut History,
    ) -> Result<bool, JobError> {
        let state = coordinator.state();
        let Some(rule) = &self.spec.evaluation else {
            return Ok(false);
        };
        if !rule.is_due(state.step) || state.step <= history.watch.step {
            return Ok(false);
        }
        let evaluation = tokio::task::block_in_place(|| {
            let parameters = self.workload.parameters(&state.params)?;
            self.workload.evaluate(&parameters)
        })?;
        progress.evaluated(state.step, &evaluation);
        history.watch.note(rule, state.step, &evaluation)?;
        if let Some(metric) = &self.spec.checkpoints.keep_best_by {
            let value = measured_as("keep_best_by", metric, &evaluation)?;
            history.compared = Some((value, state.step));
        }
        if history.watch.stop {
            let (best, at) = history.watch.best.unwrap_or((f64::NAN, 0));
            self.log.line(format_args!(
                "stopping early after step {}: nothing was better than {best:.4} after step {at}",
                state.step
            ));
        }
        Ok(true)
    }

    /// What to save now, and how fast. The history counts this checkpoint already.
    pub(super) fn order(
        &self,
        coordinator: &Coordinator,
        saver: &Saver,
        history: &History,
        spread: Spread,
    ) -> SaveOrder {
        let state = coordinator.state();
        let text = |value: &dyn std::fmt::Display| value.to_string();
        let layout = self.workload.layout();
        let mut metadata = self.knowledge(coordinator, saver.committed_count() + 1, history);
        metadata.extend([
            ("job_name".to_owned(), self.spec.name.clone()),
            ("seed".to_owned(), text(&self.spec.seed)),
            (
                "fingerprint".to_owned(),
                text(&blake3::Hash::from(state.fingerprint).to_hex()),
            ),
            ("weights_blake3".to_owned(), coordinator.digest().to_owned()),
            (
                SHAPES_KEY.to_owned(),
                serde_json::to_string(&state.shapes(layout)).expect("plain numbers always encode"),
            ),
        ]);
        SaveOrder {
            step: state.step,
            incarnation: self.incarnation,
            state: Arc::new(StateSnapshot::of(state)),
            metric: self.metric(state.step, history),
            sections: state.sections(layout),
            weights_blake3: coordinator.digest().to_owned(),
            metadata,
            helpers: coordinator.helpers(state.step),
            spread,
        }
    }

    /// What a checkpoint of `step` is compared by; none where that was not measured after that very step.
    fn metric(&self, step: u64, history: &History) -> Option<f64> {
        if self.spec.checkpoints.keep_best_by.is_none() {
            return history.loss_mean;
        }
        let (value, measured_at) = history.compared?;
        (measured_at == step).then_some(value)
    }

    /// What the next driver has to know beside the state, after so many checkpoints.
    pub(super) fn knowledge(
        &self,
        coordinator: &Coordinator,
        checkpoints: u64,
        history: &History,
    ) -> BTreeMap<String, String> {
        let history = History {
            counters: coordinator.counters(),
            checkpoints,
            ..*history
        };
        let history = serde_json::to_string(&history).expect("plain numbers always encode");
        let trace = self.trace.lock().as_ref().map(StepTrace::to_text);
        let mut knowledge = BTreeMap::from([(HISTORY_KEY.to_owned(), history)]);
        knowledge.extend(trace.map(|trace| (TRACE_KEY.to_owned(), trace)));
        knowledge
    }
}

fn note_stall(schedule: &SaveSchedule, history: &mut History) {
    let stall_us = u64::try_from(schedule.stall_longest().as_micros()).unwrap_or(u64::MAX);
    history.snapshot_stall_us = history.snapshot_stall_us.max(stall_us);
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_jobs_can_be_trained() {
        for (file, text) in [
            (
                "mlp",
                include_str!("../../../cluster-configs/jobs/digits-mlp.toml"),
            ),
            (
                "cnn",
                include_str!("../../../cluster-configs/jobs/digits-cnn.toml"),
            ),
        ] {
            let spec = TrainSpec::from_toml(text, file).unwrap();
            Workload::load(&spec, &Files::local()).unwrap();
        }
    }
}
