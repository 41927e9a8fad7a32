//! Notes beside the log: a few numbers under a key, each with eight bytes, the highest first.

use super::{RaftLog, RaftLogError};
use crate::engine::{Column, Durability, Engine, WriteBatch};

impl<E: Engine> RaftLog<E> {
    /// The note with this key, if it was written. `what` names it where it is damaged.
    pub(super) fn note<const N: usize>(
        &self,
        key: &[u8],
        what: &str,
    ) -> Result<Option<[u64; N]>, RaftLogError> {
        let Some(bytes) = self.engine().get(Column::Meta, key)? else {
            return Ok(None);
        };
        let (words, rest) = bytes.as_chunks::<8>();
        let whole = <[[u8; 8]; N]>::try_from(words).ok();
        let Some(words) = whole.filter(|_| rest.is_empty()) else {
            return Err(RaftLogError::Damaged {
                what: what.to_owned(),
                reason: format!("has {} bytes and not {}", bytes.len(), 8 * N),
            });
        };
        Ok(Some(words.map(u64::from_be_bytes)))
    }

    /// Writes a note, which is on the disk when this returns.
    pub(super) fn write_note<const N: usize>(
        &self,
        key: &[u8],
        numbers: [u64; N],
    ) -> Result<(), RaftLogError> {
        let bytes = numbers.map(u64::to_be_bytes).concat();
        let mut batch = WriteBatch::new();
        batch.put(Column::Meta, key, bytes);
        Ok(self.engine().write(batch, Durability::Synced)?)
    }
}
