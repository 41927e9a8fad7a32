//! Uploading what a save consists of together with others who hold the very same bytes.
//!
//! Invariants:
//! 1. A piece is done when somebody who holds it has verified and stored it; who fails gets no more, and what it had
//!    goes to the others.
//! 2. Whoever leads the save uploads too, and in the end also what others have had for too long: so a save waits for
//!    nobody, and ends if the store takes it.
//! 3. Nothing becomes visible by it: the manifest is written after all of it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use mobula_storage::checkpoint::{CheckpointSource, CheckpointWriter, Piece, SaveError};
use tokio::time::Instant;

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

    /// The bytes are not needed any more.
    fn release(&self, step: u64) -> BoxFuture<'_, ()>;
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

/// Who did a batch: the leader, or a helper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Saver {
    Leader,
    Helper(usize),
}

struct Done {
    saver: Saver,
    batch: Vec<Piece>,
    outcome: Result<(), Failure>,
}

enum Failure {
    Store(SaveError),
    Helper(String),
}

/// Uploads `pieces` of `state`, which is that after `step`. Answers what each helper did; nothing where there is
/// none.
pub async fn upload(
    writer: &CheckpointWriter,
    state: &Arc<dyn CheckpointSource>,
    step: u64,
    pieces: &[Piece],
    helpers: &[Arc<dyn Helper>],
) -> Result<Vec<Share>, SaveError> {
    let mut shares: Vec<Share> = helpers
        .iter()
        .map(|helper| Share {
            name: helper.name(),
            bytes: 0,
            failed: None,
        })
        .collect();
    let outcome = share_out(writer, state, step, pieces, helpers, &mut shares).await;
    let released = helpers.iter().map(|helper| helper.release(step));
    // Who is not told finds out when it is asked to hold the next state.
    let _ = tokio::time::timeout(RELEASE_MAX, futures::future::join_all(released)).await;
    outcome.map(|()| shares)
}

async fn share_out(
    writer: &CheckpointWriter,
    state: &Arc<dyn CheckpointSource>,
    step: u64,
    pieces: &[Piece],
    helpers: &[Arc<dyn Helper>],
    shares: &mut [Share],
) -> Result<(), SaveError> {
    let savers = helpers.len() + 1;
    let batch_pieces = (pieces.len() / (savers * BATCHES_EACH)).clamp(1, BATCH_PIECES_MAX);
    let mut waiting: VecDeque<Piece> = pieces.iter().copied().collect();
    let mut idle: Vec<Saver> = std::iter::once(Saver::Leader)
        .chain((0..helpers.len()).map(Saver::Helper))
        .collect();
    // What helpers are at, and since when; the leader's own is waited for.
    let mut away: BTreeMap<Saver, (Instant, Vec<Piece>)> = BTreeMap::new();
    let mut under_way: FuturesUnordered<BoxFuture<'_, Done>> = FuturesUnordered::new();
    let mut patience = PATIENCE_MIN;
    let mut leader_since: Option<Instant> = None;
    let begin = |saver: Saver, batch: Vec<Piece>| -> BoxFuture<'_, Done> {
        Box::pin(async move {
            let outcome = match saver {
                Saver::Leader => {
                    let sent = writer.upload(Arc::clone(state), &batch).await;
                    sent.map_err(Failure::Store)
                }
                Saver::Helper(index) => {
                    let sent = helpers[index].upload(step, batch.clone()).await;
                    sent.map_err(Failure::Helper)
                }
            };
            Done {
                saver,
                batch,
                outcome,
            }
        })
    };
    loop {
        while !waiting.is_empty()
            && let Some(saver) = idle.pop()
        {
            let count = batch_pieces.min(waiting.len());
            let batch: Vec<Piece> = waiting.drain(..count).collect();
            match saver {
                Saver::Leader => leader_since = Some(Instant::now()),
                Saver::Helper(_) => {
                    away.insert(saver, (Instant::now(), batch.clone()));
                }
            }
            under_way.push(begin(saver, batch));
        }
        if waiting.is_empty() && away.is_empty() && leader_since.is_none() {
            return Ok(());
        }
        // With nothing else to do the leader looks at who has had something for longest.
        let oldest = away.values().map(|(since, _)| *since).min();
        let overdue = oldest
            .filter(|_| leader_since.is_none())
            .map(|since| since + patience);
        let done = match overdue {
            None => under_way.next().await,
            Some(overdue) => match tokio::time::timeout_at(overdue, under_way.next()).await {
                Ok(done) => done,
                Err(_) => {
                    take_back(&mut away, &mut waiting, shares, patience);
                    continue;
                }
            },
        };
        let Done {
            saver,
            batch,
            outcome,
        } = done.expect("something is under way");
        match (saver, outcome) {
            (Saver::Leader, outcome) => {
                if let Err(Failure::Store(error)) = outcome {
                    return Err(error);
                }
                let took = leader_since
                    .take()
                    .map_or(PATIENCE_MIN, |since| since.elapsed());
                patience = patience.max(took * PATIENCE_FACTOR);
                idle.push(saver);
            }
            (Saver::Helper(index), outcome) => {
                // What was taken back is done by now or will be, by another.
                let was_awaited = away.remove(&saver).is_some();
                match outcome {
                    Ok(()) if was_awaited => {
                        let bytes = batch.iter().map(|piece| piece.chunk.length);
                        shares[index].bytes += bytes.sum::<u64>();
                        // The leader stays first in line for the end of the queue.
                        idle.insert(0, saver);
                    }
                    Err(Failure::Helper(reason)) if was_awaited => {
                        shares[index].failed = Some(reason);
                        waiting.extend(batch);
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Takes back what the helpers have had for longer than `patience`; they get no more.
fn take_back(
    away: &mut BTreeMap<Saver, (Instant, Vec<Piece>)>,
    waiting: &mut VecDeque<Piece>,
    shares: &mut [Share],
    patience: Duration,
) {
    let overdue: Vec<Saver> = away
        .iter()
        .filter(|(_, (since, _))| since.elapsed() >= patience)
        .map(|(saver, _)| *saver)
        .collect();
    for saver in overdue {
        let (_, batch) = away.remove(&saver).expect("it was just there");
        waiting.extend(batch);
        if let Saver::Helper(index) = saver {
            let ms = patience.as_millis();
            shares[index].failed = Some(format!("nothing was heard for {ms} ms"));
        }
    }
}

#[cfg(test)]
#[path = "sharing_tests.rs"]
mod tests;
