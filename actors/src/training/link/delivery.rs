//! How a driver gives a state to a trainer that joins: in order, by others as far as they can, and the rest itself.
//!
//! Invariants:
//! 1. Of each order of parts the driver sends only what nobody gave, and then goes on with the next order.
//! 2. Who failed in one order is asked for nothing in the next; where nobody is left, the driver sends the rest.

use std::future::Future;

use mobula_storage::checkpoint::Piece;

use crate::training::messages::Fetched;
use crate::training::parts::{PART_BYTES, PARTS_AT_ONCE, SharedState};

/// Gives `state`, of which those of `shared` give what they can. `fetch` has the trainer take parts from some others, `receive`
/// sends it the bytes from a place on.
pub(super) async fn deliver<E, F, R>(
    state: &[u8],
    shared: Option<&SharedState>,
    fetch: impl Fn(Vec<Piece>, Vec<u32>) -> F,
    receive: impl Fn(u64, Vec<u8>) -> R,
) -> Result<(), E>
where
    F: Future<Output = Result<Fetched, E>>,
    R: Future<Output = Result<(), E>>,
{
    let Some(shared) = shared else {
        let mut offset = 0;
        for piece in state.chunks(PART_BYTES) {
            receive(offset, piece.to_vec()).await?;
            offset += piece.len() as u64;
        }
        return Ok(());
    };
    let mut from = shared.from.clone();
    for parts in shared.parts.chunks(PARTS_AT_ONCE) {
        let fetched = if from.is_empty() {
            None
        } else {
            Some(fetch(parts.to_vec(), from.clone()).await?)
        };
        let is_missing = |part: &&Piece| {
            let fetched = fetched.as_ref();
            fetched.is_none_or(|fetched| fetched.missing.contains(&part.offset))
        };
        let missing: Vec<Piece> = parts.iter().filter(is_missing).copied().collect();
        for part in missing {
            let range = part.range();
            let bytes = &state[range.start as usize..range.end as usize];
            receive(part.offset, bytes.to_vec()).await?;
        }
        if let Some(Fetched { failed, .. }) = &fetched {
            from.retain(|slot| !failed.contains(slot));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "delivery_tests.rs"]
mod tests;
