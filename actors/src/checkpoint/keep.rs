//! Which checkpoints of a job stay visible: the newest, every m-th, the best, and those that somebody
//! pinned. What is not visible any more, the sweep removes from the object store.
//!
//! Invariants:
//! 1. The newest checkpoint is always kept: the next save counts on its chunks.
//! 2. At most [`KEPT_MAX`] are kept, whatever a policy asks for.

use serde::{Deserialize, Serialize};

use super::state::{CHECKPOINTS_PER_JOB, Committed};

/// Of the newest, at most.
pub const LAST_MAX: u32 = 32;
/// Of every m-th, the newest so many.
pub const EVERY_MAX: usize = 16;
/// Of the best, at most.
pub const BEST_MAX: u32 = 8;
/// Of the pinned, at most.
pub const PINNED_MAX: usize = 16;
/// Of all, at most: at about 300 bytes each, 22 KiB a job.
pub const KEPT_MAX: usize = LAST_MAX as usize + EVERY_MAX + BEST_MAX as usize + PINNED_MAX;

/// What a job wants to be kept of it while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepPolicy {
    /// The newest so many, 1 to [`LAST_MAX`].
    pub last: u32,
    /// Each whose number is a multiple of this; 0 for none. Numbers count from 1.
    pub every: u32,
    /// The best so many by the job's metric, 0 to [`BEST_MAX`].
    pub best: u32,
    /// Whether a larger metric is a better one; a loss is better when it is smaller.
    pub larger_is_better: bool,
}

impl Default for KeepPolicy {
    /// The newest twenty: enough to fall back past several damaged ones.
    fn default() -> Self {
        KeepPolicy {
            last: CHECKPOINTS_PER_JOB as u32,
            every: 0,
            best: 0,
            larger_is_better: false,
        }
    }
}

/// A policy that nothing can be kept by.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{what}` is {found}: {rule}")]
pub struct InvalidPolicy {
    /// Which part.
    pub what: &'static str,
    /// What was asked for.
    pub found: u32,
    /// What it may be.
    pub rule: String,
}

impl KeepPolicy {
    /// Checks its numbers.
    pub fn check(&self) -> Result<(), InvalidPolicy> {
        if !(1..=LAST_MAX).contains(&self.last) {
            return Err(InvalidPolicy {
                what: "keep_last",
                found: self.last,
                rule: format!("1 to {LAST_MAX} of the newest checkpoints are kept"),
            });
        }
        if self.best > BEST_MAX {
            return Err(InvalidPolicy {
                what: "keep_best",
                found: self.best,
                rule: format!("at most {BEST_MAX} of the best checkpoints are kept"),
            });
        }
        Ok(())
    }

    /// Removes what is not kept from `checkpoints`, which come newest first.
    pub fn apply(&self, checkpoints: &mut Vec<Committed>) {
        let mut best: Vec<(usize, f64)> = checkpoints
            .iter()
            .enumerate()
            .filter_map(|(index, one)| Some((index, one.checkpoint.metric?.value())))
            .collect();
        // A stable sort: of equal ones the newer comes first.
        best.sort_by(|a, b| {
            let order = a.1.total_cmp(&b.1);
            if self.larger_is_better {
                order.reverse()
            } else {
                order
            }
        });
        let best: Vec<usize> = best
            .into_iter()
            .take(self.best as usize)
            .map(|(index, _)| index)
            .collect();
        let mut of_every = 0;
        let mut index = 0;
        checkpoints.retain(|one| {
            let is_nth = self.every > 0 && one.number.is_multiple_of(u64::from(self.every));
            of_every += usize::from(is_nth);
            let is_kept = index < self.last as usize
                || (is_nth && of_every <= EVERY_MAX)
                || best.contains(&index)
                || one.is_pinned;
            index += 1;
            is_kept
        });
    }
}

/// A finite number by which checkpoints are compared.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Metric(f64);

// No value is unequal to itself: they are all finite.
impl Eq for Metric {}

/// A number that compares with nothing.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("a metric of {0} compares with nothing: give a finite number, or none")]
pub struct NotFinite(f64);

