//! Windows of parts of the traffic: each slice against the version's reference, and against its labels.
//!
//! Invariants:
//! 1. There are at most [`SLICES_MAX`] slices and `other`, which takes the rows of all further names; fewer where rows
//!    are so wide that their windows would take more than `WINDOWS_BYTES_MAX`.
//! 2. A slice keeps its place as long as the monitor lives, so that labels find it.

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
    /// Rows taken.
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
    window: WindowMonitor,
    outcomes: OutcomeCounts,
    status: SliceStatus,
}

/// The slices of one version.
#[derive(Debug)]
pub struct Slices {
    /// What new slices are made like.
    empty: WindowMonitor,
    slices_max: usize,
    slices: Vec<Slice>,
}

impl Slices {
    /// No slices yet; theirs will be windows like `window`.
    #[must_use]
    pub fn new(window: &WindowMonitor) -> Self {
        let affordable = WINDOWS_BYTES_MAX / window.window_bytes().max(1);
        Slices {
            empty: window.begin_another(),
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
            window: self.empty.begin_another(),
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
            },
        });
        (self.slices.len() - 1) as u8
    }

    /// Takes a row of the slice at `place`; what drifts since the window that it fills. A row that is none is left out,
    /// as it is in the windows of all rows.
    pub fn observe(&mut self, place: u8, row: &[f32], class: u32) -> Option<SliceDrift> {
        let slice = self.slices.get_mut(usize::from(place))?;
        let closed = slice.window.observe(row, class).ok()?;
        slice.status.rows += 1;
        closed.and_then(|closed| slice.close(&closed))
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
        Slices::new(&WindowMonitor::new(reference, config).unwrap())
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
