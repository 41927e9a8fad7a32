//! Features of few values, which are compared as categories: it counts how often each value comes, and not how large it is.
//!
//! 1. Whether a feature is one of categories follows from its reference alone, and is stored nowhere: from two to [`CATEGORIES_MAX`]
//!    values in at least [`REFERENCE_ROWS_MIN`] rows. Windows and slices cannot change it.
//! 2. Two values are the same category if they are the same number of single precision: its bits, but `-0` is `0`. NaN and infinities
//!    are in no reference, and rows that have any are in no window.
//! 3. A value that the reference has not is a category of its own. Those that both together have fewer than [`RARE_BELOW`] times are
//!    one: χ² would take a few rows of many rare values for evidence. Which ones these are depends on the sum of both
//!    counts, so that it favours neither side.
//! 4. A window of `n` rows has no more than `CATEGORIES_MAX + n / RARE_BELOW + 1` categories, whatever comes.

use serde::{Deserialize, Serialize};

use super::baseline::KS_ROWS_MAX;
use super::reference::ReferenceColumn;
use super::sketches::FeaturePopulation;
use super::statistics::{chi_square_homogeneity, jensen_shannon_distance, psi_of_counts};
use super::window::Statistic;

/// Values that a feature of categories has at most. In a window of two hundred rows each then comes forty times or so, which the tests of
/// counts are exact enough for; with more of them their order is worth more than their names.
pub(super) const CATEGORIES_MAX: usize = 5;

/// Rows that tell how many values a feature has: as many as a window has. Five rows have five values at most, of whatever feature.
pub(super) const REFERENCE_ROWS_MIN: usize = 200;

/// Values that reference and window together have fewer times than this are one category.
pub(super) const RARE_BELOW: u64 = 10;

/// Categories of a feature that are named at most: those that moved most.
pub(super) const MOVED_MAX: usize = 3;

const NOT_EMPTY: &str = "neither a reference nor a closed window is empty";

/// How often a category comes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Category {
    /// The value; nothing for all rare values together.
    pub value: Option<f32>,
    /// The share of the reference's rows that have it, in `[0, 1]`; `0` of a value that the reference has not.
    pub reference_share: f64,
    /// The share of the window's rows.
    pub current_share: f64,
}

impl Category {
    /// As reports name it.
    #[must_use]
    pub fn name(&self) -> String {
        self.value
            .map_or_else(|| "rare values".to_owned(), |value| value.to_string())
    }

    fn moved_by(&self) -> f64 {
        (self.current_share - self.reference_share).abs()
    }
}

/// The categories of a reference column.
#[derive(Debug)]
pub(super) struct Categories {
    /// Ascending values, each with its rows.
    counts: Vec<(f64, u64)>,
    test: Statistic,
}

/// The categories of a window beside those of its reference.
#[derive(Debug)]
pub(super) struct Compared {
    /// The population stability index over the categories.
    pub(super) psi: f64,
    /// χ², or Jensen-Shannon.
    pub(super) test: Statistic,
    /// Its statistic.
    pub(super) value: f64,
    /// The p-value of χ², not corrected for the number of columns.
    pub(super) p_value: f64,
    /// The categories that moved most, the farthest first; none that did not move.
    pub(super) moved: Vec<Category>,
}

/// Rows of a category.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rows {
    value: Option<f64>,
    reference: u64,
    current: u64,
}

