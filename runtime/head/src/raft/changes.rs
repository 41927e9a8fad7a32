//! Changes of the group on the leader: which are allowed now, and what became of those proposed.
//!
//! Invariants:
//! 1. A change is answered when it is applied here and a majority of the voters that it leaves knows that it
//!    is committed, and not when raft took it. While another is pending, raft turns it into an empty entry
//!    and says nothing; such a one is proposed again. And a voter goes by the members of which it knows:
//!    were this leader lost before another one has heard of the change, that one would wait for a
//!    majority of the old members, and the new one would be of no help.
//!    What it knows it still knows after a crash: see [`tells_of_change`].
//! 2. A learner is promoted only when it holds nearly all that is committed and needs no snapshot, and a
//!    member is removed only if a majority of the rest is alive: neither change may stop the group.
//!
//! These are checks of a moment, for the sake of the operator. What must hold in every case is
//! checked again in [`super::membership::apply_change`].

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mobula_core::control::Origin;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_storage::engine::Engine;
use raft::prelude::EntryType;
use raft::{ProgressState, Ready, StateRole};
use tokio::sync::oneshot;

use super::apply::AppliedChange;
use super::membership::GroupChange;
use super::node_loop::{Node, dropped, not_leader};
use super::proposals::{ChangeError, GroupProgress, MemberProgress, ProposeError};

/// How many committed entries a learner may lack when it is promoted: at the rate of a busy head
/// some tens of milliseconds.
const PROMOTION_LAG_MAX: u64 = 200;

/// How often a change is proposed again that raft has dropped: others are pending for a moment only.
const ATTEMPTS_MAX: u32 = 16;

type Reply = oneshot::Sender<Result<(), ChangeError>>;

struct Waiting {
    nonce: u64,
    change: GroupChange,
    origin: Option<Origin>,
    attempts: u32,
    reply: Reply,
}

/// The changes that were proposed here, and who is alive to take part in them.
pub(super) struct Changes {
    now: Instant,
    /// When each other head was last heard of. (raft's own flag is cleared once in each election
    /// timeout and so, for a moment, says of everybody that he is gone.)
    heard: BTreeMap<u64, Instant>,
    /// The silence after which a head does not count as alive.
    silence_max: Duration,
    /// By index of their entry.
    waiting: BTreeMap<u64, Waiting>,
    /// Those that came to nothing.
    vanished: Vec<Waiting>,
    /// Those that are applied here, by index of their entry.
    spreading: BTreeMap<u64, Reply>,
    last_nonce: u64,
}

impl Changes {
    pub(super) fn new(silence_max: Duration, now: Instant) -> Self {
        Changes {
            now,
            heard: BTreeMap::new(),
            silence_max,
            waiting: BTreeMap::new(),
            vanished: Vec::new(),
            spreading: BTreeMap::new(),
            last_nonce: 0,
        }
    }

    /// Notes what time it is.
    pub(super) fn advance_to(&mut self, now: Instant) {
        self.now = now;
    }

    /// Notes that a head of the group said something.
    pub(super) fn heard<E: Engine>(&mut self, node: &Node<E>, from: u64) {
        if node.raft.prs().get(from).is_some() {
            self.heard.insert(from, self.now);
        }
    }

    fn is_alive<E: Engine>(&self, node: &Node<E>, raft_id: u64) -> bool {
        let is_heard = |at: &Instant| self.now.saturating_duration_since(*at) <= self.silence_max;
        raft_id == node.raft.id || self.heard.get(&raft_id).is_some_and(is_heard)
    }

    /// Checks a change and puts it into the log.
    pub(super) fn propose<E: Engine>(
        &mut self,
        node: &mut Node<E>,
        change: GroupChange,
        origin: Option<Origin>,
        reply: Reply,
    ) {
        if node.raft.state != StateRole::Leader {
            // Whoever asked may have given up, here and below.
            let _ = reply.send(Err(not_leader(node).into()));
            return;
        }
        if let Err(error) = self.check(node, &change) {
            let _ = reply.send(Err(error));
            return;
        }
        let waiting = Waiting {
            nonce: 0,
            change,
            origin,
            attempts: 0,
            reply,
        };
        self.append(node, waiting);
    }

