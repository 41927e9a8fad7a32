use mobula_core::codec;
use mobula_core::control::{Caller, StateModule as _};
use mobula_core::error::ErrorCode;
use mobula_core::id::JobId;
use mobula_scheduler::memory_txn::MemoryTables;

use super::*;
use crate::drift::state::{Command, Drift, MonitorStatus, Query};
use crate::drift::vitals::TruthStatus;
use crate::drift::vitals::confidence::OutOfDistribution;
use crate::drift::vitals::join::JoinCounts;
use crate::drift::vitals::sentinels::SentinelStatus;
use crate::drift::vitals::slices::SliceStatus;

fn scores(score: &str) -> OutOfDistribution {
    OutOfDistribution {
        score: score.into(),
        no_reference: None,
        windows: 0,
        last: None,
    }
}

pub(in crate::drift) fn vitals_of(rows: u64) -> Vitals {
    Vitals {
        rows,
        confidence_mean: Some(0.9),
        out_of_distribution: scores("max_softmax_probability"),
        truth: TruthStatus {
            counts: JoinCounts::default(),
            predictions_waiting: 0,
            labels_waiting: 0,
            labels_refused: 0,
            rows_without_id: 0,
            trained_accuracy: None,
            windows: 0,
            window: None,
            total: None,
        },
        slices: Vec::new(),
        sentinels: SentinelStatus::default(),
        log: None,
        no_reference: None,
        out_of_distribution_by_energy: scores("energy"),
        rows_without_energy: 0,
    }
}

fn far() -> ScoreComparison {
    ScoreComparison {
        reference_rows: 1000,
        reference_mean: -9.0,
        window_rows: 200,
        window_mean: -1.5,
        kolmogorov_smirnov: 0.8,
        p_value: 2e-80,
        p_threshold: 1e-6,
        tail_share: 0.9,
        tail_share_threshold: 0.25,
        is_out: true,
    }
}

pub(in crate::drift) fn stream(stream: Stream, before: f64, after: f64) -> Signal {
    found_by(Detector::Adwin, stream, before, after)
}

fn found_by(detector: Detector, stream: Stream, before: f64, after: f64) -> Signal {
    Signal::Stream {
        stream,
        detector,
        change: Change {
            statistic: (after - before).abs(),
            threshold: 0.1,
            before,
            after,
            observations: 512,
        },
    }
}

fn report_of(incarnation: u64, sequence: u64, signals: Vec<Signal>) -> VitalsReport {
    VitalsReport {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: 1,
        incarnation,
        sequence,
        vitals: vitals_of(sequence),
        signals,
        signals_lost: 1,
    }
}

fn apply(tables: &mut MemoryTables, report: VitalsReport) -> Result<(), Rejection> {
    let context = ApplyContext {
        index: 1,
        term: 1,
        now_ms: 9,
    };
    let command = Command::Vitals(Box::new(report));
    tables
        .apply(&Drift, &context, &codec::encode_plain(&command))
        .map(drop)
}

fn ask<T: serde::de::DeserializeOwned>(tables: &MemoryTables, query: &Query) -> T {
    let answer = Drift.query(tables, 9, &codec::encode_plain(query)).unwrap();
    codec::decode(&answer, 1 << 20).unwrap()
}

fn status(tables: &MemoryTables) -> MonitorStatus {
    findings::monitor(tables, "digits").unwrap()
}

/// The monitor reports a window.
fn window(tables: &mut MemoryTables, window: u64, dataset_drift: bool) {
    let context = ApplyContext {
        index: 2,
        term: 1,
        now_ms: 10,
    };
    let report = findings::Report {
        incarnation: 7,
        window,
        windows: 1,
        rows: 200,
        samples: 200,
        dataset_drift,
        ..status(tables).last
    };
    let command = codec::encode_plain(&Command::Report(report));
    tables.apply(&Drift, &context, &command).unwrap();
}

#[test]
fn wrong_answers_are_a_drift_event_and_other_signals_are_not() {
    let mut tables = MemoryTables::default();
    let signals = vec![
        stream(Stream::Confidence, 0.9, 0.5),
        stream(Stream::Errors, 0.5, 0.1),
        stream(Stream::Errors, 0.1, 0.5),
    ];
    apply(&mut tables, report_of(7, 1, signals)).unwrap();
    let events: Vec<SignalEvent> = ask(
        &tables,
        &Query::Signals {
            endpoint: "digits".into(),
        },
    );
    let numbers: Vec<_> = events
        .iter()
        .map(|event| (event.number, event.drift_event))
        .collect();
    assert_eq!(numbers, [(1, None), (2, None), (3, Some(1))]);
    let status = status(&tables);
    assert_eq!((status.events, status.windows), (1, 0));
    let suggestion = status.retrain_suggestion.unwrap();
    assert_eq!(
        (
            suggestion.event,
            suggestion.version,
            suggestion.reason.as_str()
        ),
        (
            1,
            1,
            "the share of wrong answers went from 0.100 to 0.500 (ADWIN 0.400 over 0.100, after 512 rows)"
        )
    );
}

