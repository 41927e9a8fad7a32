//! Drift of what endpoints see, and what is done about it.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mobula_actors::drift::retraining::plan::Budget;

use super::duration::parse_duration_ms;
use super::registry::StageArgument;
use super::{Format, RolloutPlanArguments, StoreArguments};

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
    /// Report what earlier requests really were, so that accuracy, calibration and concept drift are known.
    Label(DriftLabelArguments),
    /// The prediction log: what an endpoint answered, as Parquet files in the object store.
    #[command(subcommand)]
    Log(DriftLogCommand),
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
pub(crate) struct DriftLabelArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// Lines such as `{"id": "user-1", "class": 3}`: the id is the request's, `label` with the class's name may stand
    /// instead of `class`, and `row` counts the rows of a request from 0.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// File with the endpoint's token [default: the environment's MOBULA_ENDPOINT_TOKEN].
    #[arg(long, value_name = "FILE")]
    pub(crate) endpoint_token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Subcommand)]
pub(crate) enum DriftLogCommand {
    /// Log an endpoint's predictions from now on; of its inputs only what is named.
    Set(Box<DriftLogSetArguments>),
    /// What is logged of an endpoint, and how much has been.
    Show(DriftTarget),
    /// Copy the files of an endpoint into a folder.
    Export(DriftLogExportArguments),
    /// Log nothing more. Files that were written stay.
    Remove {
        /// The endpoint's name.
        endpoint: String,
    },
}

#[derive(Args)]
pub(crate) struct DriftLogSetArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// The share of the requests, above 0 and up to 1; which ones, their ids decide.
    #[arg(long, default_value = "1", value_parser = parse_share)]
    pub(crate) sample: u32,
    /// Features of the inputs that are logged as they are, such as `pixel_0_1,pixel_0_2` [default: none].
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub(crate) features: Vec<String>,
    /// Log all features as they are.
    #[arg(long, conflicts_with = "features")]
    pub(crate) all_features: bool,
    /// Features of which a keyed hash is logged, which tells equal values from others.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub(crate) hash_features: Vec<String>,
    /// Log the requests' ids as they are, rather than keyed hashes of them.
    #[arg(long)]
    pub(crate) plain_ids: bool,
    /// Rows of a file, at most.
    #[arg(long, default_value_t = 100_000)]
    pub(crate) roll_rows: u32,
    /// Bytes that its rows take in memory, at most.
    #[arg(long, default_value_t = 16 << 20)]
    pub(crate) roll_bytes: u64,
    /// The time after which a file is written, whatever it has.
    #[arg(long, default_value = "10m", value_parser = parse_duration_ms)]
    pub(crate) roll_every: u64,
    /// For how long files are kept.
    #[arg(long, default_value = "720h", value_parser = parse_duration_ms)]
    pub(crate) keep: u64,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct DriftLogExportArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// The folder, which is made if it is absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Only files that were written in this time, such as `24h`.
    #[arg(long, value_parser = parse_duration_ms)]
    pub(crate) since: Option<u64>,
    #[command(flatten)]
    pub(crate) store: StoreArguments,
    #[command(flatten)]
    pub(crate) format: Format,
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

/// A share of requests, as so many of a million.
fn parse_share(text: &str) -> Result<u32, String> {
    match text.parse::<f64>() {
        Ok(share) if (1e-6..=1.0).contains(&share) => Ok((share * 1e6).round() as u32),
        _ => Err(format!(
            "`{text}` is not a share: write 1 for all requests, 0.1 for a tenth, 0.000001 at the least"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_above_nothing_and_up_to_all() {
        assert_eq!(parse_share("1"), Ok(1_000_000));
        assert_eq!(parse_share("0.25"), Ok(250_000));
        for wrong in ["0", "1.1", "-0.5", "nan", "10%", ""] {
            assert!(parse_share(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_budget_has_jobs_and_a_time() {
        let budget = parse_budget("2/24h").unwrap();
        assert_eq!((budget.jobs, budget.period_ms), (2, 86_400_000));
        for wrong in ["", "2", "2/", "x/24h", "-1/24h", "2/24"] {
            assert!(parse_budget(wrong).is_err(), "{wrong}");
        }
    }
}
