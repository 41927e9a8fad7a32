//! For how long the others may stand at the gate for all trainers together that came too late.
//!
//! Each of them may be waited for, for a share of the pause before it; of several, one after the other, each its own. So all
//! have in common what may be spent on that: it grows by a share of the time in which nobody stands there, up to what one
//! may be waited for at most, and begins with that.
//!
//! Invariant: from one time to another the others stand there for [`HOLDS_MAX`] at most, and for a share of the time in which
//! they do not, one in [`HOLD_SHARE`]; what the last of those waits took longer than it might comes on top, and delays the next.

use std::time::Duration;

use tokio::time::Instant;

use super::joining::HOLD_SHARE;
use crate::training::crew::LATE_PAUSE_MAX;

/// The longest pause of a trainer that came too late: after as much time the others may wait for any one again.
const CREDIT_MAX: Duration = LATE_PAUSE_MAX;
/// For how long they may stand at the gate at a time, for one or for several.
pub(super) const HOLDS_MAX: Duration =
    Duration::from_secs(CREDIT_MAX.as_secs() / HOLD_SHARE as u64);

/// What may be spent on waiting for trainers that came too late.
#[derive(Debug, Clone, Copy)]
pub(super) struct HoldBudget {
    /// Time in which nobody stood there and that was not spent: [`HOLD_SHARE`] times as much as they may stand.
    credit: Duration,
    /// Up to when time was counted. Beyond now, what was overdrawn: time counts again from then on.
    counted_to: Instant,
}

impl HoldBudget {
    /// All of it, at `now`.
    pub(super) fn new(now: Instant) -> Self {
        HoldBudget {
            credit: CREDIT_MAX,
            counted_to: now,
        }
    }

    /// Whether the others may stand there for `at_most` from `now` on. It is spent when they have.
    pub(super) fn covers(&mut self, at_most: Duration, now: Instant) -> bool {
        self.earn(now);
        at_most.saturating_mul(HOLD_SHARE) <= self.credit
    }

    /// They stood there from `since` until `until`.
    pub(super) fn spend(&mut self, since: Instant, until: Instant) {
        self.earn(since);
        let stood = until.saturating_duration_since(since);
        let cost = stood.saturating_mul(HOLD_SHARE);
        let overdrawn = cost.saturating_sub(self.credit);
        self.credit = self.credit.saturating_sub(cost);
        self.counted_to = self.counted_to.max(until) + overdrawn;
    }

    /// Counts the time up to `now`, in which nobody stood there.
    fn earn(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counted_to);
        self.credit = self.credit.saturating_add(passed).min(CREDIT_MAX);
        self.counted_to = self.counted_to.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn one_trainer_is_waited_for_again_and_again_after_its_pauses() {
        let mut now = Instant::now();
        let mut budget = HoldBudget::new(now);
        for _ in 0..100 {
            assert!(budget.covers(HOLDS_MAX, now));
            let until = now + HOLDS_MAX;
            budget.spend(now, until);
            assert!(!budget.covers(Duration::from_nanos(1), until));
            now = until + LATE_PAUSE_MAX;
        }
    }

    #[test]
    fn several_together_are_waited_for_no_longer_than_one_and_a_share_of_the_time() {
        let begun = Instant::now();
        let (mut now, mut stood) = (begun, Duration::ZERO);
        let mut budget = HoldBudget::new(now);
        // One after the other, as soon as nobody else is waited for.
        for _ in 0..100_000 {
            for hold in [7 * SECOND, 20 * SECOND, 60 * SECOND] {
                if !budget.covers(hold, now) {
                    continue;
                }
                budget.spend(now, now + hold);
                now += hold;
                stood += hold;
            }
            now += SECOND;
            let went_on = now.duration_since(begun) - stood;
            assert!(stood <= HOLDS_MAX + went_on / HOLD_SHARE, "{stood:?}");
        }
        let went_on = now.duration_since(begun) - stood;
        assert!(stood + HOLDS_MAX >= went_on / HOLD_SHARE, "{stood:?}");
    }

    #[test]
    fn what_took_longer_than_it_might_is_made_up_for() {
        let begun = Instant::now();
        let mut budget = HoldBudget::new(begun);
        let until = begun + HOLDS_MAX + SECOND;
        budget.spend(begun, until);
        let share = SECOND * HOLD_SHARE;
        assert!(!budget.covers(SECOND, until + share));
        assert!(budget.covers(SECOND, until + 2 * share));
        // What was saved up is no more than what is needed for one.
        let much_later = until + 100 * LATE_PAUSE_MAX;
        assert!(!budget.covers(HOLDS_MAX + SECOND, much_later));
        assert!(budget.covers(HOLDS_MAX, much_later));
    }
}
