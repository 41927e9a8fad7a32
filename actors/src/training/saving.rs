//! Checkpoints in the background: at most one is under way and one waits, the newest.
//!
//! Invariants:
//! 1. Training never waits for a save, except at its end and before the driver leaves its node.
//! 2. The driver keeps a snapshot until it is committed; a store that is out of reach costs nothing
//!    but age, and the job's log says so. While one is on its way no other is begun
//!    ([`Saver::is_busy`]), so one snapshot is open at a time; a last one, at the end or before the driver
//!    leaves, may wait beside it.
//! 3. A step is saved by one and the same order, however often that is tried.

use std::sync::Arc;
use std::time::Duration;

use mobula::Cluster;
use mobula_core::Incarnation;
use mobula_storage::checkpoint::SAVE_TIME_MAX;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::checkpointing::CheckpointSpec;
use super::job_log::JobLog;
use crate::checkpoint::KeepPolicy;
use crate::checkpoint::checkpointer::{Checkpointer, RestoreReport, SaveOrder, SaveReport};
use crate::checkpoint::ledger::CheckpointError;
use crate::checkpoint::sharing::Uploaded;
use crate::checkpoint::spread::Spread;
use crate::storage::open_blobs;

/// Pauses between attempts while the store is out of reach.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// How long one attempt may take: what a save may take at all. Each request has limits of its own.
const ATTEMPT_MAX: Duration = SAVE_TIME_MAX;
/// What a save is thought to take beside its bytes before one was measured: some requests to the store, its manifest, and an
/// entry of the heads' log.
const USUAL_OVERHEAD: Duration = Duration::from_secs(1);
/// What a saver is thought to send in a second before it was measured, if no limit says less: about half of what one request
/// makes to an object store of the same region, where a save has four under way, and less than a disk of one's own writes.
/// A save that is wrongly thought to be too slow costs the steps since the last one; one that is begun and does not end
/// costs them too, and the grace besides.
const USUAL_BYTES_PER_SECOND: u64 = 40_000_000;

/// What one attempt brought.
struct Attempt {
    order: Arc<SaveOrder>,
    took: Duration,
    outcome: Result<SaveReport, CheckpointError>,
}

/// A save that is on its way.
struct UnderWay {
    step: u64,
    begins: Instant,
    spread: Spread,
    /// What each of those who upload it has to send.
    share_bytes: u64,
}

/// What the latest save was.
#[derive(Debug, Clone, Copy)]
struct Latest {
    took: Duration,
    /// What it would have taken if nothing had been held back so that training keeps the machine.
    hurried: Duration,
    /// How many uploaded it.
    savers: u64,
}

impl Latest {
    fn of(took: Duration, uploaded: &Uploaded) -> Self {
        let helped = uploaded
            .shares
            .iter()
            .filter(|share| share.failed.is_none());
        let savers = 1 + u32::try_from(helped.count()).unwrap_or(u32::MAX - 1);
        Latest {
            took,
            // All at once, and not in turns.
            hurried: took.saturating_sub(uploaded.took) + uploaded.sending / savers,
            savers: u64::from(savers),
        }
    }
}

/// Saves a job's states.
pub struct Saver {
    checkpointer: Arc<Checkpointer>,
    attempts: JoinSet<Attempt>,
    waiting: Option<Arc<SaveOrder>>,
    under_way: Option<UnderWay>,
    pause: Duration,
    committed_step: Option<u64>,
    committed_count: u64,
    latest: Option<Latest>,
    /// What each saver may send in a second, if that is limited.
    bytes_per_second_max: Option<u64>,
    log: JobLog,
}

impl Saver {
    /// Saves for the job of `cluster`'s driver, as `spec` says.
    pub fn new(cluster: &Cluster, spec: &CheckpointSpec, log: JobLog) -> mobula::Result<Self> {
        let (Some(location), Some(job)) = (cluster.storage().cloned(), cluster.job()) else {
            let reason = "only a job's own process saves its checkpoints".to_owned();
            return Err(mobula::Error::NotInCluster(reason));
        };
        let limit = spec.upload_bytes_per_second;
        let checkpointer = Checkpointer::new(
            move || open_blobs(&location),
            Arc::new(cluster.clone()),
            job,
            limit,
        );
        Ok(Saver::over(checkpointer, limit, log))
    }

