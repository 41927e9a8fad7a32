//! Faults on purpose.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Format;
use super::duration::parse_minutes;

#[derive(Subcommand)]
pub(crate) enum ChaosCommand {
    /// Simulate whole clusters in one process, with faults drawn from a seed, and check every
    /// answer. The same seed is the same run.
    Sim(ChaosSimArguments),
    /// Run a scenario against real processes: a cluster is started, worked on, hurt, and checked.
    Run(ChaosRunArguments),
    /// The scenarios that come along.
    List(Format),
}

#[derive(Args)]
pub(crate) struct ChaosRunArguments {
    /// A scenario of `mobula chaos list`, or a TOML file.
    pub(crate) scenario: String,
    /// What the faults are drawn from [default: drawn from the clock, and printed].
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// How long the cluster is hurt.
    #[arg(long, value_name = "M", default_value_t = 1.0, value_parser = parse_minutes)]
    pub(crate) minutes: f64,
    /// Hurt it for as long as it takes until so many faults have come and are over, a day at most.
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "minutes",
        value_parser = clap::value_parser!(u32).range(1..=10_000)
    )]
    pub(crate) faults: Option<u32>,
    /// File for what came of it, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Where logs and data are kept, and stay [default: a temporary directory, which stays if
    /// something is broken].
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Give the machines no networks of their own, also where that is possible.
    #[arg(long)]
    pub(crate) loopback: bool,
}

#[derive(Args)]
pub(crate) struct ChaosSimArguments {
    /// The first seed [default: drawn from the clock, and printed].
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// How many seeds [default: one, or as many as --minutes allows].
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seeds: Option<u64>,
    /// After how many minutes no seed is begun.
    #[arg(long, value_name = "T", value_parser = parse_minutes)]
    pub(crate) minutes: Option<f64>,
    /// How many seeds run at a time [default: one a core].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// After how many events a run counts as endless [default: 3000000; a common one has some
    /// thousands].
    #[arg(long, value_name = "N")]
    pub(crate) events_max: Option<u64>,
    /// Print what happens in a run of one seed.
    #[arg(long)]
    pub(crate) verbose: bool,
}
