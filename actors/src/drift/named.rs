//! What of a window's report people read: the predictions if they drift, then the features that do, from the worst on.

use super::categories::Category;
use super::findings::{DRIFTED_MAX, Drifted};
use super::window::{FeatureDrift, WindowReport};

/// Features of categories whose categories are named, so that reports stay small: a person reads no more of them.
const CATEGORIES_OF_MAX: usize = 8;

/// All that drifted; of a feature PSI first, then its test, then of categories the shares of those that moved most.
pub(super) fn drifted(closed: &WindowReport) -> Vec<Drifted> {
    let prediction = &closed.prediction;
    let mut drifted = Vec::new();
    if prediction.drifted {
        drifted.push(Drifted {
            feature: "prediction".to_owned(),
            statistic: "jensen_shannon".to_owned(),
            value: prediction.jensen_shannon,
            p_value: Some(prediction.p_value),
            threshold: prediction.distance_threshold,
            reference_count: prediction.reference_count,
            current_count: prediction.current_count,
        });
    }
    let mut with_categories = 0;
    for worst in closed.worst_features(DRIFTED_MAX) {
        let of_column = closed
            .features
            .iter()
            .filter(|row| row.feature == worst.feature);
        for row in of_column {
            drifted.push(statistic(row));
            if !row.categories.is_empty() && with_categories < CATEGORIES_OF_MAX {
                with_categories += 1;
                drifted.extend(row.categories.iter().map(|category| share(row, category)));
            }
        }
    }
    drifted
}

fn statistic(row: &FeatureDrift) -> Drifted {
    Drifted {
        feature: row.feature.clone(),
        statistic: row.statistic.as_str().to_owned(),
        value: row.value,
        p_value: row.p_value,
        threshold: row.threshold,
        reference_count: row.reference_count,
        current_count: row.current_count,
    }
}

fn share(row: &FeatureDrift, category: &Category) -> Drifted {
    Drifted {
        statistic: format!("share of {}", category.name()),
        value: category.current_share,
        p_value: None,
        threshold: category.reference_share,
        ..statistic(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drift::{MonitorConfig, Reference, WindowMonitor};

    /// A window of the value 2 in the place of 1 in many columns of zeros and ones, and of one with more values.
    #[test]
    fn the_test_and_the_categories_that_moved_most_are_named() {
        const ROWS: usize = 200;
        let columns = CATEGORIES_OF_MAX + 2;
        let names = (0..columns).map(|column| format!("f{column}")).collect();
        let row = |number: usize, one: f32| -> Vec<f32> {
            let category = if number.is_multiple_of(2) { 0.0 } else { one };
            let mut row = vec![category; columns];
            row[0] = number as f32 + one;
            row
        };
        let values: Vec<f32> = (0..ROWS).flat_map(|number| row(number, 1.0)).collect();
        let reference = Reference::new(names, &values, &[0]).unwrap();
        let config = MonitorConfig::with_window_size(ROWS);
        let mut monitor = WindowMonitor::new(reference, config).unwrap();
        let closed = (0..ROWS).find_map(|number| monitor.observe(&row(number, 2.0), 0).unwrap());
        let found = drifted(&closed.unwrap());
        let of = |feature: &str| -> Vec<(String, f64, f64)> {
            let rows = found.iter().filter(|row| row.feature == feature);
            rows.map(|row| (row.statistic.clone(), row.value, row.threshold))
                .collect()
        };
        let first = of("f1");
        assert_eq!(
            (first[0].0.as_str(), first[1].0.as_str()),
            ("psi", "chi_square")
        );
        assert_eq!(
            first[2..],
            [
                ("share of 1".to_owned(), 0.0, 0.5),
                ("share of 2".to_owned(), 0.5, 0.0)
            ]
        );
        assert_eq!(of(&format!("f{CATEGORIES_OF_MAX}")).len(), 4);
        // No more are named than a report has room for.
        assert_eq!(of(&format!("f{}", columns - 1)).len(), 2);
        // Numbers that moved by one of two hundred.
        assert!(of("f0").is_empty());
        assert_eq!(found[0].reference_count, ROWS as u64);
    }
}