    fn append<E: Engine>(&mut self, node: &mut Node<E>, mut waiting: Waiting) {
        // Across leaders too: the term is part of it.
        self.last_nonce += 1;
        waiting.nonce = (node.raft.term << 32) | self.last_nonce;
        waiting.attempts += 1;
        let (context, change) = waiting
            .change
            .to_raft(waiting.nonce, waiting.origin.clone());
        match node.propose_conf_change(context, change) {
            Ok(()) => {
                let index = node.raft.raft_log.last_index();
                self.waiting.insert(index, waiting);
            }
            Err(_) => {
                let _ = waiting.reply.send(Err(dropped(node).into()));
            }
        }
    }

    /// Takes what an entry did.
    pub(super) fn applied(&mut self, applied: AppliedChange) {
        let Some(waiting) = self.waiting.remove(&applied.index) else {
            return;
        };
        if applied.nonce != Some(waiting.nonce) && !is_planted(Mutant::ChangeSwallowed) {
            return self.vanished.push(waiting);
        }
        match applied.result {
            Ok(()) => drop(self.spreading.insert(applied.index, waiting.reply)),
            Err(rejection) => drop(waiting.reply.send(Err(rejection.into()))),
        }
    }

    /// Answers those changes of which a majority knows.
    pub(super) fn answer_known<E: Engine>(&mut self, node: &Node<E>) {
        if self.spreading.is_empty() {
            return;
        }
        let tracker = node.raft.prs();
        let voters = tracker.conf().to_conf_state().voters;
        let knows = |raft_id: u64, index: u64| match raft_id == node.raft.id {
            true => node.raft.raft_log.committed >= index,
            false => tracker
                .get(raft_id)
                .is_some_and(|progress| progress.committed_index >= index),
        };
        while let Some(first) = self.spreading.first_entry() {
            let index = *first.key();
            let known = voters.iter().filter(|id| knows(**id, index)).count();
            if known <= voters.len() / 2 {
                return;
            }
            let _ = first.remove().send(Ok(()));
        }
    }

    /// Proposes again what vanished. To be called when nothing is between `ready` and `advance`.
    pub(super) fn propose_again<E: Engine>(&mut self, node: &mut Node<E>) {
        for waiting in std::mem::take(&mut self.vanished) {
            if node.raft.state != StateRole::Leader {
                let _ = waiting.reply.send(Err(not_leader(node).into()));
            } else if waiting.attempts >= ATTEMPTS_MAX {
                let why = "other changes of the group were pending each time";
                let _ = waiting
                    .reply
                    .send(Err(ProposeError::Overloaded(why).into()));
            } else if let Err(error) = self.check(node, &waiting.change) {
                let _ = waiting.reply.send(Err(error));
            } else {
                self.append(node, waiting);
            }
        }
    }

    /// Answers all that wait: another leader decides what becomes of them.
    pub(super) fn leadership_lost(&mut self) {
        let waiting = std::mem::take(&mut self.waiting).into_values();
        let waiting = waiting.chain(std::mem::take(&mut self.vanished));
        let spreading = std::mem::take(&mut self.spreading).into_values();
        for reply in waiting.map(|waiting| waiting.reply).chain(spreading) {
            let lost = ProposeError::Unknown("leadership was lost");
            let _ = reply.send(Err(lost.into()));
        }
    }
}

/// Whether the write of `ready` lets others know that a change of the group is committed here, and so has to
/// be on the disk before they do. Where only a part of what is committed is handed out at a time, the rest
/// may hold one.
pub(super) fn tells_of_change(ready: &Ready) -> bool {
    if is_planted(Mutant::ChangeNotSynced) {
        return false;
    }
    let committed = ready.committed_entries();
    let is_change = |kind| kind != EntryType::EntryNormal;
    let ends_at = committed.last().map_or(0, |entry| entry.index);
    ready.hs().is_some_and(|state| {
        state.commit > ends_at
            || committed
                .iter()
                .any(|entry| is_change(entry.get_entry_type()))
    })
}

fn refused(why: String) -> ChangeError {
    Rejection::new(ErrorCode::FailedPrecondition, why).into()
}

impl Changes {
    fn check<E: Engine>(&self, node: &Node<E>, change: &GroupChange) -> Result<(), ChangeError> {
        match change {
            GroupChange::AddLearner(_) => Ok(()),
            GroupChange::Promote(raft_id) => self.check_promotion(node, *raft_id),
            GroupChange::Remove(raft_id) => self.check_removal(node, *raft_id),
        }
    }

