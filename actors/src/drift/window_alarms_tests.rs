//! How soon a shift is found, and how often nothing is: simulations with seeds, which are printed.

use super::*;
use crate::drift::sketches::Population;
use crate::drift::statistics::testing::Lcg;

const FEATURES: usize = 100;
const WINDOW: usize = 200;

/// Nearly normal, with a standard deviation of one.
fn normal(random: &mut Lcg) -> f32 {
    let sum: f64 = (0..12).map(|_| random.next_unit()).sum();
    (sum - 6.0) as f32
}

fn row(random: &mut Lcg, features: usize, shift: f32) -> Vec<f32> {
    (0..features).map(|_| normal(random) + shift).collect()
}

/// Of so many training rows; of more than a thousand the reference is a sample and sketches, and the test another.
fn monitor(random: &mut Lcg, features: usize, rows: usize) -> WindowMonitor {
    let values: Vec<f32> = (0..rows).flat_map(|_| row(random, features, 0.0)).collect();
    let kept = rows.min(1000);
    let classes: Vec<u32> = (0..kept as u32).map(|row| row % 10).collect();
    let names = (0..features).map(|index| format!("f{index}")).collect();
    let mut reference = Reference::new(names, &values[..kept * features], &classes).unwrap();
    if rows > kept {
        let mut population = Population::new(&vec![0.0; features], 7, 0);
        population.add_rows(&values);
        reference = reference.with_population(population).unwrap();
    }
    WindowMonitor::new(reference, MonitorConfig::with_window_size(WINDOW)).unwrap()
}

/// Whether a shift that begins somewhere within a window is found within so many rows.
fn is_found(seed: u64, features: usize, training_rows: usize, shift: f32, within: usize) -> bool {
    let mut random = Lcg::new(seed);
    let mut monitor = monitor(&mut random, features, training_rows);
    for _ in 0..37 * seed {
        let row = row(&mut random, features, 0.0);
        monitor.observe(&row, 0).unwrap();
    }
    let found = (1..=within).find(|_| {
        let row = row(&mut random, features, shift);
        let closed = monitor.observe(&row, 0).unwrap();
        closed.is_some_and(|closed| closed.dataset_drift)
    });
    println!("seed {seed}, {features} features, {training_rows} training rows: {found:?}");
    found.is_some()
}

#[test]
fn half_a_deviation_is_found_within_five_hundred_rows() {
    for seed in [11, 12, 13] {
        for training_rows in [300, 1000, 5000] {
            assert!(is_found(seed, FEATURES, training_rows, 0.5, 500));
        }
    }
}

/// It has no others to back it: what chance explains once in thirty days takes more to be told from it.
#[test]
fn a_single_feature_takes_a_larger_shift_or_more_rows() {
    for seed in [11, 12, 13] {
        for training_rows in [300, 1000, 5000] {
            assert!(is_found(seed, 1, training_rows, 0.8, 500));
            assert!(is_found(seed, 1, training_rows, 0.5, 4000));
        }
    }
}

/// Windows of a hundred features: of thirty days there are a hundred times as many, which would take minutes.
const WINDOWS: usize = 400;

#[test]
fn a_hundred_features_that_stay_as_they_were_raise_nothing() {
    for (seed, rows) in [(21, 1000), (22, 5000)] {
        println!("seed {seed}, {rows} training rows");
        let mut random = Lcg::new(seed);
        let mut monitor = monitor(&mut random, FEATURES, rows);
        for _ in 0..WINDOWS * WINDOW {
            let row = row(&mut random, FEATURES, 0.0);
            let class = (random.next_unit() * 10.0) as u32;
            if let Some(closed) = monitor.observe(&row, class).unwrap() {
                assert!(!closed.dataset_drift && !closed.prediction.drifted);
                assert!(closed.drifted_columns <= 1, "{}", closed.drifted_columns);
            }
        }
    }
}

/// Alarms in windows of so many features that are one and the same value, and the windows in which half of them drift: without the
/// correction for looks, those would be the alarms.
fn alarms_of_one_value(seed: u64, features: usize, rows: usize, windows: u64) -> (u32, u32) {
    let mut random = Lcg::new(seed);
    let repeated = |value: f32| vec![value; features];
    let values: Vec<f32> = (0..rows)
        .flat_map(|_| repeated(normal(&mut random)))
        .collect();
    let names = (0..features).map(|index| format!("f{index}")).collect();
    let reference = Reference::new(names, &values, &vec![0; rows]).unwrap();
    let config = MonitorConfig::with_window_size(WINDOW);
    let mut monitor = WindowMonitor::new(reference, config).unwrap();
    let (mut alarms, mut uncorrected) = (0, 0);
    while monitor.closed_windows() < windows {
        let row = repeated(normal(&mut random));
        if let Some(closed) = monitor.observe(&row, 0).unwrap() {
            alarms += u32::from(closed.dataset_drift);
            uncorrected += u32::from(closed.drifted_columns * 2 >= closed.informative_columns);
        }
    }
    println!("seed {seed}, {features} features, {rows} rows: {alarms} alarms of {uncorrected}");
    (alarms, uncorrected)
}

/// Nothing backs a single feature: its test alone is corrected for the looks.
#[test]
fn one_feature_that_stays_as_it_was_raises_one_alarm_in_thirty_days_at_most() {
    for (seed, rows) in [(41, 300), (42, 1000)] {
        let (alarms, uncorrected) = alarms_of_one_value(seed, 1, rows, LOOKS as u64);
        assert!(alarms <= 1, "{alarms} alarms");
        // What the correction is for.
        assert!(uncorrected > 3, "{uncorrected}");
    }
}

/// Nor do features back each other that move as one, however many they are.
#[test]
fn features_that_move_as_one_raise_no_more_alarms_than_one_does() {
    let (alarms, uncorrected) = alarms_of_one_value(44, 10, 300, LOOKS as u64 / 10);
    assert_eq!(alarms, 0);
    assert!(uncorrected > 3, "{uncorrected}");
}

/// The predictions have one test a window, which no share of columns backs.
#[test]
fn predictions_that_stay_as_they_were_raise_one_alarm_in_thirty_days_at_most() {
    let seed = 31;
    println!("seed {seed}");
    let mut random = Lcg::new(seed);
    let classes: Vec<u32> = (0..1000).map(|row| row % 10).collect();
    let reference = Reference::new(vec!["f".into()], &[0.0], &classes).unwrap();
    let config = MonitorConfig::with_window_size(WINDOW);
    let mut monitor = WindowMonitor::new(reference, config).unwrap();
    let (mut alarms, mut uncorrected) = (0, 0);
    while (monitor.closed_windows() as f64) < LOOKS {
        let class = (random.next_unit() * 10.0) as u32;
        if let Some(closed) = monitor.observe(&[0.0], class).unwrap() {
            alarms += u32::from(closed.prediction.drifted);
            uncorrected += u32::from(closed.prediction.p_value <= 0.05);
        }
    }
    assert!(alarms <= 1, "{alarms} alarms");
    // What the correction is for.
    assert!(uncorrected > 100, "{uncorrected}");
}
