//! The gradient in pieces: each has an owner that adds it, and travels on its own.
//!
//! Invariants:
//! 1. Buckets are neighbouring ranges that cover every value once.
//! 2. Their order is that in which they are sent: the last values first, because a backward pass is done
//!    with the last layers first.

use std::ops::Range;

/// Bytes of a bucket, at most: large enough that a call's fixed costs vanish beside it, small enough
/// that it fits a message and that several are under way at once.
pub const BUCKET_BYTES_MAX: usize = 4 << 20;
/// Bytes of a bucket, at least: below this, a call costs more than what it carries.
pub const BUCKET_BYTES_MIN: usize = 64 << 10;

/// How a vector is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buckets {
    value_count: usize,
    bucket_values: usize,
}

impl Buckets {
    /// Buckets of `bucket_values` values for a vector of `value_count`; the last in order is the rest.
    ///
    /// # Panics
    /// If a bucket would be empty.
    #[must_use]
    pub fn new(value_count: usize, bucket_values: usize) -> Self {
        assert!(bucket_values > 0, "buckets of no values");
        Buckets {
            value_count,
            bucket_values,
        }
    }

    /// Buckets for up to `worker_count` workers: one for each where that makes them neither too small nor
    /// too large; all of about the same length.
    #[must_use]
    pub fn for_workers(value_count: usize, worker_count: u32) -> Self {
        let bytes = value_count * 4;
        let fewest = bytes.div_ceil(BUCKET_BYTES_MAX).max(1);
        let most = (bytes / BUCKET_BYTES_MIN).max(fewest);
        let count = (worker_count as usize).clamp(fewest, most);
        Buckets::new(value_count, value_count.div_ceil(count).max(1))
    }

    /// Number of buckets; at least one, so that the loss travels even for a model without parameters.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.value_count.div_ceil(self.bucket_values).max(1) as u32
    }

    /// Values of the whole vector.
    #[must_use]
    pub fn value_count(&self) -> usize {
        self.value_count
    }

    /// The values of bucket `index`, counted from the end of the vector.
    #[must_use]
    pub fn range(&self, index: u32) -> Range<usize> {
        let end = self
            .value_count
            .saturating_sub(index as usize * self.bucket_values);
        end.saturating_sub(self.bucket_values)..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_one_bucket_the_last_values_in_the_first() {
        for (values, bucket) in [(0, 4), (1, 4), (4, 4), (5, 4), (1003, 10)] {
            let buckets = Buckets::new(values, bucket);
            let mut end = values;
            for index in 0..buckets.count() {
                let range = buckets.range(index);
                assert_eq!(range.end, end, "{values} by {bucket}");
                assert!(range.len() <= bucket);
                end = range.start;
            }
            assert_eq!(end, 0, "{values} by {bucket}");
        }
    }

    #[test]
    fn a_small_model_has_few_buckets_and_a_large_one_small_messages() {
        assert_eq!(Buckets::for_workers(1000, 8).count(), 1);
        // Not one of 64 KiB and a rest.
        assert_eq!(Buckets::for_workers(17_226, 8).count(), 1);
        assert_eq!(Buckets::for_workers(1 << 20, 8).count(), 8);
        let large = Buckets::for_workers(64 << 20, 8);
        assert_eq!(large.count(), 64);
        assert_eq!(large.range(0).len() * 4, BUCKET_BYTES_MAX);
    }
}
