//! Models: their versions, who decides about them, and the keys that decisions are signed with.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use mobula_actors::registry::keys::Role;
use mobula_actors::registry::search::MetricCondition;
use mobula_actors::registry::stages::Stage;
use mobula_core::id::JobId;

use super::{AdminSigning, Format, StoreArguments};
use crate::models::name::VersionName;
use crate::signing::KeySource;

#[derive(Subcommand)]
pub(crate) enum ModelsCommand {
    /// All models and their versions.
    List(Format),
    /// One model, or one version of it, with where each version comes from.
    Show {
        /// The model, as `name`, or one version, as `name:3` or `name:alias`.
        model: VersionName,
        #[command(flatten)]
        format: Format,
    },
    /// The versions that fulfil all that is said of them.
    Search(SearchArguments),
    /// Register a model that was made elsewhere, as a new version. The file is looked through and tried here, and goes
    /// straight into the cluster's object store.
    Register(RegisterArguments),
    /// Bring a version one stage further, with signatures.
    Promote {
        /// The version, as `name:3` or `name:alias`.
        version: VersionName,
        /// The stage [default: staging, and production for a version that is there].
        #[arg(long)]
        to: Option<StageArgument>,
        #[command(flatten)]
        signing: SigningArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Take a version out of use, with signatures.
    Archive {
        /// The version, as `name:3` or `name:alias`.
        version: VersionName,
        #[command(flatten)]
        signing: SigningArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Give a version a name that can be moved to another one.
    Alias {
        /// The version, as `name:3`; with --remove the model.
        version: VersionName,
        /// The alias, such as `champion`.
        alias: String,
        /// Remove the alias.
        #[arg(long)]
        remove: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Tag a version.
    Tag {
        /// The version, as `name:3` or `name:alias`.
        version: VersionName,
        /// The tag, as `team=vision`; with --remove its name.
        tag: String,
        /// Take the tag away.
        #[arg(long)]
        remove: bool,
        #[command(flatten)]
        format: Format,
    },
    /// Say how many different keys sign each change of a model's stages. Asking for fewer is signed.
    Policy {
        /// The model.
        model: String,
        /// `normal`, or `high`: nobody decides alone.
        #[arg(long, default_value = "normal")]
        risk: RiskArgument,
        /// How many keys [default: 1, and 2 for high risk].
        #[arg(long)]
        signatures: Option<u32>,
        /// A private key's file, or `holder:3f9a01bc`, of a key with the role `release`; can be repeated.
        #[arg(long = "key", value_name = "KEY")]
        keys: Vec<KeySource>,
        #[command(flatten)]
        format: Format,
    },
    /// From data to endpoints: what versions were made of, and where they serve.
    Lineage {
        /// A version, as `name:3` or `name:alias`, or all of a model, as `name`.
        #[arg(required_unless_present_any = ["data", "job"])]
        version: Option<VersionName>,
        /// All versions that were trained on this data, by the BLAKE3 of its bytes.
        #[arg(long, value_name = "BLAKE3", conflicts_with = "version")]
        data: Option<String>,
        /// All versions that this job made.
        #[arg(long, conflicts_with = "version")]
        job: Option<JobId>,
        #[command(flatten)]
        format: Format,
    },
    /// A version as a page in Markdown: what it is for, what it was measured at, where it came from, who signed it, and
    /// how its rollouts went.
    Card {
        /// The version, as `name:3` or `name:alias`.
        version: VersionName,
        /// Write it to this file instead.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Check a version: its file byte by byte, and what was signed about it. Fails if anything is wrong.
    Verify {
        /// The version, as `name:3` or `name:alias`.
        version: VersionName,
        #[command(flatten)]
        store: StoreArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Write a version's file and what was signed about it into a folder; with --key signed as a whole, so
    /// that `model_signing verify key` accepts it.
    Export {
        /// The version, as `name:3` or `name:alias`.
        version: VersionName,
        /// The folder, which must be empty or absent.
        folder: PathBuf,
        /// A private key's file (ECDSA on P-256).
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        #[command(flatten)]
        store: StoreArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Check a folder against its signature, made by `mobula models export` or `model_signing sign key`.
    VerifyBundle {
        /// The folder.
        folder: PathBuf,
        /// The public key's file.
        #[arg(long, value_name = "FILE")]
        public_key: PathBuf,
        /// The signature [default: `model.sig` in the folder].
        #[arg(long, value_name = "FILE")]
        signature: Option<PathBuf>,
        #[command(flatten)]
        format: Format,
    },
}

#[derive(Args)]
pub(crate) struct RegisterArguments {
    /// The model.
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) source: ModelSource,
    /// Where it comes from and what it is worth, in JSON; any of: `dataset_blake3`, `code`, `code_blake3`, `environment`,
    /// `seed`, `run_record`, `metrics`, `training`, and `labels`, the names of an output's classes.
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata: Option<PathBuf>,
    /// Rows of a batch, at most [default: as many as a call holds, up to 128, where rows are answered independently of each
    /// other; of an encoder, as many of the longest texts as should be answered in time].
    #[arg(long, value_name = "ROWS")]
    pub(crate) max_batch: Option<u32>,
    #[command(flatten)]
    pub(crate) store: StoreArguments,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// The model's files.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ModelSource {
    /// An ONNX file, with its weights inside.
    #[arg(long, value_name = "FILE")]
    pub(crate) onnx: Option<PathBuf>,
    /// A folder with a text encoder of the BERT family, as Hugging Face has them: `config.json`, `model.safetensors` and
    /// `tokenizer.json`. Other files in it are left alone.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) encoder: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct SearchArguments {
    /// Of this model.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// In this stage.
    #[arg(long)]
    pub(crate) stage: Option<StageArgument>,
    /// With this tag, as `team`, or `team=vision`; can be repeated.
    #[arg(long = "tag", value_name = "NAME[=VALUE]")]
    pub(crate) tags: Vec<String>,
    /// With this metric, as `accuracy>=0.9`; can be repeated.
    #[arg(long = "metric", value_name = "CONDITION")]
    pub(crate) metrics: Vec<MetricCondition>,
    /// At most so many.
    #[arg(long, default_value_t = 100)]
    pub(crate) limit: usize,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// Who signs, and what becomes of it.
#[derive(Args)]
pub(crate) struct SigningArguments {
    /// A private key's file, as `mobula keys create` made it, or `holder:3f9a01bc` for a key of the key holder;
    /// can be repeated.
    #[arg(long = "key", value_name = "KEY", required_unless_present = "envelope")]
    pub(crate) keys: Vec<KeySource>,
    /// Why, for people; it is part of what is signed.
    #[arg(long, default_value = "", conflicts_with = "envelope")]
    pub(crate) reason: String,
    /// A file that somebody else signed with --save: their signatures count too.
    #[arg(long, value_name = "FILE")]
    pub(crate) envelope: Option<PathBuf>,
    /// Write what was signed into a file for the next one to sign, and change nothing.
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,
}

/// A stage, on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum StageArgument {
    Candidate,
    Staging,
    Production,
    Archived,
}

impl From<StageArgument> for Stage {
    fn from(stage: StageArgument) -> Self {
        match stage {
            StageArgument::Candidate => Stage::Candidate,
            StageArgument::Staging => Stage::Staging,
            StageArgument::Production => Stage::Production,
            StageArgument::Archived => Stage::Archived,
        }
    }
}

/// A risk, on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum RiskArgument {
    Normal,
    High,
}

/// A role, on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum RoleArgument {
    Stage,
    Release,
    Approve,
    Admin,
}

impl From<RoleArgument> for Role {
    fn from(role: RoleArgument) -> Self {
        match role {
            RoleArgument::Stage => Role::Stage,
            RoleArgument::Release => Role::Release,
            RoleArgument::Approve => Role::Approve,
            RoleArgument::Admin => Role::Admin,
        }
    }
}

/// How a key signs, on the command line.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum AlgorithmArgument {
    EcdsaP256,
    Ed25519,
}

#[derive(Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key: FILE, which only you can read, and FILE.pub; and let the registry know it.
    Create {
        /// Where the private key goes.
        file: PathBuf,
        /// How it signs. OpenSSF's model-signing knows `ecdsa-p256` only.
        #[arg(long, default_value = "ecdsa-p256")]
        algorithm: AlgorithmArgument,
        /// Only make the files.
        #[arg(long)]
        offline: bool,
        #[command(flatten)]
        known: KnownKeyArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Let the registry know a public key that somebody else made.
    Add {
        /// The public key's file, in PEM.
        file: PathBuf,
        #[command(flatten)]
        known: KnownKeyArguments,
        #[command(flatten)]
        format: Format,
    },
    /// Have keys held by an actor, which signs with them for whoever is asked with `holder:KEY` and gives no key away.
    Hold {
        /// The private keys' files, on the machine where the actor runs.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// A label of that machine, as `zone=vault`; can be repeated.
        #[arg(long = "label", value_name = "NAME=VALUE")]
        labels: Vec<String>,
        #[command(flatten)]
        format: Format,
    },
    /// The keys that the registry knows.
    List(Format),
    /// Make a key worthless for what is signed from now on, for good.
    Revoke {
        /// The key, as `keys list` shows it; the first 8 digits or more are enough.
        key: String,
        /// Why, for people.
        #[arg(long)]
        reason: String,
        #[command(flatten)]
        signing: AdminSigning,
        #[command(flatten)]
        format: Format,
    },
}

/// What the registry should know about a key.
#[derive(Args)]
pub(crate) struct KnownKeyArguments {
    /// What it may sign; can be repeated: `stage` (stages but production), `release` (those and production),
    /// `approve` (what others ask for), `admin` (keys, policies, labels).
    #[arg(long = "role", default_value = "stage")]
    pub(crate) roles: Vec<RoleArgument>,
    /// Whose it is [default: the file's name].
    #[arg(long)]
    pub(crate) owner: Option<String>,
    #[command(flatten)]
    pub(crate) signing: AdminSigning,
}
