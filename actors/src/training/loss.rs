//! Softmax and cross-entropy, in `f64` and in a fixed order.
//!
//! candle's `softmax_last_dim` cuts gradients without a word, and its `exp` and `log` are the platform's.
//! Here the loss and its gradient with respect to the logits are computed directly, and the gradient
//! enters candle's graph as a constant (see [`super::model`]).

use super::math;

/// The loss of some samples, as sums.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct CrossEntropy {
    /// −Σ ln p(label).
    pub(super) loss_sum: f64,
    /// The gradient of `loss_sum` with respect to each logit: p − 1 at the label, p elsewhere.
    pub(super) logit_gradients: Vec<f32>,
}

/// The cross-entropy of `logits` (`labels.len()` rows of `classes`). Labels must be below `classes`.
pub(super) fn cross_entropy(logits: &[f32], labels: &[u32], classes: usize) -> CrossEntropy {
    let mut loss_sum = 0.0;
    let mut logit_gradients = Vec::with_capacity(logits.len());
    let mut row_probabilities = vec![0.0; classes];
    for (row, label) in logits.chunks_exact(classes).zip(labels) {
        let label = *label as usize;
        let log_total = softmax_row(row, &mut row_probabilities);
        loss_sum += log_total - f64::from(row[label]);
        row_probabilities[label] -= 1.0;
        logit_gradients.extend(row_probabilities.iter().map(|value| *value as f32));
    }
    CrossEntropy {
        loss_sum,
        logit_gradients,
    }
}

/// The probabilities for `logits` in rows of `classes`.
pub(super) fn softmax(logits: &[f32], classes: usize) -> Vec<f32> {
    let mut probabilities = Vec::with_capacity(logits.len());
    let mut row_probabilities = vec![0.0; classes];
    for row in logits.chunks_exact(classes) {
        softmax_row(row, &mut row_probabilities);
        probabilities.extend(row_probabilities.iter().map(|value| *value as f32));
    }
    probabilities
}

/// Fills in the probabilities of one row, and returns the logarithm of Σ e^logit.
fn softmax_row(row: &[f32], probabilities: &mut [f64]) -> f64 {
    let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mut total = 0.0;
    for (probability, logit) in probabilities.iter_mut().zip(row) {
        *probability = math::exp(f64::from(*logit) - largest);
        total += *probability;
    }
    for probability in probabilities.iter_mut() {
        *probability /= total;
    }
    largest + math::ln(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_formula_and_with_differences() {
        let logits = [0.5f32, -1.0, 2.0, 100.0, 100.0, -100.0];
        let labels = [2u32, 1];
        let result = cross_entropy(&logits, &labels, 3);
        let first = (0.5f64.exp() + (-1f64).exp() + 2f64.exp()).ln() - 2.0;
        assert!((result.loss_sum - first - 2f64.ln()).abs() < 1e-12);
        for index in 0..logits.len() {
            let shifted = |by: f32| {
                let mut logits = logits;
                logits[index] += by;
                cross_entropy(&logits, &labels, 3).loss_sum
            };
            let slope = (shifted(0.0078125) - shifted(-0.0078125)) / 0.015625;
            assert!((slope - f64::from(result.logit_gradients[index])).abs() < 1e-4);
        }
    }

    #[test]
    fn probabilities_sum_to_one_and_nan_shows() {
        let probabilities = softmax(&[1.0, 2.0, 3.0, -1e30, 0.0, 1e30], 3);
        for row in probabilities.chunks(3) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
        assert_eq!(probabilities[5], 1.0);
        assert!(
            softmax(&[f32::NAN, 0.0], 2)
                .iter()
                .all(|value| value.is_nan())
        );
    }
}
