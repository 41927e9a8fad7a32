//! Whether the replicas hold the same (I12): heads tell each other their state at an entry, and
//! each compares what it hears with its own state at that entry.
//!
//! A state is told by the chain of hashes over all writes ([`super::apply::StateAt`]). Two chains that
//! differ once differ for ever, until one of them is replaced by a snapshot, and two that are equal at
//! an entry were equal at all entries before; so comparing now and then finds whatever happened in
//! between.
//!
//! Who is wrong a majority decides: a head that differs from another one, which agrees with a majority
//! of the voters, is the one that is wrong, and ends. Where no majority agrees (two heads that
//! differ, three of which one is away) nobody can say, and both say so loudly and go on: stopping
//! both would trade a doubt for a certain outage.
//!
//! Invariants:
//! 1. Only states of one and the same entry are compared.
//! 2. An agreement counts against a head only if it is about the entry at which that one was found to
//!    differ, or a later one: a head that has just gone wrong agreed with everybody a moment before.
//! 3. A head that differs from a majority notes that on its disk before it ends, and never serves
//!    again from there.
//! 4. Nothing here waits: a claim about an entry that is not applied here yet is kept until it is, one
//!    for each head.

use std::collections::{BTreeMap, VecDeque};

use mobula_core::mutant::{Mutant, is_planted};
use mobula_wire::raft::StateClaim;

use super::apply::StateAt;
use super::membership::MEMBERS_MAX;

/// Entries whose states are remembered: how far two heads may be apart for a claim to be compared. A
/// claim is on its way for milliseconds, in which a busy group applies some hundreds. 40 bytes each.
const RECENT_MAX: usize = 4096;

/// What became of comparing this head's state with another one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerState {
    /// The other head's Raft id.
    pub raft_id: u64,
    /// The entry at which the two were last compared.
    pub index: u64,
    /// Whether they were different there.
    pub differs: bool,
}

/// This head's state is not that of a majority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the state of this head ({raft_id}) at entry {index} differs from that of head {other}, with \
     which {agreeing} of {voters} voters agree: what it holds is wrong, and it serves no more; keep \
     its data directory for whoever looks into this, remove it from the group (`mobula head remove \
     {raft_id}`), and join again with an empty directory, under a new id"
)]
pub(crate) struct Diverged {
    pub(crate) raft_id: u64,
    pub(crate) index: u64,
    pub(crate) other: u64,
    pub(crate) agreeing: usize,
    pub(crate) voters: usize,
}

#[derive(Debug, Default)]
struct Peer {
    compared: Option<PeerState>,
    /// The first entry at which it was found to differ.
    differs_since: Option<u64>,
    /// What it said last about an entry that is not applied here yet.
    waiting: Option<StateClaim>,
}

/// What this head knows about the states of the others.
#[derive(Debug)]
pub(super) struct Agreement {
    raft_id: u64,
    /// This head's states, oldest first, without gaps.
    recent: VecDeque<StateAt>,
    peers: BTreeMap<u64, Peer>,
    /// Whether what [`Agreement::peers`] gives has changed since it was last asked.
    changed: bool,
}

impl Agreement {
    /// That of head `raft_id`, which is at `start`.
    pub(super) fn new(raft_id: u64, start: StateAt) -> Self {
        Agreement {
            raft_id,
            recent: VecDeque::from([start]),
            peers: BTreeMap::new(),
            changed: false,
        }
    }

    /// Entries were applied.
    pub(super) fn applied(&mut self, states: &[StateAt]) {
        self.recent.extend(states);
        let excess = self.recent.len().saturating_sub(RECENT_MAX);
        self.recent.drain(..excess);
    }

    /// The whole state was replaced.
    pub(super) fn replaced(&mut self, state: StateAt) {
        self.recent = VecDeque::from([state]);
        self.peers.clear();
        self.changed = true;
    }

    /// Another head said what its state is.
    pub(super) fn heard(&mut self, from: u64, claim: StateClaim) {
        if self.peers.len() >= MEMBERS_MAX && !self.peers.contains_key(&from) {
            return;
        }
        self.peers.entry(from).or_default().waiting = Some(claim);
    }

    /// Heads that are members no more are forgotten.
    pub(super) fn keep_only(&mut self, is_member: impl Fn(u64) -> bool) {
        let before = self.peers.len();
        self.peers.retain(|raft_id, _| is_member(*raft_id));
        self.changed |= self.peers.len() != before;
    }

    /// Whether there is something to judge.
    pub(super) fn is_waiting(&self) -> bool {
        self.changed || self.peers.values().any(|peer| peer.waiting.is_some())
    }

