//! The monitor: compares what an endpoint sees with what its model was trained on, and reports.
//!
//! Invariants:
//! 1. The reference is that of the version which the endpoint serves; its file is verified.
//! 2. One report waits for the head at most; later windows are merged into it, and drift is never
//!    merged away. Quiet windows are reported together, so that traffic does not become log entries.
//! 3. A monitor that is started again begins with an empty window, under a new incarnation.
//! 4. A version whose file has no usable reference has no windows, and says why: all else of it is watched.

use std::time::{Duration, Instant};

use mobula::{ActorContext, Cluster, ContextExt};
use mobula_core::error::ErrorCode;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::log::tap::Tap;
use super::state::Report;
use super::vitals::keeper::{Identity, Keeper};
use super::vitals::{LABELS_PER_CALL_MAX, Label, LabelReply};
use super::watch::{WINDOW_SIZE, Watch, merged, window_of};
use super::window::{MonitorConfig, MonitorConfigError};
use crate::drift::client;
use crate::registry::version_file::{VersionFile, VersionFileError};
use crate::serving::feed::Observation;
use crate::storage::open_blobs;
use crate::training::reference::feature_names;

pub use super::watch::Seen;

/// How often windows are reported while nothing changes.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);

/// The pause before a report is sent again.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// Why a monitor cannot start.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The version's file cannot be used.
    #[error(transparent)]
    Version(#[from] VersionFileError),
    /// The thresholds are out of range.
    #[error(transparent)]
    Config(#[from] MonitorConfigError),
}

/// Watches one endpoint.
pub struct Monitor {
    watch: Watch,
    waiting: watch::Sender<Option<Report>>,
    vitals: Keeper,
    log: Tap,
    /// Send the reports and ask the sentinels; aborted when dropped.
    _tasks: JoinSet<()>,
}

#[mobula::actor(name = "mobula.monitor")]
impl Monitor {
    /// Loads the reference from the version's file.
    pub async fn new(
        ctx: &ActorContext,
        endpoint: String,
        model: String,
        version: u64,
        digest: String,
        size_bytes: u64,
    ) -> Result<Self, MonitorError> {
        let blobs = open_blobs(ctx.storage()).map_err(VersionFileError::from)?;
        let file = VersionFile::load(&blobs, &digest, size_bytes).await?;
        let config = MonitorConfig::with_window_size(WINDOW_SIZE);
        let window = window_of(&file, config)?;
        let identity = Identity {
            endpoint: endpoint.clone(),
            model: model.clone(),
            version,
            incarnation: ctx.incarnation().0,
        };
        // This runs the version over its reference rows.
        let vitals = tokio::task::block_in_place(|| Keeper::new(identity.clone(), &file, &window));
        let watch = Watch {
            endpoint,
            model,
            version,
            incarnation: ctx.incarnation().0,
            row_values: file.samples.feature_count(),
            window: window.ok(),
            rests_until: Instant::now(),
            seen: Seen::default(),
            reported: Seen::default(),
        };
        let waiting = watch::Sender::new(None);
        let mut tasks = JoinSet::new();
        tasks.spawn(send_reports(ctx.cluster(), waiting.clone()));
        let cluster = ctx.cluster();
        let names = feature_names(&file.samples);
        let log = Tap::spawn(identity, names, blobs, &mut tasks, &cluster);
        vitals.spawn(&log, &mut tasks, &cluster);
        Ok(Monitor {
            watch,
            waiting,
            vitals,
            log,
            _tasks: tasks,
        })
    }

    /// Takes answered requests, and how many rows were dropped before them.
    pub fn observe(&mut self, observation: Observation, dropped: u64) -> Seen {
        self.watch.seen.dropped += dropped;
        // Closing a window sorts and tests every feature.
        let found = tokio::task::block_in_place(|| {
            self.log.observe(&observation);
            self.watch.take(&self.vitals, &observation)
        });
        for report in found {
            self.waiting.send_modify(|waiting| {
                *waiting = Some(match waiting.take() {
                    Some(earlier) => merged(earlier, report),
                    None => report,
                });
            });
        }
        self.watch.seen
    }

    /// Takes the truth about rows of earlier requests; of more than [`LABELS_PER_CALL_MAX`] the rest is refused.
    pub fn label(&mut self, labels: Vec<Label>) -> LabelReply {
        let (taken, rest) = labels.split_at(labels.len().min(LABELS_PER_CALL_MAX));
        let mut reply = self.vitals.label(taken);
        if !rest.is_empty() {
            reply.add(LabelReply {
                refused: rest.len() as u64,
                refusal: Some(format!(
                    "a call takes {LABELS_PER_CALL_MAX} labels at the most"
                )),
                ..LabelReply::default()
            });
        }
        reply
    }

    /// What it has seen.
    pub fn seen(&self) -> Seen {
        self.watch.seen
    }

    /// Writes what of the prediction log waits.
    #[mobula(stop)]
    async fn flush(&mut self) {
        self.log.flush().await;
    }

    /// Leaves a node that will be taken away; the open window is given up.
    #[mobula(notice)]
    async fn leave(&mut self, ctx: &ActorContext, deadline_ms: u64) {
        self.log.flush().await;
        if let Err(error) = ctx.yield_now().await {
            tracing::warn!(%error, deadline_ms, "a monitor could not leave its node early");
        }
    }
}

/// Sends what waits until the head has it; at once when drift begins or ends, else now and then.
async fn send_reports(cluster: Cluster, waiting: watch::Sender<Option<Report>>) {
    let mut news = waiting.subscribe();
    loop {
        // We hold a sender, so waiting cannot fail.
        let _ = news.wait_for(Option::is_some).await;
        let Some(report) = waiting.send_replace(None) else {
            continue;
        };
        let drifts = report.drifts();
        send_report(&cluster, report).await;
        let is_new = |next: &Option<Report>| next.as_ref().is_some_and(|r| r.drifts() != drifts);
        let _ = tokio::time::timeout(REPORT_INTERVAL, news.wait_for(is_new)).await;
    }
}

async fn send_report(cluster: &Cluster, report: Report) {
    while let Err(error) = client::report(cluster, report.clone()).await {
        let is_final = matches!(
            error.code(),
            Some(ErrorCode::InvalidArgument | ErrorCode::Fenced | ErrorCode::PermissionDenied)
        );
        tracing::warn!(window = report.window, %error, is_final, "a drift report was not taken");
        if is_final {
            return;
        }
        tokio::time::sleep(REPORT_PAUSE).await;
    }
}
