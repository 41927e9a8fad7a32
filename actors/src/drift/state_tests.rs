use mobula_core::row;

use super::findings::{EVENTS, EVENTS_MAX, MONITORS, MONITORS_MAX};
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
fn a_suggestion_ends_with_its_drift() {
    let mut tables = MemoryTables::default();
    apply(&mut tables, seen(1, 0, true)).unwrap();
    apply(&mut tables, seen(1, 1, true)).unwrap();
    assert_eq!(status(&tables).retrain_suggestion.unwrap().event, 1);
    apply(&mut tables, seen(1, 2, false)).unwrap();
    assert_eq!(status(&tables).retrain_suggestion, None);
    apply(&mut tables, seen(1, 3, true)).unwrap();
    assert_eq!(status(&tables).retrain_suggestion.unwrap().event, 2);
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
