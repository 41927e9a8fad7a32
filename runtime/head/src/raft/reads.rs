//! Linearizable reads: each waits for the index that a leader confirmed, and then for its apply.
//!
//! Invariants:
//! 1. A read's context is unique among all heads and all lives of a process: the leader keeps those
//!    of followers beside its own and drops a repeated one silently, and an answer to an earlier
//!    life would vouch for too little.
//! 2. A leader asks for the group's confirmation of one context once: a message that arrives again, or
//!    after a newer one of its sender, is dropped. raft-rs would take it in behind newer reads, count
//!    answers to the first one for it, and release those newer ones with it, unconfirmed.
//! 3. A read that gets no index is dropped when its asker gives up; [`super::RaftHandle::read`]
//!    asks again, for raft-rs drops reads silently (no leader, a leader that has not committed in
//!    its term, a change of roles).

use std::collections::{BTreeMap, VecDeque};

use mobula_core::mutant::{Mutant, is_planted};
use mobula_storage::engine::RocksSnapshot;
use raft::ReadState;
use raft::eraftpb::Message;
use tokio::sync::oneshot;

use super::proposals::{ProposeError, TableView};

/// How many reads may wait for their index.
const READS_MAX: usize = 4096;

pub(crate) type ReadReply<S = RocksSnapshot> = oneshot::Sender<Result<TableView<S>, ProposeError>>;

/// Member, life of the process, number.
type Context = [u8; 24];

/// Lives of other heads whose newest read is remembered: each head has one, and the late messages of
/// a life before it do not come from longer ago than a few starts.
const ASKERS_MAX: usize = 64;

/// The reads that wait.
pub(super) struct Reads<S> {
    member: u64,
    life: u64,
    last: u64,
    /// Those that wait for an index.
    asked: BTreeMap<Context, ReadReply<S>>,
    /// Those with an index that is not applied yet.
    confirmed: VecDeque<(u64, ReadReply<S>)>,
    /// The newest read of each other head's life, the life that asked last in the back.
    askers: VecDeque<([u8; 16], u64)>,
}

impl<S> Reads<S> {
    /// `life` differs between any two lives of the member's process.
    pub(super) fn new(member: u64, life: u64) -> Self {
        Reads {
            member,
            life,
            last: 0,
            asked: BTreeMap::new(),
            confirmed: VecDeque::new(),
            askers: VecDeque::new(),
        }
    }

    /// Takes a read in; the context to ask raft for its index with.
    pub(super) fn ask(&mut self, reply: ReadReply<S>) -> Option<Vec<u8>> {
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

    /// Whether a read that another head asks this leader for is newer than all before of that head.
    pub(super) fn is_new(&mut self, message: &Message) -> bool {
        let context = message.entries.first().map(|entry| entry.data.as_slice());
        let Some(context) = context.and_then(|data| Context::try_from(data).ok()) else {
            return false;
        };
        let (asker, number) = context.split_at(16);
        let asker: [u8; 16] = asker.try_into().expect("it was split there");
        let number = u64::from_be_bytes(number.try_into().expect("8 of 24 bytes are left"));
        let known = self.askers.iter().position(|(known, _)| *known == asker);
        let newest = known.and_then(|at| self.askers.remove(at));
        let newest = newest.map_or(0, |(_, number)| number);
        self.askers.push_back((asker, newest.max(number)));
        if self.askers.len() > ASKERS_MAX {
            self.askers.pop_front();
        }
        number > newest
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
    pub(super) fn answer(&mut self, applied: u64, view: impl Fn() -> TableView<S>) {
        let is_due = |index: u64| index <= applied || is_planted(Mutant::ReadBeforeApply);
        while self
            .confirmed
            .front()
            .is_some_and(|(index, _)| is_due(*index))
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
    fn a_read_of_another_head_counts_once() {
        let mut leader = Reads::<RocksSnapshot>::new(1, 1);
        let mut asker = Reads::<RocksSnapshot>::new(2, 7);
        let mut message = || {
            let (reply, _answer) = oneshot::channel();
            let data = asker.ask(reply).unwrap();
            let entry = raft::eraftpb::Entry {
                data,
                ..Default::default()
            };
            Message {
                entries: vec![entry],
                ..Message::default()
            }
        };
        let (first, second, third) = (message(), message(), message());
        assert!(leader.is_new(&first));
        assert!(!leader.is_new(&first), "it arrives again");
        assert!(leader.is_new(&third));
        assert!(!leader.is_new(&second), "it arrives late");
        assert!(!leader.is_new(&Message::default()), "it has no context");
    }

    #[test]
    fn contexts_differ_between_members_lives_and_reads() {
        let mut contexts = std::collections::BTreeSet::new();
        for member in [1, 2] {
            for life in 0..3 {
                let mut reads = Reads::<RocksSnapshot>::new(member, life);
                for _read in 0..4 {
                    let (reply, _answer) = oneshot::channel();
                    contexts.insert(reads.ask(reply).unwrap());
                }
            }
        }
        assert_eq!(contexts.len(), 2 * 3 * 4);
    }
}
