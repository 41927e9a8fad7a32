//! What an operator asks of an endpoint's scaling.

use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

use super::schedule::Schedule;
use crate::serving::state::REPLICAS_MAX;
use crate::units;

/// Requests of one replica, waiting or being answered, that a policy aims at if nothing else is said: a
/// replica then is busy, and a batch that waits is small.
pub const TARGET_IN_FLIGHT: u32 = 16;

/// The shortest window: a router looks twice a second, and a window of fewer looks is no average.
const WINDOW_MIN_MS: u64 = 1_000;

/// The longest window and pause.
const WINDOW_MAX_MS: u64 = 24 * 60 * 60 * 1_000;

/// Schedules of an endpoint: every hour of every day of the week would fit in.
const SCHEDULES_MAX: usize = 168;

/// The largest target or rate, and the largest time of an answer, in milliseconds: what larger numbers would mean nobody can
/// say.
pub const NUMBER_MAX: u32 = 1_000_000;

/// How an endpoint is scaled. Persisted: the order of fields never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Never fewer replicas, outside of schedules; 0 lets an idle endpoint have none.
    pub replicas_min: u32,
    /// Never more replicas, outside of schedules.
    pub replicas_max: u32,
    /// How many requests a replica shall have, waiting or being answered.
    pub target_in_flight: u32,
    /// How many requests a second a replica shall get, at most.
    pub target_rate: Option<u32>,
    /// What the 99th percentile of answers shall stay below, in milliseconds.
    pub slo_p99_ms: Option<u32>,
    /// Requests a second that the endpoint takes; more are refused.
    pub rate_limit: Option<u32>,
    /// What load is averaged over, in milliseconds; bursts are seen over a tenth of it.
    pub stable_window_ms: u64,
    /// How long nothing must have been asked before the last replica ends, in milliseconds.
    pub idle_ms: u64,
    /// Within this time the replicas at most double, in milliseconds.
    pub up_window_ms: u64,
    /// Within this time at most half of the replicas end, in milliseconds.
    pub down_window_ms: u64,
    /// When other bounds hold.
    pub schedules: Vec<Schedule>,
    /// For how much of the time a replica's model shall compute, in percent.
    pub target_busy_percent: Option<u32>,
    /// How much of the memory that it may have a replica's process shall use, in percent.
    pub target_memory_percent: Option<u32>,
}

impl Policy {
    /// Between `replicas_min` and `replicas_max` replicas, the rest as is usual.
    #[must_use]
    pub fn between(replicas_min: u32, replicas_max: u32) -> Self {
        Policy {
            replicas_min,
            replicas_max,
            target_in_flight: TARGET_IN_FLIGHT,
            target_rate: None,
            slo_p99_ms: None,
            rate_limit: None,
            stable_window_ms: 60_000,
            idle_ms: 300_000,
            up_window_ms: 30_000,
            down_window_ms: 300_000,
            schedules: Vec::new(),
            target_busy_percent: None,
            target_memory_percent: None,
        }
    }

    /// 1 to 3 replicas, 100 requests a second each, answers within 200 ms, models that compute for at most 70 % of the
    /// time, and at most 80 % of the memory.
    #[must_use]
    pub fn golden() -> Self {
        Policy {
            target_rate: Some(100),
            slo_p99_ms: Some(200),
            target_busy_percent: Some(70),
            target_memory_percent: Some(80),
            ..Policy::between(1, 3)
        }
    }

    /// What bursts are seen over, in milliseconds.
    #[must_use]
    pub fn panic_window_ms(&self) -> u64 {
        self.stable_window_ms / 10
    }

    /// The fewest and the most replicas at this time. Of several schedules the highest floor and the
    /// lowest ceiling hold, and a floor wins over a ceiling: too few replicas cost answers.
    #[must_use]
    pub fn bounds(&self, now_ms: u64) -> (u32, u32) {
        let holding = || {
            self.schedules
                .iter()
                .filter(|schedule| schedule.holds(now_ms))
        };
        let floors = holding().filter_map(|schedule| schedule.replicas_min);
        let ceilings = holding().filter_map(|schedule| schedule.replicas_max);
        let floor = floors.max().unwrap_or(self.replicas_min);
        let ceiling = ceilings.min().unwrap_or(self.replicas_max);
        (floor, ceiling.max(floor))
    }

