//! How a training job ends: its last checkpoint, the model version, the record of the run, and the result.
//!
//! Invariant: a result stands on what is stored; a store that is out of reach is waited for.

use std::time::Duration;

use mobula::Actor;

use super::comparison::{BASELINE_VARIABLE, Baseline};
use super::job::{Coordinator, Driver, JobError, now_ms};
use super::progress::Progress;
use super::publish::{PublishVersionError, Published, describe, origin, publish_version};
use super::record::RunRecord;
use super::result::TrainResult;
use super::resume::History;
use super::saving::Saver;
use super::trainer::Trainer;
use crate::checkpoint::client;
use crate::checkpoint::spread::Spread;
use crate::registry::VersionFile;
use crate::registry::provenance::Provenance;
use crate::storage::open_blobs;

/// Pauses between attempts to store the result's files.
const PUBLISH_PAUSE_FIRST: Duration = Duration::from_millis(500);
const PUBLISH_PAUSE_MAX: Duration = Duration::from_secs(15);

impl Driver {
    /// Waits until everything of the job is stored, and gives the head its result.
    pub(super) async fn finish(
        &self,
        mut coordinator: Coordinator,
        mut saver: Saver,
        progress: &Progress,
        history: History,
    ) -> Result<TrainResult, JobError> {
        let speed = progress.samples_per_second();
        saver.offer(self.order(&coordinator, &saver, &history, Spread::default()));
        let replicas_agreeing = coordinator.confirm().await as u64;
        let (mut file, evaluation) = tokio::task::block_in_place(|| {
            describe(&self.workload, self.job, coordinator.state())
        })?;
        self.compare(&mut file).await;
        // The job's result stands on its last checkpoint: it waits for the store if it must.
        saver.flush(None).await?;
        let (run, record) = self.store_record(&coordinator).await?;
        let checkpoints = client::of_job(&self.cluster, self.job).await?;
        let of_the_end = checkpoints
            .checkpoints
            .iter()
            .map(|committed| &committed.checkpoint)
            .find(|checkpoint| checkpoint.step == coordinator.state().step);
        let origin = origin(&run, &record, of_the_end);
        let published = self.publish(&file, &origin).await?;
        let status = self.cluster.job_handle(self.job).status().await?;
        let counters = coordinator.counters();
        let wall_ms = now_ms().saturating_sub(status.started_ms.unwrap_or(status.submitted_ms));
        // A driver that found all steps taken measured none.
        let samples = (coordinator.state().step * self.spec.global_batch) as f64;
        let samples_per_second = speed.unwrap_or(samples * 1e3 / wall_ms.max(1) as f64);
        let result = TrainResult {
            weights_blake3: coordinator.digest().to_owned(),
            accuracy: evaluation.get("accuracy"),
            held_out_loss: evaluation.loss,
            metrics: evaluation.metrics.clone(),
            steps: coordinator.state().step,
            stopped_early: history.watch.stop,
            best: history.watch.best,
            last_loss: progress.last().map(|report| report.loss_mean),
            last_gradient_norm: progress.last().map(|report| report.gradient_norm),
            last_learning_rate: progress.last().map(|report| report.learning_rate),
            goodput: progress.goodput(),
            restarts: status.restarts,
            lost_steps: history.lost_steps,
            lost_steps_known: history.unknown_losses == 0,
            trainer_restarts: self.trainer_restarts().await?,
            trainers_lost: counters.trainers_lost,
            handoffs: counters.handoffs,
            reassigned_shards: counters.reassigned_shards,
            digest_mismatches: counters.digest_mismatches,
            trainers_refused: counters.trainers_refused,
            trainers_mixed: counters.trainers_mixed,
            replicas_agreeing,
            checkpoints: saver.committed_count(),
            rejected_checkpoints: history.rejected_checkpoints,
            snapshot_stall_us: history.snapshot_stall_us,
            pauses: progress.pauses(),
            record,
            wall_ms,
            samples_per_second,
            model_digest: published.digest,
            model_size_bytes: published.size_bytes,
            model: self.spec.register.clone(),
            model_version: published.version,
        };
        self.cluster.set_result(&result).await?;
        self.log.line(format_args!(
            "done: held-out {evaluation}, {} steps, {} driver restarts, {} steps lost, {} \
             trainers hold the same bits; weights_blake3 {}",
            result.steps,
            result.restarts,
            result.lost_steps,
            result.replicas_agreeing,
            result.weights_blake3
        ));
        Ok(result)
    }

    /// Measures the version that the job shall be compared with, if one is named.
    async fn compare(&self, file: &mut VersionFile) {
        let Ok(text) = std::env::var(BASELINE_VARIABLE) else {
            return;
        };
        let location = self.cluster.storage().expect("a driver is in a cluster");
        let measured = match (Baseline::from_text(&text), open_blobs(location)) {
            (Ok(baseline), Ok(blobs)) => baseline.measure(&blobs, &self.workload).await,
            (Err(error), _) => Err(error),
            (_, Err(error)) => Err(error.to_string()),
        };
        match measured {
            Ok(metrics) => file.provenance.metrics.extend(metrics),
            Err(error) => self.log.line(format_args!(
                "the active version is not measured on these samples: {error}"
            )),
        }
    }

    /// Starts of trainers after their first ones, as the head counted them.
    async fn trainer_restarts(&self) -> Result<u64, JobError> {
        let actors = self.cluster.list_actors(Some(self.job)).await?;
        let trainers = actors
            .iter()
            .filter(|actor| actor.type_name == Trainer::TYPE_NAME);
        Ok(trainers.map(|trainer| u64::from(trainer.restarts)).sum())
    }

    /// Stores what the run was, however long the store is out of reach; the record and its digest.
    async fn store_record(
        &self,
        coordinator: &Coordinator,
    ) -> Result<(RunRecord, String), JobError> {
        let state = coordinator.state();
        let record = tokio::task::block_in_place(|| {
            let trace = self.trace.lock();
            let record = RunRecord::new(
                self.job,
                &self.spec,
                &state.fingerprint,
                self.workload.split().train.digest(),
                trace.as_ref().expect("it was set before the first step"),
                state.step,
                coordinator.digest(),
            );
            RunRecord {
                trainers_mixed: coordinator.counters().trainers_mixed,
                ..record
            }
        });
        let location = self.cluster.storage().expect("a driver is in a cluster");
        let mut pause = PUBLISH_PAUSE_FIRST;
        loop {
            let stored = match open_blobs(location) {
                Ok(blobs) => record.store(&blobs).await,
                Err(error) => Err(error),
            };
            match stored {
                Ok(digest) => return Ok((record, digest)),
                // Also a full disk or a refused key: somebody can mend it while the job waits.
                Err(error) => self.log.line(format_args!(
                    "the run's record is not stored: {error}; waiting, next attempt in {} ms",
                    pause.as_millis()
                )),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PUBLISH_PAUSE_MAX);
        }
    }

    /// Stores the model version, however long the store is out of reach.
    async fn publish(
        &self,
        file: &VersionFile,
        origin: &Provenance,
    ) -> Result<Published, PublishVersionError> {
        let mut pause = PUBLISH_PAUSE_FIRST;
        loop {
            match publish_version(&self.cluster, &self.spec, file, origin).await {
                Err(error) if error.may_pass() => self.log.line(format_args!(
                    "the model version is not stored: {error}; waiting, next attempt in {} ms",
                    pause.as_millis()
                )),
                outcome => return outcome,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PUBLISH_PAUSE_MAX);
        }
    }
}