    /// Compares what was heard with what is applied by now, and judges.
    pub(super) fn judge(&mut self, voters: &[u64]) -> Result<(), Diverged> {
        let Some(newest) = self.recent.back().map(|state| state.index) else {
            return Ok(());
        };
        let mut ripe: Vec<(u64, StateClaim)> = Vec::new();
        for (raft_id, peer) in &mut self.peers {
            let claim = peer.waiting.take_if(|claim| claim.index <= newest);
            ripe.extend(claim.map(|claim| (*raft_id, claim)));
        }
        for (raft_id, claim) in ripe {
            // One about an entry that is too long ago is no use; the next one will be.
            let own = match is_planted(Mutant::ClaimOfOtherEntry) {
                true => self.recent.back().copied(),
                false => self.state_at(claim.index),
            };
            if let Some(own) = own {
                self.compare(raft_id, own, &claim, voters)?;
            }
        }
        Ok(())
    }

    fn compare(
        &mut self,
        raft_id: u64,
        own: StateAt,
        claim: &StateClaim,
        voters: &[u64],
    ) -> Result<(), Diverged> {
        let compared = PeerState {
            raft_id,
            index: own.index,
            differs: own.hash != claim.state_hash,
        };
        let peer = self.peers.entry(raft_id).or_default();
        let before = peer.compared.replace(compared);
        self.changed |= before != Some(compared);
        if !compared.differs {
            peer.differs_since = None;
            return Ok(());
        }
        let since = *peer.differs_since.get_or_insert(own.index);
        let agrees = |id: u64| {
            let same = |(other, index): &(u64, u64)| *other == id && *index >= since;
            id == raft_id || claim.agrees_with.iter().any(same)
        };
        let agreeing = voters.iter().filter(|id| agrees(**id)).count();
        if agreeing > voters.len() / 2 && !agrees(self.raft_id) {
            return Err(Diverged {
                raft_id: self.raft_id,
                index: own.index,
                other: raft_id,
                agreeing,
                voters: voters.len(),
            });
        }
        if before.is_none_or(|before| !before.differs) {
            tracing::error!(
                peer = raft_id,
                index = own.index,
                "the state of another head differs from this head's: one of the two is wrong; see \
                 `mobula head members`"
            );
        }
        Ok(())
    }

    fn state_at(&self, index: u64) -> Option<StateAt> {
        let first = self.recent.front()?.index;
        let offset = usize::try_from(index.checked_sub(first)?).ok()?;
        self.recent.get(offset).copied()
    }

    /// What this head says of itself.
    pub(super) fn claim(&self) -> Option<StateClaim> {
        let own = self.recent.back()?;
        let agrees = |peer: &Peer| {
            let same = peer.compared.filter(|state| !state.differs)?;
            Some((same.raft_id, same.index))
        };
        Some(StateClaim {
            index: own.index,
            state_hash: own.hash,
            agrees_with: self.peers.values().filter_map(agrees).collect(),
        })
    }