    /// Refuses what cannot be a policy.
    ///
    /// # Errors
    /// The value, its bounds, and the option that sets it, in whose units both stand.
    pub fn check(&self) -> Result<(), Rejection> {
        let (low, high) = (self.replicas_min, self.replicas_max);
        let out_of_bounds = |count: u32| count > REPLICAS_MAX;
        if low > high || high == 0 || out_of_bounds(high) {
            return Err(Rejection::invalid(format!(
                "{low}..{high} replicas are not possible (`--replicas`): give a range such as 1..8, of which the second \
                 is 1 to {REPLICAS_MAX}"
            )));
        }
        for (what, number) in [
            (
                "requests in flight (`--target-in-flight`)",
                Some(self.target_in_flight),
            ),
            (
                "requests a second for each replica (`--target-rate`)",
                self.target_rate,
            ),
            (
                "requests a second that are taken (`--rate-limit`)",
                self.rate_limit,
            ),
        ] {
            if number.is_some_and(|number| !(1..=NUMBER_MAX).contains(&number)) {
                return Err(Rejection::invalid(format!(
                    "{} is not possible as a number of {what}: give 1 to {NUMBER_MAX}",
                    number.unwrap_or_default()
                )));
            }
        }
        for (what, percent) in [
            (
                "time that models compute (`--target-busy`)",
                self.target_busy_percent,
            ),
            (
                "memory in use (`--target-memory`)",
                self.target_memory_percent,
            ),
        ] {
            if percent.is_some_and(|percent| !(1..=100).contains(&percent)) {
                return Err(Rejection::invalid(format!(
                    "{} is not possible as percents of {what}: give 1 to 100",
                    percent.unwrap_or_default()
                )));
            }
        }
        let slo_p99_ms = self.slo_p99_ms.map(u64::from);
        let windows_ms = (WINDOW_MIN_MS, WINDOW_MAX_MS);
        for (what, time_ms, (min_ms, max_ms)) in [
            (
                "99th percentile of answers (`--slo-p99`)",
                slo_p99_ms,
                (1, u64::from(NUMBER_MAX)),
            ),
            (
                "window of the load (`--window`)",
                Some(self.stable_window_ms),
                windows_ms,
            ),
            (
                "time without requests (`--idle-after`)",
                Some(self.idle_ms),
                windows_ms,
            ),
            (
                "window of scaling up (`--up-window`)",
                Some(self.up_window_ms),
                windows_ms,
            ),
            (
                "window of scaling down (`--down-window`)",
                Some(self.down_window_ms),
                windows_ms,
            ),
        ] {
            if let Some(time_ms) = time_ms.filter(|time_ms| !(min_ms..=max_ms).contains(time_ms)) {
                return Err(Rejection::invalid(format!(
                    "a {what} of {} is not possible: give {} to {}",
                    units::millis(time_ms),
                    units::millis(min_ms),
                    units::millis(max_ms)
                )));
            }
        }
        if self.schedules.len() > SCHEDULES_MAX {
            return Err(Rejection::invalid(format!(
                "{} schedules (`--schedule`) are more than the {SCHEDULES_MAX} that an endpoint may have",
                self.schedules.len()
            )));
        }
        for schedule in &self.schedules {
            let bounds = [schedule.replicas_min, schedule.replicas_max];
            if !schedule.is_possible() || bounds.into_iter().flatten().any(out_of_bounds) {
                return Err(Rejection::invalid(format!(
                    "schedule `{schedule}` (`--schedule`) is not possible: give days, hours, and bounds of at most \
                     {REPLICAS_MAX} replicas, as in `mon-fri 08:00-18:00 2..6`"
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_move_both_bounds_and_floors_win() {
        let mut policy = Policy::between(1, 3);
        policy.schedules = vec![
            "thu 00:00-12:00 2..6".parse().unwrap(),
            "thu 06:00-12:00 4..".parse().unwrap(),
            "thu 09:00-12:00 ..2".parse().unwrap(),
        ];
        let hour = 3_600_000;
        let at = |hours: u64| policy.bounds(hours * hour);
        assert_eq!(
            (at(1), at(7), at(10), at(13)),
            ((2, 6), (4, 6), (4, 4), (1, 3))
        );
    }

    #[test]
    fn what_cannot_be_kept_is_refused_with_the_limit() {
        let change = |change: fn(&mut Policy)| {
            let mut policy = Policy::between(0, 8);
            change(&mut policy);
            policy.check()
        };
        assert_eq!(change(|_| ()), Ok(()));
        assert_eq!(Policy::golden().check(), Ok(()));
        for (policy, expected) in [
            (change(|policy| policy.replicas_min = 9), "9..8 replicas"),
            (change(|policy| policy.replicas_max = 65), "1 to 64"),
            (
                change(|policy| (policy.replicas_min, policy.replicas_max) = (0, 0)),
                "0..0 replicas",
            ),
            (
                change(|policy| policy.target_in_flight = 0),
                "0 is not possible",
            ),
            (
                change(|policy| policy.rate_limit = Some(0)),
                "0 is not possible as a number of requests a second that are taken (`--rate-limit`)",
            ),
            (
                change(|policy| policy.idle_ms = 1),
                "(`--idle-after`) of 1ms is not possible: give 1s to 24h",
            ),
            (
                change(|policy| policy.stable_window_ms = 25 * 3_600_000),
                "(`--window`) of 25h is not possible: give 1s to 24h",
            ),
            (
                change(|policy| policy.slo_p99_ms = Some(1_200_000)),
                "(`--slo-p99`) of 20m is not possible: give 1ms to 1000s",
            ),
            (
                change(|policy| policy.target_busy_percent = Some(101)),
                "101 is not possible as percents of time",
            ),
            (
                change(|policy| policy.target_memory_percent = Some(0)),
                "0 is not possible as percents of memory",
            ),
            (
                change(|policy| policy.schedules = vec!["daily 00:00-24:00 ..99".parse().unwrap()]),
                "..99` (`--schedule`) is not possible",
            ),
        ] {
            let message = policy.unwrap_err().message;
            assert!(message.contains(expected), "{message}");
        }
    }
}
