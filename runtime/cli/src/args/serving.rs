//! The endpoints that serve models.

use clap::{Args, Subcommand};

use super::Format;
use super::duration::parse_duration_ms;
use super::scaling::{ExplainScalingArguments, ScaleArguments, ScalingArguments};
use crate::models::name::VersionName;

#[derive(Subcommand)]
pub(crate) enum ServeCommand {
    /// Make a model version answer requests.
    Deploy {
        /// The model, as `name` (newest version), `name:3` or `name:alias`.
        model: VersionName,
        /// The endpoint's name [default: the model's].
        #[arg(long)]
        endpoint: Option<String>,
        #[command(flatten)]
        scaling: ScalingArguments,
        /// How long to wait until it answers, such as `30s`.
        #[arg(long, default_value = "30s", value_parser = parse_duration_ms)]
        timeout: u64,
        #[command(flatten)]
        format: Format,
    },
    /// All endpoints.
    List(Format),
    /// Change how an endpoint is scaled: what is not said stays.
    Scale(ScaleArguments),
    /// How an endpoint is scaled, and the numbers behind each of the last changes.
    Explain(ExplainScalingArguments),
    /// Have an endpoint give the answers of equal requests again without computing them, for as long as they are kept. Only for
    /// models that answer the same to the same.
    Cache(CacheArguments),
    /// Stop serving.
    Delete {
        /// The endpoint's name.
        endpoint: String,
    },
}

#[derive(Args)]
pub(crate) struct CacheArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// Memory for the answers of each version, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, conflicts_with = "off")]
    pub(crate) mib: u64,
    /// How long an answer is given again, such as `10m`.
    #[arg(long, default_value = "60s", value_parser = parse_duration_ms, conflicts_with = "off")]
    pub(crate) ttl: u64,
    /// Keep no answers.
    #[arg(long)]
    pub(crate) off: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}
