//! The endpoints that serve models.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mobula_actors::serving::access::rules::Matcher;
use mobula_actors::serving::cache::setting::CACHE_BYTES_MAX;

use super::Format;
use super::duration::parse_duration_ms;
use super::replicas::ReplicaArguments;
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
        #[command(flatten)]
        replicas: ReplicaArguments,
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
    /// How an endpoint is scaled, the numbers behind each of the last changes, and the rules by which its requests go
    /// to a version.
    Explain(ExplainScalingArguments),
    /// The tokens with which an endpoint is asked.
    #[command(subcommand)]
    Tokens(ServeTokensCommand),
    /// Rules that send requests to a version because of a header or a parameter.
    #[command(subcommand)]
    Route(ServeRouteCommand),
    /// Graphs: endpoints that answer one request together, as one model.
    #[command(subcommand)]
    Graph(ServeGraphCommand),
    /// Answer a file of requests at low priority; started again, it goes on where it was.
    Batch(ServeBatchArguments),
    /// The addresses at which workers answer for all endpoints (`mobula worker --ingress`).
    Ingress(Format),
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
pub(crate) struct ServeBatchArguments {
    /// The endpoint's name; that of a graph with --url.
    pub(crate) endpoint: String,
    /// Requests, one JSON object a line, as they would be posted; or a `.csv` of values, one row of the model's only
    /// input a line.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// Answers, one JSON object a line, in the order of the requests.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Where to ask, such as that of an ingress [default: the endpoint's own address].
    #[arg(long)]
    pub(crate) url: Option<String>,
    /// File with a token of the endpoint [default: one for this run].
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Requests that may be under way at once, 1 to 128; fewer are while the endpoint has no room.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=128))]
    pub(crate) in_flight: u8,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Subcommand)]
pub(crate) enum ServeTokensCommand {
    /// Make one more token. It is shown this once.
    Add {
        /// The endpoint's name.
        endpoint: String,
        /// A name for the token, such as that of whoever gets it.
        name: String,
        /// How long it lives, such as `24h` [default: for ever].
        #[arg(long, value_parser = parse_duration_ms)]
        ttl: Option<u64>,
        /// Requests a second that are taken with it, a second's worth at once [default: as many as the endpoint takes].
        #[arg(long, value_name = "PER_SECOND")]
        rate_limit: Option<u32>,
        #[command(flatten)]
        format: Format,
    },
    /// The tokens of an endpoint; `deploy` is the one that it was deployed with.
    List {
        /// The endpoint's name.
        endpoint: String,
        #[command(flatten)]
        format: Format,
    },
    /// Accept a token no more, within a second.
    Revoke {
        /// The endpoint's name.
        endpoint: String,
        /// The token's name.
        name: String,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Subcommand)]
pub(crate) enum ServeGraphCommand {
    /// Make a graph, which every ingress then answers for. Its token is shown this once; `mobula serve tokens` makes
    /// more.
    Create {
        /// Its name, which no endpoint has.
        name: String,
        /// A TOML file with its nodes and outputs.
        #[arg(long)]
        file: PathBuf,
        #[command(flatten)]
        format: Format,
    },
    /// Make another graph of it; its tokens stay.
    Change {
        /// Its name.
        name: String,
        /// A TOML file with its nodes and outputs.
        #[arg(long)]
        file: PathBuf,
        #[command(flatten)]
        format: Format,
    },
    /// All graphs, with their nodes in the order in which they run.
    List(Format),
    /// Forget a graph. Its endpoints go on.
    Delete {
        /// Its name.
        name: String,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Subcommand)]
pub(crate) enum ServeRouteCommand {
    /// Send requests to a version, before weights are looked at. A rule for the same header and value is changed.
    Set {
        /// The endpoint's name.
        endpoint: String,
        #[command(flatten)]
        matcher: MatcherArguments,
        /// The version that answers them, while it is in service.
        #[arg(long)]
        version: u64,
        /// The share of their keys that goes there, in percent; the others are held against the next rules. A key is the
        /// header `x-mobula-key`, or the request's id; without both, every request is its own.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100))]
        percent: u32,
        /// Hold requests against it before all other rules.
        #[arg(long)]
        first: bool,
        #[command(flatten)]
        format: Format,
    },
    /// The rules of an endpoint, in the order in which a request is held against them.
    List {
        /// The endpoint's name.
        endpoint: String,
        #[command(flatten)]
        format: Format,
    },
    /// Forget a rule.
    Remove {
        /// The endpoint's name.
        endpoint: String,
        #[command(flatten)]
        matcher: MatcherArguments,
        #[command(flatten)]
        format: Format,
    },
}

/// What of a request is looked at.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct MatcherArguments {
    /// A header of HTTP or of gRPC's metadata that has this value.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    header: Option<(String, String)>,
    /// A parameter of the request that has this value.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    parameter: Option<(String, String)>,
}

impl MatcherArguments {
    /// What they say.
    pub(crate) fn matcher(self) -> Option<Matcher> {
        let header = self
            .header
            .map(|(name, value)| Matcher::header(&name, &value));
        let parameter = self.parameter;
        header.or_else(|| parameter.map(|(name, value)| Matcher::Parameter { name, value }))
    }
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=');
    pair.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
        .ok_or_else(|| format!("`{text}` is not NAME=VALUE, such as x-tier=beta"))
}

#[derive(Args)]
pub(crate) struct CacheArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// Memory for the answers of each version, in MiB, 1 to 16384.
    #[arg(
        long,
        value_name = "MIB",
        default_value_t = 64,
        value_parser = clap::value_parser!(u64).range(1..=CACHE_BYTES_MAX >> 20),
        conflicts_with = "off"
    )]
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
