//! Sums with a digest of their bytes, as they travel.

use serde::{Deserialize, Serialize};

use crate::training::reduction::Partial;
use crate::training::value_bytes::bytes_of;

/// Sums whose bytes can be checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sealed {
    partial: Partial,
    digest: [u8; 16],
}

/// The bytes are not those that were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("the sums' digest does not match their bytes; they were damaged on the way")]
pub struct Damaged;

impl Sealed {
    /// Seals sums.
    #[must_use]
    pub fn new(partial: Partial) -> Self {
        Sealed {
            digest: digest(&partial),
            partial,
        }
    }

    /// The sums, if they are what was sealed.
    pub fn open(self) -> Result<Partial, Damaged> {
        if digest(&self.partial) == self.digest {
            Ok(self.partial)
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
    use super::*;
    use crate::training::reduction::Subtree;

    #[test]
    fn any_changed_bit_is_seen() {
        let partial = Partial {
            subtree: Subtree { level: 1, index: 2 },
            loss_sum: 0.5,
            count: 8,
            grads: (0..3000).map(|value| value as f32).collect(),
        };
        let sealed = Sealed::new(partial.clone());
        assert_eq!(sealed.clone().open(), Ok(partial));
        let changes: [fn(&mut Partial); 5] = [
            |p| p.subtree.index ^= 1,
            |p| p.loss_sum = -0.5,
            |p| p.count += 1,
            |p| p.grads[2999] = f32::from_bits(p.grads[2999].to_bits() ^ 1),
            |p| p.grads.truncate(2999),
        ];
        for change in changes {
            let mut damaged = sealed.clone();
            change(&mut damaged.partial);
            assert_eq!(damaged.open(), Err(Damaged));
        }
    }
}
