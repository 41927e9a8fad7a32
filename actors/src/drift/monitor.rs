//! The monitor: compares what an endpoint sees with what its model was trained on, and reports.
//!
//! Invariants:
//! 1. The reference is that of the version which the endpoint serves; its file is verified.
//! 2. One report waits for the head at most; later windows are merged into it, and drift is never
//!    merged away. Quiet windows are reported together, so that traffic does not become log entries.
//! 3. A monitor that is started again begins with an empty window, under a new incarnation.
//! 4. Windows take a tenth of a processor at the most: rows that come meanwhile are in none, and counted.

use std::time::{Duration, Instant};

use mobula::{ActorContext, Cluster, ContextExt};
use mobula_core::error::ErrorCode;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::log::tap::Tap;
use super::state::{DRIFTED_MAX, Drifted, Report};
use super::vitals::keeper::{Identity, Keeper};
use super::vitals::{LABELS_PER_CALL_MAX, Label, LabelReply};
use super::window::{MonitorConfig, MonitorConfigError, WindowMonitor, WindowReport};
use crate::drift::client;
use crate::registry::version_file::{VersionFile, VersionFileError};
use crate::serving::feed::Observation;
use crate::storage::open_blobs;
use crate::training::reference::feature_names;

/// Rows in a window: enough to find a shift of half a standard deviation, and soon full.
const WINDOW_SIZE: usize = 200;

/// How much longer it rests after a window than the window took: a tenth of a processor at the most is for windows, whatever
/// is asked. At fifteen thousand rows a second they took a whole one, which replicas and router then lacked.
const REST: u32 = 9;

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

/// What a monitor has seen since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Rows taken into windows.
    pub rows: u64,
    /// Rows refused: of the wrong width, or with values that are no numbers.
    pub refused: u64,
    /// Rows that the router could not deliver, or that came while the monitor rested.
    pub dropped: u64,
    /// Windows compared.
    pub windows: u64,
}

/// Watches one endpoint.
pub struct Monitor {
    watch: Watch,
    waiting: watch::Sender<Option<Report>>,
    /// When the next row is taken into a window.
    rests_until: Instant,
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
        let window = WindowMonitor::new(file.build_reference()?, config)?;
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
            window,
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
            rests_until: Instant::now(),
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
            self.vitals.observe(&observation);
            self.log.observe(&observation);
            let began = Instant::now();
            if began < self.rests_until {
                self.watch.seen.dropped += observation.classes.len() as u64;
                return Vec::new();
            }
            let found = self.watch.observe(&observation.rows, &observation.classes);
            if !found.is_empty() {
                self.rests_until = Instant::now() + began.elapsed() * REST;
            }
            found
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

/// One report of two. The later window counts, unless only the earlier one drifted.
fn merged(earlier: Report, later: Report) -> Report {
    let (windows, rows) = (earlier.windows + later.windows, earlier.rows + later.rows);
    let refused = earlier.refused + later.refused;
    let dropped = earlier.dropped + later.dropped;
    let window = later.window;
    let findings = if earlier.drifts() && !later.drifts() {
        earlier
    } else {
        later
    };
    Report {
        window,
        windows,
        rows,
        refused,
        dropped,
        ..findings
    }
}

/// A monitor without the actor around it.
struct Watch {
    endpoint: String,
    model: String,
    version: u64,
    incarnation: u64,
    /// Values of a row; the reference has a column for each.
    row_values: usize,
    window: WindowMonitor,
    seen: Seen,
    /// What was seen when the last window was full.
    reported: Seen,
}

impl Watch {
    /// Takes rows; a report for each window that they fill.
    fn observe(&mut self, rows: &[f32], classes: &[u32]) -> Vec<Report> {
        let mut reports = Vec::new();
        for (row, class) in rows.chunks(self.row_values).zip(classes) {
            match self.window.observe(row, *class) {
                Ok(closed) => {
                    self.seen.rows += 1;
                    if let Some(closed) = closed {
                        self.seen.windows += 1;
                        reports.push(self.report(&closed));
                        self.reported = self.seen;
                    }
                }
                Err(error) => {
                    self.seen.refused += 1;
                    tracing::debug!(endpoint = self.endpoint, %error, "a row is not watched");
                }
            }
        }
        reports
    }

