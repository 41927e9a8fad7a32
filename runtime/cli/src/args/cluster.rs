//! The processes of a cluster: heads, workers, and a whole one on this machine.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use mobula_worker::notices::Cloud;

use super::Format;
use super::duration::parse_duration_ms;

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
    /// Where this machine answers for all endpoints of the cluster, also those that run elsewhere: HTTP and gRPC at one
    /// port that stays.
    #[arg(long, value_name = "IP:PORT", value_parser = parse_ingress)]
    pub(crate) ingress: Option<SocketAddr>,
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
    /// Where the first worker answers for all endpoints of the cluster; each other one takes the next port.
    #[arg(long, value_name = "IP:PORT", value_parser = parse_ingress)]
    pub(crate) ingress: Option<SocketAddr>,
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

/// An address whose port stays the same.
fn parse_ingress(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("`{text}` is not ip:port, such as 0.0.0.0:8000"))?;
    if address.port() == 0 {
        return Err("an ingress has a port that stays: name one, such as 8000".to_owned());
    }
    Ok(address)
}