    fn check_promotion<E: Engine>(&self, node: &Node<E>, raft_id: u64) -> Result<(), ChangeError> {
        let tracker = node.raft.prs();
        if tracker.conf().voters().contains(raft_id) {
            return Ok(());
        }
        let Some(progress) = tracker.get(raft_id) else {
            return Err(refused(format!(
                "head {raft_id} is not in the group: it must join first"
            )));
        };
        let committed = node.raft.raft_log.committed;
        let lag = committed.saturating_sub(progress.matched);
        let is_alive = self.is_alive(node, raft_id);
        // What the log has no more of comes in a snapshot, which may be lost many times. In a young group
        // that is less than the lag above, and until then the learner has no tables and no members.
        let needs_snapshot =
            progress.matched == 0 || progress.matched + 1 < node.raft.raft_log.first_index();
        let needs_snapshot = needs_snapshot && !is_planted(Mutant::PromotedEmpty);
        // The state does not matter: what is matched the learner holds, and raft leaves one that has
        // everything in state probe until there is something new to send.
        if is_alive && lag <= PROMOTION_LAG_MAX && !needs_snapshot {
            return Ok(());
        }
        let state = if is_alive {
            state_name(progress.state)
        } else {
            "silent"
        };
        Err(refused(format!(
            "head {raft_id} ({state}) has not caught up: it holds entry {} of {committed}, at most \
             {PROMOTION_LAG_MAX} may be missing and none that the log does not have any more, and it \
             must have been heard of lately; wait and try again",
            progress.matched
        )))
    }

    fn check_removal<E: Engine>(&self, node: &Node<E>, raft_id: u64) -> Result<(), ChangeError> {
        let tracker = node.raft.prs();
        if raft_id == node.raft.id {
            return Err(ChangeError::IsLeader(raft_id));
        }
        if tracker.get(raft_id).is_none() {
            return Err(refused(format!("head {raft_id} is not in the group")));
        }
        let voters = tracker.conf().to_conf_state().voters;
        if !voters.contains(&raft_id) {
            return Ok(());
        }
        let rest: Vec<u64> = voters.into_iter().filter(|id| *id != raft_id).collect();
        let alive = rest.iter().filter(|id| self.is_alive(node, **id)).count();
        let needed = rest.len() / 2 + 1;
        if alive >= needed {
            return Ok(());
        }
        Err(refused(format!(
            "without head {raft_id} only {alive} of {} voters are alive, and {needed} are needed: the \
         group would stop; bring a head back, or promote another one first",
            rest.len()
        )))
    }

    /// Begins to hand leadership over; to whom.
    pub(super) fn transfer<E: Engine>(
        &self,
        node: &mut Node<E>,
        to: Option<u64>,
    ) -> Result<u64, ChangeError> {
        if node.raft.state != StateRole::Leader {
            return Err(not_leader(node).into());
        }
        let tracker = node.raft.prs();
        let voters = tracker.conf().to_conf_state().voters;
        let others = voters.iter().copied().filter(|id| *id != node.raft.id);
        let furthest = others
            .filter(|id| self.is_alive(node, *id))
            .filter_map(|id| Some((tracker.get(id)?, id)))
            .max_by_key(|(progress, id)| (progress.matched, std::cmp::Reverse(*id)));
        let to = match (to, furthest) {
            (Some(to), _) if to == node.raft.id => return Ok(to),
            (Some(to), _) if !voters.contains(&to) => {
                return Err(refused(format!(
                    "head {to} does not vote, so it cannot lead"
                )));
            }
            (Some(to), _) if !self.is_alive(node, to) => {
                return Err(refused(format!(
                    "head {to} has not been heard of lately, so it cannot lead now"
                )));
            }
            (Some(to), _) => to,
            (None, Some((_, id))) => id,
            (None, None) => {
                return Err(refused(
                    "no other voter is alive that could lead: add a head and promote it first"
                        .into(),
                ));
            }
        };
        node.transfer_leader(to);
        Ok(to)
    }

    /// How far the members are.
    pub(super) fn progress<E: Engine>(&self, node: &Node<E>) -> GroupProgress {
        let raft = &node.raft;
        let mut members: Vec<MemberProgress> = Vec::new();
        if raft.state == StateRole::Leader {
            members.extend(raft.prs().iter().map(|(id, progress)| MemberProgress {
                raft_id: *id,
                active: self.is_alive(node, *id),
                replication: state_name(progress.state),
                matched_index: progress.matched,
            }));
            members.sort_by_key(|member| member.raft_id);
        }
        GroupProgress {
            term: raft.term,
            committed_index: raft.raft_log.committed,
            members,
        }
    }
}

fn state_name(state: ProgressState) -> &'static str {
    match state {
        ProgressState::Probe => "probe",
        ProgressState::Replicate => "replicate",
        ProgressState::Snapshot => "snapshot",
    }
}