#[test]
fn one_growth_of_errors_is_one_event_however_many_detectors_find_it() {
    let mut tables = MemoryTables::default();
    let grew = |detector| found_by(detector, Stream::Errors, 0.1, 0.5);
    let shrank = || stream(Stream::Errors, 0.5, 0.1);
    apply(&mut tables, report_of(7, 1, vec![grew(Detector::HddmW)])).unwrap();
    let later = vec![grew(Detector::HddmA), grew(Detector::Adwin)];
    apply(&mut tables, report_of(7, 2, later)).unwrap();
    apply(
        &mut tables,
        report_of(7, 3, vec![stream(Stream::Confidence, 0.9, 0.5)]),
    )
    .unwrap();
    // A monitor that is started again watches the same version.
    apply(
        &mut tables,
        report_of(8, 1, vec![grew(Detector::PageHinkley)]),
    )
    .unwrap();
    let suggestion = |tables: &MemoryTables| status(tables).retrain_suggestion.unwrap();
    assert_eq!((status(&tables).events, suggestion(&tables).event), (1, 1));
    assert!(suggestion(&tables).reason.contains("HDDM_W"));

    // What has ended can begin again.
    apply(&mut tables, report_of(8, 2, vec![shrank()])).unwrap();
    assert_eq!(vitals(&tables, "digits").unwrap().errors_event, None);
    let again = vec![grew(Detector::Adwin), grew(Detector::PageHinkley)];
    apply(&mut tables, report_of(8, 3, again)).unwrap();
    assert_eq!((status(&tables).events, suggestion(&tables).event), (2, 2));

    // And another version's errors are another event, though the first version comes back.
    for (version, sequence) in [(2, 4), (1, 5)] {
        let report = VitalsReport {
            version,
            ..report_of(8, sequence, Vec::new())
        };
        apply(&mut tables, report).unwrap();
        assert_eq!(vitals(&tables, "digits").unwrap().errors_event, None);
    }
    let both = vec![grew(Detector::HddmW), shrank(), grew(Detector::HddmW)];
    apply(&mut tables, report_of(8, 6, both)).unwrap();
    assert_eq!(status(&tables).events, 4);
    assert_eq!(vitals(&tables, "digits").unwrap().errors_event, Some(4));
    let numbers: Vec<_> = signals(&tables, "digits")
        .iter()
        .map(|event| event.drift_event)
        .collect();
    let expected = [
        Some(1),
        Some(1),
        Some(1),
        None,
        Some(1),
        None,
        Some(2),
        Some(2),
        Some(3),
        None,
        Some(4),
    ];
    assert_eq!(numbers, expected);
}

#[test]
fn a_suggestion_lasts_while_windows_drift_or_answers_are_wrong_more_often() {
    let mut tables = MemoryTables::default();
    let suggested = |tables: &MemoryTables| {
        let suggestion = status(tables).retrain_suggestion;
        suggestion.map(|suggestion| suggestion.event)
    };
    let grew = || vec![stream(Stream::Errors, 0.1, 0.5)];
    let shrank = || vec![stream(Stream::Errors, 0.5, 0.1)];
    let about = About {
        endpoint: "digits",
        model: "digits",
        version: 1,
    };
    apply(&mut tables, report_of(7, 1, grew())).unwrap();
    window(&mut tables, 0, false);
    assert_eq!(suggested(&tables), Some(1));
    assert_eq!(findings::goes_on_ms(&tables, about), Some(9));
    window(&mut tables, 1, true);
    assert_eq!(suggested(&tables), Some(2));
    assert_eq!(findings::goes_on_ms(&tables, about), Some(10));
    apply(&mut tables, report_of(7, 2, shrank())).unwrap();
    assert_eq!(suggested(&tables), Some(2));
    window(&mut tables, 2, false);
    assert_eq!(suggested(&tables), None);
    assert_eq!(findings::goes_on_ms(&tables, about), None);

    // The errors end last.
    window(&mut tables, 3, true);
    apply(&mut tables, report_of(7, 3, grew())).unwrap();
    window(&mut tables, 4, false);
    assert_eq!(suggested(&tables), Some(4));
    let of_another = About {
        version: 2,
        ..about
    };
    assert_eq!(findings::goes_on_ms(&tables, of_another), None);
    apply(&mut tables, report_of(7, 4, shrank())).unwrap();
    assert_eq!(suggested(&tables), None);
}

