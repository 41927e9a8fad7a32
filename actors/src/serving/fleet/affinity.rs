//! Requests that prefer the replica which earlier ones with their key had, as what they have in common may be at hand there.
//!
//! Invariants:
//! 1. Of the replicas that take requests a key prefers the one with the largest hash of both (rendezvous hashing): when
//!    one goes, its keys move and no others, and they return when one of its number does.
//! 2. What is preferred costs no answer and not much time: a replica that has clearly more to do than the others, has no
//!    room, or would be late, is passed over for the usual choice.
//! 3. What was not answered is sent elsewhere as always: a second try prefers nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{BATCH_ROWS_MAX, Backend, Fleet, mixed};
use crate::serving::lane::{Deadline, Lane};
use crate::serving::oip::InferRequest;
use crate::serving::rows::Row;

/// The header, or key of gRPC's metadata, whose value is the key.
pub(in crate::serving) const AFFINITY: &str = "x-mobula-affinity";

/// What a request prefers: the hash of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::serving) struct Affinity(u64);

impl Affinity {
    /// That of a key.
    pub(in crate::serving) fn of(key: &str) -> Self {
        let hash = blake3::hash(key.as_bytes());
        let first = hash.as_bytes().iter().take(size_of::<u64>());
        Affinity(first.fold(0, |number, byte| (number << 8) | u64::from(*byte)))
    }

    /// That of a request, if it has any. An empty key is none.
    pub(in crate::serving) fn of_request(request: &InferRequest) -> Option<Self> {
        let key = request.headers.get(AFFINITY)?;
        (!key.is_empty()).then(|| Affinity::of(key))
    }

    /// How much it prefers a replica, by its number.
    fn score(self, number: u32) -> u64 {
        mixed(self.0 ^ mixed(u64::from(number)))
    }
}

impl<B: Backend> Fleet<B> {
    /// The replica that a request prefers, unless it is better off elsewhere.
    pub(super) fn preferred(
        &self,
        affinity: Affinity,
        rows: &[Row],
        deadline: &Deadline,
    ) -> Option<Arc<Lane<B>>> {
        let queued_max = self.batching.queued_requests_max as usize;
        self.among(None, |replicas| {
            let candidates = replicas.iter().copied();
            let preferred = candidates.max_by_key(|replica| affinity.score(replica.number))?;
            let load = |replica: &Arc<Lane<B>>| replica.rows_in_flight.load(Ordering::Relaxed);
            let all: usize = replicas.iter().copied().map(load).sum();
            let is_fit = !has_clearly_more(load(preferred), all, replicas.len())
                && preferred.queued() < queued_max
                && preferred.first_try(deadline, rows, false).is_ok();
            is_fit.then(|| Arc::clone(preferred))
        })
    }
}

/// Whether so many rows are more than one and a quarter times the average of all and one batch: below that they make
/// nobody wait for long.
fn has_clearly_more(rows: usize, all: usize, replicas: usize) -> bool {
    4 * rows * replicas > 5 * all + 4 * BATCH_ROWS_MAX * replicas
}

#[cfg(test)]
#[path = "affinity_tests.rs"]
mod tests;
