//! The monitor on data shaped like small images: columns that never change, that are mostly zero, and that vary.

use super::*;
use crate::drift::sketches::Population;
use crate::drift::statistics::testing::Lcg;

const COLUMNS: usize = 64;

/// One "image": a third of the pixels are always 0, a third mostly 0, a third noisy; values are whole numbers 0–16.
fn image(random: &mut Lcg) -> Vec<f32> {
    (0..COLUMNS)
        .map(|pixel| match pixel % 3 {
            0 => 0.0,
            1 if random.next_unit() < 0.85 => 0.0,
            _ => (random.next_unit() * random.next_unit() * 17.0).floor() as f32,
        })
        .collect()
}

fn reference(random: &mut Lcg) -> Reference {
    let values: Vec<f32> = (0..1_437).flat_map(|_| image(random)).collect();
    let classes: Vec<u32> = (0..1_437).map(|row| row % 10).collect();
    let names = (0..COLUMNS).map(|pixel| format!("pixel_{pixel}")).collect();
    Reference::new(names, &values, &classes).unwrap()
}

fn monitor(window_size: usize, random: &mut Lcg) -> WindowMonitor {
    WindowMonitor::new(
        reference(random),
        MonitorConfig::with_window_size(window_size),
    )
    .unwrap()
}

/// Feeds rows until a window closes.
fn window(
    monitor: &mut WindowMonitor,
    random: &mut Lcg,
    change: impl Fn(f32) -> f32,
    class: impl Fn(f64) -> u32,
) -> WindowReport {
    loop {
        let row: Vec<f32> = image(random).into_iter().map(&change).collect();
        let class = class(random.next_unit());
        if let Some(report) = monitor.observe(&row, class).unwrap() {
            return report;
        }
    }
}

fn any_class(unit: f64) -> u32 {
    (unit * 10.0) as u32
}

#[test]
fn null_windows_raise_no_alarm() {
    let mut random = Lcg::new(1);
    for window_size in [50, 200] {
        let mut monitor = monitor(window_size, &mut random);
        for index in 0..60 {
            let report = window(&mut monitor, &mut random, |value| value, any_class);
            assert_eq!(report.window_index, index);
            assert_eq!(report.samples, window_size as u64);
            assert!(!report.dataset_drift, "window {index}");
            assert!(
                !report.prediction.drifted,
                "window {index}: {:?}",
                report.prediction
            );
            assert!(
                report.drifted_columns <= 2,
                "window {index}: {}",
                report.drifted_columns
            );
            // The 22 constant columns are not informative, do not drift and do not divide by zero.
            assert_eq!(report.informative_columns, 42);
            assert!(report.features.iter().all(|row| row.value.is_finite()));
        }
    }
}

#[test]
fn shifted_windows_name_their_features() {
    let mut random = Lcg::new(2);
    let mut monitor = monitor(100, &mut random);
    for change in [
        |value: f32| 16.0 - value,
        |value: f32| value + 3.0,
        |value: f32| value * 0.3,
    ] {
        let report = window(&mut monitor, &mut random, change, any_class);
        // Scaling leaves the mostly-zero columns almost as they were: half of the informative ones remain.
        assert!(report.drifted_columns >= 21, "{}", report.drifted_columns);
        assert!(report.dataset_drift);
        let worst = report.worst_features(3);
        assert_eq!(worst.len(), 3);
        for row in worst {
            assert_eq!((row.statistic, row.threshold), (Statistic::Psi, 0.25));
            assert_eq!((row.reference_count, row.current_count), (1_437, 100));
            assert!(
                row.value >= row.threshold && row.feature.starts_with("pixel_"),
                "{row:?}"
            );
        }
    }
    let back = window(&mut monitor, &mut random, |value| value, any_class);
    assert!(!back.dataset_drift, "a tumbling window forgets");
}

#[test]
fn a_constant_column_that_moves_is_informative_and_drifts() {
    let values = vec![0.0; 500];
    let reference = Reference::new(vec!["always_zero".into()], &values, &[0]).unwrap();
    let config = MonitorConfig::with_window_size(20);
    let mut monitor = WindowMonitor::new(reference, config).unwrap();
    let mut last = None;
    for _ in 0..20 {
        last = monitor.observe(&[5.0], 0).unwrap();
    }
    let report = last.unwrap();
    assert_eq!((report.informative_columns, report.drifted_columns), (1, 1));
    assert!(report.dataset_drift && !report.prediction.drifted);
}

#[test]
fn all_columns_constant_is_no_drift() {
    let reference = Reference::new(vec!["a".into(), "b".into()], &[0.0; 100], &[0]).unwrap();
    let mut monitor = WindowMonitor::new(reference, MonitorConfig::with_window_size(20)).unwrap();
    let mut last = None;
    for _ in 0..20 {
        last = monitor.observe(&[0.0, 0.0], 0).unwrap();
    }
    let report = last.unwrap();
    assert_eq!(
        (report.informative_columns, report.dataset_drift),
        (0, false)
    );
}

