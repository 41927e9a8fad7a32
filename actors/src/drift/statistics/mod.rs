//! Two-sample statistics, each exact against published reference values.
//!
//! 1. Samples are passed sorted ascending and free of NaN, so that a reference is sorted once and not per window.
//! 2. Sizes and counts are compared as integers wherever possible; floating point enters only in the last step.
//! 3. An empty sample gives `None`: no data is neither drift nor its absence.

mod categorical;
mod distance;
mod histogram;
mod kolmogorov_smirnov;

pub use categorical::{
    ChiSquare, Share, benjamini_hochberg, chi_square_against_expected, chi_square_homogeneity,
    fisher_exact_growth, jensen_shannon_distance,
};
pub use distance::{
    Chance, norm, normed_wasserstein_distance, standard_deviation, wasserstein_distance,
    wasserstein_distance_of_points,
};
pub use histogram::{
    population_stability_index, population_stability_index_of_points, psi_of_counts, sturges_edges,
};
pub use kolmogorov_smirnov::{KolmogorovSmirnov, kolmogorov_smirnov};

#[cfg(test)]
pub(crate) mod testing {
    //! The golden samples of the reference values, and a portable random source for the rest.

    /// `ref = i/1000` and `cur = 1.1·ref + .05` for `i < 1000`.
    pub(crate) fn golden_pair() -> (Vec<f64>, Vec<f64>) {
        let reference: Vec<f64> = (0..1000).map(|i| f64::from(i) / 1000.0).collect();
        let current = reference.iter().map(|x| 1.1 * x + 0.05).collect();
        (reference, current)
    }

    /// The linear congruential generator of the golden streams, in `[0, 1)`.
    pub(crate) struct Lcg(u64);

    impl Lcg {
        pub(crate) fn new(seed: u64) -> Self {
            Self(seed)
        }

        pub(crate) fn next_unit(&mut self) -> f64 {
            self.0 = (1_103_515_245 * self.0 + 12_345) % (1 << 31);
            self.0 as f64 / (1u64 << 31) as f64
        }
    }

    pub(crate) fn sorted(mut values: Vec<f64>) -> Vec<f64> {
        values.sort_by(f64::total_cmp);
        values
    }

    /// Fails unless `got` is within a relative `1e-9` of `expected`.
    pub(crate) fn assert_close(got: f64, expected: f64) {
        let error = (got - expected).abs() / expected.abs().max(f64::MIN_POSITIVE);
        assert!(
            error <= 1e-9,
            "got {got}, expected {expected}, relative error {error:e}"
        );
    }
}
