//! How a trainer's attempts to take part have gone, and how long it is left alone after one that failed.
//!
//! Invariants:
//! 1. The pause doubles with each attempt in a row that failed, and begins anew once it took part for long. That it came too
//!    late is counted apart.
//! 2. Others wait for it only where it came too late before, and for a bounded time; an attempt that failed otherwise is no
//!    reason.
//! 3. One that was reached and refused [`REFUSALS_MAX`] times, without having taken part for long in between, has refused too
//!    often. One that cannot be reached never has.
//! 4. Whether it took part for long is judged when its seat is lost, whatever it is lost for.

use std::time::Duration;

use tokio::time::Instant;

/// A trainer is left alone for no longer than this, unless it takes a large share of it to give it the state.
const PAUSE_MAX: Duration = Duration::from_secs(120);
/// Then for no longer than this: others wait for it for a share of it.
pub(in crate::training) const LATE_PAUSE_MAX: Duration = Duration::from_secs(240);
/// A trainer took part for long if it did for this time, however few steps that were.
const STEADY_TIME: Duration = Duration::from_secs(30);

/// How often one process may refuse what it is told.
pub(in crate::training) const REFUSALS_MAX: u32 = 10;

/// One trainer's attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::training) struct Attempts {
    /// Those in a row that failed, but for those that came too late.
    pub(in crate::training) failed: u32,
    /// Those of them in which it was reached, and refused.
    refusals: u32,
    /// Those in a row in which it came too late.
    pub(in crate::training) late: u32,
    /// For how long others may wait for it the next time, as it came too late.
    hold_due: Duration,
    /// How long it took to give it the state the last time.
    took: Duration,
    /// The step from which it takes part, and since when, if it does.
    seated_at: Option<(u64, Instant)>,
}

impl Attempts {
    /// It takes part from `step`, since `now`.
    pub(in crate::training) fn succeeded(&mut self, step: u64, now: Instant) {
        (self.seated_at, self.hold_due) = (Some((step, now)), Duration::ZERO);
    }

    /// Its seat is lost at `step`, if it had one: what comes counts as new where it had it for `steady` steps or for long.
    pub(in crate::training) fn unseated(&mut self, step: u64, now: Instant, steady: u64) {
        let Some((from, since)) = self.seated_at.take() else {
            return;
        };
        let took_part = now.saturating_duration_since(since);
        if step.saturating_sub(from) >= steady || took_part >= STEADY_TIME {
            (self.failed, self.refusals, self.late) = (0, 0, 0);
        }
    }

    /// An attempt has failed, or what an earlier one brought is over. Answers for how long the trainer is left alone, which
    /// is `first` after the first.
    pub(in crate::training) fn fails(&mut self, first: Duration) -> Duration {
        doubled(first, &mut self.failed)
    }

    /// The same of one that was reached and refused; nothing where it has done so too often.
    pub(in crate::training) fn refuses(&mut self, first: Duration) -> Option<Duration> {
        let pause = self.fails(first);
        self.refusals = self.refusals.saturating_add(1);
        (self.refusals < REFUSALS_MAX).then_some(pause)
    }