    /// How the states of the others compare with this head's, by Raft id, if that has changed since
    /// this was last asked.
    pub(super) fn news(&mut self) -> Option<Vec<PeerState>> {
        std::mem::take(&mut self.changed).then(|| {
            let peers = self.peers.values();
            peers.filter_map(|peer| peer.compared).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(index: u64, hash: u8) -> StateAt {
        StateAt {
            index,
            hash: [hash; 32],
        }
    }

    fn claim(index: u64, hash: u8, agrees_with: &[(u64, u64)]) -> StateClaim {
        StateClaim {
            index,
            state_hash: [hash; 32],
            agrees_with: agrees_with.to_vec(),
        }
    }

    /// Head 3 at entries 10 to 12, whose states are 10 to 12.
    fn head() -> Agreement {
        let mut head = Agreement::new(3, state(10, 10));
        head.applied(&[state(11, 11), state(12, 12)]);
        head
    }

    #[test]
    fn a_head_that_differs_from_a_majority_is_wrong_and_one_that_differs_from_one_other_may_not_be()
    {
        // Voters; with whom head 1 says that it agrees, and where; whether head 3 is wrong.
        type Case<'a> = (&'a [u64], &'a [(u64, u64)], bool);
        let cases: [Case<'_>; 8] = [
            (&[1, 2, 3], &[(2, 11)], true),
            // From before they differed: head 1 may have gone wrong since.
            (&[1, 2, 3], &[(2, 10)], false),
            (&[1, 2, 3], &[], false),
            (&[1, 2, 3], &[(2, 11), (3, 11)], false),
            (&[1, 3], &[], false),
            (&[1, 2, 3, 4, 5], &[(2, 11)], false),
            (&[1, 2, 3, 4, 5], &[(2, 11), (5, 12)], true),
            // What learners hold decides nothing; a learner may be wrong.
            (&[1], &[], true),
        ];
        for (voters, agrees_with, wrong) in cases {
            let mut head = head();
            head.heard(1, claim(11, 99, &[]));
            let first = head.judge(voters);
            head.heard(1, claim(12, 99, agrees_with));
            let judged = first.and_then(|()| head.judge(voters));
            assert_eq!(judged.is_err(), wrong, "{voters:?} {agrees_with:?}");
            if let Err(error) = judged {
                assert_eq!((error.raft_id, error.other), (3, 1));
            } else {
                let found = head.news().unwrap();
                assert!(found[0].differs, "it is named all the same: {found:?}");
            }
        }
    }

    /// Three heads that tell each other everything, of which one goes wrong: it is the one that ends,
    /// whoever speaks first.
    #[test]
    fn only_the_wrong_one_of_three_ends() {
        for order in [
            [1, 2, 3],
            [1, 3, 2],
            [2, 1, 3],
            [2, 3, 1],
            [3, 1, 2],
            [3, 2, 1],
        ] {
            let mut heads: BTreeMap<u64, Agreement> = (1..=3)
                .map(|raft_id| (raft_id, Agreement::new(raft_id, state(0, 0))))
                .collect();
            let mut ended = Vec::new();
            for index in 1..=9 {
                for (raft_id, head) in &mut heads {
                    let is_wrong = *raft_id == 2 && index >= 5;
                    head.applied(&[state(index, if is_wrong { 99 } else { 1 })]);
                }
                for speaker in order {
                    let Some(said) = heads.get(&speaker).and_then(Agreement::claim) else {
                        continue;
                    };
                    heads.retain(|raft_id, head| {
                        if *raft_id != speaker {
                            head.heard(speaker, said.clone());
                        }
                        let wrong = head.judge(&[1, 2, 3]).is_err();
                        if wrong {
                            ended.push(*raft_id);
                        }
                        !wrong
                    });
                }
            }
            assert_eq!(ended, [2], "{order:?}");
        }
    }

    #[test]
    fn equal_states_agree_and_are_told_on() {
        let mut head = head();
        assert_eq!(head.claim().unwrap(), claim(12, 12, &[]));
        assert_eq!(head.news(), None);
        head.heard(1, claim(12, 12, &[]));
        head.heard(2, claim(10, 10, &[]));
        head.judge(&[1, 2, 3]).unwrap();
        assert_eq!(head.claim().unwrap(), claim(12, 12, &[(1, 12), (2, 10)]));
        let found = head.news().unwrap();
        assert!(found.iter().all(|peer| !peer.differs), "{found:?}");
        assert_eq!(head.news(), None);
    }

    #[test]
    fn a_claim_waits_for_its_entry_and_one_from_long_ago_says_nothing() {
        let mut head = head();
        head.heard(1, claim(13, 13, &[]));
        head.heard(2, claim(9, 77, &[(1, 9)]));
        head.judge(&[1, 2, 3]).unwrap();
        assert_eq!(head.news(), None);
        head.applied(&[state(13, 14)]);
        head.judge(&[1, 2, 3]).unwrap();
        let differs = PeerState {
            raft_id: 1,
            index: 13,
            differs: true,
        };
        assert_eq!(head.news().unwrap(), [differs]);
        // A snapshot took the place of all that.
        head.replaced(state(20, 20));
        assert_eq!(head.news().unwrap(), []);
        head.heard(1, claim(13, 13, &[(2, 13)]));
        head.judge(&[1, 2, 3]).unwrap();
        assert_eq!(head.claim().unwrap(), claim(20, 20, &[]));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_who_left_is_forgotten() {
        let mut head = head();
        let many: Vec<StateAt> = (13..13 + 2 * RECENT_MAX as u64)
            .map(|index| state(index, 1))
            .collect();
        head.applied(&many);
        assert_eq!(head.recent.len(), RECENT_MAX);
        for from in 0..100 {
            head.heard(from, claim(many.last().unwrap().index, 2, &[]));
        }
        assert_eq!(head.peers.len(), MEMBERS_MAX);
        head.judge(&[]).unwrap();
        head.keep_only(|raft_id| raft_id == 5);
        let left: Vec<u64> = head.news().unwrap().iter().map(|p| p.raft_id).collect();
        assert_eq!(left, [5]);
    }
}
