//! What a column of a window is compared with, and by which test.
//!
//! 1. Up to [`KS_ROWS_MAX`] reference rows the test is Kolmogorov's and Smirnov's. With more, its p-value would say how many rows there are
//!    rather than how far they moved: the test is the Wasserstein distance in standard deviations of the reference.
//! 2. A distance alone is not evidence: two hundred rows of the reference itself are a tenth of a deviation away from it. It comes
//!    with an upper bound of its p-value.
//! 3. A feature of few values is compared as one of categories ([`categories`](super::categories)), whose order says nothing.
//! 4. All that depends on the reference alone is computed once, and shared by the windows of all slices.

use super::categories::{Categories, Category};
use super::reference::{Reference, ReferenceColumn};
use super::sketches::{FeaturePopulation, Population};
use super::statistics::{
    Chance, kolmogorov_smirnov, norm, population_stability_index,
    population_stability_index_of_points, standard_deviation, wasserstein_distance_of_points,
};
use super::window::Statistic;

/// Training rows up to which the test is Kolmogorov-Smirnov, and χ² of categories.
pub(super) const KS_ROWS_MAX: u64 = 1000;

const NOT_EMPTY: &str = "neither a reference nor a closed window is empty";

/// A reference column, ready to be compared with.
#[derive(Debug)]
pub(super) struct Baseline {
    rows: u64,
    ends: (f64, f64),
    known: Known,
}

/// How the values of a reference column are known.
#[derive(Debug)]
enum Known {
    /// All of them, ascending, and few.
    Few(Vec<f64>),
    /// All of them, ascending.
    Many(Vec<f64>, DistanceBaseline),
    /// By the ascending points of a sketch of their ranks, and by one of their values.
    Sketched(Vec<(f64, u64)>, DistanceBaseline),
    /// By how often each comes: they are few, and categories.
    Categories(Categories),
}

/// What distances are computed from.
#[derive(Debug)]
struct DistanceBaseline {
    points: Vec<(f64, u64)>,
    /// A standard deviation.
    unit: f64,
    chance: Chance,
    /// Of a sketch; in the unit of the values.
    error_max: Option<f64>,
}

/// A column of a window beside its reference.
#[derive(Debug)]
pub(super) struct Comparison {
    /// The population stability index.
    pub(super) psi: f64,
    /// The test: Kolmogorov-Smirnov or Wasserstein, of categories χ² or Jensen-Shannon.
    pub(super) test: Statistic,
    /// Its statistic, of Wasserstein in standard deviations of the reference.
    pub(super) value: f64,
    /// By how much that may be off.
    pub(super) error_max: Option<f64>,
    /// The p-value, or an upper bound of it; not corrected for the number of columns.
    pub(super) p_value: f64,
    /// Rows of the reference that were compared.
    pub(super) reference_rows: u64,
    /// Whether there is one and the same value in both.
    pub(super) is_one_value: bool,
    /// The categories that moved most; none of a column of numbers.
    pub(super) moved: Vec<Category>,
}

impl Baseline {
    /// Those of all columns, in their order.
    pub(super) fn all(reference: &Reference) -> Vec<Baseline> {
        let populations = reference.population().map(Population::features);
        let columns = reference.columns().iter().enumerate();
        columns
            .map(|(index, column)| {
                let population = populations.map(|features| &features[index]);
                Baseline::of_categories(column, population).unwrap_or_else(|| match population {
                    Some(population) => Baseline::of_population(population),
                    None => Baseline::of_column(column),
                })
            })
            .collect()
    }

    /// That of a column of categories, if it is one: of the rows that are kept, however many there were.
    fn of_categories(
        column: &ReferenceColumn,
        population: Option<&FeaturePopulation>,
    ) -> Option<Baseline> {
        let categories = Categories::of(column, population)?;
        let values = column.sorted_values();
        Some(Baseline {
            rows: values.len() as u64,
            ends: (f64::from(values[0]), f64::from(values[values.len() - 1])),
            known: Known::Categories(categories),
        })
    }

