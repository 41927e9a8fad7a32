//! What a save does about sweeps that run at the same time: before it names chunks it makes sure that no sweep deletes
//! one of them.
//!
//! A sweep looks at a chunk, finds it old, and deletes it a moment later. A save may have written the chunk in between,
//! for equal jobs have equal chunks. Nobody holds a lock; the plans of sweeps lie in the store, and this is why no order
//! of things loses a chunk. A save writes C and then lists the plans; a sweep whose plan P names C looks at C, finds it
//! old, and deletes it.
//!
//! 1. The sweep looked at C before the save wrote it: else it would have found C young, and spared it.
//! 2. P was stored before that look, so it was there when the save listed the plans; and it stays for longer than a
//!    save and a sweep take together. So the save found P.
//! 3. Where P was marked as over, its deletions were acknowledged before. So a look at C behind the list tells whether C
//!    was deleted; a C that is gone is written again.
//! 4. Where P was not marked, the save waits until it is. The sweep may have died: then it waits until, by the store's
//!    own clock, so much time has passed since P was stored that nothing of that sweep can be on its way any more, and
//!    writes C again.
//! 5. All of that is done again until there is nothing to be written; then no sweep of which the save could not know
//!    can delete C (1).
//!
//! It rests on this: the store shows at once what it has acknowledged; the clocks of head and store are less than
//! [`SAVE_TIME_MAX`](super::SAVE_TIME_MAX) apart; a sweep's process is not suspended for minutes in the very middle
//! of sending a request; and the store does not carry out a deletion that it has not answered after one for the same
//! name that was sent later and that it has answered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use tokio::time::Instant;

use super::plans::{self, SWEEP_OVER_AFTER};
use super::writer::check_time;
use super::{CheckpointSource, CheckpointWriter, Piece, SaveError};

/// How often a save looks whether a sweep is over.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Blobs that are asked for at once.
const REQUESTS_MAX: usize = 16;

/// A chunk that a sweep may have deleted, or may still.
struct Doubt {
    piece: Piece,
    /// How long it takes at most until it can be written for good.
    wait: Duration,
}

impl CheckpointWriter {
    /// Makes sure that the chunks of `pieces`, which were written since `begun`, are there and stay. They must be named
    /// at once.
    pub(super) async fn confirm(
        &self,
        source: &Arc<dyn CheckpointSource>,
        pieces: &[Piece],
        begun: Instant,
    ) -> Result<(), SaveError> {
        // Until when sweeps that were not over at some look are waited for.
        let mut until = None;
        loop {
            let doubts = self.doubts(pieces).await?;
            // Here and not before: what is named is younger than that.
            check_time(begun)?;
            let Some(wait) = doubts.iter().map(|doubt| doubt.wait).max() else {
                return Ok(());
            };
            let (now, count) = (Instant::now(), doubts.len());
            if !wait.is_zero() {
                if until.is_none() {
                    tracing::info!(count, "a save waits for a sweep that may delete its chunks");
                }
                let end: Instant = *until.get_or_insert(now + wait);
                if now < end {
                    tokio::time::sleep(LOOK_EVERY.min(end - now)).await;
                    continue;
                }
            }
            tracing::info!(
                count,
                "chunks are written again: a sweep may have deleted them"
            );
            let lost: Vec<Piece> = doubts.into_iter().map(|doubt| doubt.piece).collect();
            self.upload(Arc::clone(source), &lost).await?;
            until = None;
        }
    }

    /// Which of `pieces` sweeps name, and are not there or may be deleted still.
    async fn doubts(&self, pieces: &[Piece]) -> Result<Vec<Doubt>, SaveError> {
        if pieces.is_empty() {
            return Ok(Vec::new());
        }
        let announced = plans::announced(self.blobs()).await?;
        if announced.is_empty() {
            return Ok(Vec::new());
        }
        let ours: BTreeMap<String, Piece> = pieces
            .iter()
            .map(|piece| (piece.chunk.path(), *piece))
            .collect();
        // What sweeps name, and after which moment it must have been written.
        let mut named: BTreeMap<&str, u64> = BTreeMap::new();
        for group in announced.chunks(REQUESTS_MAX) {
            let asked = group
                .iter()
                .map(|plan| plans::chunks_of(self.blobs(), plan));
            for (plan, chunks) in group.iter().zip(try_join_all(asked).await?) {
                let after_ms = match plan.is_over {
                    true => 0,
                    false => plan.stored_ms.saturating_add(millis(SWEEP_OVER_AFTER)),
                };
                let is_named = |path: &str| chunks.as_ref().is_none_or(|all| all.contains(path));
                for path in ours.keys().filter(|path| is_named(path)) {
                    let known = named.entry(path).or_default();
                    *known = after_ms.max(*known);
                }
            }
        }
        let named: Vec<(&str, u64)> = named.into_iter().collect();
        let mut doubts = Vec::new();
        for group in named.chunks(REQUESTS_MAX) {
            let asked = group.iter().map(|(path, _)| self.blobs().head(path));
            for ((path, after_ms), found) in group.iter().zip(try_join_all(asked).await?) {
                let written_ms = found.map(|blob| blob.modified_ms);
                if let Some(wait) = longest_wait(written_ms, *after_ms) {
                    let piece = ours[*path];
                    doubts.push(Doubt { piece, wait });
                }
            }
        }
        Ok(doubts)
    }
}

/// How long it takes at most until a chunk can be written for good that was written at `written_ms`, if it is there, and
/// must be after `after_ms`: both by the store's clock, which shows at least `written_ms` now. `None` if nothing is to
/// be done.
fn longest_wait(written_ms: Option<u64>, after_ms: u64) -> Option<Duration> {
    match written_ms {
        Some(written_ms) if written_ms >= after_ms => None,
        Some(written_ms) => Some(Duration::from_millis(after_ms - written_ms)),
        None if after_ms == 0 => Some(Duration::ZERO),
        None => Some(SWEEP_OVER_AFTER),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_waited_for_as_long_as_a_sweep_without_a_mark_may_run() {
        let over_ms = millis(SWEEP_OVER_AFTER);
        // All sweeps that name it are over: it is there or it is not.
        assert_eq!(longest_wait(Some(7), 0), None);
        assert_eq!(longest_wait(None, 0), Some(Duration::ZERO));
        // One is not, whose plan was stored at 1000: written at 4000 it may go still, until that is over.
        let left = Duration::from_millis(over_ms - 3000);
        assert_eq!(longest_wait(Some(4000), 1000 + over_ms), Some(left));
        assert_eq!(longest_wait(None, 1000 + over_ms), Some(SWEEP_OVER_AFTER));
        assert_eq!(longest_wait(Some(1000 + over_ms), 1000 + over_ms), None);
    }
}
