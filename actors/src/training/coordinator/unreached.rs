//! Who does not reach whom, and for how long: from that follows who is left out.
//!
//! Invariants:
//! 1. A pair counts from the first call that failed until one is answered. A call is repeated at once. One that
//!    brings sums is answered at once as well; one that asks for them is answered when they are there, so after a way
//!    has failed for a moment somebody may still be left out whose sums take longer than [`UNREACHED_MAX`] then.
//! 2. Nobody is left out for a pair of which one has no seat any more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::training::protocol::plan::MemberId;

/// How long a member may not reach another one.
const UNREACHED_MAX: Duration = Duration::from_secs(3);
/// How long it must be to count when somebody is to be left out: what has just failed may be there again soon.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// Pairs of which the first does not reach the second, and since when.
#[derive(Debug, Default)]
pub(super) struct Unreached {
    since: BTreeMap<(MemberId, MemberId), Instant>,
}

impl Unreached {
    /// A call of `from` to `peer` failed.
    pub(super) fn failed(&mut self, from: MemberId, peer: MemberId, now: Instant) {
        self.since.entry((from, peer)).or_insert(now);
    }

    /// A call of `from` to `peer` was answered.
    pub(super) fn reached(&mut self, from: MemberId, peer: MemberId) {
        self.since.remove(&(from, peer));
    }

    /// Forgets all pairs: a step was done.
    pub(super) fn clear(&mut self) {
        self.since.clear();
    }

    /// Forgets the pairs of `member`.
    pub(super) fn forget(&mut self, member: MemberId) {
        self.since
            .retain(|(from, peer), _| *from != member && *peer != member);
    }

    /// The one of `seated` that is to be left out at `now`, if some pair of them and the copy `me` has not reached each
    /// other for too long: the one in most pairs. All pairs then get their time again, for those that remain may
    /// have been about what follows from it.
    pub(super) fn worst(
        &mut self,
        seated: &BTreeSet<MemberId>,
        me: MemberId,
        now: Instant,
    ) -> Option<MemberId> {
        let takes_part = |member: &MemberId| *member == me || seated.contains(member);
        self.since
            .retain(|(from, peer), _| takes_part(from) && takes_part(peer));
        let lasts = |since: &Instant, least| now.saturating_duration_since(*since) >= least;
        if !self.since.values().any(|since| lasts(since, UNREACHED_MAX)) {
            return None;
        }
        let settled = self
            .since
            .iter()
            .filter(|(_, since)| lasts(since, SETTLED_AFTER));
        let mut pairs: BTreeMap<MemberId, usize> = BTreeMap::new();
        for ((from, peer), _) in settled {
            for member in [from, peer] {
                *pairs.entry(*member).or_default() += 1;
            }
        }
        pairs.remove(&me);
        self.since.values_mut().for_each(|since| *since = now);
        let worst = pairs
            .into_iter()
            .max_by_key(|(member, count)| (*count, member.slot));
        worst.map(|(member, _)| member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(slot: u32) -> MemberId {
        MemberId {
            slot,
            incarnation: 1,
            entry: 1,
        }
    }

    /// Three members, the copy, and a moment.
    fn world() -> (BTreeSet<MemberId>, MemberId, Instant) {
        let seated = (0..3).map(member).collect();
        (seated, member(u32::MAX), Instant::now())
    }

    #[test]
    fn a_way_that_failed_for_a_moment_leaves_nobody_out_however_long_the_step_takes() {
        let (seated, me, begun) = world();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut unreached = Unreached::default();
        unreached.failed(member(0), member(1), at(0));
        unreached.reached(member(0), member(1));
        assert_eq!(unreached.worst(&seated, me, at(60_000)), None);
        // Again, a minute later: that counts from then.
        unreached.failed(member(0), member(1), at(60_000));
        unreached.failed(member(0), member(1), at(62_000));
        assert_eq!(unreached.worst(&seated, me, at(62_900)), None);
        assert_eq!(unreached.worst(&seated, me, at(63_000)), Some(member(1)));
        // The other direction says nothing of this one.
        let mut unreached = Unreached::default();
        unreached.failed(member(0), member(1), at(0));
        unreached.reached(member(1), member(0));
        assert!(unreached.worst(&seated, me, at(3000)).is_some());
    }

    #[test]
    fn the_one_in_most_pairs_is_left_out_and_the_others_get_their_time_again() {
        let (seated, me, begun) = world();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut unreached = Unreached::default();
        unreached.failed(member(0), member(2), at(0));
        unreached.failed(member(0), member(1), at(500));
        unreached.failed(me, member(0), at(900));
        // These may be there again in a moment.
        for peer in [0, 1] {
            unreached.failed(member(2), member(peer), at(2990));
        }
        assert_eq!(unreached.worst(&seated, me, at(3000)), Some(member(0)));
        unreached.forget(member(0));
        assert_eq!(unreached.worst(&seated, me, at(5900)), None);
        assert_eq!(unreached.worst(&seated, me, at(6000)), Some(member(2)));
        unreached.clear();
        assert_eq!(unreached.worst(&seated, me, at(99_000)), None);
    }

    #[test]
    fn who_has_no_seat_any_more_is_no_reason() {
        let (seated, me, begun) = world();
        let mut unreached = Unreached::default();
        unreached.failed(member(0), member(7), begun);
        unreached.failed(member(7), member(1), begun);
        let late = begun + Duration::from_secs(60);
        assert_eq!(unreached.worst(&seated, me, late), None);
        assert!(unreached.since.is_empty(), "it does not pile up");
    }
}
