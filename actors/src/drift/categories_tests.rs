use statrs::function::factorial::ln_binomial;

use super::*;
use crate::drift::sketches::Population;
use crate::drift::statistics::testing::{Lcg, assert_close};
use crate::drift::window::LOOKS;
use crate::drift::{MonitorConfig, Reference, WindowMonitor, WindowReport};

const WINDOW: usize = 200;

/// The shares of 0, 1 and 2 in the training rows.
const TRAINED: [f64; 3] = [0.5, 0.3, 0.2];

/// Values, each so many times.
fn repeated<T: Copy>(counts: &[(T, usize)]) -> Vec<T> {
    let times = |(value, count): &(T, usize)| std::iter::repeat_n(*value, *count);
    counts.iter().flat_map(times).collect()
}

fn reference(counts: &[(f32, usize)]) -> Reference {
    Reference::new(vec!["f".into()], &repeated(counts), &[0]).unwrap()
}

/// The first thousand rows as the sample, all of them as the population.
fn sampled(values: &[f32]) -> Reference {
    let mut population = Population::new(&[0.0], 3, 0);
    population.add_rows(values);
    let sample = Reference::new(vec!["f".into()], &values[..1000], &[0]).unwrap();
    sample.with_population(population).unwrap()
}

fn categories(reference: &Reference) -> Option<Categories> {
    let population = reference.population();
    let feature = population.map(|population| &population.features()[0]);
    Categories::of(&reference.columns()[0], feature)
}

#[test]
fn two_to_five_values_of_enough_rows_are_categories() {
    let is_one = |counts: &[(f32, usize)]| categories(&reference(counts)).is_some();
    assert!(is_one(&[(0.0, 100), (1.0, 100)]));
    assert!(is_one(&[
        (0.0, 196),
        (1.0, 1),
        (2.0, 1),
        (3.5, 1),
        (-4.0, 1)
    ]));
    assert!(!is_one(&[(7.0, 200)]), "one value is a number");
    let six: Vec<(f32, usize)> = (0..6u8).map(|value| (f32::from(value), 40)).collect();
    assert!(!is_one(&six));
    assert!(!is_one(&[(0.0, 100), (1.0, 99)]), "of too few rows");
    // Zero has one sign.
    assert!(!is_one(&[(0.0, 100), (-0.0, 100)]));
    let both = categories(&reference(&[(-0.0, 100), (0.0, 50), (1.0, 50)])).unwrap();
    assert_eq!(both.counts, [(0.0, 150), (1.0, 50)]);
    assert!(both.counts[0].0.is_sign_positive());
    let same = both.beside(&repeated(&[(-0.0, 60), (0.0, 70), (1.0, 70)]));
    assert_eq!(same[0].current, 130);
}

#[test]
fn the_number_of_training_rows_chooses_the_test() {
    let test = |reference: &Reference| categories(reference).map(|known| known.test);
    let of_rows = |rows: usize| reference(&[(0.0, rows - 100), (1.0, 100)]);
    assert_eq!(test(&of_rows(1000)), Some(Statistic::ChiSquare));
    assert_eq!(test(&of_rows(1001)), Some(Statistic::JensenShannon));
    // Of more rows than are kept those that are kept are counted.
    let three: Vec<f32> = (0..5000u16).map(|row| f32::from(row % 3)).collect();
    let known = categories(&sampled(&three)).unwrap();
    assert_eq!(known.test, Statistic::JensenShannon);
    assert_eq!(known.counts, [(0.0, 334), (1.0, 333), (2.0, 333)]);
    // All rows have more values than the sample happens to have.
    let more = |row: u16| if row < 1000 { row % 3 } else { row % 9 };
    let nine: Vec<f32> = (0..5000).map(|row| f32::from(more(row))).collect();
    assert_eq!(test(&sampled(&nine)), None);
}

