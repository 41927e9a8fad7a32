//! Whether the errors of a version are still the grown ones: their drift event stays open until they are found to have become fewer,
//! and what nobody has seen since a retraining ended must not begin another.
//!
//! Invariants:
//! 1. Only labels confirm it, traffic without them never: a growth that was found, or [`LABELS_TO_CONFIRM`] labels that were judged
//!    since, of which at least the share halfway between those before and after the growth say that the answer was wrong.
//! 2. Only the start of the monitor that found the growth confirms it. A later one knows no label before its own, and counts from
//!    nothing: it has to find growth itself.
//! 3. It is a function of what reports say, and of the time of their log entries.

use serde::{Deserialize, Serialize};

use super::streams::Change;
use super::vitals::{OUTCOME_WINDOW, TruthStatus};

/// Labels that are looked at together: in fewer, chance makes errors look grown that are as few as before.
pub const LABELS_TO_CONFIRM: u64 = OUTCOME_WINDOW;

/// Errors that grew, and when they were last seen to be as many. Persisted: the order of fields never changes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GrownErrors {
    /// The start of the monitor that found it.
    pub incarnation: u64,
    /// When that was last confirmed, in milliseconds since the Unix epoch.
    pub confirmed_ms: u64,
    /// The share of wrong answers, of 1, from which on they are the grown ones.
    pub share_min: f64,
    /// Labels that had been judged when they were last looked at, since the monitor started.
    pub labels: u64,
    /// Those of them that say that the answer was wrong.
    pub wrong: u64,
}

/// What a monitor has judged by the time of a report.
#[derive(Debug, Clone, Copy)]
pub(super) struct Judged {
    incarnation: u64,
    at_ms: u64,
    labels: u64,
    wrong: u64,
}

impl Judged {
    /// By what this start of the monitor says, in a log entry of this time.
    pub(super) fn new(incarnation: u64, truth: &TruthStatus, at_ms: u64) -> Self {
        let (labels, right) = truth.total.as_ref().map_or((0, 0), |total| {
            let right = (total.accuracy * total.samples as f64).round() as u64;
            (total.samples, right)
        });
        Judged {
            incarnation,
            at_ms,
            labels,
            wrong: labels.saturating_sub(right),
        }
    }
}

impl GrownErrors {
    /// Errors are found to have grown, after what was known of the event that this goes on with.
    pub(super) fn found(known: Option<Self>, judged: Judged, change: &Change) -> Self {
        let halfway = (change.before + change.after) / 2.0;
        // Those that grow once more and become as few as after the first growth are grown ones still.
        let share_min = known
            .filter(|known| known.incarnation == judged.incarnation)
            .map_or(halfway, |known| known.share_min.min(halfway));
        GrownErrors {
            incarnation: judged.incarnation,
            confirmed_ms: judged.at_ms,
            share_min,
            labels: judged.labels,
            wrong: judged.wrong,
        }
    }

    /// After a report.
    pub(super) fn looked_at(self, judged: Judged) -> Self {
        let labels = judged.labels.saturating_sub(self.labels);
        if judged.incarnation != self.incarnation || labels < LABELS_TO_CONFIRM {
            return self;
        }
        let wrong = judged.wrong.saturating_sub(self.wrong);
        let is_confirmed = wrong as f64 >= self.share_min * labels as f64;
        GrownErrors {
            confirmed_ms: if is_confirmed {
                judged.at_ms
            } else {
                self.confirmed_ms
            },
            labels: judged.labels,
            wrong: judged.wrong,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(incarnation: u64, at_ms: u64, labels: u64, wrong: u64) -> Judged {
        Judged {
            incarnation,
            at_ms,
            labels,
            wrong,
        }
    }

    fn grew(before: f64, after: f64) -> Change {
        Change {
            statistic: 1.0,
            threshold: 0.5,
            before,
            after,
            observations: 500,
        }
    }

    #[test]
    fn labels_confirm_growth_while_as_many_are_wrong_and_traffic_never_does() {
        let known = GrownErrors::found(None, judged(7, 10, 500, 100), &grew(0.1, 0.5));
        assert_eq!((known.confirmed_ms, known.share_min), (10, 0.3));
        // No label, and too few of them.
        assert_eq!(known.looked_at(judged(7, 20, 500, 100)), known);
        assert_eq!(known.looked_at(judged(7, 20, 699, 299)), known);
        let after = known.looked_at(judged(7, 20, 700, 170));
        assert_eq!(after.confirmed_ms, 20);
        // As few as before: they are looked at, and confirm nothing; nor do those with the next.
        let after = after.looked_at(judged(7, 30, 900, 180));
        assert_eq!(
            (after.confirmed_ms, after.labels, after.wrong),
            (20, 900, 180)
        );
        let after = after.looked_at(judged(7, 40, 1_100, 239));
        assert_eq!(after.confirmed_ms, 20);
        let after = after.looked_at(judged(7, 50, 1_300, 339));
        assert_eq!(after.confirmed_ms, 50);
    }

    #[test]
    fn a_later_start_of_the_monitor_confirms_what_it_found_itself() {
        let known = GrownErrors::found(None, judged(7, 10, 500, 100), &grew(0.1, 0.5));
        assert_eq!(known.looked_at(judged(8, 20, 5_000, 5_000)), known);
        let found = GrownErrors::found(Some(known), judged(8, 30, 5_400, 5_200), &grew(0.5, 0.9));
        assert_eq!(
            (found.incarnation, found.confirmed_ms, found.share_min),
            (8, 30, 0.7)
        );
        // A further growth does not move what counts as grown.
        let again = GrownErrors::found(Some(found), judged(8, 40, 5_800, 5_600), &grew(0.9, 1.0));
        assert_eq!((again.confirmed_ms, again.share_min), (40, 0.7));
    }
}
