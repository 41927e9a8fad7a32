//! Whether a new version is better than the active one.
//!
//! The job measures both on the samples that it held out, where it can ([`BASELINE_PREFIX`]). Otherwise each
//! counts with what its own record says, and the comparison says so.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::plan::Terms;
use crate::registry::NewVersion;
use crate::training::comparison::BASELINE_PREFIX;
use crate::training::evaluation::lower_is_better;

/// A new version against the active one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What was measured.
    pub metric: String,
    /// Of the new version.
    pub candidate: f64,
    /// Of the active version.
    pub baseline: f64,
    /// Whether both were measured on the same samples, which neither was trained on by this job.
    pub same_samples: bool,
    /// Whether the new version is better by as much as was asked for.
    pub is_better: bool,
}

/// Compares, or says why that is not possible.
pub(super) fn compare(
    terms: &Terms,
    candidate: &NewVersion,
    baseline: &NewVersion,
) -> Result<Comparison, String> {
    let measured = |metric: &str| -> Option<(f64, f64, bool)> {
        let of = |metrics: &BTreeMap<String, f64>, name: &str| metrics.get(name).copied();
        let new = of(&candidate.metrics, metric)?;
        let same = of(&candidate.metrics, &format!("{BASELINE_PREFIX}{metric}"));
        let old = same.or_else(|| of(&baseline.metrics, metric))?;
        Some((new, old, same.is_some()))
    };
    let wanted: Vec<&str> = match &terms.metric {
        Some(metric) => vec![metric],
        None => vec!["accuracy", "loss"],
    };
    let found = wanted
        .iter()
        .find_map(|metric| Some((*metric, measured(metric)?)));
    let Some((metric, (new, old, same_samples))) = found else {
        return Err(format!(
            "{} cannot be compared: not both versions have it; name another one with `--metric`",
            wanted.join(" or ")
        ));
    };
    let gain = if lower_is_better(metric, None) {
        old - new
    } else {
        new - old
    };
    Ok(Comparison {
        metric: metric.to_owned(),
        candidate: new,
        baseline: old,
        same_samples,
        // What is no number is never better.
        is_better: gain >= terms.min_gain,
    })
}

impl Comparison {
    /// In a sentence.
    #[must_use]
    pub fn described(&self, min_gain: f64) -> String {
        let samples = if self.same_samples {
            "on the same held-out samples"
        } else {
            "each on its own held-out samples"
        };
        format!(
            "{} {:.4} against {:.4} of the active version, {samples}; a gain of {min_gain} is asked for",
            self.metric, self.candidate, self.baseline
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drift::retraining::state::tests::{new_version, terms};

    fn version(metrics: &[(&str, f64)]) -> NewVersion {
        let metrics = metrics
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value));
        NewVersion {
            metrics: metrics.collect(),
            ..new_version('1')
        }
    }

    #[test]
    fn the_same_samples_count_more_than_what_was_recorded() {
        let active = version(&[("accuracy", 0.98), ("loss", 0.1)]);
        let new = version(&[("accuracy", 0.95), ("baseline_accuracy", 0.4)]);
        let compared = compare(&terms(), &new, &active).unwrap();
        assert!(compared.is_better && compared.same_samples);
        assert_eq!((compared.candidate, compared.baseline), (0.95, 0.4));

        let new = version(&[("accuracy", 0.95)]);
        let compared = compare(&terms(), &new, &active).unwrap();
        assert!(!compared.is_better && !compared.same_samples);
        assert!(
            compared
                .described(0.0)
                .contains("each on its own held-out samples")
        );
        let lenient = Terms {
            min_gain: -0.05,
            ..terms()
        };
        assert!(compare(&lenient, &new, &active).unwrap().is_better);
    }

    #[test]
    fn less_loss_is_better_and_no_number_never_is() {
        let terms = Terms {
            metric: Some("loss".into()),
            ..terms()
        };
        let loss = |value| version(&[("loss", value)]);
        let is_better = |new, old| compare(&terms, &loss(new), &loss(old)).unwrap().is_better;
        assert!(is_better(0.1, 0.2) && !is_better(0.2, 0.1));
        assert!(!is_better(f64::NAN, 0.2) && !is_better(0.1, f64::NAN));
        let error = compare(&terms, &version(&[("accuracy", 1.0)]), &loss(0.1)).unwrap_err();
        assert!(error.contains("--metric"), "{error}");
    }
}
