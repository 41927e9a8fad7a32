//! Sums as they travel: with a digest of their bytes, in the message itself or in memory that the receiver can
//! read.

use serde::{Deserialize, Serialize};

use super::segment::{SegmentName, Span};
use crate::training::reduction::{Partial, Subtree};
use crate::training::value_bytes::{bytes_of, packed};

/// Sums whose bytes can be checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parcel {
    subtree: Subtree,
    loss_sum: f64,
    count: u64,
    values: Values,
    digest: [u8; 16],
}

/// Where the values are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Values {
    Here(#[serde(with = "packed")] Vec<f32>),
    There(SegmentName, Span),
}

/// The bytes are not those that were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("the sums' digest does not match their bytes; they were damaged on the way")]
pub struct Damaged;

impl Parcel {
    /// Sums that go with the message.
    #[must_use]
    pub fn inline(mut partial: Partial) -> Self {
        let digest = digest(&partial);
        let values = std::mem::take(&mut partial.grads);
        Parcel::new(&partial, digest, Values::Here(values))
    }

    /// Sums whose values lie at `span` of a segment.
    #[must_use]
    pub fn placed(partial: &Partial, segment: SegmentName, span: Span) -> Self {
        Parcel::new(partial, digest(partial), Values::There(segment, span))
    }

    fn new(partial: &Partial, digest: [u8; 16], values: Values) -> Self {
        Parcel {
            subtree: partial.subtree,
            loss_sum: partial.loss_sum,
            count: partial.count,
            values,
            digest,
        }
    }

    /// Where its values lie; `None` if it has them with it.
    #[must_use]
    pub fn place(&self) -> Option<(SegmentName, Span)> {
        match &self.values {
            Values::Here(_) => None,
            Values::There(segment, span) => Some((*segment, *span)),
        }
    }

    /// The sums, if they are what was sealed. `read` copies values from a segment.
    pub fn open(
        self,
        read: impl FnOnce(SegmentName, Span) -> Option<Vec<f32>>,
    ) -> Result<Partial, Damaged> {
        let partial = Partial {
            subtree: self.subtree,
            loss_sum: self.loss_sum,
            count: self.count,
            grads: match self.values {
                Values::Here(values) => values,
                Values::There(segment, span) => read(segment, span).ok_or(Damaged)?,
            },
        };
        if digest(&partial) == self.digest {
            Ok(partial)
        } else {
            Err(Damaged)
        }
    }
}

fn digest(partial: &Partial) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&partial.subtree.level.to_le_bytes());
    hasher.update(&partial.subtree.index.to_le_bytes());
    hasher.update(&partial.loss_sum.to_le_bytes());
    hasher.update(&partial.count.to_le_bytes());
    hasher.update(&bytes_of(&partial.grads));
    let mut digest = [0; 16];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    digest
}

#[cfg(test)]
mod tests {
    use mobula_core::codec;

    use super::*;

    fn sums() -> Partial {
        Partial {
            subtree: Subtree { level: 1, index: 2 },
            loss_sum: 0.5,
            count: 8,
            grads: (0..3000).map(|value| value as f32).collect(),
        }
    }

    fn nowhere(_: SegmentName, _: Span) -> Option<Vec<f32>> {
        None
    }

    #[test]
    fn any_changed_bit_is_seen() {
        let sealed = Parcel::inline(sums());
        let bytes = codec::encode_plain(&sealed);
        let back: Parcel = codec::decode(&bytes, bytes.len()).unwrap();
        assert_eq!(back.open(nowhere), Ok(sums()));
        let changes: [fn(&mut Parcel, &mut Vec<f32>); 5] = [
            |p, _| p.subtree.index ^= 1,
            |p, _| p.loss_sum = -0.5,
            |p, _| p.count += 1,
            |_, v| v[2999] = f32::from_bits(v[2999].to_bits() ^ 1),
            |_, v| v.truncate(2999),
        ];
        for change in changes {
            let (mut damaged, mut values) = (sealed.clone(), sums().grads);
            change(&mut damaged, &mut values);
            damaged.values = Values::Here(values);
            assert_eq!(damaged.open(nowhere), Err(Damaged));
        }
    }
}
