//! Windows of parts of the traffic: each slice against the version's reference, and against its labels.
//!
//! Invariants:
//! 1. There are at most [`SLICES_MAX`] slices and `other`, which takes the rows of all further names; fewer where rows
//!    are so wide that their windows would take more than `WINDOWS_BYTES_MAX`.
//! 2. A slice keeps its place as long as the monitor lives, so that labels find it.
//! 3. A slice has no windows where its version has no reference, and leaves rows out of them while windows rest: its labels
//!    count all the same.

use serde::{Deserialize, Serialize};

use super::calibration::OutcomeCounts;
use super::join::Outcome;
use crate::drift::window::{WindowMonitor, WindowReport};

/// Slices with names of their own: what a person looks at, and what a report of all of them can hold.
pub const SLICES_MAX: usize = 16;

/// Bytes of a slice's name.
pub const SLICE_NAME_BYTES_MAX: usize = 64;

/// What the open windows of all slices take at the most.
const WINDOWS_BYTES_MAX: usize = 32 << 20;

/// The slice of all whose name came too late.
const OTHER: &str = "other";

/// Where a slice stands. All numbers are since its monitor started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SliceStatus {
    /// Its name; `other` for all that have no place of their own.
    pub name: String,
    /// Rows of its requests.
    pub rows: u64,
    /// Windows compared.
    pub windows: u64,
    /// Features of the last window that were compared.
    pub features_compared: u64,
    /// How many of them drifted.
    pub features_drifted: u64,
    /// Whether enough of them did, or the predictions.
    pub drifts: bool,
    /// Rows with a label.
    pub labelled: u64,
    /// The share of those that was right.
    pub accuracy: Option<f64>,
    /// Their expected calibration error.
    pub calibration_error: Option<f64>,
    /// Rows that are in no window because they came while windows rested.
    pub dropped: u64,
}

/// A slice whose drift began.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceDrift {
    /// Its name.
    pub name: String,
    /// Features that were compared.
    pub features_compared: u64,
    /// How many of them drifted.
    pub features_drifted: u64,
    /// Whether the predictions drifted.
    pub prediction_drift: bool,
}

#[derive(Debug)]
struct Slice {
    name: String,
    window: Option<WindowMonitor>,
    outcomes: OutcomeCounts,
    status: SliceStatus,
}

/// The slices of one version.
#[derive(Debug)]
pub struct Slices {
    /// What new slices are made like; nothing without a reference.
    empty: Option<WindowMonitor>,
    slices_max: usize,
    slices: Vec<Slice>,
}

impl Slices {
    /// No slices yet; theirs will be windows like `window`, if there is one.
    #[must_use]
    pub fn new(window: Option<&WindowMonitor>) -> Self {
        let affordable = window.map_or(usize::MAX, |window| {
            WINDOWS_BYTES_MAX / window.window_bytes().max(1)
        });
        Slices {
            empty: window.map(WindowMonitor::begin_another),
            slices_max: affordable.clamp(1, SLICES_MAX + 1),
            slices: Vec::new(),
        }
    }

    /// The place of a slice, which it gets if there is room.
    pub fn place(&mut self, name: &str) -> u8 {
        if let Some(known) = self.slices.iter().position(|slice| slice.name == name) {
            return known as u8;
        }
        // The last place is for all others.
        let name = if self.slices.len() + 1 < self.slices_max {
            name
        } else {
            OTHER
        };
        if let Some(known) = self.slices.iter().position(|slice| slice.name == name) {
            return known as u8;
        }
        self.slices.push(Slice {
            name: name.to_owned(),
            window: self.empty.as_ref().map(WindowMonitor::begin_another),
            outcomes: OutcomeCounts::default(),
            status: SliceStatus {
                name: name.to_owned(),
                rows: 0,
                windows: 0,
                features_compared: 0,
                features_drifted: 0,
                drifts: false,
                labelled: 0,
                accuracy: None,
                calibration_error: None,
                dropped: 0,
            },
        });
        (self.slices.len() - 1) as u8
    }

    /// Takes a row of the slice at `place`; what drifts since the window that it fills. A row that is none is left out
    /// of the window, as it is of those of all rows.
    pub fn observe(&mut self, place: u8, row: &[f32], class: u32) -> Option<SliceDrift> {
        let slice = self.slices.get_mut(usize::from(place))?;
        slice.status.rows += 1;
        let closed = slice.window.as_mut()?.observe(row, class).ok()??;
        slice.close(&closed)
    }

    /// Counts a row of the slice at `place` that came while windows rested.
    pub fn leave_out(&mut self, place: u8) {
        if let Some(slice) = self.slices.get_mut(usize::from(place)) {
            slice.status.rows += 1;
            slice.status.dropped += 1;
        }
    }

    /// Windows compared, of all slices.
    #[must_use]
    pub fn windows(&self) -> u64 {
        self.slices.iter().map(|slice| slice.status.windows).sum()
    }

    /// Takes an outcome of the slice at `place`.
    pub fn label(&mut self, place: u8, outcome: &Outcome) {
        if let Some(slice) = self.slices.get_mut(usize::from(place)) {
            slice.outcomes.add(outcome);
        }
    }

