//! Values for tests, and how far they are off.

use super::update::AdamwUpdate;
use crate::training::random::{Purpose, Stream};

/// An update in the midst of a training; no value is one that would hide a mistake.
pub(crate) const ADAMW: AdamwUpdate = AdamwUpdate {
    scale: 0.37,
    beta1: 0.9,
    one_minus_beta1: 0.1,
    beta2: 0.999,
    one_minus_beta2: 0.001,
    epsilon: 1e-8,
    inverse_square_correction: 17.3,
    keep: 0.999,
    rate: 0.01,
};

/// `count` normal values with this deviation.
pub(crate) fn normal(name: &str, count: usize, deviation: f64) -> Vec<f32> {
    let stream = Stream::new(5, Purpose::Initialise, name, 0);
    (0..count as u64)
        .map(|index| (stream.normal(index, 0) * deviation) as f32)
        .collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The largest difference, as a share of the largest value of the reference.
pub(crate) fn relative_error(values: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(values.len(), reference.len());
    let largest = reference
        .iter()
        .fold(0.0f64, |largest, x| largest.max(x.abs()));
    let differences = values
        .iter()
        .zip(reference)
        .map(|(a, b)| (f64::from(*a) - b).abs());
    // A NaN must not hide behind `max`.
    differences.fold(0.0, |worst, x| if x <= worst { worst } else { x }) / largest.max(1e-30)
}
