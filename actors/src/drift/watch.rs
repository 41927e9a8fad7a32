//! What a monitor does with answered requests, without the actor around it: windows of them, and reports of these.
//!
//! 1. Windows, those of slices included, take a tenth of a processor at the most: rows that come meanwhile are in none, and
//!    counted.
//! 2. Two reports are made one without losing that one of them found drift.
//! 3. Of rows that another version answered only their names are known, for labels: no number here is about them.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::named;
use super::state::Report;
use super::vitals::keeper::Keeper;
use super::window::{MonitorConfig, MonitorConfigError, WindowMonitor, WindowReport};
use crate::registry::version_file::VersionFile;
use crate::serving::feed::Observation;

/// Rows in a window: enough to find a shift of half a standard deviation, and soon full.
pub(super) const WINDOW_SIZE: usize = 200;

/// How much longer it rests after windows than these took: a tenth of a processor at the most is for windows, whatever
/// is asked. At fifteen thousand rows a second they took a whole one, which replicas and router then lacked.
const REST: u32 = 9;

/// The longest reason why there is no reference: names of features in it are a user's.
const REASON_CHARS_MAX: usize = 200;

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

/// The windows of a version; or why there are none, because there is nothing to compare them with. Such a version is watched
/// without them: its file will not change, however often its monitor is started.
pub(super) fn window_of(
    file: &VersionFile,
    config: MonitorConfig,
) -> Result<Result<WindowMonitor, String>, MonitorConfigError> {
    config.validate()?;
    match file.build_reference() {
        Ok(reference) => WindowMonitor::new(reference, config).map(Ok),
        Err(error) => {
            let reason = error.to_string();
            Ok(Err(reason.chars().take(REASON_CHARS_MAX).collect()))
        }
    }
}

/// A monitor without the actor around it.
pub(super) struct Watch {
    pub(super) endpoint: String,
    pub(super) model: String,
    pub(super) version: u64,
    pub(super) incarnation: u64,
    /// Values of a row; the reference has a column for each.
    pub(super) row_values: usize,
    /// Absent if there is no reference to compare with.
    pub(super) window: Option<WindowMonitor>,
    /// When the next row is taken into a window, of all rows or of a slice.
    pub(super) rests_until: Instant,
    pub(super) seen: Seen,
    /// What was seen when the last window was full.
    pub(super) reported: Seen,
}

impl Watch {
    /// Takes answered requests; a report for each window of all rows that they fill. Windows rest after those that were
    /// compared, and vitals go on.
    pub(super) fn take(&mut self, vitals: &Keeper, observation: &Observation) -> Vec<Report> {
        let began = Instant::now();
        let is_resting = began < self.rests_until;
        let (observation, others) = observation.part_of(self.version);
        if !others.is_empty() {
            vitals.observe_elsewhere(&others);
        }
        if observation.classes.is_empty() {
            return Vec::new();
        }
        let of_slices = vitals.observe(&observation, is_resting);
        if is_resting {
            self.seen.dropped += observation.classes.len() as u64;
            return Vec::new();
        }
        let reports = self.observe(&observation.rows, &observation.classes);
        if of_slices > 0 || !reports.is_empty() {
            self.rests_until = Instant::now() + began.elapsed() * REST;
        }
        reports
    }

