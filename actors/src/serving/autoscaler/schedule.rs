//! Hours of the week in which other bounds hold, as `mon-fri 08:00-18:00 2..6`. All times are UTC.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

const DAY_NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

const MINUTES_OF_DAY: u16 = 24 * 60;

/// Hours in which an endpoint has other bounds than its policy's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    /// The days on which it begins, Monday in the lowest bit.
    pub days: u8,
    /// When it begins, in minutes after midnight UTC.
    pub from_minute: u16,
    /// When it ends, up to 1440; on the next day if that is not after its beginning.
    pub until_minute: u16,
    /// Not fewer replicas than this.
    pub replicas_min: Option<u32>,
    /// Not more replicas than this.
    pub replicas_max: Option<u32>,
}

/// Why a text is no schedule.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "`{text}` is no schedule: write `mon-fri 08:00-18:00 2..6`, `sat,sun 00:00-24:00 ..1` or `daily 22:00-06:00 1..`, in UTC"
)]
pub struct ScheduleError {
    text: String,
}

impl Schedule {
    /// Whether its parts are what they can be.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        (1..1 << DAY_NAMES.len()).contains(&self.days)
            && self.from_minute < MINUTES_OF_DAY
            && (1..=MINUTES_OF_DAY).contains(&self.until_minute)
            && (self.replicas_min.is_some() || self.replicas_max.is_some())
            && self.replicas_min.unwrap_or(0) <= self.replicas_max.unwrap_or(u32::MAX)
    }

    /// Whether it holds at this time, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn holds(&self, now_ms: u64) -> bool {
        let minutes = now_ms / 60_000;
        let minute = (minutes % u64::from(MINUTES_OF_DAY)) as u16;
        // The epoch was a Thursday.
        let today = (minutes / u64::from(MINUTES_OF_DAY) + 3) % 7;
        let begins_on = |day: u64| self.days & (1 << day) != 0;
        if self.from_minute < self.until_minute {
            return begins_on(today) && (self.from_minute..self.until_minute).contains(&minute);
        }
        let yesterday = (today + 6) % 7;
        (begins_on(today) && minute >= self.from_minute)
            || (begins_on(yesterday) && minute < self.until_minute)
    }
}

impl FromStr for Schedule {
    type Err = ScheduleError;

    fn from_str(text: &str) -> Result<Self, ScheduleError> {
        let parsed = || {
            let [days, hours, bounds] = text
                .split_whitespace()
                .collect::<Vec<_>>()
                .try_into()
                .ok()?;
            let (from, until) = hours.split_once('-')?;
            let (low, high) = bounds.split_once("..")?;
            let schedule = Schedule {
                days: days_of(days)?,
                from_minute: minute_of(from)?,
                until_minute: minute_of(until)?,
                replicas_min: bound_of(low)?,
                replicas_max: bound_of(high)?,
            };
            schedule.is_possible().then_some(schedule)
        };
        parsed().ok_or_else(|| ScheduleError {
            text: text.to_owned(),
        })
    }
}

fn days_of(text: &str) -> Option<u8> {
    if text == "daily" {
        return Some((1 << DAY_NAMES.len()) - 1);
    }
    let day = |name: &str| DAY_NAMES.iter().position(|known| *known == name);
    let mut days = 0;
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        // `fri-mon` goes over the end of the week.
        let length = (last + DAY_NAMES.len() - first) % DAY_NAMES.len();
        for step in 0..=length {
            days |= 1 << ((first + step) % DAY_NAMES.len());
        }
    }
    Some(days)
}

fn minute_of(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
    let is_time = hour < 24 && minute < 60 || (hour, minute) == (24, 0);
    is_time.then_some(hour * 60 + minute)
}

/// A bound that may be left out.
fn bound_of(text: &str) -> Option<Option<u32>> {
    match text {
        "" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = (0..DAY_NAMES.len()).filter(|day| self.days & (1 << day) != 0);
        let days: Vec<&str> = named.map(|day| DAY_NAMES[day]).collect();
        let bound = |bound: Option<u32>| bound.map_or_else(String::new, |bound| bound.to_string());
        write!(
            f,
            "{} {:02}:{:02}-{:02}:{:02} {}..{}",
            days.join(","),
            self.from_minute / 60,
            self.from_minute % 60,
            self.until_minute / 60,
            self.until_minute % 60,
            bound(self.replicas_min),
            bound(self.replicas_max)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Monday, 2024-01-01, midnight.
    const MONDAY_MS: u64 = 1_704_067_200_000;

    fn at(day: u64, hour: u64, minute: u64) -> u64 {
        MONDAY_MS + ((day * 24 + hour) * 60 + minute) * 60_000
    }

    #[test]
    fn a_schedule_holds_in_its_hours_also_over_midnight_and_the_end_of_the_week() {
        let office: Schedule = "mon-fri 08:00-18:00 2..6".parse().unwrap();
        let night: Schedule = "sun 22:00-06:00 ..1".parse().unwrap();
        let always: Schedule = "daily 00:00-24:00 1..".parse().unwrap();
        for (schedule, now_ms, expected) in [
            (&office, at(0, 7, 59), false),
            (&office, at(0, 8, 0), true),
            (&office, at(4, 17, 59), true),
            (&office, at(4, 18, 0), false),
            (&office, at(5, 12, 0), false),
            (&night, at(6, 21, 59), false),
            (&night, at(6, 22, 0), true),
            (&night, at(7, 5, 59), true),
            (&night, at(7, 6, 0), false),
            (&night, at(1, 3, 0), false),
            (&always, at(3, 0, 0), true),
            (&always, at(3, 23, 59), true),
        ] {
            assert_eq!(schedule.holds(now_ms), expected, "{schedule} at {now_ms}");
        }
    }

    #[test]
    fn what_is_written_is_read_again_and_what_is_none_is_refused() {
        for (text, shown) in [
            ("mon-wed 08:00-18:30 2..6", "mon,tue,wed 08:00-18:30 2..6"),
            ("fri-mon 00:00-24:00 ..1", "mon,fri,sat,sun 00:00-24:00 ..1"),
            ("sat,sun 22:00-06:00 3..", "sat,sun 22:00-06:00 3.."),
        ] {
            let schedule: Schedule = text.parse().unwrap();
            assert_eq!(schedule.to_string(), shown);
            assert_eq!(schedule.to_string().parse(), Ok(schedule));
        }
        for text in [
            "",
            "mon 08:00-18:00",
            "mun 08:00-18:00 1..2",
            "mon 8-18 1..2",
            "mon 08:00-25:00 1..2",
            "mon 24:00-08:00 1..2",
            "mon 08:60-18:00 1..2",
            "mon 08:00-18:00 ..",
            "mon 08:00-18:00 3..2",
            "mon 08:00-18:00 1..2 3",
        ] {
            assert!(text.parse::<Schedule>().is_err(), "{text}");
        }
    }
}
