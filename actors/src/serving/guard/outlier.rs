//! Ejection of replicas that fail again and again while they seem to be alive (Envoy's outlier detection).
//!
//! Invariants:
//! 1. [`FAILURES_MAX`] failures without a success between them eject a replica, for longer each time.
//! 2. At most a tenth of the replicas is ejected at once, but one may always be; never the last one that
//!    takes requests: a replica that fails is no worse than none.
//! 3. What is known of a replica is bounded by the number of replicas.

use std::collections::BTreeMap;

/// Failures in a row that eject a replica.
pub const FAILURES_MAX: u32 = 5;

/// How long the first ejection lasts, in milliseconds; the second lasts twice as long, and so on.
pub const EJECTION_MS: u64 = 30_000;

/// How many times as long an ejection lasts at the most: five minutes.
const EJECTIONS_MAX: u32 = 10;

/// Each such time without an ejection makes the next one shorter by a step, in milliseconds.
const FORGIVEN_MS: u64 = 10_000;

/// The share of replicas that may be ejected at once, in percent.
const EJECTED_PERCENT: usize = 10;

#[derive(Debug, Clone, Copy, Default)]
struct Replica {
    failures: u32,
    /// How often it was ejected, as far as that is not forgiven.
    ejections: u32,
    /// When its last ejection ends or ended.
    until_ms: u64,
}

impl Replica {
    fn is_ejected(&self, now_ms: u64) -> bool {
        now_ms < self.until_ms
    }
}

/// The replicas of one version that have failed lately, by number.
#[derive(Debug, Default)]
pub struct Outliers {
    replicas: BTreeMap<u32, Replica>,
}

impl Outliers {
    /// A replica has answered.
    pub fn succeeded(&mut self, number: u32) {
        if let Some(replica) = self.replicas.get_mut(&number) {
            replica.failures = 0;
        }
    }

    /// A replica has failed; `open` are the replicas that take requests as far as is known otherwise. How
    /// long it is ejected, in milliseconds, if it is now.
    pub fn failed(&mut self, number: u32, open: usize, now_ms: u64) -> Option<u64> {
        let ejected = self.ejected(now_ms);
        let replica = self.replicas.entry(number).or_default();
        replica.failures += 1;
        let allowed = (open * EJECTED_PERCENT / 100).max(1);
        let leaves_one = ejected + 1 < open;
        if replica.failures < FAILURES_MAX
            || replica.is_ejected(now_ms)
            || ejected >= allowed
            || !leaves_one
        {
            return None;
        }
        let forgiven = now_ms.saturating_sub(replica.until_ms) / FORGIVEN_MS;
        let forgiven = u32::try_from(forgiven).unwrap_or(u32::MAX);
        let ejections = replica.ejections.saturating_sub(forgiven) + 1;
        let lasts_ms = EJECTION_MS * u64::from(ejections.min(EJECTIONS_MAX));
        *replica = Replica {
            failures: 0,
            ejections,
            until_ms: now_ms + lasts_ms,
        };
        Some(lasts_ms)
    }

    /// Whether a replica gets no requests.
    #[must_use]
    pub fn is_ejected(&self, number: u32, now_ms: u64) -> bool {
        let replica = self.replicas.get(&number);
        replica.is_some_and(|replica| replica.is_ejected(now_ms))
    }

    /// How many get no requests.
    #[must_use]
    pub fn ejected(&self, now_ms: u64) -> usize {
        let replicas = self.replicas.values();
        replicas
            .filter(|replica| replica.is_ejected(now_ms))
            .count()
    }

    /// Forgets the replicas above this number, which are gone.
    pub fn keep(&mut self, replicas: u32) {
        self.replicas.retain(|number, _| *number <= replicas);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(outliers: &mut Outliers, number: u32, open: usize, now_ms: u64) -> Option<u64> {
        (0..FAILURES_MAX).find_map(|_| outliers.failed(number, open, now_ms))
    }

    #[test]
    fn five_failures_in_a_row_eject_and_a_success_between_them_does_not() {
        let mut outliers = Outliers::default();
        for _ in 0..3 {
            for _ in 1..FAILURES_MAX {
                assert_eq!(outliers.failed(1, 3, 0), None);
            }
            outliers.succeeded(1);
        }
        assert_eq!(fail(&mut outliers, 1, 3, 0), Some(30_000));
        assert!(outliers.is_ejected(1, 29_999) && !outliers.is_ejected(1, 30_000));
        assert!(!outliers.is_ejected(2, 0));
    }

    #[test]
    fn ejections_grow_up_to_five_minutes_and_are_forgiven() {
        let mut outliers = Outliers::default();
        let mut now_ms = 0;
        for times in (1..=10).chain([10, 10]) {
            let lasts_ms = fail(&mut outliers, 1, 2, now_ms).unwrap();
            assert_eq!(lasts_ms, 30_000 * times);
            now_ms += lasts_ms;
        }
        // A hundred seconds forgive ten of twelve.
        assert_eq!(fail(&mut outliers, 1, 2, now_ms + 100_000), Some(90_000));
    }

    #[test]
    fn a_tenth_may_be_ejected_one_always_and_the_last_one_never() {
        let mut outliers = Outliers::default();
        assert_eq!(fail(&mut outliers, 1, 1, 0), None);
        assert!(fail(&mut outliers, 1, 9, 0).is_some());
        assert_eq!(fail(&mut outliers, 2, 9, 0), None);
        assert!(fail(&mut outliers, 2, 20, 0).is_some());
        assert_eq!(fail(&mut outliers, 3, 20, 0), None);
        assert_eq!(outliers.ejected(0), 2);
        outliers.keep(1);
        assert_eq!(outliers.ejected(0), 1);
    }
}
