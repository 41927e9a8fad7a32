//! The 95th percentile of a candidate's latencies, held against its baseline's.
//!
//! Two questions are asked of it, which need different numbers of answers:
//! * Is the candidate slower, beyond chance? An answer beyond the baseline's 95th percentile, as it was before that
//!   answer, is an event that hits both sides equally if both are equally slow: [`log_e_value`] says at every look what
//!   such events prove.
//! * Is it within its guardrail? Then no more than a twentieth of its answers is beyond so many times the baseline's
//!   95th percentile. That share is known to a standard error, and a step that is too close to call goes on.
//!
//! Invariants:
//! 1. What counts as slow depends on earlier answers alone, never on the one that is held against it.
//! 2. A step is held for its 95th percentile for a bounded number of requests.

use super::sequential::log_e_value;

/// Each bucket is one percent wider than the one before: they reach up to 20 s.
const GROWTH: f64 = 1.01;
const BUCKETS: usize = 1_690;

/// The part of the answers that is beyond the 95th percentile.
const TAIL: f64 = 0.05;

/// Answers of the baseline before others are held against its 95th percentile: one of so many is beyond it.
const BASELINE_MIN: u64 = 20;

/// A share within so many standard errors of its limit is too close to call.
const CLOSE_ERRORS: f64 = 1.0;

/// A candidate is rolled back only if its share is beyond the limit by so many standard errors: one whose 95th
/// percentile is longer by less than it may be seldom looks so.
const SURE_ERRORS: f64 = 2.5;

/// As many times the samples of a step are waited for while its 95th percentile may be within the guardrail or not.
const CLOSE_TIMES: u64 = 10;

/// As many times the samples a step is held for its 95th percentile at the most. Who is slower beyond chance by then
/// was rolled back.
const HELD_TIMES_MAX: u64 = 50;

/// How many answers took how long, to one percent.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    /// Nothing.
    pub(super) fn new() -> Self {
        Histogram {
            counts: vec![0; BUCKETS],
            total: 0,
        }
    }

    /// Counts an answer by the natural logarithm of its latency in microseconds, of at least one; its bucket.
    pub(super) fn add(&mut self, log_us: f64) -> usize {
        let bucket = ((log_us / GROWTH.ln()) as usize).min(BUCKETS - 1);
        self.counts[bucket] += 1;
        self.total += 1;
        bucket
    }

    /// The bucket of the 95th percentile, once there is an answer.
    fn p95(&self) -> Option<usize> {
        let rank = (self.total * 95).div_ceil(100).max(1);
        let mut seen = 0;
        self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })
    }

    /// The 95th percentile in microseconds; 0 before there is an answer.
    pub(super) fn p95_us(&self) -> u64 {
        self.p95()
            .map_or(0, |bucket| GROWTH.powi(bucket as i32 + 1).round() as u64)
    }

    /// The share of the answers in later buckets, and the variance of that share.
    fn beyond(&self, bucket: usize) -> (f64, f64) {
        let count: u64 = self.counts.iter().skip(bucket + 1).sum();
        let total = self.total.max(1) as f64;
        let share = count as f64 / total;
        (share, share * (1.0 - share) / total)
    }
}

/// Slow answers of both sides.
#[derive(Debug, Clone, Default)]
pub(super) struct SlowAnswers {
    /// Answers in later buckets are slow. Absent until there is enough to go by.
    after: Option<usize>,
    /// Answers of the baseline with which that is looked up again.
    next: u64,
    candidate: u64,
    baseline: u64,
}

impl SlowAnswers {
    /// Takes an answer in this bucket. `baseline` has counted it if it is one of the baseline's.
    pub(super) fn take(&mut self, is_candidate: bool, bucket: usize, baseline: &Histogram) {
        let is_slow = self.after.is_some_and(|after| bucket > after);
        if is_candidate {
            self.candidate += u64::from(is_slow);
            return;
        }
        self.baseline += u64::from(is_slow);
        // For those that come after it.
        if baseline.total >= self.next.max(BASELINE_MIN) {
            self.after = baseline.p95();
            self.next = baseline.total + baseline.total / 4 + 1;
        }
    }

    /// The logarithm of the evidence that the candidate, which has `fair` of all requests, has more of them, once any can
    /// be told.
    pub(super) fn log_e_value(&self, fair: f64) -> Option<f64> {
        self.after
            .map(|_| log_e_value(self.candidate, self.baseline, fair))
    }
}

/// Why a step is held for its 95th percentile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// It is longer than allowed, but may yet be so by chance.
    Beyond,
    /// It is within the guardrail or close to it: so many requests of each side are waited for at the most.
    Close(u64),
}

/// The share of the candidate's answers beyond so many times the baseline's 95th percentile.
#[derive(Debug, Clone, Copy)]
pub(super) struct Excess {
    share: f64,
    standard_error: f64,
}

