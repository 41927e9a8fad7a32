//! The parts of a state, named by their hashes, and how one that joins gets them from several others at once.
//!
//! Invariants:
//! 1. No byte is taken over whose part has not the hash that was asked for.
//! 2. A part that one does not give is asked of another, and so is one that takes long, while it may still come; of the same
//!    one it is asked once.
//! 3. Of each at most two parts are asked at once, and one less for each that it has not given: who has not
//!    given so many is asked for nothing more.
//! 4. One part that nobody gives takes nothing from the others.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use mobula_storage::checkpoint::{ChunkRef, Piece};
use mobula_storage::digest::Digest;
use tokio::time::Instant;

/// Bytes of a part: one travels in one call.
pub const PART_BYTES: usize = 4 << 20;
/// Parts that one order of the driver has a trainer take: enough that several are on their way from each who gives.
pub const PARTS_AT_ONCE: usize = 16;
/// Parts that are under way from one.
const IN_FLIGHT_EACH: usize = 2;
/// How long one may take to give a part.
const PART_MAX: Duration = Duration::from_secs(10);
/// After this a part is asked of another as well: one whose machine is gone costs those who join no more than that.
const ANOTHER_AFTER: Duration = Duration::from_secs(2);

/// A state that others keep for those who join, as the driver's copy has it too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedState {
    /// Number of steps taken.
    pub step: u64,
    /// All of it, in order.
    pub parts: Vec<Piece>,
    /// The trainers that keep it.
    pub from: Vec<u32>,
}

/// What came of some parts that were asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pulled {
    /// Their bytes, in order; nothing where nobody gave them in time.
    pub parts: Vec<Option<Vec<u8>>>,
    /// Who is not worth being asked again, by its place among those who were asked.
    pub failed: Vec<usize>,
    /// Why the last one that did not give a part did not.
    pub reason: String,
}

/// The parts of `bytes`, of `part_bytes` each but the last.
#[must_use]
pub fn parts_of(bytes: &[u8], part_bytes: usize) -> Vec<Piece> {
    let mut offset = 0;
    let part = |bytes: &[u8]| {
        let length = bytes.len() as u64;
        let piece = Piece {
            chunk: ChunkRef {
                blake3: Digest::of(bytes),
                length,
            },
            offset,
        };
        offset += length;
        piece
    };
    bytes.chunks(part_bytes.max(1)).map(part).collect()
}

/// One of those who are asked.
#[derive(Debug, Clone, Default)]
struct Giver {
    /// The parts that are under way from it, and whether each takes long.
    under_way: BTreeMap<usize, bool>,
    failures: usize,
}

impl Giver {
    fn may_be_asked(&self) -> bool {
        self.under_way.len() + self.failures < IN_FLIGHT_EACH
    }

    /// Whether it has failed too often, or others had to give what still takes long.
    fn has_failed(&self) -> bool {
        self.failures >= IN_FLIGHT_EACH || self.under_way.values().any(|is_late| *is_late)
    }
}

/// The bytes of `pieces` from `givers` at once, as far as they come within `limit`. `ask` asks one of them, by its place
/// there.
pub async fn pull<F>(
    pieces: &[Piece],
    givers: usize,
    limit: Duration,
    ask: impl Fn(usize, Piece) -> F,
) -> Pulled
where
    F: Future<Output = Result<Vec<u8>, String>>,
{
    let end = Instant::now() + limit;
    let mut parts: Vec<Option<Vec<u8>>> = vec![None; pieces.len()];
    let mut asked: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); pieces.len()];
    let mut missing: VecDeque<usize> = (0..pieces.len()).collect();
    let mut all = vec![Giver::default(); givers];
    let mut reason = "nobody was there to be asked".to_owned();
    let mut calls = FuturesUnordered::new();
    // When which part of whom takes long, in this order.
    let mut patience: VecDeque<(Instant, usize, usize)> = VecDeque::new();
    while parts.iter().any(Option::is_none) {
        while let Some((giver, at)) = next_call(&all, &missing, &asked) {
            let index = missing.remove(at).expect("it was found there");
            asked[index].insert(giver);
            all[giver].under_way.insert(index, false);
            patience.push_back((Instant::now() + ANOTHER_AFTER, giver, index));
            let answer = tokio::time::timeout(PART_MAX, ask(giver, pieces[index]));
            calls.push(async move { (giver, index, answer.await) });
        }
        let until = patience.front().map_or(end, |(at, ..)| end.min(*at));
        let answered = match tokio::time::timeout_at(until, calls.next()).await {
            Ok(Some(answered)) => answered,
            // Nobody is left to be asked.
            Ok(None) => break,
            Err(_) if until == end => {
                reason = format!("no answer within {limit:?}");
                break;
            }
            Err(_) => {
                if let Some((_, giver, index)) = patience.pop_front()
                    && let Some(is_late) = all[giver].under_way.get_mut(&index)
                {
                    *is_late = true;
                    if parts[index].is_none() && !missing.contains(&index) {
                        missing.push_front(index);
                    }
                }
                continue;
            }
        };
        let (giver, index, answer) = answered;
        all[giver].under_way.remove(&index);
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {PART_MAX:?}")));
        match answer.and_then(|bytes| verified(bytes, &pieces[index])) {
            Ok(bytes) => {
                parts[index] = Some(bytes);
                missing.retain(|other| *other != index);
            }
            Err(why) => {
                reason = why;
                all[giver].failures += 1;
                if parts[index].is_none() && !missing.contains(&index) {
                    missing.push_front(index);
                }
            }
        }
    }
    let failed = (0..givers).filter(|giver| all[*giver].has_failed());
    Pulled {
        parts,
        failed: failed.collect(),
        reason,
    }
}

/// Who is asked next, and for which of the missing parts: the one with the fewest under way that may be asked for one.
fn next_call(
    all: &[Giver],
    missing: &VecDeque<usize>,
    asked: &[BTreeSet<usize>],
) -> Option<(usize, usize)> {
    let givers = all.iter().enumerate().filter(|(_, it)| it.may_be_asked());
    let calls = givers.filter_map(|(giver, it)| {
        let at = missing
            .iter()
            .position(|index| !asked[*index].contains(&giver))?;
        Some((it.under_way.len(), giver, at))
    });
    let (_, giver, at) = calls.min()?;
    Some((giver, at))
}

fn verified(bytes: Vec<u8>, piece: &Piece) -> Result<Vec<u8>, String> {
    let found = Digest::of(&bytes);
    if bytes.len() as u64 == piece.chunk.length && found == piece.chunk.blake3 {
        return Ok(bytes);
    }
    Err(format!(
        "{} bytes with hash {found} came where {} with hash {} were asked for",
        bytes.len(),
        piece.chunk.length,
        piece.chunk.blake3
    ))
}

#[cfg(test)]
#[path = "parts_tests.rs"]
mod tests;