/// The counts of the reference values. Both sides are samples here, so that the test is that of a table of both
/// (`statistics` has the value against expected counts as well).
#[test]
fn the_golden_counts_have_their_statistics() {
    let window = repeated(&[(0.0, 450), (1.0, 320), (2.0, 230)]);
    let counts = [(0.0, 500), (1.0, 300), (2.0, 200)];
    let found = categories(&reference(&counts)).unwrap().compare(&window);
    assert_eq!(found.test, Statistic::ChiSquare);
    assert_close(found.value, 5.369_763_493_504_955);
    assert_close(found.p_value, 0.068_229_261_871_073_86);
    let moved: Vec<Option<f32>> = found.moved.iter().map(|category| category.value).collect();
    assert_eq!(moved, [Some(0.0), Some(2.0), Some(1.0)]);

    let twice = counts.map(|(value, count)| (value, 2 * count));
    let many = categories(&reference(&twice)).unwrap().compare(&window);
    assert_eq!(many.test, Statistic::JensenShannon);
    assert_close(many.value, 0.036_649_669_186_548_04);
    assert_close(many.p_value, 0.027_667_634_783_212_22);
    assert_close(many.psi, found.psi);
}

#[test]
fn rare_values_are_one_category_however_many_they_are() {
    let known = categories(&reference(&[(0.0, 195), (1.0, 5)])).unwrap();
    let rows = |value, reference, current| Rows {
        value,
        reference,
        current,
    };
    let singles: Vec<f64> = (10..16).map(f64::from).collect();
    let of_window = [repeated(&[(0.0, 190), (1.0, 4)]), singles].concat();
    assert_eq!(
        known.beside(&of_window),
        [rows(Some(0.0), 195, 190), rows(None, 5, 10)]
    );
    // Ten of both are enough.
    assert_eq!(
        known.beside(&repeated(&[(0.0, 195), (1.0, 5)]))[1],
        rows(Some(1.0), 5, 5)
    );
    // A single rare value has a name.
    assert_eq!(
        known.beside(&repeated(&[(0.0, 200)]))[1],
        rows(Some(1.0), 5, 0)
    );
    // Nothing of a window makes many of them.
    let all_differ: Vec<f64> = (0..10_000).map(|row| 2.0 + f64::from(row)).collect();
    assert_eq!(known.beside(&all_differ).len(), 2);
    let in_tens: Vec<f64> = (0..10_000).map(|row| f64::from(2 + row / 10)).collect();
    assert_eq!(known.beside(&in_tens).len(), 1002);
}

/// A column that is zero but for numbers that hardly ever repeat: the reference happens to have few of them.
#[test]
fn a_few_more_rows_of_values_that_never_repeat_are_no_large_shift() {
    let counts = [(0.0, 996), (1.5, 1), (2.5, 1), (3.5, 1), (4.5, 1)];
    let known = categories(&reference(&counts)).unwrap();
    let new: Vec<f64> = (0..9).map(|row| 5.25 + f64::from(row)).collect();
    let found = known.compare(&[vec![0.0; 191], new].concat());
    assert!(found.psi < 0.15, "{found:?}");
}

fn draw(random: &mut Lcg, shares: [f64; 3]) -> f32 {
    let unit = random.next_unit();
    if unit < shares[0] {
        0.0
    } else if unit < shares[0] + shares[1] {
        1.0
    } else {
        2.0
    }
}

fn monitor(random: &mut Lcg, features: usize, rows: usize) -> WindowMonitor {
    let values: Vec<f32> = (0..rows * features)
        .map(|_| draw(random, TRAINED))
        .collect();
    let names = (0..features).map(|index| format!("f{index}")).collect();
    let reference = Reference::new(names, &values, &[0]).unwrap();
    WindowMonitor::new(reference, MonitorConfig::with_window_size(WINDOW)).unwrap()
}

/// A whole window of one feature.
fn window(monitor: &mut WindowMonitor, mut value: impl FnMut(usize) -> f32) -> WindowReport {
    (0..WINDOW)
        .find_map(|row| monitor.observe(&[value(row)], 0).unwrap())
        .unwrap()
}