#[test]
fn a_report_counts_once_and_an_older_one_is_fenced() {
    let mut tables = MemoryTables::default();
    let signals = || vec![stream(Stream::Confidence, 0.9, 0.5)];
    apply(&mut tables, report_of(7, 1, signals())).unwrap();
    apply(&mut tables, report_of(7, 1, signals())).unwrap();
    apply(&mut tables, report_of(7, 2, signals())).unwrap();
    let error = apply(&mut tables, report_of(6, 9, signals())).unwrap_err();
    assert_eq!(error.code, ErrorCode::Fenced);
    let known: Option<EndpointVitals> = ask(
        &tables,
        &Query::Vitals {
            endpoint: "digits".into(),
        },
    );
    let known = known.unwrap();
    assert_eq!((known.signals, known.signals_lost), (2, 2));
    assert_eq!((known.vitals.rows, known.reported_ms), (2, 9));
}

#[test]
fn the_first_window_counts_after_signals_have_made_the_row() {
    let mut tables = MemoryTables::default();
    apply(&mut tables, report_of(7, 1, Vec::new())).unwrap();
    assert_eq!(status(&tables).last.incarnation, 0);
    window(&mut tables, 0, true);
    let status = status(&tables);
    assert_eq!((status.windows, status.samples, status.events), (1, 200, 1));
}

#[test]
fn old_signals_go_and_a_forgotten_endpoint_has_none() {
    let mut tables = MemoryTables::default();
    let rounds = SIGNALS_KEPT + 5;
    for sequence in 1..=rounds {
        let signals = vec![stream(Stream::Confidence, 0.9, 0.5)];
        apply(&mut tables, report_of(7, sequence, signals)).unwrap();
    }
    let kept = signals(&tables, "digits");
    assert_eq!(kept.len() as u64, SIGNALS_KEPT);
    assert_eq!(kept[0].number, 6);

    for number in 0..findings::MONITORS_MAX {
        let report = VitalsReport {
            endpoint: format!("e{number}"),
            ..report_of(8, 1, Vec::new())
        };
        let context = ApplyContext {
            index: 3,
            term: 1,
            now_ms: 20 + number as u64,
        };
        let command = Command::Vitals(Box::new(report));
        tables
            .apply(&Drift, &context, &codec::encode_plain(&command))
            .unwrap();
    }
    assert_eq!(vitals(&tables, "digits"), None);
    assert_eq!(signals(&tables, "digits"), []);
    assert!(vitals(&tables, "e0").is_some());
}

#[test]
fn a_report_that_is_too_large_is_refused() {
    let mut tables = MemoryTables::default();
    let many = vec![stream(Stream::Confidence, 0.9, 0.5); SIGNALS_MAX + 1];
    let error = apply(&mut tables, report_of(7, 1, many)).unwrap_err();
    assert!(error.message.contains("33 signals"), "{error:?}");
    let long = Signal::Slice {
        slice: "x".repeat(SLICE_NAME_BYTES_MAX + 1),
        features_compared: 1,
        features_drifted: 1,
        prediction_drift: false,
    };
    let error = apply(&mut tables, report_of(7, 1, vec![long])).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    let mut wordy = report_of(7, 1, Vec::new());
    wordy.vitals.no_reference = Some("x".repeat(TEXT_BYTES_MAX + 1));
    let error = apply(&mut tables, wordy).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    let mut wordy = report_of(7, 1, Vec::new());
    let by_energy = &mut wordy.vitals.out_of_distribution_by_energy;
    by_energy.no_reference = Some("x".repeat(TEXT_BYTES_MAX));
    let error = apply(&mut tables, wordy).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert_eq!(vitals(&tables, "digits"), None);
}

#[test]
fn endpoints_are_counted_by_the_score_that_their_rows_are_out_by() {
    let mut tables = MemoryTables::default();
    let mut unsure = report_of(7, 1, Vec::new());
    unsure.vitals.out_of_distribution.last = Some(far());
    apply(&mut tables, unsure).unwrap();
    for endpoint in ["faces", "words"] {
        let mut report = report_of(7, 1, vec![Signal::OutOfDistributionByEnergy(far())]);
        report.endpoint = endpoint.into();
        report.vitals.out_of_distribution_by_energy.last = Some(far());
        apply(&mut tables, report).unwrap();
    }
    let expected = Troubled {
        unsure: 1,
        high_energy: 2,
        ..Troubled::default()
    };
    assert_eq!(troubled(&tables), expected);
    // It needs a person, as the other score does.
    let kept = signals(&tables, "faces");
    assert_eq!((kept.len(), kept[0].drift_event), (1, None));
}

