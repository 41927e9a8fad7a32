//! The endpoints that serve models, and the drift of what those see.

use clap::Subcommand;

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
    /// Stop serving.
    Delete {
        /// The endpoint's name.
        endpoint: String,
    },
}

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
}