impl Categories {
    /// Those of a column, if it is one of categories. The rows that are kept are counted, each value exactly; of all training
    /// rows, where they are more and known by a sketch, is only asked whether there are more values than that.
    pub(super) fn of(
        column: &ReferenceColumn,
        population: Option<&FeaturePopulation>,
    ) -> Option<Categories> {
        let values = column.sorted_values();
        if values.len() < REFERENCE_ROWS_MIN {
            return None;
        }
        let counts: Vec<(f64, u64)> = values
            .chunk_by(|a, b| a == b)
            .take(CATEGORIES_MAX + 1)
            .map(|same| (unsigned_zero(f64::from(same[0])), same.len() as u64))
            .collect();
        if !(2..=CATEGORIES_MAX).contains(&counts.len()) {
            return None;
        }
        // What is in different bins differs: so many values at the least.
        let has_more =
            |feature: &FeaturePopulation| feature.values().points().len() > CATEGORIES_MAX;
        if population.is_some_and(has_more) {
            return None;
        }
        let training_rows = population.map_or(values.len() as u64, FeaturePopulation::count);
        let test = if training_rows <= KS_ROWS_MAX {
            Statistic::ChiSquare
        } else {
            Statistic::JensenShannon
        };
        Some(Categories { counts, test })
    }

    /// Compares an ascending column of a window, which is not empty.
    pub(super) fn compare(&self, current: &[f64]) -> Compared {
        let categories = self.beside(current);
        let reference: Vec<u64> = categories.iter().map(|rows| rows.reference).collect();
        let window: Vec<u64> = categories.iter().map(|rows| rows.current).collect();
        let chi_square = chi_square_homogeneity(&reference, &window);
        let value = match self.test {
            Statistic::JensenShannon => {
                jensen_shannon_distance(&reference, &window).expect(NOT_EMPTY)
            }
            _ => chi_square.map_or(0.0, |test| test.statistic),
        };
        Compared {
            psi: psi_of_counts(&reference, &window).expect(NOT_EMPTY),
            test: self.test,
            value,
            p_value: chi_square.map_or(1.0, |test| test.p_value),
            moved: moved_most(&categories),
        }
    }

    /// The categories of both, by value, rare ones last.
    fn beside(&self, current: &[f64]) -> Vec<Rows> {
        let window = current.chunk_by(|a, b| a == b);
        let mut window = window
            .map(|same| (unsigned_zero(same[0]), same.len() as u64))
            .peekable();
        let mut reference = self.counts.iter().copied().peekable();
        let (mut categories, mut rare, mut rare_values) = (Vec::new(), Rows::default(), 0);
        loop {
            let value = match (reference.peek(), window.peek()) {
                (Some((r, _)), Some((c, _))) => r.min(*c),
                (Some((value, _)), None) | (None, Some((value, _))) => *value,
                (None, None) => break,
            };
            let of_reference = reference.next_if(|(known, _)| *known == value);
            let of_window = window.next_if(|(known, _)| *known == value);
            let rows = Rows {
                value: Some(value),
                reference: of_reference.map_or(0, |(_, count)| count),
                current: of_window.map_or(0, |(_, count)| count),
            };
            if rows.reference + rows.current >= RARE_BELOW {
                categories.push(rows);
                continue;
            }
            rare_values += 1;
            rare = Rows {
                // Only one that is alone has a name.
                value: rows.value.filter(|_| rare_values == 1),
                reference: rare.reference + rows.reference,
                current: rare.current + rows.current,
            };
        }
        categories.extend((rare_values > 0).then_some(rare));
        categories
    }
}

fn moved_most(categories: &[Rows]) -> Vec<Category> {
    let reference = categories.iter().map(|rows| rows.reference).sum::<u64>() as f64;
    let current = categories.iter().map(|rows| rows.current).sum::<u64>() as f64;
    let mut moved: Vec<Category> = categories
        .iter()
        .map(|rows| Category {
            value: rows.value.map(|value| value as f32),
            reference_share: rows.reference as f64 / reference,
            current_share: rows.current as f64 / current,
        })
        .filter(|category| category.moved_by() > 0.0)
        .collect();
    // Stable: those that moved as far stay in the order of their values.
    moved.sort_by(|a, b| b.moved_by().total_cmp(&a.moved_by()));
    moved.truncate(MOVED_MAX);
    moved
}

/// The same number, of which zero has one sign.
fn unsigned_zero(value: f64) -> f64 {
    if value == 0.0 { 0.0 } else { value }
}

#[cfg(test)]
#[path = "categories_tests.rs"]
mod tests;
