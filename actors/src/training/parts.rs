//! The parts of a state, named by their hashes, and how one that joins gets them from several others at once.
//!
//! Invariants:
//! 1. No byte is taken over whose part has not the hash that was asked for.
//! 2. A part that one does not give is asked of another, and so is one that takes long, while it may still come, once
//!    nothing else is to be asked for; of the same one it is asked once.
//! 3. Who takes long is told by all of its parts, and by how long parts take that come: on a slow way, where all take long,
//!    none is asked for twice.
//! 4. Of each one part is asked at first, two at once after one came soon, and one again after it has not given one: who has
//!    not given two is asked for nothing more.
//! 5. One part that nobody gives takes nothing from the others.

use std::collections::{BTreeSet, VecDeque};
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
/// Parts that are under way from one, after one came from it within this.
const IN_FLIGHT_EACH: usize = 2;
const QUICK_MAX: Duration = Duration::from_secs(1);
/// How long one may take to give a part.
const PART_MAX: Duration = Duration::from_secs(10);
/// Where no part of one came for this, its parts are asked of others as well: one whose machine is gone costs those who join
/// no more than that, or so many times what the slowest part took where that is more.
const ANOTHER_AFTER: Duration = Duration::from_secs(2);
const PATIENCE_TIMES: u32 = 3;

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
#[derive(Debug, Clone)]
struct Giver {
    /// The parts that are under way from it and still missing.
    under_way: BTreeSet<usize>,
    /// When a part came from it last, or it was asked for one while none was under way from it.
    heard_at: Instant,
    /// Whether a part came from it soon.
    is_quick: bool,
    /// Whether others are asked for what it has not given, and nothing came from it since.
    is_replaced: bool,
    failures: usize,
}

impl Giver {
    fn new(now: Instant) -> Self {
        Giver {
            under_way: BTreeSet::new(),
            heard_at: now,
            is_quick: false,
            is_replaced: false,
            failures: 0,
        }
    }

    fn may_be_asked(&self) -> bool {
        let at_once = if self.is_quick && self.failures == 0 {
            IN_FLIGHT_EACH
        } else {
            1
        };
        !self.has_failed() && self.under_way.len() < at_once
    }

    /// Whether it takes long at `now`, where `patience` is what one has.
    fn is_late(&self, now: Instant, patience: Duration) -> bool {
        !self.under_way.is_empty() && now >= self.heard_at + patience
    }

    /// Whether it has failed too often, or others had to give what still takes long.
    fn has_failed(&self) -> bool {
        self.failures >= IN_FLIGHT_EACH || self.is_replaced
    }
}

/// Parts that are being taken from some.
struct Taking {
    parts: Vec<Option<Vec<u8>>>,
    /// Who was asked for each.
    asked: Vec<BTreeSet<usize>>,
    /// Those that are to be asked for: nobody was yet, or one did not give it.
    missing: VecDeque<usize>,
    givers: Vec<Giver>,
    /// How long the slowest part took that came.
    slowest: Duration,
}

impl Taking {
    fn new(parts: usize, givers: usize) -> Self {
        Taking {
            parts: vec![None; parts],
            asked: vec![BTreeSet::new(); parts],
            missing: (0..parts).collect(),
            givers: vec![Giver::new(Instant::now()); givers],
            slowest: Duration::ZERO,
        }
    }

    /// How long nothing may come of one before others are asked for its parts: where the way is slow all take long.
    fn patience(&self) -> Duration {
        ANOTHER_AFTER.max(self.slowest * PATIENCE_TIMES)
    }

    /// When the next one is late that is not yet.
    fn next_late(&self, now: Instant) -> Option<Instant> {
        let busy = self.givers.iter().filter(|it| !it.under_way.is_empty());
        let late = busy.map(|it| it.heard_at + self.patience());
        late.filter(|at| *at > now).min()
    }

    /// Who is asked next, and for which part: one that is to be asked for, or else one of somebody who is late.
    fn next_call(&mut self, now: Instant) -> Option<(usize, usize)> {
        let (giver, index) = self.missing_call(now).or_else(|| self.late_call(now))?;
        self.missing.retain(|other| *other != index);
        self.asked[index].insert(giver);
        let asked = &mut self.givers[giver];
        if asked.under_way.is_empty() {
            asked.heard_at = now;
        }
        asked.under_way.insert(index);
        Some((giver, index))
    }