    /// Saves by `checkpointer`, whose uploads are limited to `bytes_per_second_max`.
    #[must_use]
    pub fn over(
        checkpointer: Checkpointer,
        bytes_per_second_max: Option<u64>,
        log: JobLog,
    ) -> Self {
        Saver {
            checkpointer: Arc::new(checkpointer),
            attempts: JoinSet::new(),
            waiting: None,
            under_way: None,
            pause: PAUSE_FIRST,
            committed_step: None,
            committed_count: 0,
            latest: None,
            bytes_per_second_max,
            log,
        }
    }

    /// Whether a save is on its way, or waits for the store.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.under_way.is_some() || self.waiting.is_some()
    }

    /// Checkpoints that were committed.
    #[must_use]
    pub fn committed_count(&self) -> u64 {
        self.committed_count
    }

    /// The step of the last one that was committed.
    #[must_use]
    pub fn committed_step(&self) -> Option<u64> {
        self.committed_step
    }

    /// What a save of a state of `size_bytes` takes: as long as the latest one did, if there was one.
    #[must_use]
    pub fn expected_time(&self, size_bytes: u64) -> Duration {
        match self.latest {
            Some(latest) => latest.took,
            None => self.unmeasured(size_bytes),
        }
    }

    /// What a save takes beside its bytes. Nothing more once one was measured: [`Saver::bytes_per_second`] is over all of it.
    #[must_use]
    pub fn overhead(&self) -> Duration {
        match self.latest {
            Some(_) => Duration::ZERO,
            None => USUAL_OVERHEAD,
        }
    }

    /// What one of those who upload can send in a second, of a state of `size_bytes`: as they did of the latest, if there
    /// was one; at least 1.
    #[must_use]
    pub fn bytes_per_second(&self, size_bytes: u64) -> u64 {
        let Some(Latest {
            hurried, savers, ..
        }) = self.latest
        else {
            return self.usual_rate();
        };
        let took_ms = u64::try_from(hurried.as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        (size_bytes.saturating_mul(1000) / took_ms / savers.max(1)).max(1)
    }

    fn usual_rate(&self) -> u64 {
        let limit = self.bytes_per_second_max.unwrap_or(u64::MAX);
        USUAL_BYTES_PER_SECOND.min(limit).max(1)
    }

    /// What a save is thought to take, of which one saver sends so many bytes, as long as none was measured.
    fn unmeasured(&self, share_bytes: u64) -> Duration {
        let sending_ms = share_bytes.saturating_mul(1000).div_ceil(self.usual_rate());
        USUAL_OVERHEAD + Duration::from_millis(sending_ms)
    }

    /// Lets nothing be held back any more of what is saved now or waits.
    pub fn hurry(&mut self) {
        if let Some(waiting) = &self.waiting {
            waiting.spread.hurry();
        }
        if let Some(under_way) = &mut self.under_way
            && under_way.spread.hurry()
        {
            // Nobody knows what of it is sent: the rest may be all of it.
            under_way.begins = under_way.begins.max(Instant::now());
        }
    }

    /// How long the save that is on its way still takes, if there is one and it is like the latest.
    #[must_use]
    pub fn expected_left(&self) -> Option<Duration> {
        let under_way = self.under_way.as_ref()?;
        let takes = match self.latest {
            None => self.unmeasured(under_way.share_bytes),
            Some(latest) if under_way.spread.holds_back() => latest.took,
            Some(latest) => latest.hurried,
        };
        let ends = under_way.begins + takes;
        Some(ends.saturating_duration_since(Instant::now()))
    }

    /// Goes on from a job's earlier checkpoints.
    pub fn resume(&mut self, committed_count: u64, step: u64) {
        self.committed_count = committed_count;
        self.committed_step = Some(step);
    }

    /// The newest checkpoint that verifies. While the store or the head is out of reach the job
    /// waits, and says so.
    pub async fn restore(
        &mut self,
        incarnation: Incarnation,
    ) -> Result<RestoreReport, CheckpointError> {
        let mut pause = PAUSE_FIRST;
        loop {
            match limited(self.checkpointer.restore(incarnation)).await {
                Err(CheckpointError::Unavailable(reason)) => {
                    self.log.line(format_args!(
                        "checkpoints cannot be read: {reason}; waiting, next attempt in {} ms",
                        pause.as_millis()
                    ));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                outcome => return outcome,
            }
        }
    }

    /// Says to the table what is to be kept of the job. What cannot be said now is not said: then more
    /// is kept.
    pub async fn keep(&self, incarnation: Incarnation, policy: KeepPolicy) {
        if let Err(error) = limited(self.checkpointer.keep(incarnation, policy)).await {
            self.log
                .line(format_args!("the head keeps what it kept before: {error}"));
        }
    }

    /// Saves a state as soon as the one before it is done; of those that wait the newest counts. One that is in a hurry
    /// waits for none that has time.
    pub fn offer(&mut self, order: SaveOrder) {
        if !order.spread.holds_back() {
            self.hurry();
        }
        let under_way = self.under_way.as_ref().map(|save| save.step);
        if under_way == Some(order.step) || self.committed_step == Some(order.step) {
            return;
        }
        self.waiting = Some(Arc::new(order));
        self.start_next(Duration::ZERO);
    }

    /// Takes note of what is done, without waiting.
    pub fn poll(&mut self) -> Result<(), CheckpointError> {
        while let Some(attempt) = self.attempts.try_join_next() {
            self.settle(attempt.expect("an attempt does not panic, and is not aborted"))?;
        }
        Ok(())
    }

    /// Waits until everything is committed, or until `deadline`, and lets nothing be held back. Answers whether it is.
    pub async fn flush(&mut self, deadline: Option<Instant>) -> Result<bool, CheckpointError> {
        self.hurry();
        while !self.attempts.is_empty() {
            let next = self.attempts.join_next();
            let attempt = match deadline {
                None => next.await,
                Some(deadline) => match tokio::time::timeout_at(deadline, next).await {
                    Ok(attempt) => attempt,
                    Err(_) => return Ok(false),
                },
            };
            if let Some(attempt) = attempt {
                self.settle(attempt.expect("an attempt does not panic, and is not aborted"))?;
            }
        }
        Ok(true)
    }

    fn settle(&mut self, attempt: Attempt) -> Result<(), CheckpointError> {
        let Attempt {
            order,
            took,
            outcome,
        } = attempt;
        self.under_way = None;
        match outcome {
            Ok(SaveReport {
                checkpoint,
                uploaded,
            }) => {
                self.pause = PAUSE_FIRST;
                self.committed_step = Some(checkpoint.step);
                self.committed_count += 1;
                self.latest = Some(Latest::of(took, &uploaded));
                self.log.line(format_args!(
                    "checkpoint of step {} committed: {} bytes in {} ms, {}",
                    checkpoint.step,
                    checkpoint.size_bytes,
                    took.as_millis(),
                    checkpoint.manifest_path
                ));
                for share in uploaded.shares {
                    let step = checkpoint.step;
                    self.log.line(format_args!(
                        "checkpoint of step {step} was shared: {share}"
                    ));
                }
                self.start_next(Duration::ZERO);
                Ok(())
            }
            Err(CheckpointError::Unavailable(reason)) => {
                self.log.line(format_args!(
                    "checkpoint of step {} is not saved: {reason}; waiting, next attempt in {} ms",
                    order.step,
                    self.pause.as_millis()
                ));
                self.waiting.get_or_insert(order);
                self.start_next(self.pause);
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn start_next(&mut self, pause: Duration) {
        if self.under_way.is_some() {
            return;
        }
        let Some(order) = self.waiting.take() else {
            return;
        };
        self.under_way = Some(UnderWay {
            step: order.step,
            begins: Instant::now() + pause,
            spread: order.spread.clone(),
            share_bytes: order.state.length_bytes() / (1 + order.helpers.len() as u64),
        });
        let checkpointer = Arc::clone(&self.checkpointer);
        self.attempts.spawn(async move {
            tokio::time::sleep(pause).await;
            let begun = Instant::now();
            let outcome = limited(checkpointer.save(&order)).await;
            Attempt {
                order,
                took: begun.elapsed(),
                outcome,
            }
        });
    }
}

/// Ends an attempt that takes longer than any may.
async fn limited<T>(
    attempt: impl Future<Output = Result<T, CheckpointError>>,
) -> Result<T, CheckpointError> {
    tokio::time::timeout(ATTEMPT_MAX, attempt)
        .await
        .unwrap_or_else(|_| {
            Err(CheckpointError::Unavailable(format!(
                "it took longer than {} s",
                ATTEMPT_MAX.as_secs()
            )))
        })
}

#[cfg(test)]
#[path = "saving_tests.rs"]
mod tests;
