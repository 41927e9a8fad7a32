//! The command line: what there is to say, by subject. What a command then does is in its own file.

mod access;
mod chaos;
mod cluster;
mod drift;
mod duration;
mod experiment;
mod jobs;
mod policy;
mod registry;
mod replicas;
mod rollout;
mod scaling;
mod serving;
mod training;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::Resettable;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

pub(crate) use access::{AuditArguments, AuditCommand, TokensCommand};
pub(crate) use chaos::{ChaosCommand, ChaosRunArguments, ChaosSimArguments};
pub(crate) use cluster::{
    DemoArguments, GroupCommand, HeadArguments, HeadCommand, LocalCommand, LocalDirectory,
    LocalUpArguments, WorkerArguments,
};
pub(crate) use drift::{
    DriftCommand, DriftLabelArguments, DriftLogCommand, DriftLogExportArguments,
    DriftLogSetArguments, DriftTarget, RetrainPolicyCommand, RetrainPolicySetArguments,
};
pub(crate) use experiment::{
    ExperimentCommand, ExperimentRecordArguments, ExperimentStartArguments, MetricArgument,
};
pub(crate) use jobs::{
    ActorsCommand, ExplainArguments, JobsCommand, NodesCommand, SubmitArguments,
};
pub(crate) use policy::{
    ActionArgument, AdminSigning, ApprovalsCommand, DataCommand, PolicyCommand, SubjectArguments,
};
pub(crate) use registry::{
    AlgorithmArgument, KeysCommand, KnownKeyArguments, ModelSource, ModelsCommand,
    RegisterArguments, RiskArgument, SearchArguments, SigningArguments,
};
pub(crate) use rollout::{
    RolloutCommand, RolloutEvidenceArguments, RolloutPlanArguments, RolloutStartArguments,
    RolloutTarget,
};
pub(crate) use scaling::{ExplainScalingArguments, ScaleArguments};
pub(crate) use serving::{
    CacheArguments, ServeBatchArguments, ServeCommand, ServeGraphCommand, ServeRouteCommand,
    ServeTokensCommand,
};
pub(crate) use training::{CheckpointsCommand, StoreArguments, TrainArguments, TrainCommand};

/// An actor-based distributed runtime: a head, workers, and jobs made of actors, in one binary.
#[derive(Parser)]
#[command(name = "mobula", version, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) target: Target,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Arguments {
    /// What this process was started with. Ends it, with what is wrong, if that is no command line.
    ///
    /// A variable of the environment that is empty is as one that is not set: that is how a unit file or a
    /// Dockerfile unsets one.
    pub(crate) fn from_command_line() -> Self {
        let matches = without_empty_variables(Self::command()).get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |variable: &std::ffi::OsStr| {
        std::env::var_os(variable).is_some_and(|value| value.is_empty())
    };
    command
        .mut_args(|argument| match argument.get_env() {
            Some(variable) if is_empty(variable) => argument.env(Resettable::Reset),
            _ => argument,
        })
        .mut_subcommands(without_empty_variables)
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
    #[arg(long, global = true, value_name = "FILE", requires = "api")]
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
    /// Keys that decisions about models are signed with.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Policies: what may be trained on, promoted and deployed.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Labels of data, which policies go by.
    #[command(subcommand)]
    Data(DataCommand),
    /// Approvals of what somebody else asks for.
    #[command(subcommand)]
    Approvals(ApprovalsCommand),
    /// Endpoints that serve models.
    #[command(subcommand)]
    Serve(ServeCommand),
    /// Rollouts: another version of a model for an endpoint, step by step.
    #[command(subcommand)]
    Rollout(RolloutCommand),
    /// Experiments: which of two versions of a model is better, by a plan that is fixed before.
    #[command(subcommand)]
    Experiment(ExperimentCommand),
    /// Drift of what endpoints see, and what is done about it.
    #[command(subcommand)]
    Drift(DriftCommand),
    /// Join and client tokens.
    #[command(subcommand)]
    Tokens(TokensCommand),
    /// Who changed what: one record of each call that changed something, or would have; or the log of what was
    /// decided about models, which can be checked without a cluster.
    #[command(args_conflicts_with_subcommands = true)]
    Audit {
        #[command(subcommand)]
        command: Option<AuditCommand>,
        #[command(flatten)]
        arguments: AuditArguments,
    },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}

#[cfg(test)]
#[path = "pages_tests.rs"]
mod pages_tests;

#[cfg(test)]
#[path = "endpoint_down_tests.rs"]
mod endpoint_down_tests;
