//! A member's calls to others: which are under way, which are to be repeated, which need no repetition.
//!
//! Invariant: a call is under way, resting or delivered, and only one of them.

use std::collections::BTreeSet;

use super::exchange::Report;
use super::plan::{MemberId, Plan};
use crate::training::reduction::Subtree;

/// A call under way, or one that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Call {
    Contribute {
        to: MemberId,
        step: u64,
        bucket: u32,
        subtree: Subtree,
    },
    Ask {
        to: MemberId,
        step: u64,
        bucket: u32,
    },
}

impl Call {
    pub(super) fn to(&self) -> MemberId {
        match self {
            Call::Contribute { to, .. } | Call::Ask { to, .. } => *to,
        }
    }

    pub(super) fn step(&self) -> u64 {
        match self {
            Call::Contribute { step, .. } | Call::Ask { step, .. } => *step,
        }
    }
}

/// What became of a member's calls in this step and the one before.
#[derive(Debug, Default)]
pub(super) struct Calls {
    under_way: BTreeSet<Call>,
    /// Failed or refused; sent again after [`Calls::retry`].
    resting: BTreeSet<Call>,
    /// Contributions that were taken.
    delivered: BTreeSet<Call>,
    /// Members to which the last call that ended has failed.
    silent: BTreeSet<MemberId>,
}

impl Calls {
    /// Whether `call` is to be made now: it was not, and fewer than `limit` of its kind are under way to
    /// that member.
    pub(super) fn is_due(&self, call: &Call, limit: usize) -> bool {
        let is_ask = |call: &Call| matches!(call, Call::Ask { .. });
        let like = |other: &&Call| other.to() == call.to() && is_ask(other) == is_ask(call);
        !self.under_way.contains(call)
            && !self.resting.contains(call)
            && !self.delivered.contains(call)
            && self.under_way.iter().filter(like).count() < limit
    }

    /// Whether sums of this bucket are under way to `owner`.
    pub(super) fn is_sending(&self, owner: MemberId, at: (u64, u32)) -> bool {
        self.under_way.iter().any(|call| {
            matches!(call, Call::Contribute { to, step, bucket, .. }
                if *to == owner && (*step, *bucket) == at)
        })
    }

    pub(super) fn begin(&mut self, call: Call) {
        self.under_way.insert(call);
    }

    /// The call is over. What there is to tell of its member, if that was silent before and has answered.
    pub(super) fn end(&mut self, call: &Call, is_answered: bool) -> Option<Report> {
        self.under_way.remove(call);
        let peer = call.to();
        (is_answered && self.silent.remove(&peer)).then_some(Report::Reached { peer })
    }

    pub(super) fn deliver(&mut self, call: Call) {
        self.delivered.insert(call);
    }

    pub(super) fn rest(&mut self, call: Call) {
        self.resting.insert(call);
    }

    /// The call failed. What there is to tell of its member.
    pub(super) fn fail(&mut self, call: Call) -> Report {
        let peer = call.to();
        self.silent.insert(peer);
        self.rest(call);
        Report::Unreachable { peer }
    }

    /// Whether the last call of `member` that ended has failed.
    pub(super) fn is_silent(&self, member: MemberId) -> bool {
        self.silent.contains(&member)
    }

    pub(super) fn is_resting(&self) -> bool {
        !self.resting.is_empty()
    }

    /// What failed or was refused may be made again.
    pub(super) fn retry(&mut self) {
        self.resting.clear();
    }

    /// Forgets what the new plan makes useless; what rested may be tried again. A late answer still counts.
    pub(super) fn follow(&mut self, plan: &Plan) {
        self.under_way.retain(|call| match call {
            Call::Ask { to, bucket, .. } => plan.owner(*bucket) == Some(*to),
            Call::Contribute { to, .. } => plan.seat(*to).is_some(),
        });
        self.silent.retain(|member| plan.seat(*member).is_some());
        self.resting.clear();
    }

    /// Forgets calls of steps before `oldest`.
    pub(super) fn forget_before(&mut self, oldest: u64) {
        for calls in [&mut self.under_way, &mut self.resting, &mut self.delivered] {
            calls.retain(|call| call.step() >= oldest);
        }
    }

    /// How many are under way, and how many rest.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.under_way.len(), self.resting.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_was_silent_and_answers_is_told_of_once() {
        let peer = MemberId::default();
        let call = Call::Ask {
            to: peer,
            step: 3,
            bucket: 0,
        };
        let mut calls = Calls::default();
        calls.begin(call);
        assert_eq!(calls.end(&call, true), None, "nobody missed it");
        calls.begin(call);
        assert_eq!(calls.end(&call, false), None);
        assert_eq!(calls.fail(call), Report::Unreachable { peer });
        assert!(calls.is_resting());
        calls.retry();
        calls.begin(call);
        assert_eq!(calls.end(&call, true), Some(Report::Reached { peer }));
        assert_eq!(calls.end(&call, true), None);
        // Nobody calls a member without a seat: it is never told that it is back.
        calls.fail(call);
        calls.follow(&Plan::default());
        assert!(calls.silent.is_empty());
    }
}
