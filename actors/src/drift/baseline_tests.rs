use super::*;
use crate::drift::sketches::Population;
use crate::drift::statistics::testing::{Lcg, assert_close, golden_pair, sorted};

/// Rows that are the same numbers again and again.
fn reference(values: &[f32], rows: usize) -> Reference {
    let values: Vec<f32> = values.iter().copied().cycle().take(rows).collect();
    Reference::new(vec!["f".into()], &values, &[0]).unwrap()
}

fn baseline(reference: &Reference) -> Baseline {
    Baseline::all(reference).remove(0)
}

/// The first rows as the sample, all of them as the population.
fn sketched(values: &[f32]) -> Reference {
    let mut population = Population::new(&[f64::from(values[0])], 3, 0);
    population.add_rows(values);
    reference(values, 1000).with_population(population).unwrap()
}

#[test]
fn the_number_of_reference_rows_chooses_the_test() {
    let window = [[0.0; 10], [1.0; 10], [1.0; 10], [2.0; 10]].concat();
    for (rows, test) in [
        (5, Statistic::Ks),
        (1000, Statistic::Ks),
        (1001, Statistic::Wasserstein),
        (5000, Statistic::Wasserstein),
    ] {
        // More values than categories may have.
        let found = baseline(&reference(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], rows)).compare(&window);
        assert_eq!((found.test, found.reference_rows), (test, rows as u64));
    }
    // A sample of a thousand rows of more.
    let values: Vec<f32> = (0..1200).map(|i| i as f32).collect();
    let found = baseline(&sketched(&values)).compare(&window);
    assert_eq!(
        (found.test, found.reference_rows),
        (Statistic::Wasserstein, 1200)
    );
    assert!(
        found.error_max.unwrap() > 0.0 && found.p_value < 1e-9,
        "{found:?}"
    );
}

#[test]
fn a_column_of_few_values_is_compared_as_categories() {
    let window = [[0.0; 10], [1.0; 10], [1.0; 10], [2.0; 10]].concat();
    for (rows, test) in [
        (199, Statistic::Ks),
        (200, Statistic::ChiSquare),
        (1000, Statistic::ChiSquare),
        (1001, Statistic::JensenShannon),
    ] {
        let found = baseline(&reference(&[0.0, 1.0, 2.0], rows)).compare(&window);
        assert_eq!((found.test, found.reference_rows), (test, rows as u64));
        assert!(!found.is_one_value && found.error_max.is_none());
        assert_eq!(found.moved.is_empty(), test == Statistic::Ks);
    }
    // The rows that are kept are counted, and all rows choose the test.
    let values: Vec<f32> = (0..1200u16).map(|i| f32::from(i % 3)).collect();
    let found = baseline(&sketched(&values)).compare(&window);
    assert_eq!(
        (found.test, found.reference_rows),
        (Statistic::JensenShannon, 1000)
    );
}

/// Twice the golden reference is the same distribution, of more than a thousand rows.
#[test]
fn the_golden_pair_has_its_distance_and_a_sketch_is_as_close_as_it_says() {
    let (reference_values, current) = golden_pair();
    let values: Vec<f32> = reference_values.iter().map(|x| *x as f32).collect();
    let exact = baseline(&reference(&values, 2000)).compare(&current);
    // The features are of single precision.
    assert!(
        (exact.value - 0.346_237_129_551_626_9).abs() < 1e-6,
        "{exact:?}"
    );
    assert_eq!(exact.error_max, None);
    assert!(exact.p_value < 1e-9, "{exact:?}");

    let twice: Vec<f32> = values.iter().copied().cycle().take(2000).collect();
    let found = baseline(&sketched(&twice)).compare(&current);
    let error = found.error_max.unwrap();
    assert!(
        error < 0.02 && (found.value - exact.value).abs() <= error,
        "{found:?}"
    );
    assert!(
        (found.psi / exact.psi - 1.0).abs() < 0.1,
        "{} {}",
        found.psi,
        exact.psi
    );
}

/// What two hundred rows of the reference are away from it is above the threshold often, and never evidence.
#[test]
fn rows_of_the_reference_itself_are_no_evidence() {
    let mut random = Lcg::new(8);
    let mut sample = |count: usize| -> Vec<f32> {
        let value = |_| (0..12).map(|_| random.next_unit()).sum::<f64>() as f32 - 6.0;
        (0..count).map(value).collect()
    };
    let baseline = baseline(&sketched(&sample(20_000)));
    let mut large = 0;
    for _ in 0..100 {
        let window = sorted(sample(200).into_iter().map(f64::from).collect());
        let found = baseline.compare(&window);
        large += u32::from(found.value >= 0.1);
        assert!(found.p_value > 0.05, "{found:?}");
    }
    assert!(large > 10, "{large}");
}

#[test]
fn a_constant_reference_divides_by_a_thousandth() {
    let baseline = baseline(&reference(&[2.0], 2000));
    let same = baseline.compare(&[2.0; 30]);
    assert!(
        same.is_one_value && same.value == 0.0 && same.p_value == 1.0,
        "{same:?}"
    );
    let moved = baseline.compare(&[2.5; 30]);
    assert!(!moved.is_one_value && moved.p_value == 0.0, "{moved:?}");
    assert_close(moved.value, 500.0);
}
