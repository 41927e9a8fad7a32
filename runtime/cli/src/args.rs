//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use mobula_core::id::{ActorId, JobId};
use mobula_worker::notices::Cloud;

/// An actor-based distributed runtime: a head, workers, and jobs made of actors, in one binary.
#[derive(Parser)]
#[command(name = "mobula", version, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Which cluster a command is for.
#[derive(Args, Clone)]
pub(crate) struct Target {
    /// Data directory of a local cluster, as `mobula local up` printed it.
    #[arg(long, global = true, env = "MOBULA_CLUSTER", value_name = "DIR")]
    pub(crate) cluster: Option<PathBuf>,
    /// `ip:port` of a head's control API, instead of --cluster.
    #[arg(long, global = true, value_name = "IP:PORT", requires = "token_file")]
    pub(crate) api: Option<SocketAddr>,
    /// File with a client token, for --api.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

/// How to print.
#[derive(Args, Clone, Copy)]
pub(crate) struct Format {
    /// Print JSON with stable field names.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run a head; or, with a command behind, look at the group of heads and change it.
    Head(HeadArguments),
    /// Run a worker.
    Worker(WorkerArguments),
    /// A whole cluster on this machine, as child processes.
    #[command(subcommand)]
    Local(LocalCommand),
    /// Train, preempt, kill, serve and detect drift on a cluster of processes.
    Demo(DemoArguments),
    /// Submit a job: a program that uses the SDK, or a TOML file for a built-in job.
    Submit(SubmitArguments),
    /// Train a model, data-parallel, to the same bits whatever dies; or look at what training jobs do and
    /// did.
    #[command(args_conflicts_with_subcommands = true)]
    Train {
        #[command(subcommand)]
        command: Option<TrainCommand>,
        #[command(flatten)]
        arguments: TrainArguments,
    },
    /// Jobs.
    #[command(subcommand)]
    Jobs(JobsCommand),
    /// Actors.
    #[command(subcommand)]
    Actors(ActorsCommand),
    /// Nodes.
    #[command(subcommand)]
    Nodes(NodesCommand),
    /// Checkpoints of training jobs.
    #[command(subcommand)]
    Checkpoints(CheckpointsCommand),
    /// Models and their versions.
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Endpoints that serve models.
    #[command(subcommand)]
    Serve(ServeCommand),
    /// Drift of what endpoints see.
    #[command(subcommand)]
    Drift(DriftCommand),
    /// Join and client tokens.
    #[command(subcommand)]
    Tokens(TokensCommand),
    /// Who changed what: one record of each call that changed something, or would have.
    Audit(AuditArguments),
    /// What the cluster is and how it does.
    Status(Format),
    /// What a head or a worker counts and measures, as Prometheus reads it.
    Metrics {
        /// A worker, by its name or `node-3` [default: the head].
        node: Option<String>,
    },
    /// Why a job or an actor is where it is, or what keeps it pending.
    Explain(ExplainArguments),
    /// Hurt a cluster on purpose, and see whether it keeps its promises.
    #[command(subcommand)]
    Chaos(ChaosCommand),
}

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
    #[arg(long, value_name = "M", default_value_t = 1.0)]
    pub(crate) minutes: f64,
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
    #[arg(long, value_name = "M")]
    pub(crate) seeds: Option<u64>,
    /// After how many minutes no seed is begun.
    #[arg(long, value_name = "T")]
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

impl Command {
    /// Whether it goes on until it is stopped.
    pub(crate) fn is_daemon(&self) -> bool {
        match self {
            Command::Head(arguments) => arguments.command.is_none(),
            Command::Worker(_) => true,
            _ => false,
        }
    }
}

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct HeadArguments {
    #[command(subcommand)]
    pub(crate) command: Option<HeadCommand>,
    /// Configuration file; see cluster-configs/.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The head's name at its first start, instead of head.name.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// The control API of a head whose group this one joins at its first start, instead of
    /// head.join; can be repeated.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) join: Vec<SocketAddr>,
    /// File with a head token from `mobula head add`, instead of head.join_token_file.
    #[arg(long, value_name = "FILE")]
    pub(crate) join_token_file: Option<PathBuf>,
    /// Follow without a vote until `mobula head promote`.
    #[arg(long)]
    pub(crate) learner: bool,
    /// Where its state is kept, instead of head.data_dir.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Where the control API listens, instead of head.api_listen.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) api_listen: Option<SocketAddr>,
    /// Where workers connect, instead of head.cluster_listen.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) cluster_listen: Option<SocketAddr>,
    /// The object store, instead of storage.url.
    #[arg(long, value_name = "URL")]
    pub(crate) storage_url: Option<String>,
    /// File to write once it serves: JSON with its addresses.
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) ready_file: Option<PathBuf>,
}