    fn of_column(column: &ReferenceColumn) -> Baseline {
        let values: Vec<f64> = column
            .sorted_values()
            .iter()
            .copied()
            .map(f64::from)
            .collect();
        let rows = values.len() as u64;
        let ends = (values[0], values[values.len() - 1]);
        let known = if rows <= KS_ROWS_MAX {
            Known::Few(values)
        } else {
            let points = values.iter().map(|value| (*value, 1)).collect();
            let deviation = standard_deviation(&values);
            Known::Many(values, DistanceBaseline::new(points, deviation, None))
        };
        Baseline { rows, ends, known }
    }

    fn of_population(feature: &FeaturePopulation) -> Baseline {
        let (values, ranks) = (feature.values(), feature.ranks());
        let (smallest, largest) = ranks.ends().expect("a checked population has values");
        let error_max = Some(values.distance_error_max());
        let distance = DistanceBaseline::new(values.points(), feature.deviation(), error_max);
        Baseline {
            rows: feature.count(),
            ends: (f64::from(smallest), f64::from(largest)),
            known: Known::Sketched(ranks.points(), distance),
        }
    }

    /// Compares an ascending column of a window, which is not empty.
    pub(super) fn compare(&self, current: &[f64]) -> Comparison {
        let (psi, test, value, p_value, moved) = match &self.known {
            Known::Few(values) => {
                let psi = population_stability_index(values, current);
                let found = kolmogorov_smirnov(values, current).expect(NOT_EMPTY);
                (
                    psi,
                    Statistic::Ks,
                    found.statistic,
                    found.p_value,
                    Vec::new(),
                )
            }
            Known::Many(values, distance) => {
                let psi = population_stability_index(values, current);
                let (value, p_value) = distance.compare(self.rows, current);
                (psi, Statistic::Wasserstein, value, p_value, Vec::new())
            }
            Known::Sketched(points, distance) => {
                let psi = population_stability_index_of_points(points, self.ends, current);
                let (value, p_value) = distance.compare(self.rows, current);
                (psi, Statistic::Wasserstein, value, p_value, Vec::new())
            }
            Known::Categories(categories) => {
                let found = categories.compare(current);
                (
                    Some(found.psi),
                    found.test,
                    found.value,
                    found.p_value,
                    found.moved,
                )
            }
        };
        let error_max = match &self.known {
            Known::Many(_, distance) | Known::Sketched(_, distance) => {
                distance.error_max.map(|error| error / distance.unit)
            }
            Known::Few(_) | Known::Categories(_) => None,
        };
        let ends = [
            self.ends.0,
            self.ends.1,
            current[0],
            current[current.len() - 1],
        ];
        Comparison {
            psi: psi.expect(NOT_EMPTY),
            test,
            value,
            p_value,
            error_max,
            reference_rows: self.rows,
            is_one_value: ends.iter().all(|end| *end == ends[0]),
            moved,
        }
    }
}

impl DistanceBaseline {
    fn new(points: Vec<(f64, u64)>, deviation: f64, error_max: Option<f64>) -> Self {
        DistanceBaseline {
            chance: Chance::of(&points, deviation),
            unit: norm(deviation),
            points,
            error_max,
        }
    }

    /// The distance in standard deviations, and at most how probable it is by chance, for a reference of so many rows.
    fn compare(&self, reference_rows: u64, current: &[f64]) -> (f64, f64) {
        let current_rows = current.len() as u64;
        let current: Vec<(f64, u64)> = current.iter().map(|value| (*value, 1)).collect();
        let distance = wasserstein_distance_of_points(&self.points, &current).expect(NOT_EMPTY);
        // What may be the sketch's is no evidence.
        let sure = distance - self.error_max.unwrap_or(0.0);
        let p_value = self.chance.p_value_max(sure, reference_rows, current_rows);
        (distance / self.unit, p_value)
    }
}

#[cfg(test)]
#[path = "baseline_tests.rs"]
mod tests;