impl Excess {
    /// What both sides came to, where the candidate's 95th percentile may be `factor` times as long; `None` without
    /// answers of the baseline.
    pub(super) fn of(candidate: &Histogram, baseline: &Histogram, factor: f64) -> Option<Self> {
        let at = baseline.p95()?;
        // The baseline's 95th percentile is not known for sure either.
        let (_, of_baseline) = baseline.beyond(at);
        let allowed = (factor.ln() / GROWTH.ln()).ceil() as usize;
        let (share, of_candidate) = candidate.beyond(at + allowed);
        Some(Excess {
            share,
            standard_error: (of_baseline + of_candidate).sqrt(),
        })
    }

    /// Whether the guardrail is exceeded by more than chance explains, as far as one look can say so.
    pub(super) fn is_sure(&self) -> bool {
        self.share - SURE_ERRORS * self.standard_error > TAIL
    }

    /// Why a step is not passed after `requests` of each side, which needs `min_samples`.
    pub(super) fn held(&self, requests: u64, min_samples: u64) -> Option<Held> {
        let close = CLOSE_ERRORS * self.standard_error;
        let close_max = min_samples.saturating_mul(CLOSE_TIMES);
        if requests >= min_samples.saturating_mul(HELD_TIMES_MAX) {
            None
        } else if self.share - close > TAIL {
            Some(Held::Beyond)
        } else if requests < close_max && self.share + close > TAIL {
            Some(Held::Close(close_max))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many answers of each of these latencies, in microseconds.
    fn histogram(answers: &[(u64, f64)]) -> Histogram {
        let mut histogram = Histogram::new();
        for (count, latency_us) in answers {
            (0..*count).for_each(|_| {
                histogram.add(latency_us.ln());
            });
        }
        histogram
    }

    #[test]
    fn the_95th_percentile_is_known_to_one_percent() {
        assert_eq!(Histogram::new().p95_us(), 0);
        for (answers, expected) in [
            (&[(1, 1.0)][..], 1.0),
            (&[(95, 1_000.0), (5, 9_000.0)], 1_000.0),
            (&[(94, 1_000.0), (6, 9_000.0)], 9_000.0),
            (&[(19, 1_000.0), (1, 9_000.0)], 1_000.0),
            // Nothing that is answered takes as long as this.
            (&[(1, 1e12)], 2.0e7),
        ] {
            let found = histogram(answers).p95_us() as f64;
            assert!((found / expected - 1.0).abs() <= 0.011, "{found}");
        }
    }

    #[test]
    fn an_answer_is_held_against_those_before_it() {
        let (mut slow, mut baseline) = (SlowAnswers::default(), Histogram::new());
        for count in 1..=20 {
            let bucket = baseline.add(1_000f64.ln());
            assert_eq!(slow.log_e_value(0.5), None, "{count}");
            slow.take(false, bucket, &baseline);
        }
        assert_eq!(slow.log_e_value(0.5), Some(log_e_value(0, 0, 0.5)));
        for _ in 0..3 {
            slow.take(true, Histogram::new().add(1_500f64.ln()), &baseline);
        }
        let bucket = baseline.add(1_500f64.ln());
        slow.take(false, bucket, &baseline);
        assert_eq!((slow.candidate, slow.baseline), (3, 1));
        // As more of the baseline's answers take as long, that is slow no more.
        for _ in 0..20 {
            let bucket = baseline.add(1_500f64.ln());
            slow.take(false, bucket, &baseline);
        }
        let seen = slow.baseline;
        slow.take(false, bucket, &baseline);
        assert_eq!(slow.baseline, seen);
    }

    #[test]
    fn a_step_is_held_for_a_bounded_number_of_requests() {
        let baseline = histogram(&[(190, 1_000.0), (10, 2_000.0)]);
        let held = |slow: u64, requests| {
            let candidate = histogram(&[(200 - slow, 1_000.0), (slow, 2_000.0)]);
            Excess::of(&candidate, &baseline, 1.1)
                .unwrap()
                .held(requests, 200)
        };
        assert_eq!(held(2, 200), None);
        assert_eq!(held(10, 200), Some(Held::Close(2_000)));
        assert_eq!(held(10, 2_000), None);
        for requests in [200, 2_000, 9_999] {
            assert_eq!(held(20, requests), Some(Held::Beyond));
        }
        assert_eq!(held(20, 10_000), None);
    }

    #[test]
    fn only_what_is_beyond_the_allowance_is_too_much() {
        let baseline = histogram(&[(190, 1_000.0), (10, 2_000.0)]);
        let excess = |latency_us: f64, factor| {
            let candidate = histogram(&[(150, 900.0), (50, latency_us)]);
            Excess::of(&candidate, &baseline, factor).unwrap()
        };
        assert!(excess(1_300.0, 1.1).is_sure() && !excess(1_300.0, 1.4).is_sure());
        assert!(!excess(1_000.0, 1.0).is_sure());
        assert!(Excess::of(&baseline, &Histogram::new(), 1.1).is_none());
    }
}
