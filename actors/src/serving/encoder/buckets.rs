//! Which rows of a batch are computed at once: those that are padded to the same length, so that a short text does not cost
//! what the longest one does.
//!
//! Invariants:
//! 1. What a row is padded to depends on its own length alone.
//! 2. Each row is in one bucket, and no bucket takes more memory than its bound, unless one row alone does.

use std::collections::BTreeMap;

/// The shortest bucket: shorter texts would save less than another call costs.
const LENGTH_MIN: usize = 8;

/// What the largest tensor of a bucket may take: it and its like fit into a processor's memory many times over.
const TENSOR_BYTES_MAX: usize = 64 << 20;

/// Rows that are computed at once.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bucket {
    /// The length that they are padded to.
    pub(super) length: usize,
    /// Their places in the batch, in order.
    pub(super) rows: Vec<usize>,
}

/// The sizes of a network that its tensors follow from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Tokens of a row, at most.
    pub(super) positions: usize,
    /// The widest that the network gets for each token.
    pub(super) width: usize,
    pub(super) heads: usize,
}

impl Sizes {
    /// How many rows of this length fit into a bucket.
    fn rows(self, length: usize) -> usize {
        let values = length * self.width.max(self.heads * length);
        (TENSOR_BYTES_MAX / size_of::<f32>() / values.max(1)).max(1)
    }
}

/// What a row of so many tokens is padded to.
fn padded(count: usize, positions: usize) -> usize {
    count.next_power_of_two().max(LENGTH_MIN).min(positions)
}

/// The buckets of rows that have so many tokens each, the shortest first.
pub(super) fn buckets(counts: &[usize], sizes: Sizes) -> Vec<Bucket> {
    let mut by_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (row, count) in counts.iter().enumerate() {
        let length = padded(*count, sizes.positions);
        by_length.entry(length).or_default().push(row);
    }
    let of_length = |(length, rows): (usize, Vec<usize>)| {
        let parts = rows.chunks(sizes.rows(length)).map(<[usize]>::to_vec);
        parts
            .map(|rows| Bucket { length, rows })
            .collect::<Vec<_>>()
    };
    by_length.into_iter().flat_map(of_length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        positions: 40,
        width: 64,
        heads: 4,
    };

    #[test]
    fn rows_are_padded_to_powers_of_two_and_no_further_than_the_model_goes() {
        for (count, length) in [
            (1, 8),
            (8, 8),
            (9, 16),
            (16, 16),
            (17, 32),
            (32, 32),
            (33, 40),
            (40, 40),
        ] {
            assert_eq!(padded(count, 40), length, "{count}");
        }
        assert_eq!(padded(3, 4), 4);
    }

    #[test]
    fn each_row_is_in_one_bucket_with_others_of_its_length() {
        let bucket = |length, rows: &[usize]| Bucket {
            length,
            rows: rows.to_vec(),
        };
        assert_eq!(
            buckets(&[30, 3, 12, 8, 40, 17], SIZES),
            [
                bucket(8, &[1, 3]),
                bucket(16, &[2]),
                bucket(32, &[0, 5]),
                bucket(40, &[4])
            ]
        );
        assert_eq!(buckets(&[], SIZES), []);
    }

    #[test]
    fn a_bucket_that_would_take_too_much_is_divided() {
        let wide = Sizes {
            positions: 2048,
            width: 3072,
            heads: 12,
        };
        // 12 heads over 512 tokens are 12 MiB a row.
        assert_eq!(wide.rows(512), 5);
        assert_eq!(wide.rows(2048), 1);
        let found = buckets(&[300; 12], wide);
        let sizes: Vec<usize> = found.iter().map(|bucket| bucket.rows.len()).collect();
        assert_eq!(sizes, [5, 5, 2]);
        let rows: Vec<usize> = found.into_iter().flat_map(|bucket| bucket.rows).collect();
        assert_eq!(rows, (0..12).collect::<Vec<_>>());
    }
}
