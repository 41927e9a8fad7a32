//! Training, and the checkpoints that it makes.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mobula_core::id::JobId;

use super::Format;

#[derive(Args)]
pub(crate) struct TrainArguments {
    /// The job's TOML file: see docs/training.md.
    pub(crate) file: Option<PathBuf>,
    /// How many workers take part, as 2..8 (both included) or 4 [default: what the file says].
    #[arg(long, value_name = "MIN..MAX", value_parser = crate::train_file::parse_workers)]
    pub(crate) workers: Option<mobula_actors::training::spec::WorkerRange>,
    /// Print its progress until it has ended; the exit code is that of the job.
    #[arg(long)]
    pub(crate) follow: bool,
    /// A program with models of its own, whose `main` hands its arguments to
    /// `mobula_actors::builtin::main` [default: this binary].
    #[arg(long, value_name = "FILE")]
    pub(crate) program: Option<PathBuf>,
    /// The job's name [default: what the file says].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// How often its driver is started again when it fails.
    #[arg(long, default_value_t = 3)]
    pub(crate) max_restarts: u32,
    /// CPU cores for its driver.
    #[arg(long, default_value_t = 0.1)]
    pub(crate) cpus: f64,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Subcommand)]
pub(crate) enum TrainCommand {
    /// How a training job goes: progress, speed, and where a step's time went.
    Status {
        /// The job, as `job-12` or `12`.
        job: JobId,
        #[command(flatten)]
        format: Format,
    },
    /// Make a job's run once more, on this machine, and compare it step by step with what was recorded.
    /// Fails at a difference, and names the first step and tensor.
    Replay {
        /// The job.
        job: JobId,
        /// Only so many steps.
        #[arg(long, value_name = "N")]
        steps: Option<u64>,
        /// For a model of the user's own: fetch the program that ran from the object store, and run it on this
        /// machine, with all rights of whoever says this.
        #[arg(long)]
        run_program: bool,
        #[command(flatten)]
        store: StoreArguments,
        #[command(flatten)]
        format: Format,
    },
    /// What differs between two runs: program, dependencies, machine, hyperparameters, data, and states.
    Diff {
        /// One job.
        a: JobId,
        /// The other.
        b: JobId,
        #[command(flatten)]
        store: StoreArguments,
        #[command(flatten)]
        format: Format,
    },
}

/// How the object store is reached from here.
#[derive(Args, Clone)]
pub(crate) struct StoreArguments {
    /// Configuration file whose `[storage.s3]` says how the cluster's S3 server is reached; without one
    /// the usual `AWS_*` variables do.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum CheckpointsCommand {
    /// The jobs that have checkpoints, or those of one job, newest first.
    List {
        /// The job.
        job: Option<JobId>,
        #[command(flatten)]
        format: Format,
    },
    /// What a checkpoint holds and where it is.
    Show {
        /// The job.
        job: JobId,
        /// The step after which it was taken [default: the newest].
        #[arg(long)]
        step: Option<u64>,
        #[command(flatten)]
        store: StoreArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Read every byte of a job's checkpoints and check it. Fails if one cannot be restored.
    Verify {
        /// The job.
        job: JobId,
        /// Only that of this step.
        #[arg(long)]
        step: Option<u64>,
        #[command(flatten)]
        store: StoreArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Write the newest checkpoint that verifies into a safetensors file.
    Restore {
        /// The job.
        job: JobId,
        /// That of this step and no other.
        #[arg(long)]
        step: Option<u64>,
        /// The file [default: `<job>-<step>.safetensors` here].
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Replace a file that is there.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        store: StoreArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Hide all but the newest and the pinned checkpoints of a job; the next sweeps remove their bytes.
    Prune {
        /// The job.
        job: JobId,
        /// How many of the newest stay.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        keep: u32,
        /// Only say what would be hidden.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Keep a checkpoint whatever the job's policy says.
    Pin {
        /// The job.
        job: JobId,
        /// The step after which it was taken.
        step: u64,
        /// Keep it no more.
        #[arg(long)]
        undo: bool,
    },
}
