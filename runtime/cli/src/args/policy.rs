//! Policies, labels of data, and approvals.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::Format;
use super::registry::StageArgument;
use crate::signing::KeySource;

#[derive(Subcommand)]
pub(crate) enum PolicyCommand {
    /// The policies that are in force: the shipped ones, and those that were set.
    Show(Format),
    /// What policies can speak of, in Cedar's schema language.
    Schema,
    /// Put a file of policies in the place of those that were set before. The shipped ones stay.
    Set {
        /// The file, in Cedar.
        file: PathBuf,
        #[command(flatten)]
        signing: AdminSigning,
        /// The revision that this was decided on [default: what it is now].
        #[arg(long)]
        revision: Option<u64>,
        #[command(flatten)]
        format: Format,
    },
    /// Take away the policies that were set. The shipped ones stay.
    Remove {
        #[command(flatten)]
        signing: AdminSigning,
        #[command(flatten)]
        format: Format,
    },
    /// Check a file of policies as `set` would, without a cluster.
    Check {
        /// The file, in Cedar.
        file: PathBuf,
        #[command(flatten)]
        format: Format,
    },
    /// What the policies would say now, and why. Changes nothing.
    Explain {
        #[command(flatten)]
        subject: SubjectArguments,
        /// In whose name it would be asked.
        #[arg(long, default_value = "somebody")]
        principal: String,
        /// Of a deployment: the endpoint [default: the model's name].
        #[arg(long)]
        endpoint: Option<String>,
        /// Of a deployment: a rollout at an endpoint that is there.
        #[arg(long)]
        rollout: bool,
        #[command(flatten)]
        format: Format,
    },
}

/// The signature of an admin.
#[derive(Args)]
pub(crate) struct AdminSigning {
    /// The private key's file, or `holder:3f9a01bc`, of a key with the role `admin`: needed once there is such a
    /// key.
    #[arg(long, value_name = "KEY")]
    pub(crate) sign_with: Option<KeySource>,
}

/// What happens behind a gate.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActionArgument {
    Train,
    Promote,
    Deploy,
}

/// Something that happens behind a gate.
#[derive(Args)]
pub(crate) struct SubjectArguments {
    /// What is to happen.
    pub(crate) action: ActionArgument,
    /// With what: to train, a file of the data or BLAKE3 in hex (of a file, or of a data set as `dataset_blake3`
    /// has it); else a version, as `name:3` or `name:alias`.
    #[arg(value_name = "DATA|VERSION")]
    pub(crate) what: String,
    /// Of a promotion: the stage.
    #[arg(long)]
    pub(crate) to: Option<StageArgument>,
}

#[derive(Subcommand)]
pub(crate) enum DataCommand {
    /// Say what data is. A label of a file holds for every data set that the file is read into.
    Label {
        /// A file of the data, or BLAKE3 in hex.
        #[arg(value_name = "FILE|BLAKE3")]
        data: String,
        /// A label, such as `pii`; can be repeated. Those that the data has stay.
        #[arg(long = "label", required_unless_present = "remove")]
        labels: Vec<String>,
        /// A label that is taken away; can be repeated.
        #[arg(long)]
        remove: Vec<String>,
        /// What people call it [default: what it was called before, or the file's name].
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        signing: AdminSigning,
        #[command(flatten)]
        format: Format,
    },
    /// What data is labelled as.
    Show {
        /// A file of the data, or BLAKE3 in hex.
        #[arg(value_name = "FILE|BLAKE3")]
        data: String,
        #[command(flatten)]
        format: Format,
    },
    /// All labelled data.
    List(Format),
}

#[derive(Subcommand)]
pub(crate) enum ApprovalsCommand {
    /// Approve what somebody else asks for, with a key that has the role `approve`.
    Add {
        #[command(flatten)]
        subject: SubjectArguments,
        /// A private key's file, as `mobula keys create` made it, or `holder:3f9a01bc` for a key of the key holder.
        #[arg(long, value_name = "KEY")]
        key: KeySource,
        /// Why, for people; it is part of what is signed.
        #[arg(long, default_value = "")]
        reason: String,
        #[command(flatten)]
        format: Format,
    },
    /// Withdraw all approvals of something.
    Withdraw {
        #[command(flatten)]
        subject: SubjectArguments,
        /// Why, for people.
        #[arg(long, default_value = "")]
        reason: String,
        #[command(flatten)]
        format: Format,
    },
    /// All approvals.
    List(Format),
}
