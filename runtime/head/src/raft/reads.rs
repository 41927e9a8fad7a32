//! Linearizable reads: each waits for the index that a leader confirmed, and then for its apply.
//!
//! Invariants:
//! 1. A read's context is unique among all heads and all lives of a process: the leader keeps those
//!    of followers beside its own and drops a repeated one silently, and an answer to an earlier
//!    life would vouch for too little.
//! 2. A read that gets no index is dropped when its asker gives up; [`super::RaftHandle::read`]
//!    asks again, for raft-rs drops reads silently (no leader, a leader that has not committed in
//!    its term, a change of roles).

use std::collections::{BTreeMap, VecDeque};

use raft::ReadState;
use rand::RngCore;
use tokio::sync::oneshot;

use super::proposals::{ProposeError, TableView};

/// How many reads may wait for their index.
const READS_MAX: usize = 4096;

pub(super) type ReadReply = oneshot::Sender<Result<TableView, ProposeError>>;

/// Member, life of the process, number.
type Context = [u8; 24];

/// The reads that wait.
pub(super) struct Reads {
    member: u64,
    life: u64,
    last: u64,
    /// Those that wait for an index.
    asked: BTreeMap<Context, ReadReply>,
    /// Those with an index that is not applied yet.
    confirmed: VecDeque<(u64, ReadReply)>,
}

impl Reads {
    pub(super) fn new(member: u64) -> Self {
        Reads {
            member,
            life: rand::rng().next_u64(),
            last: 0,
            asked: BTreeMap::new(),
            confirmed: VecDeque::new(),
        }
    }

    /// Takes a read in; the context to ask raft for its index with.
    pub(super) fn ask(&mut self, reply: ReadReply) -> Option<Vec<u8>> {
        // Bounded by those who really wait.
        self.asked.retain(|_, waiting| !waiting.is_closed());
        if self.asked.len() >= READS_MAX {
            // Whoever asked may have given up.
            let _ = reply.send(Err(ProposeError::Overloaded("4096 reads are waiting")));
            return None;
        }
        self.last += 1;
        let mut context: Context = [0; 24];
        context[..8].copy_from_slice(&self.member.to_be_bytes());
        context[8..16].copy_from_slice(&self.life.to_be_bytes());
        context[16..].copy_from_slice(&self.last.to_be_bytes());
        self.asked.insert(context, reply);
        Some(context.to_vec())
    }

    /// Notes which indexes a leader has confirmed.
    pub(super) fn confirm(&mut self, states: Vec<ReadState>) {
        for state in states {
            let Ok(context) = Context::try_from(state.request_ctx.as_slice()) else {
                continue;
            };
            if let Some(reply) = self.asked.remove(&context) {
                self.confirmed.push_back((state.index, reply));
            }
        }
    }

    /// Answers those whose index is applied.
    pub(super) fn answer(&mut self, applied: u64, view: impl Fn() -> TableView) {
        while self
            .confirmed
            .front()
            .is_some_and(|(index, _)| *index <= applied)
        {
            let Some((_, reply)) = self.confirmed.pop_front() else {
                return;
            };
            if !reply.is_closed() {
                let _ = reply.send(Ok(view()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_differ_between_members_lives_and_reads() {
        let mut contexts = std::collections::BTreeSet::new();
        for member in [1, 2] {
            for _life in 0..3 {
                let mut reads = Reads::new(member);
                for _read in 0..4 {
                    let (reply, _answer) = oneshot::channel();
                    contexts.insert(reads.ask(reply).unwrap());
                }
            }
        }
        assert_eq!(contexts.len(), 2 * 3 * 4);
    }
}