#[derive(Subcommand)]
pub(crate) enum HeadCommand {
    #[command(flatten)]
    Group(GroupCommand),
    /// Write everything that the heads hold into a file, with the cluster's private key: keep it as
    /// secret as a head's data directory.
    Backup {
        /// The file, which must not be there yet; `-` for standard output.
        file: PathBuf,
        /// What the head that answers holds, whatever the others may have decided since: also where
        /// there is no leader.
        #[arg(long)]
        local: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Make a backup the state of a new group of one head, of the same cluster, in an empty directory.
    Restore {
        /// The file that `mobula head backup` wrote.
        file: PathBuf,
        /// The new head's data directory: empty, or not there yet.
        #[arg(long, value_name = "DIR", required_unless_present = "check")]
        data_dir: Option<PathBuf>,
        /// The new head's name.
        #[arg(long, default_value = "head-1")]
        name: String,
        /// Only read all of it and check it.
        #[arg(long, conflicts_with = "data_dir")]
        check: bool,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Subcommand)]
pub(crate) enum GroupCommand {
    /// The heads: who leads, who votes, how far each is.
    Members(Format),
    /// Make a token with which one more head can join, and say how.
    Add {
        /// How long the token lives, such as `1h`.
        #[arg(long, default_value = "1h", value_parser = parse_duration_ms)]
        ttl: u64,
        #[command(flatten)]
        format: Format,
    },
    /// Let a head that follows vote, once it has caught up.
    Promote {
        /// The head: its Raft id, or its name.
        head: String,
        #[command(flatten)]
        format: Format,
    },
    /// Take a head out of the group for good. One that leads hands leadership over first.
    Remove {
        /// The head: its Raft id, or its name.
        head: String,
        #[command(flatten)]
        format: Format,
    },
    /// Hand leadership to another head.
    Transfer {
        /// The head: its Raft id, or its name [default: the one that is furthest].
        head: Option<String>,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Args)]
pub(crate) struct WorkerArguments {
    /// Configuration file; see cluster-configs/.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The node's name, instead of worker.name.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Where its state is kept, instead of worker.data_dir.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// The control API of one or more heads, separated by commas, instead of worker.head_api.
    #[arg(long, value_name = "IP:PORT,…")]
    pub(crate) head: Option<String>,
    /// File with a join token, instead of worker.token_file.
    #[arg(long, value_name = "FILE")]
    pub(crate) join_token_file: Option<PathBuf>,
    /// CPU cores to offer, instead of what is found.
    #[arg(long)]
    pub(crate) cpus: Option<f64>,
    /// A label for placement, key=value; can be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub(crate) labels: Vec<String>,
    /// A file whose appearance is a notice of preemption.
    #[arg(long, value_name = "FILE")]
    pub(crate) notice_file: Option<PathBuf>,
    /// Whose machine it is: `aws`, `gcp` or `azure`. Its metadata service is asked for notices of
    /// preemption.
    #[arg(long, value_name = "CLOUD", env = "MOBULA_CLOUD")]
    pub(crate) cloud: Option<Cloud>,
    /// Where that service answers, if not where it does on such machines: for emulators.
    #[arg(long, value_name = "URL", requires = "cloud")]
    pub(crate) cloud_endpoint: Option<String>,
}

#[derive(Subcommand)]
pub(crate) enum LocalCommand {
    /// Start a cluster.
    Up(LocalUpArguments),
    /// Stop it.
    Down(LocalDirectory),
    /// Show its processes.
    Status(LocalStatusArguments),
}

#[derive(Args, Clone)]
pub(crate) struct LocalDirectory {
    /// Where it keeps everything [default: --cluster, or ~/.mobula/local].
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct LocalStatusArguments {
    #[command(flatten)]
    pub(crate) directory: LocalDirectory,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct LocalUpArguments {
    #[command(flatten)]
    pub(crate) directory: LocalDirectory,
    /// How many heads: 1, 3 or 5.
    #[arg(long, default_value_t = 1)]
    pub(crate) heads: u32,
    /// How many workers.
    #[arg(long, default_value_t = 2)]
    pub(crate) workers: u32,
    /// CPU cores that each worker offers.
    #[arg(long, default_value_t = 4.0)]
    pub(crate) cpus: f64,
    /// The object store [default: a folder in the data directory].
    #[arg(long, value_name = "URL")]
    pub(crate) storage_url: Option<String>,
    /// Configuration file for what has no option here.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Live only as long as standard input is open.
    #[arg(long)]
    pub(crate) ephemeral: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct DemoArguments {
    /// Leave the cluster up, and say how to reach it.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Where to keep everything [default: a fresh temporary directory].
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// What preemptions and kills are drawn from [default: drawn too, and printed].
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) format: Format,
}

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

#[derive(Subcommand)]
pub(crate) enum ModelsCommand {
    /// All models and their versions.
    List(Format),
    /// One model, with where each version comes from.
    Show {
        /// The model's name.
        model: String,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Subcommand)]
pub(crate) enum ServeCommand {
    /// Make a model version answer requests.
    Deploy {
        /// The model, as `name` (newest version) or `name:version`.
        model: String,
        /// The endpoint's name [default: the model's].
        #[arg(long)]
        endpoint: Option<String>,
        /// How many replicas, on different workers where there are enough.
        #[arg(long, default_value_t = 2)]
        replicas: u32,
        /// How long to wait until it answers, such as `30s`.
        #[arg(long, default_value = "30s", value_parser = parse_duration_ms)]
        timeout: u64,
        #[command(flatten)]
        format: Format,
    },
    /// All endpoints.
    List(Format),
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

#[derive(Args)]
pub(crate) struct AuditArguments {
    /// The number of the first record to show [default: so that the newest are shown].
    #[arg(long, value_name = "N")]
    pub(crate) since: Option<u64>,
    /// At most so many [default: 100 of the newest, all with --since].
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u64>,
    /// Go on and print records as they come; with --json one object a line.
    #[arg(long, conflicts_with = "verify")]
    pub(crate) follow: bool,
    /// Read all records that are kept and check the chain of their hashes.
    #[arg(long, conflicts_with_all = ["since", "limit"])]
    pub(crate) verify: bool,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Subcommand)]
pub(crate) enum TokensCommand {
    /// Make a token; it is printed once.
    Create {
        /// `worker`, `client`, `head` or `metrics`.
        #[arg(long)]
        role: String,
        /// How long it lives, such as `24h`.
        #[arg(long, default_value = "24h", value_parser = parse_duration_ms)]
        ttl: u64,
        /// How often a worker can join with it [default: without limit].
        #[arg(long, default_value_t = 0)]
        uses: u32,
        /// Whose namespaces its bearer enters, for a client token: those of all tokens with the same one
        /// [default: those of this token alone].
        #[arg(long, value_name = "NAME")]
        principal: Option<String>,
        #[command(flatten)]
        format: Format,
    },
    /// List the tokens there are, without their secrets.
    List(Format),
    /// Make a token useless, at once.
    Revoke {
        /// Its name, as `tokens list` shows it.
        id: String,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Args)]
pub(crate) struct ExplainArguments {
    /// `job-12` or `actor-34`.
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// Milliseconds of a duration such as `500ms`, `10s`, `5m`, `24h`.
fn parse_duration_ms(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => {
            return Err(format!(
                "`{text}` is not a duration: write 500ms, 10s, 5m or 24h"
            ));
        }
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a duration: write 500ms or 10s"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("`{text}` is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn durations_name_their_unit() {
        assert_eq!(parse_duration_ms("500ms"), Ok(500));
        assert_eq!(parse_duration_ms("24h"), Ok(86_400_000));
        assert!(parse_duration_ms("10").is_err());
        assert!(parse_duration_ms("s").is_err());
    }
}
