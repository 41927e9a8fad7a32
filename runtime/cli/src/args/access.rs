//! Who may do what, and who did.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Format;
use super::duration::parse_duration_ms;

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

#[derive(Subcommand)]
pub(crate) enum AuditCommand {
    /// Write the log of what was decided about models into a file.
    Export {
        /// The file, which must be absent.
        file: PathBuf,
        #[command(flatten)]
        format: Format,
    },
    /// Print one entry of that log, with the proof that it is there.
    Prove {
        /// The entry's number.
        sequence: u64,
    },
    /// Check a file of `export` or `prove`, without a cluster. Names the first entry that was changed.
    Verify {
        /// The file.
        file: PathBuf,
        /// The root that it must have, in hex: one that was kept elsewhere.
        #[arg(long, value_name = "SHA256")]
        root: Option<String>,
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
