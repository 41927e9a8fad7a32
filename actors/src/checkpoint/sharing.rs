//! Uploading what a save consists of together with others who hold the very same bytes.
//!
//! Invariants:
//! 1. A piece is done when somebody who holds it has verified and stored it; who fails gets no more, and what it had
//!    goes to the others.
//! 2. Whoever leads the save uploads too, and in the end also what others have had for too long: so a save waits for
//!    nobody, and ends if the store takes it.
//! 3. Nothing becomes visible by it: the manifest is written after all of it.
//! 4. Where the save is spread over a time, savers take turns; nobody is told of it but the leader, who deals.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use mobula_storage::checkpoint::{CheckpointSource, CheckpointWriter, Piece, SaveError};
use tokio::time::Instant;

use super::spread::{Spread, Turns};

/// Pieces that one saver gets at once, at most: as many as a writer sends at a time.
const BATCH_PIECES_MAX: usize = 4;
/// Batches that each saver should get at least, so that the fastest get most.
const BATCHES_EACH: usize = 4;
/// What others have may take this many times as long as the leader's own batches before the leader sends it too,
/// and so long at least.
const PATIENCE_FACTOR: u32 = 3;
const PATIENCE_MIN: Duration = Duration::from_secs(1);
/// How long helpers are told that it is over.
const RELEASE_MAX: Duration = Duration::from_secs(1);

/// Somebody else who holds the bytes of a save.
pub trait Helper: Send + Sync + 'static {
    /// Who, for people.
    fn name(&self) -> String;

    /// Verifies `pieces` of the state after `step` and stores them. An answer comes within a bound.
    fn upload(&self, step: u64, pieces: Vec<Piece>) -> BoxFuture<'_, Result<(), String>>;

    /// What it was asked to hold for this save is not needed any more; what a later save asked for is.
    fn release(&self) -> BoxFuture<'_, ()>;
}

/// What one saver did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Who.
    pub name: String,
    /// Bytes that it stored.
    pub bytes: u64,
    /// Why it stored no more, if it was not the end.
    pub failed: Option<String>,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} bytes", self.name, self.bytes)?;
        match &self.failed {
            Some(reason) => write!(f, " (then no more: {reason})"),
            None => Ok(()),
        }
    }
}

/// Who sends a batch: the leader, or a helper by its place among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Saver {
    Leader,
    Helper(usize),
}

/// What became of a batch.
enum Done {
    Leader(Result<(), SaveError>),
    Helper {
        index: usize,
        batch: Vec<Piece>,
        outcome: Result<(), String>,
    },
}

/// What an upload was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// What each helper did; nothing where there is none.
    pub shares: Vec<Share>,
    /// How long it took, with what was held back.
    pub took: Duration,
    /// How long each saver was at its batches, all of them added: of a save that is spread they take turns.
    pub sending: Duration,
}

/// Uploads `pieces` of `state`, which is that after `step`, spread as it says.
pub async fn upload(
    writer: &CheckpointWriter,
    state: &Arc<dyn CheckpointSource>,
    step: u64,
    pieces: &[Piece],
    helpers: &[Arc<dyn Helper>],
    spread: &Spread,
) -> Result<Uploaded, SaveError> {
    let send = |saver: Saver, batch: Vec<Piece>| async move {
        match saver {
            Saver::Leader => Done::Leader(writer.upload(Arc::clone(state), &batch).await),
            Saver::Helper(index) => Done::Helper {
                index,
                outcome: helpers[index].upload(step, batch.clone()).await,
                batch,
            },
        }
    };
    let begun = Instant::now();
    let mut deal = Deal::new(pieces, helpers, spread);
    let outcome = deal.carry_out(send).await;
    let took = begun.elapsed();
    let released = helpers.iter().map(|helper| helper.release());
    // Who is not told finds out when it is asked to hold the next state.
    let _ = tokio::time::timeout(RELEASE_MAX, futures::future::join_all(released)).await;
    outcome.map(|()| Uploaded {
        shares: deal.shares,
        took,
        sending: deal.sending,
    })
}

/// Who has what of an upload.
struct Deal {
    batch_pieces: usize,
    /// What nobody is at.
    waiting: VecDeque<Piece>,
    /// When each batch may begin.
    turns: Turns,
    /// How long savers were at what they have done.
    sending: Duration,
    /// Who is at nothing; the last one is next.
    idle: Vec<Saver>,
    /// What helpers are at, and since when.
    away: BTreeMap<usize, (Instant, Vec<Piece>)>,
    /// Since when the leader has been at something. That is waited for.
    leader_since: Option<Instant>,
    /// How long a helper may be at a batch.
    patience: Duration,
    shares: Vec<Share>,
}

