//! What monitors found: rows, and what a report makes of them.
//!
//! Invariants:
//! 1. An event is raised when drift of a version begins: not again for every window in which it
//!    goes on, whoever reports that, and not again when a report is repeated.
//! 2. A suggestion is about the version that is watched, and lasts while its drift does: it ends with another version's monitor, and
//!    when neither the last window drifts nor answers are wrong more often than before.
//! 3. Monitors and events are bounded; the oldest goes first.
//! 4. Events of windows, and of wrong answers (`signals`), have numbers of one sequence.

use mobula_core::control::{ApplyContext, ModuleId, Reader, Table, Txn};
use mobula_core::error::Rejection;
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::signals;

/// Endpoint → [`MonitorStatus`].
pub(super) const MONITORS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 1,
};
/// Endpoint, 0, event number → [`DriftEvent`].
pub(super) const EVENTS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 2,
};

/// Events kept for each endpoint.
pub(super) const EVENTS_MAX: u64 = 100;

/// Features that a report names at most, the worst ones; each with its PSI and its test, and the first few of categories with shares.
pub const DRIFTED_MAX: usize = 64;

/// Monitors whose findings are kept: as many as there can be endpoints. Past it the one that
/// reported longest ago goes.
pub(super) const MONITORS_MAX: usize = 1_000;

/// Monitors in one answer: with some 20 KiB each, well below what one message of the control API
/// holds.
const PAGE_ROWS: usize = 100;

/// One statistic of something that drifted: a feature, or the predictions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drifted {
    /// The feature's name; `prediction` for the predicted classes.
    pub feature: String,
    /// `psi`, and `ks` or `wasserstein`, or of categories `chi_square` or `jensen_shannon`, and `share of …` of those that moved most;
    /// `jensen_shannon` for predictions.
    pub statistic: String,
    /// The statistic's value.
    pub value: f64,
    /// The p-value, where the statistic has one; of `wasserstein` an upper bound of it, of `jensen_shannon` that of χ².
    pub p_value: Option<f64>,
    /// What the value (`ks` and `chi_square`: the p-value) was compared with; of a share, that of the reference.
    pub threshold: f64,
    /// Rows of the reference that were compared.
    pub reference_count: u64,
    /// Rows of the window.
    pub current_count: u64,
}

/// What a monitor saw in one window, and how many went before it unreported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The endpoint.
    pub endpoint: String,
    /// The model that it serves.
    pub model: String,
    /// Which version of it.
    pub version: u64,
    /// Tells this monitor's windows from those of its earlier starts.
    pub incarnation: u64,
    /// Counted from 0 within an incarnation.
    pub window: u64,
    /// Rows in the window.
    pub samples: u64,
    /// Windows since the report before this one, this window included: quiet ones travel together.
    pub windows: u64,
    /// Rows in all of those.
    pub rows: u64,
    /// Rows since the report before this one that are in no window: of the wrong width, or with
    /// values that are no numbers.
    pub refused: u64,
    /// Rows that the router could not deliver since then: the monitor saw a sample only.
    pub dropped: u64,
    /// Features that were compared.
    pub features_compared: u64,
    /// How many of them drifted.
    pub features_drifted: u64,
    /// Whether the data set as a whole drifted.
    pub dataset_drift: bool,
    /// Whether the predictions drifted.
    pub prediction_drift: bool,
    /// How far the distribution of predictions moved (Jensen-Shannon distance).
    pub prediction_distance: f64,
    /// What drifted, predictions first, then features from the worst on; at most
    /// [`DRIFTED_MAX`] of those.
    pub drifted: Vec<Drifted>,
}

impl Report {
    /// What is known of an endpoint before its first window is full: every window is younger.
    fn of_no_window(about: About<'_>) -> Self {
        Report {
            endpoint: about.endpoint.to_owned(),
            model: about.model.to_owned(),
            version: about.version,
            incarnation: 0,
            window: 0,
            samples: 0,
            windows: 0,
            rows: 0,
            refused: 0,
            dropped: 0,
            features_compared: 0,
            features_drifted: 0,
            dataset_drift: false,
            prediction_drift: false,
            prediction_distance: 0.0,
            drifted: Vec::new(),
        }
    }

    /// Whether the inputs or the predictions drifted.
    #[must_use]
    pub fn drifts(&self) -> bool {
        self.dataset_drift || self.prediction_drift
    }
}

