//! What monitors found, replicated: drift events and retrain suggestions.
//!
//! Invariants:
//! 1. An event is raised when drift of a version begins: not again for every window in which it
//!    goes on, whoever reports that, and not again when a report is repeated.
//! 2. A suggestion is about the version that is watched: another version's monitor ends it.
//! 3. Both lists are bounded; the oldest goes first.

use mobula_core::codec;
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, Table, TableGauge, Txn,
};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::JobId;
use mobula_core::row;
use serde::{Deserialize, Serialize};

/// Endpoint → [`MonitorStatus`].
const MONITORS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 1,
};
/// Endpoint, 0, event number → [`DriftEvent`].
const EVENTS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 2,
};

/// The largest report: 64 features with their numbers, with room.
const PAYLOAD_BYTES_MAX: usize = 256 * 1024;

/// Events kept for each endpoint.
const EVENTS_MAX: u64 = 100;

/// Features that a report names at most, the worst ones; each with its PSI and its KS.
pub const DRIFTED_MAX: usize = 64;

/// Monitors whose findings are kept: as many as there can be endpoints. Past it the one that
/// reported longest ago goes.
const MONITORS_MAX: usize = 1_000;

/// Monitors in one answer: with some 20 KiB each, well below what one message of the control API
/// holds.
const PAGE_ROWS: usize = 100;

/// One statistic of something that drifted: a feature, or the predictions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drifted {
    /// The feature's name; `prediction` for the predicted classes.
    pub feature: String,
    /// `psi` or `ks`; `jensen_shannon` for predictions.
    pub statistic: String,
    /// The statistic's value.
    pub value: f64,
    /// The p-value, where the statistic has one.
    pub p_value: Option<f64>,
    /// What the value (`ks`: the p-value) was compared with.
    pub threshold: f64,
    /// Rows of the reference.
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
    /// The last window.
    pub last: Report,
    /// When it was reported, in milliseconds since the Unix epoch.
    pub last_ms: u64,
    /// What to do about the version that is served, if it has drifted.
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

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// A monitor compared a window. Answer: nothing.
    Report(Report),
}

/// A question. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// That of one endpoint, or all monitors, by endpoint, a page of them. Answer:
    /// `Vec<MonitorStatus>`, of a list empty after the last.
    Monitors {
        /// Only that one.
        endpoint: Option<String>,
        /// In a list, only those of endpoints with a larger name.
        after: Option<String>,
    },
    /// Events of an endpoint, oldest first. Answer: `Vec<DriftEvent>`.
    Events {
        /// The endpoint.
        endpoint: String,
    },
}

/// The replicated part of drift detection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Drift;

fn event_key(endpoint: &str, number: u64) -> Vec<u8> {
    [endpoint.as_bytes(), &[0], &number.to_be_bytes()].concat()
}

fn report(context: &ApplyContext, txn: &mut dyn Txn, report: Report) -> Result<(), Rejection> {
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
    let is_same_version = |model: &str, version| model == report.model && version == report.version;
    let goes_on = before.as_ref().is_some_and(|before| {
        before.last.drifts() && is_same_version(&before.last.model, before.last.version)
    });
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
            .filter(|known| is_same_version(&known.model, known.version)),
    };
    if report.drifts() && !goes_on {
        status.events += 1;
        let number = status.events;
        let event = DriftEvent {
            number,
            at_ms: context.now_ms,
            report: report.clone(),
        };
        row::put(txn, EVENTS, &event_key(&report.endpoint, number), &event);
        if number > EVENTS_MAX {
            txn.delete(EVENTS, &event_key(&report.endpoint, number - EVENTS_MAX));
        }
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
    if let Some((key, status)) = oldest {
        txn.delete(MONITORS, &key);
        let kept = status.events.saturating_sub(EVENTS_MAX) + 1..=status.events;
        for number in kept {
            txn.delete(EVENTS, &event_key(&status.endpoint, number));
        }
    }
}

impl StateModule for Drift {
    fn id(&self) -> ModuleId {
        ModuleId::DRIFT
    }