impl Metric {
    /// The number.
    #[must_use]
    pub fn value(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Metric {
    type Error = NotFinite;

    fn try_from(value: f64) -> Result<Self, NotFinite> {
        if value.is_finite() {
            Ok(Metric(value))
        } else {
            Err(NotFinite(value))
        }
    }
}

impl From<Metric> for f64 {
    fn from(metric: Metric) -> f64 {
        metric.0
    }
}

#[cfg(test)]
mod tests {
    use mobula_core::Incarnation;
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::state::CheckpointRef;

    fn committed(number: u64, metric: Option<f64>) -> Committed {
        Committed {
            checkpoint: CheckpointRef {
                step: number * 10,
                incarnation: Incarnation(1),
                manifest_path: format!("m{number}"),
                manifest_digest: format!("d{number}"),
                size_bytes: 1,
                weights_blake3: None,
                metric: metric.map(|metric| Metric::try_from(metric).unwrap()),
            },
            committed_ms: number,
            number,
            is_pinned: false,
        }
    }

    /// Commits `metrics` one after the other, as the table does; the numbers that are left.
    fn left(policy: KeepPolicy, metrics: &[Option<f64>], pinned: &[u64]) -> Vec<u64> {
        let mut kept = Vec::new();
        for (index, metric) in metrics.iter().enumerate() {
            let number = index as u64 + 1;
            let mut one = committed(number, *metric);
            one.is_pinned = pinned.contains(&number);
            kept.insert(0, one);
            policy.apply(&mut kept);
        }
        kept.iter().map(|one| one.number).collect()
    }

    #[test]
    fn the_newest_every_mth_the_best_and_the_pinned_are_kept() {
        let policy = KeepPolicy {
            last: 2,
            every: 5,
            best: 1,
            larger_is_better: false,
        };
        let mut metrics = vec![Some(1.0); 12];
        metrics[6] = Some(0.5);
        assert_eq!(left(policy, &metrics, &[]), [12, 11, 10, 7, 5]);
        assert_eq!(left(policy, &metrics, &[3]), [12, 11, 10, 7, 5, 3]);
        let larger = KeepPolicy {
            larger_is_better: true,
            every: 0,
            ..policy
        };
        metrics[3] = Some(9.0);
        assert_eq!(left(larger, &metrics, &[]), [12, 11, 4]);
        assert_eq!(left(larger, &[None; 5], &[]), [5, 4]);
    }

    #[test]
    fn numbers_outside_their_limits_are_refused() {
        let with = |last, best| KeepPolicy {
            last,
            best,
            ..KeepPolicy::default()
        };
        assert!(KeepPolicy::default().check().is_ok());
        for (policy, expected) in [
            (with(0, 0), "`keep_last` is 0"),
            (with(33, 0), "`keep_last` is 33"),
            (with(1, 9), "`keep_best` is 9"),
        ] {
            let error = policy.check().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        assert!(Metric::try_from(f64::NAN).is_err());
        assert!(serde_json::from_str::<Metric>("1e999").is_err());
    }

    proptest! {
        #[test]
        fn the_newest_stays_the_bound_holds_and_keeping_again_changes_nothing(
            last in 1..=LAST_MAX,
            every in 0_u32..4,
            best in 0..=BEST_MAX,
            larger_is_better: bool,
            metrics in prop::collection::vec(prop::option::of(-5.0..5.0_f64), 1..150),
        ) {
            let policy = KeepPolicy { last, every, best, larger_is_better };
            let kept = left(policy, &metrics, &[]);
            prop_assert_eq!(kept[0], metrics.len() as u64);
            prop_assert!(kept.len() <= KEPT_MAX);
            prop_assert!(kept.len() >= metrics.len().min(last as usize));
            let mut again: Vec<Committed> = kept
                .iter()
                .map(|number| committed(*number, metrics[*number as usize - 1]))
                .collect();
            policy.apply(&mut again);
            prop_assert_eq!(again.iter().map(|one| one.number).collect::<Vec<_>>(), kept);
        }
    }
}