/// Where a monitor stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MonitorStatus {
    /// The endpoint.
    pub endpoint: String,
    /// Windows that were compared.
    pub windows: u64,
    /// Rows in them.
    pub samples: u64,
    /// Rows that the monitors refused.
    pub refused: u64,
    /// Rows that routers could not deliver to them.
    pub dropped: u64,
    /// Events so far.
    pub events: u64,
    /// The last window; one of no rows, of incarnation 0, if the first is not full yet.
    pub last: Report,
    /// When it was reported, in milliseconds since the Unix epoch.
    pub last_ms: u64,
    /// What to do about the version that is served, while it drifts.
    pub retrain_suggestion: Option<RetrainSuggestion>,
}

/// Drift was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DriftEvent {
    /// Counted from 1 for each endpoint.
    pub number: u64,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What was seen.
    pub report: Report,
}

/// That a model should be trained again, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrainSuggestion {
    /// The model.
    pub model: String,
    /// The version that no longer fits what it sees.
    pub version: u64,
    /// The event that led to it.
    pub event: u64,
    /// In a sentence.
    pub reason: String,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
}

/// An endpoint, and the version that is watched there.
#[derive(Clone, Copy)]
pub(super) struct About<'a> {
    pub(super) endpoint: &'a str,
    pub(super) model: &'a str,
    pub(super) version: u64,
}

impl About<'_> {
    /// Whether it is about this version.
    pub(super) fn is_about(self, model: &str, version: u64) -> bool {
        self.model == model && self.version == version
    }
}

impl MonitorStatus {
    /// Whether the last window was one of this version, and drifts.
    fn drifts(&self, about: About<'_>) -> bool {
        self.last.drifts() && about.is_about(&self.last.model, self.last.version)
    }
}

/// Where the monitor of an endpoint stands, if one has reported.
pub(super) fn monitor(reader: &dyn Reader, endpoint: &str) -> Option<MonitorStatus> {
    row::get(reader, MONITORS, endpoint.as_bytes())
}

/// When drift of a version was last seen to go on, in its windows or its errors, in milliseconds since the Unix epoch; nothing if it does
/// not.
pub(super) fn goes_on_ms(reader: &dyn Reader, about: About<'_>) -> Option<u64> {
    let in_windows = monitor(reader, about.endpoint)
        .filter(|status| status.drifts(about))
        .map(|status| status.last_ms);
    in_windows.max(signals::errors_go_on_ms(reader, about))
}

/// Endpoints whose last window drifted.
pub(super) fn drifting_count(reader: &dyn Reader) -> u64 {
    let monitors = row::all::<MonitorStatus>(reader, MONITORS, &[]);
    let drifting = monitors.iter().filter(|(_, monitor)| monitor.last.drifts());
    drifting.count() as u64
}

/// Where monitors stand, by endpoint, a page of them behind `after`.
pub(super) fn monitors(reader: &dyn Reader, after: Option<&str>) -> Vec<MonitorStatus> {
    reader
        .scan(MONITORS, &[], after.map(str::as_bytes), PAGE_ROWS)
        .iter()
        .map(|(_, bytes)| row::from_bytes(MONITORS, bytes))
        .collect()
}

/// The events of an endpoint that are kept, oldest first.
pub(super) fn events(reader: &dyn Reader, endpoint: &str) -> Vec<DriftEvent> {
    let prefix = [endpoint.as_bytes(), &[0]].concat();
    row::all(reader, EVENTS, &prefix)
        .into_iter()
        .map(|(_, event)| event)
        .collect()
}

pub(super) fn event_key(endpoint: &str, number: u64) -> Vec<u8> {
    [endpoint.as_bytes(), &[0], &number.to_be_bytes()].concat()
}