    fn name(&self) -> &'static str {
        "drift"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let Command::Report(found) = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        report(context, txn, found)?;
        Ok(Applied::changed(self.id(), Vec::new()))
    }

    fn gauges(&self, reader: &dyn Reader) -> Vec<TableGauge> {
        let monitors = row::all::<MonitorStatus>(reader, MONITORS, &[]);
        let drifting = monitors.iter().filter(|(_, monitor)| monitor.last.drifts());
        vec![TableGauge {
            name: "mobula_drift_endpoints_drifting",
            help: "Endpoints whose last window of requests differs from what their version was trained on",
            label: None,
            value: drifting.count() as u64,
        }]
    }

    fn query(
        &self,
        reader: &dyn Reader,
        _now_ms: u64,
        payload: &[u8],
    ) -> Result<Vec<u8>, Rejection> {
        Ok(match crate::payload::decode(payload, PAYLOAD_BYTES_MAX)? {
            Query::Monitors {
                endpoint: None,
                after,
            } => {
                let after = after.as_deref().map(str::as_bytes);
                let rows = reader.scan(MONITORS, &[], after, PAGE_ROWS);
                let monitors = rows
                    .iter()
                    .map(|(_, bytes)| row::from_bytes(MONITORS, bytes));
                codec::encode_plain(&monitors.collect::<Vec<MonitorStatus>>())
            }
            Query::Monitors {
                endpoint: Some(endpoint),
                ..
            } => {
                let row = row::get::<MonitorStatus>(reader, MONITORS, endpoint.as_bytes());
                codec::encode_plain(&row.into_iter().collect::<Vec<_>>())
            }
            Query::Events { endpoint } => {
                let prefix = [endpoint.as_bytes(), &[0]].concat();
                let rows = row::all::<DriftEvent>(reader, EVENTS, &prefix);
                codec::encode_plain(&rows.into_iter().map(|(_, row)| row).collect::<Vec<_>>())
            }
        })
    }

    fn authorize(&self, caller: &Caller, _payload: &[u8]) -> Result<(), Rejection> {
        match caller {
            Caller::Head => Ok(()),
            Caller::Host { job, .. } if *job == JobId::SYSTEM => Ok(()),
            _ => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                "drift is reported by the platform's monitors",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_scheduler::memory_txn::MemoryTables;

    fn seen(incarnation: u64, window: u64, dataset_drift: bool) -> Report {
        Report {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: 1,
            incarnation,
            window,
            samples: 200,
            refused: 1,
            dropped: 3,
            windows: 1,
            rows: 200,
            features_compared: 64,
            features_drifted: if dataset_drift { 40 } else { 0 },
            dataset_drift,
            prediction_drift: false,
            prediction_distance: 0.0,
            drifted: Vec::new(),
        }
    }

    fn apply(tables: &mut MemoryTables, report: Report) -> Result<Applied, Rejection> {
        let context = ApplyContext {
            index: 1,
            term: 1,
            now_ms: 9,
        };
        tables.apply(
            &Drift,
            &context,
            &codec::encode_plain(&Command::Report(report)),
        )
    }

    fn status(tables: &MemoryTables) -> MonitorStatus {
        row::get(tables, MONITORS, b"digits").unwrap()
    }

    #[test]
    fn a_window_counts_once_however_often_it_is_reported() {
        let mut tables = MemoryTables::default();
        apply(&mut tables, seen(1, 0, false)).unwrap();
        apply(&mut tables, seen(1, 1, true)).unwrap();
        apply(&mut tables, seen(1, 1, true)).unwrap();
        let status = status(&tables);
        assert_eq!((status.windows, status.samples, status.events), (2, 400, 1));
        assert_eq!((status.refused, status.dropped), (2, 6));
        assert_eq!(status.retrain_suggestion.unwrap().event, 1);
    }

    #[test]
    fn drift_that_goes_on_is_one_event_and_drift_that_comes_back_another() {
        let mut tables = MemoryTables::default();
        for (window, drifts) in [true, true, false, true, true].into_iter().enumerate() {
            apply(&mut tables, seen(1, window as u64, drifts)).unwrap();
        }
        let status = status(&tables);
        assert_eq!((status.windows, status.events), (5, 2));
        assert_eq!(status.last.window, 4);
    }

    #[test]
    fn a_monitor_that_starts_again_finds_no_new_drift_and_another_version_starts_afresh() {
        let mut tables = MemoryTables::default();
        apply(&mut tables, seen(1, 0, true)).unwrap();
        apply(&mut tables, seen(2, 0, true)).unwrap();
        assert_eq!(status(&tables).events, 1);
        let trained_again = |window, drifts| Report {
            version: 2,
            ..seen(3, window, drifts)
        };
        apply(&mut tables, trained_again(0, false)).unwrap();
        assert_eq!(status(&tables).retrain_suggestion, None);
        apply(&mut tables, trained_again(1, true)).unwrap();
        let now = status(&tables);
        assert_eq!(
            (now.events, now.retrain_suggestion.unwrap().version),
            (2, 2)
        );
    }

    #[test]
    fn an_older_start_of_the_monitor_is_fenced() {
        let mut tables = MemoryTables::default();
        apply(&mut tables, seen(2, 0, false)).unwrap();
        let error = apply(&mut tables, seen(1, 7, true)).unwrap_err();
        assert_eq!(error.code, ErrorCode::Fenced);
        assert_eq!(status(&tables).events, 0);
    }

    #[test]
    fn old_events_go() {
        let mut tables = MemoryTables::default();
        for round in 0..EVENTS_MAX + 5 {
            apply(&mut tables, seen(1, 2 * round, true)).unwrap();
            apply(&mut tables, seen(1, 2 * round + 1, false)).unwrap();
        }
        let prefix = [b"digits".as_slice(), &[0]].concat();
        let events = row::all::<DriftEvent>(&tables, EVENTS, &prefix);
        assert_eq!(events.len() as u64, EVENTS_MAX);
        assert_eq!(events[0].1.number, 6);
    }

    #[test]
    fn moved_predictions_alone_are_an_event_too() {
        let mut tables = MemoryTables::default();
        let report = Report {
            prediction_drift: true,
            prediction_distance: 0.25,
            ..seen(1, 0, false)
        };
        apply(&mut tables, report).unwrap();
        let suggestion = status(&tables).retrain_suggestion.unwrap();
        assert_eq!(
            suggestion.reason,
            "0 of 64 features drifted in 200 rows, and the predictions moved by 0.250 \
             (Jensen-Shannon)"
        );
    }

    #[test]
    fn the_monitor_that_was_silent_longest_makes_room() {
        let mut tables = MemoryTables::default();
        for number in 0..=MONITORS_MAX {
            let report = Report {
                endpoint: format!("e{number}"),
                ..seen(1, 0, true)
            };
            let context = ApplyContext {
                index: 1,
                term: 1,
                now_ms: number as u64,
            };
            tables
                .apply(
                    &Drift,
                    &context,
                    &codec::encode_plain(&Command::Report(report)),
                )
                .unwrap();
        }
        let mut listed: Vec<MonitorStatus> = Vec::new();
        loop {
            let query = Query::Monitors {
                endpoint: None,
                after: listed.last().map(|last| last.endpoint.clone()),
            };
            let bytes = Drift
                .query(&tables, 0, &codec::encode_plain(&query))
                .unwrap();
            let page: Vec<MonitorStatus> = codec::decode(&bytes, 4 << 20).unwrap();
            if page.is_empty() {
                break;
            }
            listed.extend(page);
        }
        assert_eq!(listed.len(), MONITORS_MAX);
        assert_eq!(row::all::<DriftEvent>(&tables, EVENTS, b"e0\0").len(), 0);
        assert_eq!(row::all::<DriftEvent>(&tables, EVENTS, b"e1\0").len(), 1);
    }
}