    /// The first part of `wanted` that may be asked of somebody, of the one with the fewest under way.
    fn call(&self, now: Instant, wanted: &[usize]) -> Option<(usize, usize)> {
        let patience = self.patience();
        let givers = self.givers.iter().enumerate();
        let free = givers.filter(|(_, it)| it.may_be_asked() && !it.is_late(now, patience));
        let calls = free.filter_map(|(giver, it)| {
            let mut asked = wanted.iter().map(|index| &self.asked[*index]);
            let at = asked.position(|asked| !asked.contains(&giver))?;
            Some((it.under_way.len(), giver, wanted[at]))
        });
        let (_, giver, index) = calls.min_by_key(|(count, giver, _)| (*count, *giver))?;
        Some((giver, index))
    }

    fn missing_call(&self, now: Instant) -> Option<(usize, usize)> {
        let missing: Vec<usize> = self.missing.iter().copied().collect();
        self.call(now, &missing)
    }

    /// The same for the parts that are under way from nobody who is not late; those who are late are replaced.
    fn late_call(&mut self, now: Instant) -> Option<(usize, usize)> {
        let patience = self.patience();
        let (late, others): (Vec<&Giver>, Vec<&Giver>) =
            self.givers.iter().partition(|it| it.is_late(now, patience));
        let of_late = late.iter().flat_map(|it| it.under_way.iter().copied());
        let wanted: Vec<usize> = of_late
            .filter(|index| !others.iter().any(|it| it.under_way.contains(index)))
            .collect();
        let (giver, index) = self.call(now, &wanted)?;
        for late in &mut self.givers {
            late.is_replaced |= late.under_way.contains(&index);
        }
        Some((giver, index))
    }

    /// A part came, after so long, and nobody else is waited for because of it.
    fn came(&mut self, giver: usize, index: usize, bytes: Vec<u8>, took: Duration) {
        let it = &mut self.givers[giver];
        (it.heard_at, it.is_replaced) = (Instant::now(), false);
        it.is_quick |= took <= QUICK_MAX;
        self.slowest = self.slowest.max(took);
        for any in &mut self.givers {
            any.under_way.remove(&index);
        }
        self.missing.retain(|other| *other != index);
        self.parts[index] = Some(bytes);
    }

    /// One has not given a part, and has said nothing at all where `is_silent`.
    fn failed(&mut self, giver: usize, index: usize, is_silent: bool) {
        let is_silent = is_silent && self.givers[giver].is_late(Instant::now(), self.patience());
        let it = &mut self.givers[giver];
        it.under_way.remove(&index);
        it.failures += if is_silent { IN_FLIGHT_EACH } else { 1 };
        if self.parts[index].is_none() && !self.missing.contains(&index) {
            self.missing.push_front(index);
        }
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
    let mut taking = Taking::new(pieces.len(), givers);
    let mut reason = "nobody was there to be asked".to_owned();
    let mut calls = FuturesUnordered::new();
    while taking.parts.iter().any(Option::is_none) {
        let now = Instant::now();
        while let Some((giver, index)) = taking.next_call(now) {
            let answer = tokio::time::timeout(PART_MAX, ask(giver, pieces[index]));
            calls.push(async move { (giver, index, now, answer.await) });
        }
        let until = taking.next_late(now).map_or(end, |at| end.min(at));
        let (giver, index, asked_at, answer) =
            match tokio::time::timeout_at(until, calls.next()).await {
                Ok(Some(answered)) => answered,
                // Nobody is left to be asked.
                Ok(None) => break,
                Err(_) if until == end => {
                    reason = format!("no answer within {limit:?}");
                    break;
                }
                // Somebody is late by now.
                Err(_) => continue,
            };
        let is_silent = answer.is_err();
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {PART_MAX:?}")));
        match answer.and_then(|bytes| verified(bytes, &pieces[index])) {
            Ok(bytes) => taking.came(giver, index, bytes, asked_at.elapsed()),
            Err(why) => {
                reason = why;
                taking.failed(giver, index, is_silent);
            }
        }
    }
    let failed = (0..givers).filter(|giver| taking.givers[*giver].has_failed());
    Pulled {
        failed: failed.collect(),
        parts: taking.parts,
        reason,
    }
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