    /// Where they stand, in the order in which they came.
    #[must_use]
    pub fn status(&self) -> Vec<SliceStatus> {
        self.slices
            .iter()
            .map(|slice| {
                let known = slice.outcomes.reliability();
                SliceStatus {
                    labelled: slice.outcomes.samples(),
                    accuracy: known.as_ref().map(|known| known.accuracy),
                    calibration_error: known.as_ref().map(|known| known.calibration_error),
                    ..slice.status.clone()
                }
            })
            .collect()
    }
}

impl Slice {
    fn close(&mut self, closed: &WindowReport) -> Option<SliceDrift> {
        let drifted_before = self.status.drifts;
        self.status.windows += 1;
        self.status.features_compared = closed.informative_columns;
        self.status.features_drifted = closed.drifted_columns;
        self.status.drifts = closed.dataset_drift || closed.prediction.drifted;
        (self.status.drifts && !drifted_before).then(|| SliceDrift {
            name: self.name.clone(),
            features_compared: closed.informative_columns,
            features_drifted: closed.drifted_columns,
            prediction_drift: closed.prediction.drifted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::join::Predicted;
    use super::*;
    use crate::drift::statistics::testing::Lcg;
    use crate::drift::{MonitorConfig, Reference};

    fn slices(columns: usize, window_size: usize) -> Slices {
        let mut random = Lcg::new(1);
        let values: Vec<f32> = (0..500 * columns)
            .map(|_| random.next_unit() as f32)
            .collect();
        let classes: Vec<u32> = (0..500).map(|row| row % 2).collect();
        let names = (0..columns).map(|column| format!("f{column}")).collect();
        let reference = Reference::new(names, &values, &classes).unwrap();
        let config = MonitorConfig::with_window_size(window_size);
        Slices::new(Some(&WindowMonitor::new(reference, config).unwrap()))
    }

    #[test]
    fn only_the_slice_that_drifts_is_named() {
        let mut slices = slices(4, 100);
        let (north, south) = (slices.place("north"), slices.place("south"));
        assert_eq!(slices.place("north"), north);
        let mut random = Lcg::new(2);
        let mut found = Vec::new();
        for number in 0..400 {
            let row: Vec<f32> = (0..4).map(|_| random.next_unit() as f32).collect();
            let moved: Vec<f32> = row.iter().map(|value| value + 2.0).collect();
            found.extend(slices.observe(north, &row, number % 2));
            found.extend(slices.observe(south, &moved, number % 2));
        }
        // Once, though four windows drifted.
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].name.as_str(), found[0].features_drifted),
            ("south", 4)
        );
        let status = slices.status();
        assert_eq!((status[0].windows, status[0].drifts), (4, false));
        assert_eq!((status[1].windows, status[1].drifts), (4, true));
    }

    #[test]
    fn names_that_come_late_share_a_place() {
        let mut slices = slices(2, 20);
        for number in 0..3 * SLICES_MAX {
            slices.place(&format!("slice-{number}"));
        }
        let status = slices.status();
        assert_eq!(status.len(), SLICES_MAX + 1);
        assert_eq!(status.last().unwrap().name, "other");
        assert_eq!(slices.place("slice-3"), 3);
        assert_eq!(usize::from(slices.place("never seen")), SLICES_MAX);
        assert_eq!(usize::from(slices.place("other")), SLICES_MAX);
    }

    #[test]
    fn wide_rows_get_fewer_slices() {
        let mut wide = slices(2000, 1000);
        for number in 0..SLICES_MAX {
            wide.place(&number.to_string());
        }
        let names: Vec<String> = wide.status().into_iter().map(|slice| slice.name).collect();
        assert_eq!(names, ["0", "other"]);
    }

    #[test]
    fn rows_that_come_while_windows_rest_are_counted_and_in_none() {
        let mut slices = slices(2, 20);
        let place = slices.place("north");
        for _ in 0..30 {
            slices.leave_out(place);
        }
        assert_eq!(slices.windows(), 0);
        for _ in 0..20 {
            slices.observe(place, &[0.5, 0.5], 1);
        }
        let status = slices.status().remove(0);
        assert_eq!((status.rows, status.dropped, status.windows), (50, 30, 1));
        assert_eq!(slices.windows(), 1);
    }

    #[test]
    fn without_a_reference_there_are_places_and_labels_and_no_windows() {
        let mut slices = Slices::new(None);
        for number in 0..2 * SLICES_MAX {
            slices.place(&number.to_string());
        }
        assert_eq!(slices.status().len(), SLICES_MAX + 1);
        for _ in 0..1000 {
            assert_eq!(slices.observe(0, &[0.5; 3], 1), None);
        }
        let predicted = Predicted {
            class: 1,
            confidence: 1.0,
            slice: Some(0),
        };
        slices.label(
            0,
            &Outcome {
                predicted,
                truth: 1,
            },
        );
        let status = slices.status().remove(0);
        assert_eq!((status.rows, status.windows, status.labelled), (1000, 0, 1));
        assert_eq!(status.accuracy, Some(1.0));
    }

    #[test]
    fn labels_are_counted_by_slice() {
        let mut slices = slices(2, 20);
        let place = slices.place("north");
        for truth in [1, 1, 0, 1] {
            let predicted = Predicted {
                class: 1,
                confidence: 1.0,
                slice: Some(place),
            };
            slices.label(place, &Outcome { predicted, truth });
        }
        let status = slices.status().remove(0);
        assert_eq!((status.labelled, status.accuracy), (4, Some(0.75)));
        assert_eq!(status.calibration_error, Some(0.25));
    }
}
