//! The items that a call brings before its answer.

use std::sync::Arc;

use bytes::Bytes;

use super::{CallControl, VALUE_BYTES_MAX};

/// Why an item was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendItemError {
    /// The caller cancelled the call, dropped its stream, or is gone; no item is wanted any more.
    #[error("the caller takes no more items")]
    Closed,
    /// It does not fit into a frame.
    #[error(
        "an item has {size_bytes} bytes encoded, the limit is {VALUE_BYTES_MAX}: send it in parts, \
         or store it and send where it is"
    )]
    TooLarge {
        /// Its size, in bytes.
        size_bytes: usize,
    },
}

/// Sends one call's items, each when the caller has room for it.
pub struct ItemSender {
    pub(super) control: Arc<CallControl>,
    pub(super) sequence: u64,
}

impl ItemSender {
    /// Sends an item, after waiting for the caller's credit. Cancel safe: an item whose future is
    /// dropped was not sent.
    pub async fn send(&mut self, value: Bytes) -> Result<(), SendItemError> {
        let size_bytes = value.len();
        if size_bytes > VALUE_BYTES_MAX {
            return Err(SendItemError::TooLarge { size_bytes });
        }
        let credit = self.control.credit.as_ref().ok_or(SendItemError::Closed)?;
        let permit = credit.acquire().await.map_err(|_| SendItemError::Closed)?;
        permit.forget();
        if !self.control.deliver_item(self.sequence, value) {
            return Err(SendItemError::Closed);
        }
        self.sequence += 1;
        Ok(())
    }
}

impl std::fmt::Debug for ItemSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ItemSender")
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}