#[test]
fn collapsed_predictions_drift_without_drift_of_the_data() {
    let mut random = Lcg::new(3);
    let mut monitor = monitor(100, &mut random);
    let report = window(&mut monitor, &mut random, |value| value, |_| 4);
    assert!(
        report.prediction.drifted && !report.dataset_drift,
        "{:?}",
        report.prediction
    );
    let unseen = window(&mut monitor, &mut random, |value| value, |_| 99);
    assert!(
        unseen.prediction.drifted,
        "a class the reference never saw: {:?}",
        unseen.prediction
    );
    assert_eq!(unseen.prediction.current_count, 100);
}

#[test]
fn refused_observations_leave_the_window_as_it_was() {
    let mut random = Lcg::new(4);
    let mut monitor = monitor(50, &mut random);
    monitor.observe(&image(&mut random), 0).unwrap();
    let error = monitor.observe(&[0.0; 63], 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "expected 64 features as in the reference, got 63"
    );
    let mut row = image(&mut random);
    row[7] = f32::INFINITY;
    let error = monitor.observe(&row, 0).unwrap_err();
    assert!(
        error.to_string().contains("\"pixel_7\" has the value inf"),
        "{error}"
    );
    assert_eq!(
        (monitor.pending_samples(), monitor.closed_windows()),
        (1, 0)
    );
}

#[test]
fn configuration_is_checked_by_key() {
    let refused = |change: fn(&mut MonitorConfig)| {
        let mut config = MonitorConfig::with_window_size(100);
        change(&mut config);
        WindowMonitor::new(reference(&mut Lcg::new(5)), config)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(|config| config.window_size = 5).contains("window_size 5"));
    assert!(refused(|config| config.window_size = 1 << 30).contains("outside 20..=10000"));
    assert!(refused(|config| config.psi_threshold = f64::NAN).contains("psi_threshold NaN"));
    assert!(refused(|config| config.p_threshold = 1.5).contains("p_threshold 1.5"));
    assert!(refused(|config| config.drifted_share_threshold = 0.0).contains("above 0"));
    assert!(refused(|config| config.dataset_p_threshold = 0.0).contains("dataset_p_threshold 0"));
}

#[test]
fn reports_travel_as_json() {
    let mut random = Lcg::new(6);
    let mut monitor = monitor(20, &mut random);
    let report = window(&mut monitor, &mut random, |value| value, any_class);
    let json = serde_json::to_string(&report).unwrap();
    assert!(json.contains(r#""statistic":"psi""#));
    assert_eq!(
        serde_json::from_str::<WindowReport>(&json)
            .unwrap()
            .features
            .len(),
        128
    );
}

/// The digits of the project's own training data: pixels 0–16, the label last.
fn digits() -> Vec<(Vec<f32>, u32)> {
    use std::io::Read;
    let mut text = String::new();
    flate2::read::GzDecoder::new(&include_bytes!("../../data/digits.csv.gz")[..])
        .read_to_string(&mut text)
        .unwrap();
    let rows = text.lines().map(|line| {
        let mut values: Vec<f32> = line
            .split(',')
            .map(|value| value.parse().unwrap())
            .collect();
        let label = values.pop().unwrap() as u32;
        (values, label)
    });
    rows.collect()
}

#[test]
fn held_out_digits_raise_no_alarm_and_shifted_ones_do() {
    let mut rows = digits();
    // The file's labels run 0, 1, … 9 over long stretches: unshuffled windows really have other classes.
    let mut random = Lcg::new(7);
    for last in (1..rows.len()).rev() {
        rows.swap(last, (random.next_unit() * (last + 1) as f64) as usize);
    }
    let (mut reference_values, mut reference_classes, mut held_out) = (vec![], vec![], vec![]);
    for (index, (pixels, label)) in rows.into_iter().enumerate() {
        if index % 5 == 4 {
            held_out.push((pixels, label));
        } else {
            reference_values.extend(pixels);
            reference_classes.push(label);
        }
    }
    let names = (0..COLUMNS).map(|pixel| format!("pixel_{pixel}")).collect();
    let exact = Reference::new(names, &reference_values, &reference_classes).unwrap();
    let mut population = Population::new(&[5.0; COLUMNS], 7, 0);
    population.add_rows(&reference_values);
    let sketched = exact.clone().with_population(population).unwrap();
    for (window_size, reference) in [50, 100, 200]
        .into_iter()
        .flat_map(|size| [(size, &exact), (size, &sketched)])
    {
        let config = MonitorConfig::with_window_size(window_size);
        let mut monitor = WindowMonitor::new(reference.clone(), config).unwrap();
        let mut reports = |change: fn(f32) -> f32| -> Vec<WindowReport> {
            let observed =
                held_out
                    .iter()
                    .cycle()
                    .take(window_size * 6)
                    .filter_map(|(row, label)| {
                        let row: Vec<f32> = row.iter().copied().map(change).collect();
                        monitor.observe(&row, *label).unwrap()
                    });
            observed.collect()
        };
        for report in reports(|value| value) {
            assert!(!report.dataset_drift);
            assert!(!report.prediction.drifted, "{:?}", report.prediction);
            assert!(report.drifted_columns <= 3, "{}", report.drifted_columns);
        }
        for report in reports(|value| 16.0 - value) {
            assert!(report.dataset_drift, "{}", report.drifted_columns);
        }
        for report in reports(|value| (value + 4.0).min(16.0)) {
            assert!(report.dataset_drift, "{}", report.drifted_columns);
        }
    }
}
