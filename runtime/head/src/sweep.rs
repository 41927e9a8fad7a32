//! The leader's sweep of the object store: checkpoints that nobody keeps, and chunks that neither
//! these nor kept objects have.
//!
//! Invariants:
//! 1. What is deleted was needed by nobody in tables that were read after the store was listed, and
//!    can be needed by nobody later ([`Retention::may_be_committed`]). So a leader that was replaced
//!    in the middle of a round does no harm.
//! 2. One round deletes at most [`DELETIONS_MAX`] blobs; the next goes on.
//! 3. A round that fails changes nothing that the next does not do again, and is shown.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::control::Retention;
use mobula_core::id::SessionId;
use mobula_scheduler::kept_chunks;
use mobula_storage::checkpoint::{GcError, Kept, ManifestRef, Sweeper};
use mobula_storage::digest::Digest;
use parking_lot::Mutex;

use crate::context::HeadContext;
use crate::raft::ProposeError;

/// Blobs that one round deletes, one after the other: minutes on a slow store.
const DELETIONS_MAX: usize = 10_000;

/// How long a round that failed waits for the next at the most: a store that was out of reach is
/// back before people look again.
const RETRY_PAUSE: Duration = Duration::from_secs(300);

/// When and what the leader sweeps.
#[derive(Clone)]
pub struct SweepOptions {
    /// How long to wait between two rounds.
    pub interval: Duration,
    /// How old something is at least before it is deleted.
    pub age_min: Duration,
    /// What says which checkpoints must stay.
    pub retention: Arc<dyn Retention>,
}

/// What this head's rounds did; not replicated.
#[derive(Debug, Clone, Default)]
pub(crate) struct SweepReport {
    /// When the last round ended, in milliseconds since the Unix epoch; none before the first.
    pub(crate) last_ms: Option<u64>,
    /// Checkpoints that it kept.
    pub(crate) kept: u64,
    /// Blobs that all rounds deleted.
    pub(crate) deleted: u64,
    /// Their size.
    pub(crate) deleted_bytes: u64,
    /// Why the last round failed, if it did.
    pub(crate) problem: Option<String>,
}

impl SweepReport {
    fn add(&mut self, round: Result<Done, SweepError>, now_ms: u64) {
        self.last_ms = Some(now_ms);
        match round {
            Ok(Done {
                kept,
                deleted,
                deleted_bytes,
            }) => {
                if deleted > 0 {
                    tracing::info!(deleted, deleted_bytes, kept, "swept the object store");
                }
                self.kept = kept;
                self.deleted += deleted;
                self.deleted_bytes += deleted_bytes;
                self.problem = None;
            }
            Err(error) => {
                tracing::warn!(%error, "the object store was not swept");
                self.problem = Some(error.to_string());
            }
        }
    }
}

/// The reports of one head.
pub(crate) type SweepReports = Mutex<SweepReport>;

#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Store(#[from] GcError),
    #[error("the tables cannot be read: {0}")]
    Tables(#[from] ProposeError),
    #[error("the table names a checkpoint by `{0}`, which is no digest")]
    Digest(String),
}

/// Sweeps as long as this head leads.
pub(crate) async fn run(context: Arc<HeadContext>, options: SweepOptions) {
    let sweeper = Sweeper::new(context.blobs.clone());
    loop {
        let round = round(&context, &sweeper, &options).await;
        let pause = match round {
            Ok(_) => options.interval,
            Err(_) => options.interval.min(RETRY_PAUSE),
        };
        context.sweeps.lock().add(round, context.clock.now_ms());
        tokio::time::sleep(pause).await;
    }
}

/// What one round did.
struct Done {
    kept: u64,
    deleted: u64,
    deleted_bytes: u64,
}

async fn round(
    context: &HeadContext,
    sweeper: &Sweeper,
    options: &SweepOptions,
) -> Result<Done, SweepError> {
    sweeper.claim(&context.cluster_id).await?;
    tidy(context, options).await?;
    let stored = sweeper.list().await?;
    let kept = {
        let reader = context.raft.read().await?;
        let committed: Result<Vec<ManifestRef>, SweepError> = options
            .retention
            .committed(&reader)
            .into_iter()
            .map(|stored| {
                let digest: Digest = stored
                    .manifest_digest
                    .parse()
                    .map_err(|_| SweepError::Digest(stored.manifest_digest.clone()))?;
                Ok(ManifestRef {
                    path: stored.manifest_path,
                    digest,
                })
            })
            .collect();
        let may_be_committed: BTreeSet<_> = stored
            .manifests()
            .filter(|name| {
                options
                    .retention
                    .may_be_committed(&reader, name.job, name.step, name.incarnation)
            })
            .collect();
        Kept {
            committed: committed?,
            may_be_committed,
            chunks: kept_chunks(&reader).map(Digest::from).collect(),
        }
    };
    let age_min_ms = u64::try_from(options.age_min.as_millis()).unwrap_or(u64::MAX);
    let now_ms = context.clock.now_ms();
    let plan = sweeper
        .plan(&stored, &kept, now_ms, age_min_ms, DELETIONS_MAX)
        .await?;
    let report = sweeper.sweep(&plan).await?;
    Ok(Done {
        kept: kept.committed.len() as u64,
        deleted: report.deleted as u64,
        deleted_bytes: report.deleted_bytes,
    })
}

async fn tidy(context: &HeadContext, options: &SweepOptions) -> Result<(), SweepError> {
    let reader = context.raft.read().await?;
    let proposals = options.retention.tidy(&reader, context.clock.now_ms());
    drop(reader);
    for proposal in proposals {
        let proposed = context
            .propose(SessionId::INTERNAL, 0, proposal.module, proposal.payload)
            .await;
        // What is not trimmed now stays until the next round.
        if let Err(error) = proposed {
            tracing::warn!(%error, "the retention's command was refused");
        }
    }
    Ok(())
}
