//! Drift of what endpoints see, and what is done about it.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mobula_actors::drift::retraining::plan::Budget;

use super::duration::parse_duration_ms;
use super::registry::StageArgument;
use super::{Format, RolloutPlanArguments};

#[derive(Subcommand)]
pub(crate) enum DriftCommand {
    /// Monitors, drift events and retrain suggestions.
    Status {
        /// Only those of this endpoint.
        #[arg(long)]
        endpoint: Option<String>,
        #[command(flatten)]
        format: Format,
    },
    /// Retrain policies: what is done when an endpoint drifts.
    #[command(subcommand)]
    Policy(RetrainPolicyCommand),
    /// The retraining of an endpoint that is under way, or was the last: its steps, and what it waits for.
    Loop(DriftTarget),
    /// The retrainings of an endpoint, and what its policy still allows.
    History(DriftTarget),
    /// Begin the retraining that is suggested, whatever the mode and the cooldown say.
    Retrain(DriftTarget),
    /// End the retraining that is under way, and its job.
    Cancel {
        #[command(flatten)]
        of: DriftTarget,
        /// Why, for people.
        #[arg(long, default_value = "")]
        reason: String,
    },
}

#[derive(Args)]
pub(crate) struct DriftTarget {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Subcommand)]
pub(crate) enum RetrainPolicyCommand {
    /// Say what is done when an endpoint drifts.
    Set(Box<RetrainPolicySetArguments>),
    /// The policy of an endpoint.
    Show(DriftTarget),
    /// Do nothing any more. A retraining that has its job goes on.
    Remove {
        /// The endpoint's name.
        endpoint: String,
    },
}

#[derive(Args)]
pub(crate) struct RetrainPolicySetArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// The training job's TOML file; `register` in it names the endpoint's model.
    #[arg(long, value_name = "FILE")]
    pub(crate) job: PathBuf,
    /// Begin at a drift event, without anybody.
    #[arg(long, conflicts_with = "suggest")]
    pub(crate) auto: bool,
    /// Suggest at a drift event, and begin at `mobula drift retrain`. The default.
    #[arg(long)]
    pub(crate) suggest: bool,
    /// How many jobs may be submitted in which time, such as `2/24h`.
    #[arg(long, default_value = "2/24h", value_parser = parse_budget)]
    pub(crate) budget: Budget,
    /// For how long after a retraining's end no drift event begins another one, such as `1h`.
    #[arg(long, default_value = "1h", value_parser = parse_duration_ms)]
    pub(crate) cooldown: u64,
    /// What the new version is compared by [default: accuracy where both versions have it, else loss].
    #[arg(long)]
    pub(crate) metric: Option<String>,
    /// By how much it must be better than the active version; below zero: how much worse it may be.
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true)]
    pub(crate) min_gain: f64,
    /// The stage that it must have before it is tried: beyond `candidate` that takes a signature.
    #[arg(long, value_enum, default_value = "candidate")]
    pub(crate) gate: StageArgument,
    #[command(flatten)]
    pub(crate) canary: RolloutPlanArguments,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// Jobs and the time in which they are counted: `2/24h`.
fn parse_budget(text: &str) -> Result<Budget, String> {
    let wrong = || format!("`{text}` is not a budget: write jobs and a time, such as 2/24h");
    let (jobs, period) = text.split_once('/').ok_or_else(wrong)?;
    Ok(Budget {
        jobs: jobs.parse().map_err(|_| wrong())?,
        period_ms: parse_duration_ms(period)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_has_jobs_and_a_time() {
        let budget = parse_budget("2/24h").unwrap();
        assert_eq!((budget.jobs, budget.period_ms), (2, 86_400_000));
        for wrong in ["", "2", "2/", "x/24h", "-1/24h", "2/24"] {
            assert!(parse_budget(wrong).is_err(), "{wrong}");
        }
    }
}