    fn report(&self, closed: &WindowReport) -> Report {
        let prediction = &closed.prediction;
        let mut drifted = Vec::new();
        if prediction.drifted {
            drifted.push(Drifted {
                feature: "prediction".to_owned(),
                statistic: "jensen_shannon".to_owned(),
                value: prediction.jensen_shannon,
                p_value: Some(prediction.p_value),
                threshold: prediction.distance_threshold,
                reference_count: prediction.reference_count,
                current_count: prediction.current_count,
            });
        }
        for worst in closed.worst_features(DRIFTED_MAX) {
            // Both statistics of a column that drifts, PSI first.
            let of_column = closed
                .features
                .iter()
                .filter(|row| row.feature == worst.feature);
            drifted.extend(of_column.map(|row| Drifted {
                feature: row.feature.clone(),
                statistic: row.statistic.as_str().to_owned(),
                value: row.value,
                p_value: row.p_value,
                threshold: row.threshold,
                reference_count: row.reference_count,
                current_count: row.current_count,
            }));
        }
        Report {
            endpoint: self.endpoint.clone(),
            model: self.model.clone(),
            version: self.version,
            incarnation: self.incarnation,
            window: closed.window_index,
            samples: closed.samples,
            windows: 1,
            rows: closed.samples,
            refused: self.seen.refused - self.reported.refused,
            dropped: self.seen.dropped - self.reported.dropped,
            features_compared: closed.informative_columns,
            features_drifted: closed.drifted_columns,
            dataset_drift: closed.dataset_drift,
            prediction_drift: prediction.drifted,
            prediction_distance: prediction.jensen_shannon,
            drifted,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::version_file::tests::digits;
    use crate::training::data::Dataset;

    const IMAGE_SIDE: usize = 8;
    const FEATURES: usize = 64;

    fn watch() -> (Watch, crate::training::model::Model) {
        let file = digits(usize::MAX);
        let config = MonitorConfig::with_window_size(WINDOW_SIZE);
        let watch = Watch {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: 1,
            incarnation: 9,
            row_values: FEATURES,
            window: WindowMonitor::new(file.build_reference().unwrap(), config).unwrap(),
            seen: Seen::default(),
            reported: Seen::default(),
        };
        (watch, file.build_model().unwrap())
    }

    fn held_out(count: usize) -> Vec<f32> {
        let held_out = Dataset::digits().unwrap().split(7, 0.2).held_out;
        let batch = held_out.gather(&(0..count).collect::<Vec<_>>()).unwrap();
        batch.features().to_vec()
    }

    /// Two pixels to the right.
    fn shifted(images: &[f32]) -> Vec<f32> {
        let pixel = |index: usize| match index % IMAGE_SIDE {
            0 | 1 => 0.0,
            _ => images[index - 2],
        };
        (0..images.len()).map(pixel).collect()
    }

    #[test]
    fn held_out_images_are_no_drift_and_shifted_ones_are() {
        let (mut watch, model) = watch();
        let images = held_out(300);
        let classes = model.predictions(&images).unwrap();
        let reports = watch.observe(&images, &classes);
        assert_eq!(reports.len(), 1);
        assert!(
            !reports[0].dataset_drift && !reports[0].prediction_drift,
            "{:?}",
            reports[0]
        );

        let images = shifted(&images);
        let classes = model.predictions(&images).unwrap();
        // The first window is half old, half new.
        let reports = watch.observe(&images, &classes);
        let last = watch.observe(&images, &classes).pop().unwrap();
        assert_eq!(reports.last().unwrap().window, 2);
        assert!(last.dataset_drift, "{last:?}");
        let worst = last
            .drifted
            .iter()
            .find(|row| row.feature != "prediction")
            .unwrap();
        assert_eq!(
            (worst.statistic.as_str(), worst.current_count),
            ("psi", 200)
        );
        assert!(
            worst.value >= worst.threshold && worst.reference_count > 1000,
            "{worst:?}"
        );
        assert_eq!(
            watch.seen,
            Seen {
                rows: 900,
                windows: 4,
                ..Seen::default()
            }
        );
    }

    #[test]
    fn windows_are_merged_and_drift_is_kept() {
        let (mut watch, model) = watch();
        let images = held_out(300);
        let classes = model.predictions(&images).unwrap();
        let quiet = watch.observe(&images, &classes).pop().unwrap();
        let images = shifted(&images);
        let found = watch
            .observe(&images, &model.predictions(&images).unwrap())
            .pop()
            .unwrap();
        assert!(found.drifts() && !quiet.drifts());
        let later = Report {
            window: 7,
            ..quiet.clone()
        };
        let merged_once = merged(found.clone(), later);
        assert!(merged_once.drifts());
        assert_eq!(
            (merged_once.window, merged_once.windows, merged_once.rows),
            (7, 2, 400)
        );
        assert_eq!(merged(quiet, found.clone()).drifted, found.drifted);
    }

    #[test]
    fn rows_that_are_no_rows_are_counted_and_left_out() {
        let (mut watch, _) = watch();
        let mut rows = vec![0.0; 2 * FEATURES];
        rows[3] = f32::INFINITY;
        assert!(watch.observe(&rows, &[1, 2]).is_empty());
        assert!(watch.observe(&[0.0; 5], &[1]).is_empty());
        assert_eq!(
            watch.seen,
            Seen {
                rows: 1,
                refused: 2,
                ..Seen::default()
            }
        );
    }
}
