//! How an endpoint is scaled, as options.

use std::str::FromStr;

use clap::Args;
use mobula_actors::serving::autoscaler::Policy;
use mobula_actors::serving::autoscaler::policy::NUMBER_MAX;
use mobula_actors::serving::autoscaler::schedule::Schedule;

use super::Format;
use super::duration::parse_duration_ms;

/// `3`, `1..8` or `0..4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplicaRange {
    pub(crate) min: u32,
    pub(crate) max: u32,
}

impl FromStr for ReplicaRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (min, max) = text.split_once("..").unwrap_or((text, text));
        let number = |text: &str| {
            text.parse()
                .map_err(|_| format!("`{text}` is not a number of replicas: write 3 or 1..8"))
        };
        Ok(ReplicaRange {
            min: number(min)?,
            max: number(max)?,
        })
    }
}

/// A value, or `none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OrNone<T>(pub(crate) Option<T>);

fn or_none<T>(
    text: &str,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<OrNone<T>, String> {
    match text {
        "none" => Ok(OrNone(None)),
        text => parse(text).map(|value| OrNone(Some(value))),
    }
}

fn count_or_none(text: &str) -> Result<OrNone<u32>, String> {
    or_none(text, |text| {
        text.parse()
            .map_err(|_| format!("`{text}` is not a number: write 100, or none"))
    })
}

fn millis_or_none(text: &str) -> Result<OrNone<u32>, String> {
    or_none(text, |text| {
        let millis = parse_duration_ms(text)?;
        u32::try_from(millis).map_err(|_| {
            let most_s = NUMBER_MAX / 1_000;
            format!("`{text}` is too long: write {most_s}s at the most, or none")
        })
    })
}

fn schedule_or_none(text: &str) -> Result<OrNone<Schedule>, String> {
    or_none(text, |text| {
        text.parse()
            .map_err(|error| format!("{error}, or none to have no schedule"))
    })
}

/// What of a policy is said.
#[derive(Args)]
pub(crate) struct ScalingArguments {
    /// How many replicas, as `3`, or between which bounds, as `1..8`; `0..8` ends the last one when nothing is
    /// asked, and starts one with the next request.
    #[arg(long, value_name = "COUNT|RANGE")]
    pub(crate) replicas: Option<ReplicaRange>,
    /// Requests that a replica shall have at once, waiting or being answered [default: 16].
    #[arg(long, value_name = "COUNT")]
    target_in_flight: Option<u32>,
    /// Requests a second that a replica shall get, or `none` [default: none].
    #[arg(long, value_name = "COUNT", value_parser = count_or_none)]
    target_rate: Option<OrNone<u32>>,
    /// What 99 of 100 answers shall take at the most, such as `200ms`, or `none` [default: none].
    #[arg(long, value_name = "DURATION", value_parser = millis_or_none)]
    slo_p99: Option<OrNone<u32>>,
    /// For how much of the time a replica's model shall compute, in percent, or `none` [default: none].
    #[arg(long, value_name = "PERCENT", value_parser = count_or_none)]
    target_busy: Option<OrNone<u32>>,
    /// How much of the memory that its process may have a replica shall use, in percent, or `none` [default: none].
    #[arg(long, value_name = "PERCENT", value_parser = count_or_none)]
    target_memory: Option<OrNone<u32>>,
    /// Requests a second that the endpoint takes, or `none` [default: none]; more are refused.
    #[arg(long, value_name = "COUNT", value_parser = count_or_none)]
    rate_limit: Option<OrNone<u32>>,
    /// Other bounds for some hours in UTC, such as `mon-fri 08:00-18:00 2..6`, or `none`. May be repeated.
    #[arg(long, value_parser = schedule_or_none)]
    schedule: Vec<OrNone<Schedule>>,
    /// What load is averaged over; bursts are seen over a tenth of it [default: 60s].
    #[arg(long, value_name = "DURATION", value_parser = parse_duration_ms)]
    window: Option<u64>,
    /// How long nothing must have been asked before the last replica ends [default: 5m].
    #[arg(long, value_name = "DURATION", value_parser = parse_duration_ms)]
    idle_after: Option<u64>,
    /// Within this time the replicas at most double [default: 30s].
    #[arg(long, value_name = "DURATION", value_parser = parse_duration_ms)]
    up_window: Option<u64>,
    /// Within this time at most half of the replicas end [default: 5m].
    #[arg(long, value_name = "DURATION", value_parser = parse_duration_ms)]
    down_window: Option<u64>,
    /// 1 to 3 replicas, 100 requests a second for each, 99 of 100 answers within 200 ms, models that compute for at
    /// most 70 % of the time, and at most 80 % of the memory; other options change that.
    #[arg(long)]
    golden: bool,
}

impl ScalingArguments {
    /// The policy that was said, where nothing was said as in `known`.
    pub(crate) fn policy(&self, known: Policy) -> Policy {
        let mut policy = if self.golden { Policy::golden() } else { known };
        if let Some(ReplicaRange { min, max }) = self.replicas {
            (policy.replicas_min, policy.replicas_max) = (min, max);
        }
        let set = |field: &mut Option<u32>, said: &Option<OrNone<u32>>| {
            if let Some(OrNone(value)) = said {
                *field = *value;
            }
        };
        set(&mut policy.target_rate, &self.target_rate);
        set(&mut policy.slo_p99_ms, &self.slo_p99);
        set(&mut policy.target_busy_percent, &self.target_busy);
        set(&mut policy.target_memory_percent, &self.target_memory);
        set(&mut policy.rate_limit, &self.rate_limit);
        policy.target_in_flight = self.target_in_flight.unwrap_or(policy.target_in_flight);
        for (field, said) in [
            (&mut policy.stable_window_ms, self.window),
            (&mut policy.idle_ms, self.idle_after),
            (&mut policy.up_window_ms, self.up_window),
            (&mut policy.down_window_ms, self.down_window),
        ] {
            *field = said.unwrap_or(*field);
        }
        if !self.schedule.is_empty() {
            let schedules = self.schedule.iter().filter_map(|said| said.0.clone());
            policy.schedules = schedules.collect();
        }
        policy
    }
}

#[derive(Args)]
pub(crate) struct ScaleArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    #[command(flatten)]
    pub(crate) scaling: ScalingArguments,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct ExplainScalingArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        scaling: ScalingArguments,
    }

    fn policy(arguments: &[&str], known: Policy) -> Policy {
        let line = [&["scale"], arguments].concat();
        Line::try_parse_from(line).unwrap().scaling.policy(known)
    }

    #[test]
    fn what_is_not_said_stays() {
        let known = policy(
            &[
                "--replicas=0..8",
                "--target-rate=50",
                "--slo-p99=200ms",
                "--schedule=mon-fri 08:00-18:00 2..6",
                "--schedule=sat 08:00-18:00 1..",
                "--idle-after=10m",
            ],
            Policy::between(2, 2),
        );
        assert_eq!((known.replicas_min, known.replicas_max), (0, 8));
        assert_eq!((known.target_rate, known.slo_p99_ms), (Some(50), Some(200)));
        assert_eq!((known.schedules.len(), known.idle_ms), (2, 600_000));
        let changed = policy(
            &["--replicas=3", "--slo-p99=none", "--schedule=none"],
            known.clone(),
        );
        assert_eq!((changed.replicas_min, changed.replicas_max), (3, 3));
        assert_eq!((changed.target_rate, changed.slo_p99_ms), (Some(50), None));
        assert!(changed.schedules.is_empty());
        assert_eq!(policy(&["--golden"], known.clone()), Policy::golden());
        let idler = policy(&["--golden", "--target-memory=none"], known);
        assert_eq!(
            (idler.target_busy_percent, idler.target_memory_percent),
            (Some(70), None)
        );
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_in_the_units_of_its_option() {
        for (argument, expected) in [
            ("--slo-p99=20m", "(`--slo-p99`) of 20m"),
            ("--window=25h", "(`--window`) of 25h"),
            ("--idle-after=1ms", "(`--idle-after`) of 1ms"),
            ("--up-window=48h", "(`--up-window`) of 48h"),
            ("--down-window=500ms", "(`--down-window`) of 500ms"),
            (
                "--target-busy=101",
                "compute (`--target-busy`): give 1 to 100",
            ),
            (
                "--target-memory=0",
                "in use (`--target-memory`): give 1 to 100",
            ),
            ("--target-rate=0", "(`--target-rate`): give 1 to 1000000"),
            ("--rate-limit=0", "(`--rate-limit`): give 1 to 1000000"),
            ("--target-in-flight=0", "(`--target-in-flight`)"),
            ("--replicas=1..65", "1..65 replicas"),
        ] {
            let refused = policy(&[argument], Policy::between(1, 1)).check();
            let message = refused.unwrap_err().message;
            assert!(message.contains(expected), "{argument}: {message}");
        }
        let refused = Line::try_parse_from(["scale", "--slo-p99=5000h"]).err();
        let message = refused.unwrap().to_string();
        assert!(message.contains("write 1000s at the most"), "{message}");
    }

    #[test]
    fn what_is_none_of_these_is_refused() {
        for argument in [
            "--replicas=a",
            "--replicas=1..",
            "--slo-p99=5",
            "--target-rate=-1",
            "--schedule=monday",
        ] {
            assert!(
                Line::try_parse_from(["scale", argument]).is_err(),
                "{argument}"
            );
        }
    }
}
