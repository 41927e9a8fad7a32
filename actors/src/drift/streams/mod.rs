//! Detectors of change in a stream of numbers, one number at a time.
//!
//! 1. Memory is bounded, however long the stream: [`Adwin`] keeps `O(log n)` buckets, the others a few numbers.
//! 2. A detector that found a change begins anew with the next number, so that one change is found once.
//! 3. A number that is none changes nothing.
//! 4. Parameters are the defaults of river, the library that most people know these detectors from, so that what is
//!    found here and when can be compared with it.
//!
//! DDM, EDDM and KSWIN are left out: they raise alarms early in streams that never change. So do the others now and then, the more often
//! the longer the stream: what follows from errors is decided above them, by [`ErrorWatch`].

mod adwin;
mod error_watch;
mod hddm;
mod page_hinkley;

use serde::{Deserialize, Serialize};

pub use adwin::Adwin;
pub use error_watch::{ErrorWatch, FAMILY_ERROR, FAMILY_LABELS};
pub use hddm::{HddmA, HddmW};
pub use page_hinkley::PageHinkley;

/// A detector. Append-only: positions are tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Detector {
    /// Adaptive windowing (Bifet and Gavaldà, 2007).
    Adwin,
    /// The Page-Hinkley test, in both directions (Page, 1954).
    PageHinkley,
    /// Hoeffding's bound on plain averages (Frías-Blanco et al., 2014); only growth.
    HddmA,
    /// McDiarmid's bound on averages that forget (the same); only growth.
    HddmW,
}

impl Detector {
    /// The name that people know it by.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Detector::Adwin => "ADWIN",
            Detector::PageHinkley => "Page-Hinkley",
            Detector::HddmA => "HDDM_A",
            Detector::HddmW => "HDDM_W",
        }
    }
}

/// A change that a detector found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// What the detector compares.
    pub statistic: f64,
    /// What the statistic is above.
    pub threshold: f64,
    /// The mean before the change, as far as the detector can place it.
    pub before: f64,
    /// The mean after it.
    pub after: f64,
    /// Numbers that the detector had seen since it began.
    pub observations: u64,
}

/// Detectors of one stream.
#[derive(Clone, Debug)]
pub struct Bank {
    adwin: Adwin,
    page_hinkley: PageHinkley,
    /// Of streams of errors, which these are made for.
    hddm: Option<(HddmA, HddmW)>,
}

impl Bank {
    /// For a stream of any numbers that lie in `[0, 1]`.
    #[must_use]
    pub fn of_values() -> Self {
        Bank {
            adwin: Adwin::new(),
            page_hinkley: PageHinkley::new(),
            hddm: None,
        }
    }

    /// For a stream of zeros, and of ones where something was wrong.
    #[must_use]
    pub fn of_errors() -> Self {
        Bank {
            hddm: Some((HddmA::new(), HddmW::new())),
            ..Bank::of_values()
        }
    }

    /// Takes a number; what each detector found with it.
    pub fn update(&mut self, value: f64) -> impl Iterator<Item = (Detector, Change)> + use<> {
        let found = [
            (Detector::Adwin, self.adwin.update(value)),
            (Detector::PageHinkley, self.page_hinkley.update(value)),
            (
                Detector::HddmA,
                self.hddm.as_mut().and_then(|(a, _)| a.update(value)),
            ),
            (
                Detector::HddmW,
                self.hddm.as_mut().and_then(|(_, w)| w.update(value)),
            ),
        ];
        found
            .into_iter()
            .filter_map(|(detector, change)| Some((detector, change?)))
    }
}

#[cfg(test)]
#[path = "streams_tests.rs"]
mod tests;
