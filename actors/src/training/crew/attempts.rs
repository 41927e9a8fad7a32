//! How a trainer's attempts to take part have gone, and how long it is left alone after one that failed.
//!
//! Invariants:
//! 1. The pause doubles with each attempt in a row that failed, and begins anew once it took part for long.
//! 2. Others wait for it only where it came too late before; an attempt that failed otherwise is no reason.

use std::time::Duration;

/// A trainer is left alone for no longer than this, unless it takes a large share of it to give it the state.
const PAUSE_MAX: Duration = Duration::from_secs(120);

/// One trainer's attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::training) struct Attempts {
    /// Those in a row that failed.
    pub(in crate::training) failed: u32,
    /// For how long others may wait for it the next time, as it came too late.
    hold_due: Duration,
    /// How long it took to give it the state the last time.
    took: Duration,
    /// The step from which it took part, after the last that succeeded.
    seated_at: Option<u64>,
}

impl Attempts {
    /// It takes part from `step`.
    pub(in crate::training) fn succeeded(&mut self, step: u64) {
        (self.seated_at, self.hold_due) = (Some(step), Duration::ZERO);
    }

    /// An attempt has failed at `step`, or what an earlier one brought is over, which counts as new where it lasted for
    /// `steady` steps. Answers for how long the trainer is left alone, which is `first` after the first.
    pub(in crate::training) fn failed_at(
        &mut self,
        step: u64,
        steady: u64,
        first: Duration,
    ) -> Duration {
        let seated_at = self.seated_at.take();
        if seated_at.is_some_and(|from| step.saturating_sub(from) >= steady) {
            self.failed = 0;
        }
        let factor = 2u32.saturating_pow(self.failed);
        self.failed = self.failed.saturating_add(1);
        first.saturating_mul(factor).min(PAUSE_MAX)
    }

    /// The same of one that came too late. From the second time in a row on it is left alone for at least `times` what it
    /// took to give it the state, so that others may wait for as long as that takes; the first time it loaded its data
    /// as well, which says nothing of the next.
    pub(in crate::training) fn late_at(
        &mut self,
        step: u64,
        steady: u64,
        first: Duration,
        times: u32,
    ) -> Duration {
        let pause = self.failed_at(step, steady, first);
        if self.failed > 1 {
            pause.max(self.took.saturating_mul(times))
        } else {
            pause
        }
    }

    /// It was given the state, which took so long.
    pub(in crate::training) fn prepared_in(&mut self, took: Duration) {
        self.took = took;
    }

    /// Others may wait for it the next time, for so long.
    pub(in crate::training) fn hold_next(&mut self, at_most: Duration) {
        self.hold_due = at_most;
    }

    /// For how long others may wait for it in this attempt, to whom asks first; nothing to those who ask later.
    pub(in crate::training) fn take_hold(&mut self) -> Duration {
        std::mem::take(&mut self.hold_due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_until_it_took_part_for_long() {
        let first = Duration::from_secs(1);
        let mut attempts = Attempts::default();
        let fails = |attempts: &mut Attempts, step| {
            let pause = attempts.failed_at(step, 10, first);
            assert_eq!(attempts.take_hold(), Duration::ZERO, "it was not late");
            pause.as_secs()
        };
        let pauses = [0; 9].map(|step| fails(&mut attempts, step));
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 120, 120]);
        attempts.succeeded(50);
        assert_eq!(fails(&mut attempts, 59), 120, "that was not for long");
        attempts.succeeded(60);
        assert_eq!(fails(&mut attempts, 70), 1);
        assert_eq!(fails(&mut attempts, 70), 2);
    }

    #[test]
    fn others_wait_once_for_who_came_too_late_and_no_more_when_it_takes_part() {
        let hold = Duration::from_secs(3);
        let mut attempts = Attempts::default();
        assert_eq!(attempts.take_hold(), Duration::ZERO);
        attempts.hold_next(hold);
        attempts.failed_at(5, 10, hold);
        assert_eq!(attempts.take_hold(), hold, "what is due stays due");
        assert_eq!(attempts.take_hold(), Duration::ZERO, "it is used once");
        attempts.hold_next(hold);
        attempts.succeeded(80);
        assert_eq!(attempts.take_hold(), Duration::ZERO);
    }

    #[test]
    fn who_takes_long_to_be_given_the_state_is_left_alone_for_long_enough_to_be_waited_for() {
        let first = Duration::from_millis(250);
        let mut attempts = Attempts::default();
        let mut late_after = |took| {
            attempts.prepared_in(Duration::from_secs(took));
            attempts.late_at(0, 10, first, 4)
        };
        assert_eq!(late_after(60), first, "it loaded its data as well");
        assert_eq!(late_after(60), Duration::from_secs(240));
        assert_eq!(late_after(45), Duration::from_secs(180));
        assert_eq!(late_after(0), Duration::from_secs(2), "and it doubles");
    }
}
