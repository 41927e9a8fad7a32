//! Who does not reach whom, and for how long: from that follows who is left out.
//!
//! Invariants:
//! 1. A pair counts from the first call that failed until one is answered. A call is repeated at once, and the first
//!    that is repeated is answered at once as well, whether it brings sums or asks for some that are not there yet: how
//!    long a step takes says nothing of who is reached.
//! 2. One call that failed leaves nobody out: another one must have failed a while later.
//! 3. Nobody is left out for a pair of which one has no seat any more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::training::protocol::plan::MemberId;

/// How long a member may not reach another one.
const UNREACHED_MAX: Duration = Duration::from_secs(3);
/// How long it must be to count when somebody is to be left out, and how far the first and the last call that failed
/// must be apart for somebody to be left out at all: what has just failed may be there again soon.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// Calls of one member to another that failed, none of which was answered since.
#[derive(Debug, Clone, Copy)]
struct Failures {
    first: Instant,
    last: Instant,
}

impl Failures {
    fn at(now: Instant) -> Self {
        Failures {
            first: now,
            last: now,
        }
    }

    fn lasted(&self, least: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.first) >= least
    }

    fn are_enough(&self, now: Instant) -> bool {
        self.lasted(UNREACHED_MAX, now) && self.lasted(SETTLED_AFTER, self.last)
    }
}

/// Pairs of which the first does not reach the second, and since when.
#[derive(Debug, Default)]
pub(super) struct Unreached {
    pairs: BTreeMap<(MemberId, MemberId), Failures>,
}

impl Unreached {
    /// A call of `from` to `peer` failed.
    pub(super) fn failed(&mut self, from: MemberId, peer: MemberId, now: Instant) {
        let failures = self.pairs.entry((from, peer));
        failures.or_insert_with(|| Failures::at(now)).last = now;
    }

    /// A call of `from` to `peer` was answered.
    pub(super) fn reached(&mut self, from: MemberId, peer: MemberId) {
        self.pairs.remove(&(from, peer));
    }

    /// Forgets all pairs: a step was done.
    pub(super) fn clear(&mut self) {
        self.pairs.clear();
    }

    /// Forgets the pairs of `member`.
    pub(super) fn forget(&mut self, member: MemberId) {
        self.pairs
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
        self.pairs
            .retain(|(from, peer), _| takes_part(from) && takes_part(peer));
        if !self.pairs.values().any(|pair| pair.are_enough(now)) {
            return None;
        }
        let settled = self
            .pairs
            .iter()
            .filter(|(_, pair)| pair.lasted(SETTLED_AFTER, now));
        let mut counts: BTreeMap<MemberId, usize> = BTreeMap::new();
        for ((from, peer), _) in settled {
            for member in [from, peer] {
                *counts.entry(*member).or_default() += 1;
            }
        }
        counts.remove(&me);
        let again = Failures::at(now);
        self.pairs.values_mut().for_each(|pair| *pair = again);
        let worst = counts
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
        unreached.failed(member(0), member(1), at(1000));
        unreached.reached(member(1), member(0));
        assert!(unreached.worst(&seated, me, at(3000)).is_some());
    }

    #[test]
    fn one_call_that_failed_leaves_nobody_out_nor_do_several_of_one_moment() {
        let (seated, me, begun) = world();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut unreached = Unreached::default();
        unreached.failed(member(0), member(1), at(0));
        assert_eq!(unreached.worst(&seated, me, at(60_000)), None);
        unreached.reached(member(0), member(1));
        for ms in 0..999 {
            unreached.failed(member(0), member(1), at(ms));
        }
        assert_eq!(unreached.worst(&seated, me, at(60_000)), None);
        unreached.failed(member(0), member(1), at(60_000));
        assert!(unreached.worst(&seated, me, at(60_000)).is_some());
    }

    #[test]
    fn the_one_in_most_pairs_is_left_out_and_the_others_get_their_time_again() {
        let (seated, me, begun) = world();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut unreached = Unreached::default();
        unreached.failed(member(0), member(2), at(0));
        unreached.failed(member(0), member(1), at(500));
        unreached.failed(me, member(0), at(900));
        unreached.failed(member(0), member(2), at(2000));
        // These may be there again in a moment.
        for peer in [0, 1] {
            unreached.failed(member(2), member(peer), at(2990));
        }
        assert_eq!(unreached.worst(&seated, me, at(3000)), Some(member(0)));
        unreached.forget(member(0));
        // And again since then.
        unreached.failed(member(2), member(1), at(5000));
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
        assert!(unreached.pairs.is_empty(), "it does not pile up");
    }
}