impl Deal {
    fn new(pieces: &[Piece], helpers: &[Arc<dyn Helper>], spread: &Spread) -> Self {
        let savers = helpers.len() + 1;
        let share = |helper: &Arc<dyn Helper>| Share {
            name: helper.name(),
            bytes: 0,
            failed: None,
        };
        // The leader is given something first: what its batches take says how long those of others may.
        let mut idle: Vec<Saver> = (0..helpers.len()).map(Saver::Helper).collect();
        idle.push(Saver::Leader);
        Deal {
            batch_pieces: (pieces.len() / (savers * BATCHES_EACH)).clamp(1, BATCH_PIECES_MAX),
            waiting: pieces.iter().copied().collect(),
            turns: Turns::new(spread, bytes(pieces)),
            sending: Duration::ZERO,
            idle,
            away: BTreeMap::new(),
            leader_since: None,
            patience: PATIENCE_MIN,
            shares: helpers.iter().map(share).collect(),
        }
    }

    /// Has everything sent by `send`. Ends with the first failure of the leader.
    async fn carry_out<F>(&mut self, send: impl Fn(Saver, Vec<Piece>) -> F) -> Result<(), SaveError>
    where
        F: Future<Output = Done>,
    {
        let mut under_way = FuturesUnordered::new();
        loop {
            // Asked once for each batch: between two looks at the clock a turn may come.
            let turn = loop {
                let turn = self.turns.next();
                if turn.is_some() {
                    break turn;
                }
                let Some((saver, batch)) = self.next_batch() else {
                    break None;
                };
                under_way.push(send(saver, batch));
            };
            if self.is_done() {
                return Ok(());
            }
            // Where nobody is there to take it, that is waited for first.
            let turn = turn.filter(|_| !self.waiting.is_empty() && !self.idle.is_empty());
            tokio::select! {
                Some(done) = under_way.next() => self.settle(done)?,
                () = at(self.overdue()) => self.take_back(),
                () = self.turns.wait(turn) => {}
            }
        }
    }

    /// The next batch, and who sends it.
    fn next_batch(&mut self) -> Option<(Saver, Vec<Piece>)> {
        if self.waiting.is_empty() {
            return None;
        }
        let saver = self.idle.pop()?;
        let count = self.batch_pieces.min(self.waiting.len());
        let batch: Vec<Piece> = self.waiting.drain(..count).collect();
        self.turns.begin(bytes(&batch));
        match saver {
            Saver::Leader => self.leader_since = Some(Instant::now()),
            Saver::Helper(index) => {
                self.away.insert(index, (Instant::now(), batch.clone()));
            }
        }
        Some((saver, batch))
    }

    fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.away.is_empty() && self.leader_since.is_none()
    }

    /// When the leader, if it has nothing else to do, takes back what a helper has had for longest.
    fn overdue(&self) -> Option<Instant> {
        let oldest = self.away.values().map(|(since, _)| *since).min();
        let oldest = oldest.filter(|_| self.leader_since.is_none());
        oldest.map(|since| since + self.patience)
    }

    /// Takes back what helpers have had for too long; they get no more.
    fn take_back(&mut self) {
        let is_overdue = |since: &Instant| since.elapsed() >= self.patience;
        let overdue = self.away.extract_if(.., |_, (since, _)| is_overdue(since));
        for (index, (_, batch)) in overdue {
            self.waiting.extend(batch);
            let ms = self.patience.as_millis();
            self.shares[index].failed = Some(format!("nothing was heard for {ms} ms"));
        }
    }

    fn settle(&mut self, done: Done) -> Result<(), SaveError> {
        if let Done::Helper { index, .. } = &done {
            let Some((since, _)) = self.away.remove(index) else {
                // What was taken back is done by now or will be, by another.
                return Ok(());
            };
            self.sending += since.elapsed();
        }
        match done {
            Done::Leader(outcome) => {
                outcome?;
                let since = self.leader_since.take();
                let took = since.map_or(PATIENCE_MIN, |since| since.elapsed());
                self.patience = self.patience.max(took * PATIENCE_FACTOR);
                self.sending += took;
                // It is the quickest to ask. Where there is time, everybody sends the same.
                let place = if self.turns.are_spread() {
                    0
                } else {
                    self.idle.len()
                };
                self.idle.insert(place, Saver::Leader);
            }
            Done::Helper {
                index,
                batch,
                outcome: Ok(()),
            } => {
                self.shares[index].bytes += bytes(&batch);
                self.idle.insert(0, Saver::Helper(index));
            }
            Done::Helper {
                index,
                batch,
                outcome: Err(reason),
            } => {
                self.shares[index].failed = Some(reason);
                self.waiting.extend(batch);
            }
        }
        Ok(())
    }
}

fn bytes(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.chunk.length).sum()
}

/// At that time, if there is one.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "sharing_tests.rs"]
mod tests;
