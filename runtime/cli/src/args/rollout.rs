//! Rollouts of versions to endpoints.

use clap::{Args, Subcommand, ValueEnum};
use mobula_actors::serving::rollout::{Guardrails, Strategy};

use super::Format;

#[derive(Subcommand)]
pub(crate) enum RolloutCommand {
    /// Try another version of an endpoint's model, and go over to it if it is no worse.
    Start(RolloutStartArguments),
    /// The rollouts of an endpoint, with the numbers of every decision.
    Status(RolloutTarget),
    /// Stay at the step. Guardrails still roll back.
    Pause(RolloutTarget),
    /// Go on.
    Resume(RolloutTarget),
    /// Make the candidate the endpoint's version now, whatever its numbers.
    Promote(RolloutTarget),
    /// End a rollout that is under way; the version of before answers everything.
    Abort(RolloutTarget),
    /// Return to the version of before, also after the promotion.
    Rollback(RolloutTarget),
}

#[derive(Args)]
pub(crate) struct RolloutTarget {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct RolloutStartArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// Its model, as `name` (newest version), `name:version` or `name@version`.
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) plan: RolloutPlanArguments,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// How a version is tried.
#[derive(Args)]
pub(crate) struct RolloutPlanArguments {
    /// How to go over.
    #[arg(long, value_enum, default_value = "canary")]
    pub(crate) strategy: StrategyArgument,
    /// The candidate's share of the requests at each step, in percent; the last is 100
    /// [default: 1,5,25,50,100 for canary; 0,100 for blue-green; 25,50,75,100 for rolling].
    #[arg(long, value_delimiter = ',')]
    pub(crate) steps: Vec<u32>,
    /// Requests that candidate and baseline must each have answered before a step is passed.
    #[arg(long, default_value_t = 200)]
    pub(crate) min_samples: u64,
    /// How many more requests may fail than with the stable version, in hundredths of a percent.
    #[arg(long, default_value_t = 50, value_name = "BASIS_POINTS")]
    pub(crate) max_error_increase_bp: u32,
    /// How much longer an answer may take than with the stable version, in percent.
    #[arg(long, default_value_t = 10, value_name = "PERCENT")]
    pub(crate) max_latency_increase: u32,
}

impl RolloutPlanArguments {
    /// What the candidate may not do.
    pub(crate) fn guardrails(&self) -> Guardrails {
        Guardrails {
            error_increase_max_bp: self.max_error_increase_bp,
            latency_increase_max_percent: self.max_latency_increase,
            ..Guardrails::STANDARD
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum StrategyArgument {
    /// A growing share of the requests, each step judged.
    Canary,
    /// All at once, when all replicas of the candidate answer.
    BlueGreen,
    /// As a canary, with replicas that take the place of others: for clusters without room for twice as many.
    Rolling,
}

impl From<StrategyArgument> for Strategy {
    fn from(argument: StrategyArgument) -> Self {
        match argument {
            StrategyArgument::Canary => Strategy::Canary,
            StrategyArgument::BlueGreen => Strategy::BlueGreen,
            StrategyArgument::Rolling => Strategy::Rolling,
        }
    }
}
