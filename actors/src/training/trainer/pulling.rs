//! States that trainers take from each other: one gives what it keeps for others part by part, and one that joins takes
//! parts from several at once.
//!
//! Invariants:
//! 1. What arrives is in order and without gaps, whoever gave it.
//! 2. A pull ends by itself before the driver that ordered it gives up waiting: then the driver gives what is missing, and
//!    no more.
//! 3. What a pull brings that another order or another state has followed is dropped.
//! 4. Few parts are read at once here, however many ask for one.
//! 5. An order to keep a state counts only where no later one and no end of it was heard, and its driver was not replaced:
//!    also while it waits for the replica.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use mobula::{ActorRef, Cluster};
use mobula_storage::checkpoint::{CheckpointSource, Piece};

use super::{Replica, Trainer, TrainerCalls, blocking, trainer_name};
use crate::training::messages::{Epoch, Fetched, KeepOrder, TrainerError};
use crate::training::parts::{self, PART_BYTES};
use crate::training::shape::state_bytes_max;
use crate::training::snapshot::StateSnapshot;

/// How long the parts of one order may take to come.
const PULL_MAX: Duration = Duration::from_secs(45);
/// Parts that one who gives reads at once; who asks for another one meanwhile waits.
pub(super) const GIVEN_AT_ONCE: usize = 4;
/// How long the head may take to say where another trainer is.
const FIND_MAX: Duration = Duration::from_secs(5);

impl Trainer {
    /// Takes `parts` of the state after `step` from the trainers `from`, behind what has arrived. Parts behind one that nobody
    /// gives wait for it.
    pub(super) async fn pull(
        &self,
        cluster: &Cluster,
        epoch: Epoch,
        step: u64,
        parts: &[Piece],
        from: &[u32],
    ) -> Result<Fetched, TrainerError> {
        let (offset, order) = self.begin_pull(epoch, parts)?;
        let (givers, mut failed) = find(cluster, from).await;
        let ask = |giver: usize, part: Piece| {
            let call = givers[giver].1.part(step, part).any_order();
            async move { call.await.map_err(|failure| failure.to_string()) }
        };
        let pulled = parts::pull(parts, givers.len(), PULL_MAX, ask).await;
        failed.extend(pulled.failed.iter().map(|giver| givers[*giver].0));
        let mut inner = self.inner.lock();
        inner.admit(epoch)?;
        if !inner.arriving.awaits(order, offset) {
            // The driver did not wait for this.
            let (found, expected) = (offset, inner.arriving.length());
            return Err(TrainerError::Misplaced { found, expected });
        }
        let mut missing = Vec::new();
        for (piece, part) in parts.iter().zip(pulled.parts) {
            match part {
                Some(part) => inner.arriving.put(piece.offset, part),
                None => missing.push(piece.offset),
            }
        }
        if !missing.is_empty() || !failed.is_empty() {
            let (count, reason) = (missing.len(), pulled.reason);
            tracing::info!(step, count, ?failed, %reason, "others do not give all parts of a state");
        }
        Ok(Fetched { missing, failed })
    }

    /// Looks whether `parts` follow each other and what has arrived. Answers where they begin, and the order's number.
    pub(super) fn begin_pull(
        &self,
        epoch: Epoch,
        parts: &[Piece],
    ) -> Result<(u64, u64), TrainerError> {
        let mut inner = self.inner.lock();
        inner.admit(epoch)?;
        if parts.first().is_some_and(|part| part.offset == 0) {
            inner.arriving.clear();
        }
        let order = inner.arriving.begin_order();
        let offset = inner.arriving.length();
        let limit = state_bytes_max(&self.spec);
        let mut end = offset;
        for part in parts {
            let length = part.chunk.length;
            let fits = length <= PART_BYTES as u64 && end + length <= limit;
            if part.offset != end || !fits {
                return Err(TrainerError::Misplaced {
                    found: part.offset,
                    expected: end,
                });
            }
            end += length;
        }
        Ok((offset, order))
    }

    /// Keeps the state after `step` for those who join, and no other; whether it can. The replica is busy for as long as a
    /// shard takes: what is heard meanwhile counts, also where nobody waits for the answer any more.
    pub(super) async fn keep_for_others(
        &self,
        order: KeepOrder,
        step: u64,
    ) -> Result<bool, TrainerError> {
        let admitted = self.inner.lock().admit_share(order, step)?;
        let Some(replica) = admitted else {
            tracing::debug!(?order, step, "an order to keep a state comes too late");
            return Ok(false);
        };
        let can = blocking(move || replica.lock().share(order, step)).await;
        let mut inner = self.inner.lock();
        if !can {
            inner.shared.take_if(|shared| shared.order == order);
        }
        // A newer driver, a later order or its end may have come in the meantime.
        let shared = inner.shared.as_ref();
        Ok(shared.is_some_and(|shared| shared.order == order))
    }

    /// Keeps no more what `order`, or one before it, asked to keep for those who join.
    pub(super) async fn keep_no_more(&self, order: KeepOrder) {
        let ended = self.inner.lock().end_share(order);
        if let Some(replica) = ended {
            blocking(move || replica.lock().unshare(order)).await;
        }
    }

    /// A part of the state after `step`, which is kept for those who join.
    pub(super) async fn give(&self, step: u64, part: Piece) -> Result<Vec<u8>, TrainerError> {
        let state = self.shared(step).await.ok_or_else(|| {
            TrainerError::NotGiven(format!(
                "the state after step {step} is not kept here for those who join"
            ))
        })?;
        let length = state.length_bytes();
        let end = part.offset.checked_add(part.chunk.length);
        if part.chunk.length > PART_BYTES as u64 || end.is_none_or(|end| end > length) {
            let offset = part.offset;
            return Err(TrainerError::NotGiven(format!(
                "{} bytes from byte {offset} on are no part of the {length} bytes of the state here, with {PART_BYTES} in \
                 a part at most",
                part.chunk.length
            )));
        }
        let _turn = self.giving.acquire().await.expect("it is never closed");
        Ok(blocking(move || Vec::<u8>::from(state.read(part.range()))).await)
    }

    /// The state after `step` as soon as it is there, if it is kept for those who join.
    async fn shared(&self, step: u64) -> Option<Arc<StateSnapshot>> {
        {
            let inner = self.inner.lock();
            let shared = inner.shared.as_ref().filter(|it| it.step == step)?;
            if let Some(state) = &shared.state {
                return Some(Arc::clone(state));
            }
        }
        let state = self.kept(step, Replica::shared).await?;
        let mut inner = self.inner.lock();
        // Unless it is kept no more.
        if let Some(shared) = inner.shared.as_mut().filter(|it| it.step == step) {
            shared.state = Some(Arc::clone(&state));
        }
        Some(state)
    }
}

/// The trainers of `slots` that can be found, and those of `slots` that cannot.
async fn find(cluster: &Cluster, slots: &[u32]) -> (Vec<(u32, ActorRef<Trainer>)>, Vec<u32>) {
    let found = slots.iter().copied().map(|slot| async move {
        let name = trainer_name(slot);
        let found = tokio::time::timeout(FIND_MAX, cluster.get_actor::<Trainer>(&name)).await;
        (slot, found.ok().and_then(Result::ok))
    });
    let (mut there, mut absent) = (Vec::new(), Vec::new());
    for (slot, found) in join_all(found).await {
        match found {
            Some(trainer) => there.push((slot, trainer)),
            None => absent.push(slot),
        }
    }
    (there, absent)
}
