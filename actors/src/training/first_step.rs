//! How a driver tells that its job goes on: a line with the time, as soon as the first step that it takes has ended.
//!
//! Lines of [`progress`](super::progress) carry no time, so they do not say how long a job stood still between two
//! starts of its driver. This one does, to people who read the job's log and to programs that measure it.
//!
//! Invariant: what [`FirstStep`] writes, it reads back; no other line is taken for it, nor a part of one.

use std::fmt;
use std::str::FromStr;

use super::progress::NotProgress;

/// What the line begins with.
const BEGIN: &str = "the first step of this driver, ";
/// What is between its numbers.
const MIDDLE: &str = ", ended at ";
/// What it ends with.
const END: &str = " ms since 1970";

/// The first step that one start of a job's driver took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstStep {
    /// Steps of the job that are taken with it.
    pub step: u64,
    /// When it ended, in milliseconds since 1970, by the clock of the driver's machine.
    pub ended_ms: u64,
}

impl fmt::Display for FirstStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FirstStep { step, ended_ms } = self;
        write!(f, "{BEGIN}{step}{MIDDLE}{ended_ms}{END}")
    }
}

impl FromStr for FirstStep {
    type Err = NotProgress;

    fn from_str(line: &str) -> Result<Self, NotProgress> {
        let numbers = line
            .trim_end()
            .strip_prefix(BEGIN)
            .and_then(|rest| rest.strip_suffix(END));
        let (step, ended_ms) = numbers
            .and_then(|numbers| numbers.split_once(MIDDLE))
            .ok_or(NotProgress)?;
        Ok(FirstStep {
            step: step.parse().map_err(|_| NotProgress)?,
            ended_ms: ended_ms.parse().map_err(|_| NotProgress)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::progress::ProgressLine;
    use super::*;

    #[test]
    fn the_line_is_read_back_as_it_was_written_and_no_part_of_it_is() {
        let first = FirstStep {
            step: 422,
            ended_ms: 1_795_259_533_500,
        };
        let line = first.to_string();
        assert_eq!(
            line,
            "the first step of this driver, 422, ended at 1795259533500 ms since 1970"
        );
        assert_eq!(line.parse::<FirstStep>(), Ok(first));
        assert_eq!(format!("{line}\n").parse::<FirstStep>(), Ok(first));
        for end in 0..line.len() {
            assert_eq!(line[..end].parse::<FirstStep>(), Err(NotProgress), "{end}");
        }
        let other = line.replace("422", "step 422/1500");
        assert_eq!(other.parse::<FirstStep>(), Err(NotProgress));
        // Nor is it taken for a line of progress.
        assert_eq!(line.parse::<ProgressLine>(), Err(NotProgress));
    }
}
