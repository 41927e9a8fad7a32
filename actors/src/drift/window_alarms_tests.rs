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

fn row(random: &mut Lcg, shift: f32) -> Vec<f32> {
    (0..FEATURES).map(|_| normal(random) + shift).collect()
}

/// Of so many training rows; of more than a thousand the reference is a sample and sketches, and the test another.
fn monitor(random: &mut Lcg, rows: usize) -> WindowMonitor {
    let values: Vec<f32> = (0..rows).flat_map(|_| row(random, 0.0)).collect();
    let classes: Vec<u32> = (0..1000).map(|row| row % 10).collect();
    let names = (0..FEATURES).map(|index| format!("f{index}")).collect();
    let mut reference = Reference::new(names, &values[..1000 * FEATURES], &classes).unwrap();
    if rows > 1000 {
        let mut population = Population::new(&[0.0; FEATURES], 7, 0);
        population.add_rows(&values);
        reference = reference.with_population(population).unwrap();
    }
    WindowMonitor::new(reference, MonitorConfig::with_window_size(WINDOW)).unwrap()
}

#[test]
fn half_a_deviation_is_found_within_five_hundred_rows() {
    for (seed, rows) in [11, 12, 13]
        .into_iter()
        .flat_map(|seed| [(seed, 1000), (seed, 5000)])
    {
        println!("seed {seed}, {rows} training rows");
        let mut random = Lcg::new(seed);
        let mut monitor = monitor(&mut random, rows);
        // Somewhere within a window.
        for _ in 0..37 * seed {
            let row = row(&mut random, 0.0);
            monitor.observe(&row, 0).unwrap();
        }
        let found = (1..=500).find(|_| {
            let row = row(&mut random, 0.5);
            let closed = monitor.observe(&row, 0).unwrap();
            closed.is_some_and(|closed| closed.dataset_drift)
        });
        assert!(found.is_some(), "seed {seed}, {rows} training rows");
    }
}

#[test]
fn a_hundred_features_that_stay_as_they_were_raise_nothing() {
    for (seed, rows) in [(21, 1000), (22, 5000)] {
        println!("seed {seed}, {rows} training rows");
        let mut random = Lcg::new(seed);
        let mut monitor = monitor(&mut random, rows);
        for _ in 0..40 * WINDOW {
            let row = row(&mut random, 0.0);
            let class = (random.next_unit() * 10.0) as u32;
            if let Some(closed) = monitor.observe(&row, class).unwrap() {
                assert!(!closed.dataset_drift && !closed.prediction.drifted);
                assert!(closed.drifted_columns <= 1, "{}", closed.drifted_columns);
            }
        }
    }
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
