//! Rollouts of versions to endpoints.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use mobula_actors::serving::rollout::{Guardrails, Strategy};
use mobula_actors::serving::shadow::{self, Rule};

use super::Format;
use super::duration::parse_duration_ms;

#[derive(Subcommand)]
pub(crate) enum RolloutCommand {
    /// Try another version of an endpoint's model, and go over to it if it is no worse.
    Start(RolloutStartArguments),
    /// The rollouts of an endpoint, with the numbers of every decision.
    Status(RolloutTarget),
    /// Write what a rollout's decisions rest on into a folder, with a list of hashes to check it by.
    Evidence(RolloutEvidenceArguments),
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
pub(crate) struct RolloutEvidenceArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// Which rollout of the endpoint [default: the newest].
    #[arg(long, value_name = "NUMBER")]
    pub(crate) rollout: Option<u64>,
    /// The folder, which must be absent.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
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
    pub(crate) shadow: ShadowArguments,
    /// How long a step may wait for replicas of the version before the rollout is rolled back, as in 30m; 0s for ever.
    #[arg(long, default_value = "1h", value_parser = parse_duration_ms, value_name = "TIME")]
    pub(crate) replica_wait: u64,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// How a candidate is shadowed before it answers anybody.
#[derive(Args)]
pub(crate) struct ShadowArguments {
    /// First send copies of requests to the candidate, and compare its answers with those that the callers got.
    #[arg(long)]
    pub(crate) shadow: bool,
    /// Of how many of a hundred keys the requests are copied.
    #[arg(
        long,
        requires = "shadow",
        default_value_t = 100,
        value_name = "PERCENT"
    )]
    pub(crate) shadow_percent: u32,
    /// How many answers are compared before the candidate answers anybody.
    #[arg(long, requires = "shadow", default_value_t = 200, value_name = "COUNT")]
    pub(crate) shadow_samples: u64,
    /// How many of ten thousand answers may differ.
    #[arg(
        long,
        requires = "shadow",
        default_value_t = 100,
        value_name = "BASIS_POINTS"
    )]
    pub(crate) max_mismatch_bp: u32,
    /// Numbers with fractions are the same if they differ by no more than this, and what --rtol adds.
    #[arg(
        long,
        requires = "shadow",
        default_value_t = 1e-6,
        value_name = "DIFFERENCE"
    )]
    pub(crate) atol: f64,
    /// And by no more than this part of what the caller got.
    #[arg(long, requires = "shadow", default_value_t = 1e-3, value_name = "PART")]
    pub(crate) rtol: f64,
    /// Instead: if no more than so many other numbers of their type lie between them.
    #[arg(long, requires = "shadow", conflicts_with_all = ["atol", "rtol"], value_name = "COUNT")]
    pub(crate) max_ulps: Option<u32>,
    /// Of this output, only the positions of the K largest values of each row are compared.
    #[arg(long, requires = "shadow", value_name = "OUTPUT=K", value_parser = top_k)]
    pub(crate) top_k: Vec<(String, u32)>,
    /// This output is not compared.
    #[arg(long, requires = "shadow", value_name = "OUTPUT")]
    pub(crate) ignore_output: Vec<String>,
}

/// `probabilities=1`.
fn top_k(text: &str) -> Result<(String, u32), String> {
    text.split_once('=')
        .and_then(|(output, count)| Some((output.to_owned(), count.parse().ok()?)))
        .ok_or_else(|| format!("`{text}` is no output with a number: write probabilities=1"))
}

impl ShadowArguments {
    /// How a candidate is shadowed, if it is.
    pub(crate) fn plan(&self) -> Option<shadow::Plan> {
        let rule = match self.max_ulps {
            Some(most) => Rule::Ulps(most),
            None => Rule::Close {
                absolute: self.atol,
                relative: self.rtol,
            },
        };
        let top = self.top_k.iter();
        let top = top.map(|(output, count)| (output.clone(), Rule::Top(*count)));
        let ignored = self.ignore_output.iter();
        let ignored = ignored.map(|output| (output.clone(), Rule::Ignore));
        self.shadow.then(|| shadow::Plan {
            percent: self.shadow_percent,
            samples: self.shadow_samples,
            mismatch_max_bp: self.max_mismatch_bp,
            rule,
            outputs: top.chain(ignored).collect(),
        })
    }
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