pub(super) fn report(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    report: Report,
) -> Result<(), Rejection> {
    let before: Option<MonitorStatus> = row::get(txn, MONITORS, report.endpoint.as_bytes());
    if let Some(before) = &before {
        let known = (before.last.incarnation, before.last.window);
        if (report.incarnation, report.window) == known {
            return Ok(());
        }
        if (report.incarnation, report.window) < known {
            return Err(Rejection::fenced(format!(
                "window {} of monitor {} is older than what is known of endpoint `{}`",
                report.window, report.incarnation, report.endpoint
            )));
        }
    }
    let about = About {
        endpoint: &report.endpoint,
        model: &report.model,
        version: report.version,
    };
    let goes_on = before.as_ref().is_some_and(|before| before.drifts(about));
    let is_over = !report.drifts() && signals::errors_go_on_ms(txn, about).is_none();
    if before.is_none() {
        make_room(txn);
    }
    let mut status = MonitorStatus {
        endpoint: report.endpoint.clone(),
        windows: before.as_ref().map_or(0, |b| b.windows) + report.windows,
        samples: before.as_ref().map_or(0, |b| b.samples) + report.rows,
        refused: before
            .as_ref()
            .map_or(0, |b| b.refused)
            .saturating_add(report.refused),
        dropped: before
            .as_ref()
            .map_or(0, |b| b.dropped)
            .saturating_add(report.dropped),
        events: before.as_ref().map_or(0, |b| b.events),
        last: report.clone(),
        last_ms: context.now_ms,
        retrain_suggestion: before
            .and_then(|before| before.retrain_suggestion)
            .filter(|known| !is_over && about.is_about(&known.model, known.version)),
    };
    if report.drifts() && !goes_on {
        let number = count_event(txn, &mut status);
        let event = DriftEvent {
            number,
            at_ms: context.now_ms,
            report: report.clone(),
        };
        row::put(txn, EVENTS, &event_key(&report.endpoint, number), &event);
        status.retrain_suggestion = Some(RetrainSuggestion {
            model: report.model.clone(),
            version: report.version,
            event: number,
            reason: reason(&report),
            at_ms: context.now_ms,
        });
    }
    row::put(txn, MONITORS, report.endpoint.as_bytes(), &status);
    Ok(())
}

/// Counts an event, and makes room for it.
fn count_event(txn: &mut dyn Txn, status: &mut MonitorStatus) -> u64 {
    status.events += 1;
    if status.events > EVENTS_MAX {
        txn.delete(
            EVENTS,
            &event_key(&status.endpoint, status.events - EVENTS_MAX),
        );
    }
    status.events
}

/// The row of an endpoint, which is made if there is none.
pub(super) fn ensure(context: &ApplyContext, txn: &mut dyn Txn, about: About<'_>) -> MonitorStatus {
    if let Some(status) = monitor(txn, about.endpoint) {
        return status;
    }
    make_room(txn);
    let status = MonitorStatus {
        endpoint: about.endpoint.to_owned(),
        windows: 0,
        samples: 0,
        refused: 0,
        dropped: 0,
        events: 0,
        last: Report::of_no_window(about),
        last_ms: context.now_ms,
        retrain_suggestion: None,
    };
    row::put(txn, MONITORS, about.endpoint.as_bytes(), &status);
    status
}

/// Begins an event that is no window's, which suggests to train the version again; its number.
pub(super) fn begin_event(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    about: About<'_>,
    reason: String,
) -> u64 {
    let mut status = ensure(context, txn, about);
    let number = count_event(txn, &mut status);
    status.retrain_suggestion = Some(RetrainSuggestion {
        model: about.model.to_owned(),
        version: about.version,
        event: number,
        reason,
        at_ms: context.now_ms,
    });
    row::put(txn, MONITORS, about.endpoint.as_bytes(), &status);
    number
}

/// Ends what is suggested about a version whose answers are not wrong more often than before, unless its windows drift.
pub(super) fn errors_are_over(txn: &mut dyn Txn, mut status: MonitorStatus, about: About<'_>) {
    if status.retrain_suggestion.is_some() && !status.drifts(about) {
        status.retrain_suggestion = None;
        row::put(txn, MONITORS, about.endpoint.as_bytes(), &status);
    }
}

fn reason(report: &Report) -> String {
    let features = format!(
        "{} of {} features drifted in {} rows",
        report.features_drifted, report.features_compared, report.samples
    );
    if report.prediction_drift {
        let distance = report.prediction_distance;
        format!("{features}, and the predictions moved by {distance:.3} (Jensen-Shannon)")
    } else {
        features
    }
}

/// Makes room for another monitor's findings.
fn make_room(txn: &mut dyn Txn) {
    let monitors = row::all::<MonitorStatus>(txn, MONITORS, &[]);
    if monitors.len() < MONITORS_MAX {
        return;
    }
    let oldest = monitors
        .into_iter()
        .min_by_key(|(_, status)| status.last_ms);
    if let Some((_, status)) = oldest {
        forget(txn, &status.endpoint);
    }
}

/// Forgets what was found about an endpoint: what is deployed later under its name has nothing to do with it.
pub(super) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    signals::forget(txn, endpoint);
    let Some(status) = row::get::<MonitorStatus>(txn, MONITORS, endpoint.as_bytes()) else {
        return;
    };
    txn.delete(MONITORS, endpoint.as_bytes());
    let kept = status.events.saturating_sub(EVENTS_MAX) + 1..=status.events;
    for number in kept {
        txn.delete(EVENTS, &event_key(endpoint, number));
    }
}