#[test]
fn gauges_count_what_is_seen_of_all_endpoints() {
    let slice = |name: &str, drifts| SliceStatus {
        name: name.into(),
        rows: 400,
        windows: 2,
        features_compared: 64,
        features_drifted: if drifts { 40 } else { 0 },
        drifts,
        labelled: 0,
        accuracy: None,
        calibration_error: None,
        dropped: 0,
    };
    let mut tables = MemoryTables::default();
    let shown = |tables: &MemoryTables| -> Vec<(&'static str, u64)> {
        let gauges = Drift.gauges(tables).into_iter();
        gauges.map(|gauge| (gauge.name, gauge.value)).collect()
    };
    assert!(shown(&tables).iter().all(|(_, value)| *value == 0));

    // One that drifts in its windows, its answers and a slice; one that is far out with two wrong replicas; one that is well.
    let mut wrong = report_of(7, 1, vec![stream(Stream::Errors, 0.1, 0.5)]);
    wrong.vitals.slices = vec![slice("north", true), slice("south", false)];
    apply(&mut tables, wrong).unwrap();
    window(&mut tables, 0, true);
    let mut far_out = report_of(7, 1, Vec::new());
    far_out.endpoint = "faces".into();
    far_out.vitals.out_of_distribution.last = Some(far());
    far_out.vitals.out_of_distribution_by_energy.last = Some(far());
    far_out.vitals.sentinels.replicas_wrong = 2;
    far_out.vitals.slices = vec![slice("old", true), slice("young", true)];
    apply(&mut tables, far_out).unwrap();
    let mut well = report_of(7, 1, Vec::new());
    well.endpoint = "words".into();
    apply(&mut tables, well).unwrap();
    let expected = [
        ("mobula_drift_endpoints_drifting", 1),
        ("mobula_drift_endpoints_out_of_distribution", 1),
        ("mobula_drift_sentinel_replicas_wrong", 2),
        ("mobula_drift_endpoints_out_of_distribution_by_energy", 1),
        ("mobula_drift_endpoints_wrong_more_often", 1),
        ("mobula_drift_slices_drifting", 3),
    ];
    assert_eq!(shown(&tables), expected);

    // What has ended is counted no more.
    let shrank = vec![stream(Stream::Errors, 0.5, 0.1)];
    apply(&mut tables, report_of(7, 2, shrank)).unwrap();
    window(&mut tables, 1, false);
    let names_of_none: Vec<&str> = shown(&tables)
        .into_iter()
        .filter_map(|(name, value)| (value == 0).then_some(name))
        .collect();
    let expected = [
        "mobula_drift_endpoints_drifting",
        "mobula_drift_endpoints_wrong_more_often",
    ];
    assert!(
        expected.iter().all(|name| names_of_none.contains(name)),
        "{names_of_none:?}"
    );
}

#[test]
fn only_the_platform_reports() {
    let payload = codec::encode_plain(&Command::Vitals(Box::new(report_of(7, 1, Vec::new()))));
    let error = Drift.authorize(&Caller::Client, &payload).unwrap_err();
    assert_eq!(error.code, ErrorCode::PermissionDenied);
    let host = |job| Caller::Host {
        job,
        node: mobula_core::id::NodeId(1),
    };
    assert!(Drift.authorize(&host(JobId::SYSTEM), &payload).is_ok());
    assert!(Drift.authorize(&host(JobId(4)), &payload).is_err());
}

#[test]
fn signals_are_said_in_sentences() {
    let sentinel = Signal::Sentinel(Mismatch {
        replica: 2,
        sentinel: 3,
        expected: 7,
        answered: Some(1),
    });
    assert_eq!(
        sentinel.sentence(),
        "replica 2 answered sentinel 3 with class 1 instead of class 7"
    );
    let slice = Signal::Slice {
        slice: "north".into(),
        features_compared: 40,
        features_drifted: 30,
        prediction_drift: true,
    };
    assert_eq!(
        slice.sentence(),
        "in slice \"north\" 30 of 40 features drifted, and its predictions did"
    );
    assert_eq!(
        Signal::OutOfDistributionByEnergy(far()).sentence(),
        "90 % of 200 rows have a higher energy than 95 % of the reference has (mean energy -1.500 against -9.000, \
         p 2.0e-80)"
    );
}
