//! Jobs, their actors, and the nodes they run on.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mobula_core::id::{ActorId, JobId};

use super::Format;
use super::duration::parse_duration_ms;

#[derive(Args)]
pub(crate) struct SubmitArguments {
    /// A program that uses the SDK, or a TOML file for a built-in job.
    pub(crate) program: PathBuf,
    /// The job's name [default: the file's name].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Print its output until it has ended; the exit code is that of the job.
    #[arg(long)]
    pub(crate) follow: bool,
    /// How often its driver is started again when it fails.
    #[arg(long, default_value_t = 3)]
    pub(crate) max_restarts: u32,
    /// CPU cores for its driver.
    #[arg(long, default_value_t = 0.1)]
    pub(crate) cpus: f64,
    /// An environment variable for its processes, KEY=VALUE; can be repeated.
    #[arg(long = "env", value_name = "KEY=VALUE")]
    pub(crate) env: Vec<String>,
    /// A secret for the environment of its processes, shown nowhere: NAME=@FILE for a file's text,
    /// or NAME for the value of that variable here; can be repeated.
    #[arg(long = "secret", value_name = "NAME[=@FILE]")]
    pub(crate) secrets: Vec<String>,
    /// A file that its processes find in their working directory, PATH or PATH:NAME; can be
    /// repeated.
    #[arg(long = "file", value_name = "PATH[:NAME]")]
    pub(crate) files: Vec<String>,
    /// Start the driver again also when its `main` returned an error.
    #[arg(long)]
    pub(crate) retry_errors: bool,
    /// A second submission with the same key is the same job.
    #[arg(long)]
    pub(crate) idempotency_key: Option<String>,
    /// The namespace that it enters, whose other jobs find its named actors and may call them; its
    /// detached actors stay there when it has ended.
    #[arg(long, value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    #[command(flatten)]
    pub(crate) format: Format,
    /// Arguments for the program, after `--`.
    #[arg(last = true)]
    pub(crate) arguments: Vec<String>,
}

#[derive(Subcommand)]
pub(crate) enum JobsCommand {
    /// All jobs that are kept.
    List(Format),
    /// One job.
    Show {
        /// The job, as `job-12` or `12`.
        job: JobId,
        #[command(flatten)]
        format: Format,
    },
    /// What its driver printed, or all of its processes.
    Logs {
        /// The job.
        job: JobId,
        /// Go on until it has ended.
        #[arg(short, long)]
        follow: bool,
        /// Of all its processes, each line with where it comes from. What several print alike within
        /// five seconds is printed once, and how often it was repeated.
        #[arg(short, long)]
        all: bool,
        /// With --all: print every line.
        #[arg(long, requires = "all")]
        no_dedup: bool,
    },
    /// End it.
    Stop {
        /// The job.
        job: JobId,
    },
    /// The objects that it keeps.
    Kept {
        /// The job.
        job: JobId,
        #[command(flatten)]
        format: Format,
    },
    /// What took how long in it, for Perfetto (ui.perfetto.dev) or chrome://tracing.
    Timeline {
        /// The job.
        job: JobId,
        /// The file to write, in the Trace Event Format [default: standard output].
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

#[derive(Subcommand)]
pub(crate) enum ActorsCommand {
    /// All actors that are kept; slots for tasks are only counted, unless asked for.
    List {
        /// Only those of this job.
        #[arg(long)]
        job: Option<JobId>,
        /// Slots for tasks too, one by one. With `--json` they always are.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        format: Format,
    },
    /// One actor.
    Show {
        /// The actor, as `actor-12` or `12`.
        actor: ActorId,
        #[command(flatten)]
        format: Format,
    },
    /// End an actor for good; a detached one, too.
    Stop {
        /// The actor.
        actor: ActorId,
        /// How long it may take to finish and tidy up, in seconds; then it is killed.
        #[arg(long, default_value_t = 10)]
        grace_s: u32,
    },
}

#[derive(Subcommand)]
pub(crate) enum NodesCommand {
    /// All nodes.
    List(Format),
    /// Move everything off a node and keep it empty.
    Drain {
        /// The node: its name, or its id.
        node: String,
        /// Let it take new work again.
        #[arg(long)]
        undo: bool,
    },
    /// Take a node away after a grace, as a cloud takes a spot machine.
    Preempt {
        /// The node: its name, or its id.
        node: String,
        /// How long it still has, such as `10s` or `500ms`.
        #[arg(long, default_value = "30s", value_parser = parse_duration_ms)]
        grace: u64,
    },
}

#[derive(Args)]
pub(crate) struct ExplainArguments {
    /// `job-12` or `actor-34`.
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) format: Format,
}