    /// It came too late. From the second time in a row on it is left alone for at least `times` what it took to give it the
    /// state, so that others may wait for as long as that takes; the first time it loaded its data as well, which says
    /// nothing of the next.
    pub(in crate::training) fn comes_late(&mut self, first: Duration, times: u32) -> Duration {
        let pause = doubled(first, &mut self.late);
        if self.late > 1 {
            let least = self.took.saturating_mul(times).min(LATE_PAUSE_MAX);
            pause.max(least)
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

    /// For how long others may wait for it in its next attempt, if they may by what all have in common.
    pub(in crate::training) fn hold_due(&self) -> Duration {
        self.hold_due
    }

    /// For how long others may wait for it in this attempt, to whom asks first; nothing to those who ask later.
    pub(in crate::training) fn take_hold(&mut self) -> Duration {
        std::mem::take(&mut self.hold_due)
    }
}

/// The pause after one more of `count` in a row, which is counted.
fn doubled(first: Duration, count: &mut u32) -> Duration {
    let factor = 2u32.saturating_pow(*count);
    *count = count.saturating_add(1);
    first.saturating_mul(factor).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEADY: u64 = 10;

    /// It loses its seat after so many steps and so much time in which it took part.
    fn takes_part(attempts: &mut Attempts, steps: u64, time: Duration) {
        let since = Instant::now();
        attempts.succeeded(50, since);
        attempts.unseated(50 + steps, since + time, STEADY);
    }

    #[test]
    fn pauses_double_until_it_took_part_for_long() {
        let first = Duration::from_secs(1);
        let mut attempts = Attempts::default();
        let fails = |attempts: &mut Attempts| {
            let pause = attempts.fails(first);
            assert_eq!(attempts.take_hold(), Duration::ZERO, "it was not late");
            pause.as_secs()
        };
        let pauses = [(); 9].map(|()| fails(&mut attempts));
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 120, 120]);
        let moment = STEADY_TIME - Duration::from_millis(1);
        takes_part(&mut attempts, STEADY - 1, moment);
        assert_eq!(fails(&mut attempts), 120, "that was not for long");
        takes_part(&mut attempts, STEADY, Duration::ZERO);
        assert_eq!([(); 2].map(|()| fails(&mut attempts)), [1, 2]);
        takes_part(&mut attempts, 1, STEADY_TIME);
        assert_eq!(fails(&mut attempts), 1, "however few steps that were");
        // Without a seat in between nothing is new.
        attempts.unseated(1000, Instant::now() + STEADY_TIME, STEADY);
        assert_eq!(fails(&mut attempts), 2);
    }

    #[test]
    fn who_refuses_too_often_is_told_and_who_took_part_for_long_begins_anew() {
        let first = Duration::from_millis(50);
        let mut attempts = Attempts::default();
        for times in 0..5 {
            let pause = attempts.refuses(first);
            assert_eq!(pause, Some(first * 4u32.pow(times)));
            // It was not reached: that makes the pause longer, and is no refusal.
            attempts.fails(first);
        }
        takes_part(&mut attempts, STEADY - 1, Duration::ZERO);
        for _ in 5..REFUSALS_MAX - 1 {
            assert!(attempts.refuses(first).is_some());
        }
        let mut steady = attempts;
        for _ in 0..2 {
            assert_eq!(attempts.refuses(first), None, "that was not for long");
        }
        takes_part(&mut steady, STEADY, Duration::ZERO);
        assert_eq!(steady.refuses(first), Some(first));
    }

    #[test]
    fn others_wait_once_for_who_came_too_late_and_no_more_when_it_takes_part() {
        let hold = Duration::from_secs(3);
        let mut attempts = Attempts::default();
        assert_eq!(attempts.take_hold(), Duration::ZERO);
        attempts.hold_next(hold);
        attempts.fails(hold);
        assert_eq!(attempts.take_hold(), hold, "what is due stays due");
        assert_eq!(attempts.take_hold(), Duration::ZERO, "it is used once");
        attempts.hold_next(hold);
        attempts.succeeded(80, Instant::now());
        assert_eq!(attempts.take_hold(), Duration::ZERO);
    }

    #[test]
    fn who_takes_long_to_be_given_the_state_is_left_alone_for_long_enough_to_be_waited_for() {
        let first = Duration::from_millis(250);
        let mut attempts = Attempts::default();
        let late_after = |attempts: &mut Attempts, took| {
            attempts.prepared_in(Duration::from_secs(took));
            attempts.comes_late(first, 4)
        };
        // That it was lost before is another matter.
        attempts.fails(first);
        let pause = late_after(&mut attempts, 60);
        assert_eq!(pause, first, "it loaded its data as well");
        let pauses = [60, 45, 600].map(|took| late_after(&mut attempts, took).as_secs());
        assert_eq!(pauses, [240, 180, 240], "four times that, and no more");
        let pause = late_after(&mut attempts, 0);
        assert_eq!(pause, Duration::from_secs(4), "and it doubles");
        assert_eq!(attempts.fails(first), 2 * first);
    }
}