#[test]
fn categories_that_are_shifted_are_found_and_others_are_not() {
    for (rows, test) in [
        (1000, Statistic::ChiSquare),
        (3000, Statistic::JensenShannon),
    ] {
        let mut random = Lcg::new(5);
        let mut monitor = monitor(&mut random, 1, rows);
        for _ in 0..20 {
            let quiet = window(&mut monitor, |_| draw(&mut random, TRAINED));
            assert_eq!(quiet.features[1].statistic, test);
            assert!(!quiet.dataset_drift, "{quiet:?}");
        }
        let shifted = window(&mut monitor, |_| draw(&mut random, [0.2, 0.3, 0.5]));
        assert!(shifted.dataset_drift, "{shifted:?}");
        let found = &shifted.features[1];
        assert!(found.exceeded && found.drifted, "{found:?}");
        let moved: Vec<f32> = found.categories[..2]
            .iter()
            .filter_map(|category| category.value)
            .collect();
        assert!(moved.contains(&0.0) && moved.contains(&2.0), "{found:?}");
        assert!(shifted.features[0].categories.is_empty());
    }
}

#[test]
fn a_value_that_the_reference_has_not_is_found() {
    for rows in [1000, 3000] {
        let mut random = Lcg::new(6);
        let mut monitor = monitor(&mut random, 1, rows);
        let found = window(&mut monitor, |row| match row % 10 {
            0 => 7.0,
            _ => draw(&mut random, TRAINED),
        });
        assert!(found.dataset_drift, "{found:?}");
        let new = Category {
            value: Some(7.0),
            reference_share: 0.0,
            current_share: 0.1,
        };
        assert_eq!(new.name(), "7");
        assert!(found.features[1].categories.contains(&new), "{found:?}");
    }
}

#[test]
fn a_hundred_features_of_categories_that_stay_as_they_were_raise_nothing() {
    const FEATURES: usize = 100;
    let mut random = Lcg::new(9);
    let mut monitor = monitor(&mut random, FEATURES, 1000);
    for _ in 0..100 * WINDOW {
        let row: Vec<f32> = (0..FEATURES).map(|_| draw(&mut random, TRAINED)).collect();
        if let Some(closed) = monitor.observe(&row, 0).unwrap() {
            assert!(!closed.dataset_drift);
            assert!(closed.drifted_columns <= 1, "{}", closed.drifted_columns);
        }
    }
}

/// How often so many of these rows have a value of this share; those that hardly ever occur are left out.
fn binomial(rows: usize, share: f64) -> Vec<(usize, f64)> {
    let probability = |hits: usize| {
        let misses = rows - hits;
        let ways = ln_binomial(rows as u64, hits as u64);
        (ways + hits as f64 * share.ln() + misses as f64 * (1.0 - share).ln()).exp()
    };
    let of_each = (0..=rows).map(|hits| (hits, probability(hits)));
    of_each
        .filter(|(_, probability)| *probability > 1e-12)
        .collect()
}

/// All that chance can make of one feature of two values, each with its probability: χ² is an approximation, and PSI has to be large as
/// well, so that together they keep what the thresholds promise.
#[test]
fn two_values_that_stay_as_they_were_keep_the_budget_of_alarms() {
    let config = MonitorConfig::with_window_size(WINDOW);
    for rows in [REFERENCE_ROWS_MIN, 300, 1000] {
        for share in [0.01, 0.02, 0.05, 0.1, 0.2, 0.5] {
            let of_window = binomial(WINDOW, share);
            let mut alarms = 0.0;
            for (hits, how_often) in binomial(rows, share) {
                if hits == 0 || hits == rows {
                    // One value is a number.
                    continue;
                }
                let known = Categories {
                    counts: vec![(0.0, (rows - hits) as u64), (1.0, hits as u64)],
                    test: Statistic::ChiSquare,
                };
                for (ones, probability) in &of_window {
                    let window = repeated(&[(0.0, WINDOW - ones), (1.0, *ones)]);
                    let found = known.compare(&window);
                    let drifts = found.psi >= config.psi_threshold
                        && found.p_value <= config.dataset_p_threshold;
                    if drifts {
                        alarms += how_often * probability * LOOKS;
                    }
                }
            }
            println!("{rows} rows, share {share}: {alarms} alarms");
            assert!(alarms <= 0.05, "{rows} rows, share {share}: {alarms}");
        }
    }
}
