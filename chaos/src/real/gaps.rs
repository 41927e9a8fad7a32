//! How long a fault was felt: figures from when writes were acknowledged, and from the heads' logs.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// What counts as being back: so much of the rate before the fault, over this window.
const BACK_SHARE: f64 = 0.9;
const BACK_WINDOW: Duration = Duration::from_millis(500);

/// The rate before a fault is that of this time.
const BEFORE: Duration = Duration::from_secs(2);

/// In which steps the moment of being back is looked for.
const STEP: Duration = Duration::from_millis(20);

/// Times of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Times {
    /// How many.
    pub count: usize,
    /// The median, in milliseconds.
    pub p50_ms: u64,
    /// The 99th percentile (the nearest rank), in milliseconds.
    pub p99_ms: u64,
    /// The longest, in milliseconds.
    pub max_ms: u64,
}

impl Times {
    /// The figures of these times.
    #[must_use]
    pub fn of(mut times: Vec<Duration>) -> Times {
        times.sort_unstable();
        let rank = |share: f64| {
            let place = (share * times.len() as f64).ceil() as usize;
            let time = times.get(place.saturating_sub(1)).copied();
            u64::try_from(time.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
        };
        Times {
            count: times.len(),
            p50_ms: rank(0.5),
            p99_ms: rank(0.99),
            max_ms: rank(1.0),
        }
    }
}

/// The longest time between `from` and `until` in which nothing was acknowledged. `moments` is
/// sorted.
#[must_use]
pub fn longest_gap(moments: &[Duration], from: Duration, until: Duration) -> Duration {
    let first = moments.partition_point(|moment| *moment <= from);
    let mut last = from;
    let mut longest = Duration::ZERO;
    for moment in &moments[first..] {
        let moment = (*moment).min(until);
        longest = longest.max(moment.saturating_sub(last));
        last = moment;
        if moment == until {
            return longest;
        }
    }
    longest.max(until.saturating_sub(last))
}

/// How long after `from` the rate of acknowledgements is back to what it was before; `None` if that
/// is not before `until`, or if there was none to come back to.
#[must_use]
pub fn recovery(moments: &[Duration], from: Duration, until: Duration) -> Option<Duration> {
    let between = |from: Duration, until: Duration| {
        let position = |at: Duration| moments.partition_point(|moment| *moment < at);
        (position(until) - position(from)) as f64
    };
    let before = between(from.saturating_sub(BEFORE), from) / BEFORE.as_secs_f64();
    let wanted = before * BACK_WINDOW.as_secs_f64() * BACK_SHARE;
    if wanted < 1.0 {
        return None;
    }
    // What is in flight at the fault may still be answered: before the gap nothing is back.
    let mut at = from + end_of_gap(moments, from, until)?;
    while at + BACK_WINDOW <= until {
        if between(at, at + BACK_WINDOW) >= wanted {
            return Some(at - from);
        }
        at += STEP;
    }
    None
}

/// When, after `from`, the longest gap ends.
fn end_of_gap(moments: &[Duration], from: Duration, until: Duration) -> Option<Duration> {
    let first = moments.partition_point(|moment| *moment <= from);
    let mut last = from;
    let mut longest = (Duration::ZERO, None);
    for moment in moments[first..].iter().take_while(|at| **at <= until) {
        if *moment - last > longest.0 {
            longest = (*moment - last, Some(*moment - from));
        }
        last = *moment;
    }
    longest.1
}

/// A moment in milliseconds since 1970; `None` of one before.
pub(super) fn unix_ms(moment: SystemTime) -> Option<u64> {
    let since = moment.duration_since(UNIX_EPOCH).ok()?;
    u64::try_from(since.as_millis()).ok()
}

/// When heads began to lead, by their logs: lines such as
/// `2026-11-21T11:12:13.123456Z  INFO mobula_head::leadership: leading term=5`.
#[must_use]
pub fn elections(log: &str) -> Vec<SystemTime> {
    let lines = log.lines().filter(|line| line.contains(": leading term="));
    lines
        .filter_map(|line| moment(line.split(' ').next()?))
        .collect()
}

/// A moment as RFC 3339 writes it, in UTC and with a fraction.
fn moment(text: &str) -> Option<SystemTime> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut parts = date.split('-').map(str::parse::<i64>);
    let mut part = || parts.next()?.ok();
    let (year, month, day) = (part()?, part()?, part()?);
    let mut parts = time.split(':');
    let hours: u64 = parts.next()?.parse().ok()?;
    let minutes: u64 = parts.next()?.parse().ok()?;
    let seconds: f64 = parts.next()?.parse().ok()?;
    // Days since 1970-01-01 in the Gregorian calendar (Hinnant, `days_from_civil`).
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    let whole = u64::try_from(days).ok()? * 86_400 + hours * 3_600 + minutes * 60;
    Some(UNIX_EPOCH + Duration::from_secs(whole) + Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let times = Times::of((1..=200).rev().map(ms).collect());
        assert_eq!((times.count, times.p50_ms), (200, 100));
        assert_eq!((times.p99_ms, times.max_ms), (198, 200));
        assert_eq!(Times::of(Vec::new()), Times::default());
    }

    #[test]
    fn a_gap_is_where_nothing_was_acknowledged() {
        let moments: Vec<Duration> = [10, 20, 30, 430, 440].map(ms).to_vec();
        assert_eq!(longest_gap(&moments, ms(25), ms(1_000)), ms(560));
        assert_eq!(longest_gap(&moments, ms(25), ms(440)), ms(400));
        assert_eq!(longest_gap(&moments, ms(25), ms(200)), ms(170));
        assert_eq!(longest_gap(&[], ms(5), ms(9)), ms(4));
    }

    #[test]
    fn recovery_is_when_the_rate_is_back() {
        // One each 10 ms, nothing from 3000 to 3700, one each 100 ms until 4500, then as before.
        let moments: Vec<Duration> = (0..800)
            .map(|number| number * 10)
            .filter(|at| !(3_000..3_700).contains(at))
            .filter(|at| !(3_700..4_500).contains(at) || at % 100 == 0)
            .map(ms)
            .collect();
        let back = recovery(&moments, ms(3_000), ms(8_000)).unwrap();
        assert!((ms(1_400)..ms(1_550)).contains(&back), "{back:?}");
        assert_eq!(recovery(&moments, ms(3_000), ms(4_400)), None);
        assert_eq!(recovery(&[], ms(3_000), ms(8_000)), None);
    }

    #[test]
    fn elections_are_read_out_of_a_log() {
        let log = "\
2026-11-21T11:12:13.250000Z  INFO mobula_head: head started raft_id=1
2026-11-21T11:12:13.500000Z  INFO mobula_head::leadership: leading term=5
2026-11-21T11:12:14.000000Z  INFO mobula_head::leadership: leading no more term=5
nonsense: leading term=6
";
        let found = elections(log);
        // `date -u -d 2026-11-21T11:12:13 +%s`
        let expected = UNIX_EPOCH + Duration::from_millis(1_795_259_533_500);
        assert_eq!(found, [expected]);
    }
}