    /// Takes rows; a report for each window that they fill.
    fn observe(&mut self, rows: &[f32], classes: &[u32]) -> Vec<Report> {
        let mut reports = Vec::new();
        for (row, class) in rows.chunks(self.row_values).zip(classes) {
            let Some(window) = &mut self.window else {
                break;
            };
            match window.observe(row, *class) {
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
            drifted: named::drifted(closed),
        }
    }
}

/// One report of two. The later window counts, unless only the earlier one drifted.
pub(super) fn merged(earlier: Report, later: Report) -> Report {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::drift::reference::MAX_REFERENCE_COLUMNS;
    use crate::drift::vitals::Label;
    use crate::drift::vitals::Truth;
    use crate::drift::vitals::keeper::Identity;
    use crate::registry::version_file::tests::digits;
    use crate::serving::feed::ObservedRequest;
    use crate::training::data::Dataset;

    const IMAGE_SIDE: usize = 8;
    const FEATURES: usize = 64;

    fn watch() -> (Watch, crate::training::model::Model) {
        let file = digits(usize::MAX);
        let watch = watch_of(window(&file).ok());
        (watch, file.build_model().unwrap())
    }

    fn watch_of(window: Option<WindowMonitor>) -> Watch {
        Watch {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: 1,
            incarnation: 9,
            row_values: FEATURES,
            window,
            rests_until: Instant::now(),
            seen: Seen::default(),
            reported: Seen::default(),
        }
    }

    fn window(file: &VersionFile) -> Result<WindowMonitor, String> {
        window_of(file, MonitorConfig::with_window_size(WINDOW_SIZE)).unwrap()
    }

    fn keeper(file: &VersionFile, window: &Result<WindowMonitor, String>) -> Keeper {
        let identity = Identity {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: 1,
            incarnation: 9,
        };
        Keeper::new(identity, file, window)
    }

    /// One request with an id for each row, all of a slice or of none.
    fn observation(count: usize, slice: Option<&str>) -> Observation {
        Observation {
            rows: vec![0.5; count * FEATURES],
            classes: vec![3; count],
            confidences: vec![0.9; count],
            requests: (0..count)
                .map(|number| ObservedRequest {
                    id: Some(number.to_string()),
                    slice: slice.map(str::to_owned),
                    rows: 1,
                })
                .collect(),
            energies: vec![None; count],
            versions: vec![1; count],
        }
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
    fn windows_of_slices_rest_and_are_rested_for_as_those_of_all_rows_are() {
        let file = digits(usize::MAX);
        let window = window(&file);
        let vitals = keeper(&file, &window);
        let mut watch = watch_of(window.ok());
        watch.take(&vitals, &observation(100, None));
        let began = watch.rests_until;
        assert_eq!(
            watch.take(&vitals, &observation(100, Some("north"))).len(),
            1
        );
        assert!(watch.rests_until > began, "a window was compared");

        // The slice's window alone is full now.
        watch.rests_until = began;
        let before = Instant::now();
        assert_eq!(watch.take(&vitals, &observation(100, Some("north"))), []);
        assert!(
            watch.rests_until > before,
            "a window of a slice was compared"
        );

        watch.rests_until = Instant::now() + Duration::from_secs(3600);
        assert_eq!(watch.take(&vitals, &observation(700, Some("north"))), []);
        assert_eq!((watch.seen.rows, watch.seen.dropped), (300, 700));
        let known = vitals.vitals();
        assert_eq!((known.rows, known.out_of_distribution.windows), (1000, 5));
        let slice = &known.slices[0];
        assert_eq!((slice.rows, slice.dropped, slice.windows), (900, 700, 1));
    }

    #[test]
    fn what_another_version_answered_is_in_no_number_and_its_labels_are_told_apart() {
        let file = digits(usize::MAX);
        let window = window(&file);
        let vitals = keeper(&file, &window);
        let mut watch = watch_of(window.ok());
        // Every other request of enough for a window of each.
        let mut tried = observation(2 * WINDOW_SIZE - 2, Some("north"));
        tried.versions = (0..tried.versions.len() as u64)
            .map(|number| 1 + number % 2)
            .collect();
        assert_eq!(watch.take(&vitals, &tried), []);
        assert_eq!(watch.seen.rows, WINDOW_SIZE as u64 - 1);
        let label = |id: &str, class| Label {
            id: id.into(),
            row: 0,
            truth: Truth::Class(class),
        };
        // The active version was right, and the other one wrong.
        let reply = vitals.label(&[label("0", 3), label("1", 4), label("nobody", 4)]);
        assert_eq!(
            (reply.joined, reply.of_other_versions, reply.waiting),
            (1, 1, 1)
        );
        let known = vitals.vitals();
        assert_eq!((known.rows, known.slices[0].rows), (199, 199));
        assert_eq!(known.truth.total.unwrap().accuracy, 1.0);
        assert_eq!(
            (known.truth.counts.joined, known.truth.counts.unmatched),
            (1, 0)
        );

        // Nor while windows rest.
        watch.rests_until = Instant::now() + Duration::from_secs(3600);
        tried.versions.fill(2);
        assert_eq!(watch.take(&vitals, &tried), []);
        assert_eq!(watch.seen.dropped, 0);
        assert_eq!(vitals.vitals().rows, 199);
    }

    #[test]
    fn a_version_without_a_usable_reference_is_watched_without_windows() {
        let mut wide = digits(20);
        let columns = MAX_REFERENCE_COLUMNS + 1;
        wide.reference.feature_names = (0..columns).map(|at| format!("feature_{at}")).collect();
        wide.reference.columns = vec![vec![0.5; 20]; columns];
        let reason = window(&wide).unwrap_err();
        assert!(reason.contains("4097 columns, at most 4096"), "{reason}");

        let mut bare = digits(20);
        bare.reference.columns.iter_mut().for_each(Vec::clear);
        bare.reference.predictions.clear();
        let window = window(&bare);
        let vitals = keeper(&bare, &window);
        let mut watch = watch_of(window.ok());
        assert_eq!(watch.take(&vitals, &observation(1000, Some("north"))), []);
        assert_eq!(watch.seen, Seen::default());
        let label = Label {
            id: "7".into(),
            row: 0,
            truth: Truth::Class(3),
        };
        assert_eq!(vitals.label(&[label]).joined, 1);
        let known = vitals.vitals();
        let reason = known.no_reference.unwrap();
        assert!(reason.contains("got 0 rows"), "{reason}");
        assert_eq!((known.rows, known.slices[0].labelled), (1000, 1));

        // Thresholds that are out of range are a fault of the program's, whatever the file has.
        for file in [digits(20), bare] {
            let error = window_of(&file, MonitorConfig::with_window_size(1)).unwrap_err();
            assert_eq!(error, MonitorConfigError::WindowSize { got: 1 });
        }
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
