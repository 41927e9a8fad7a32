//! The jobs that the `mobula` binary brings with it, as their drivers see them.

use mobula::Cluster;

use crate::registry::key_holder;
use crate::training::job::{JobError, train};

/// How the arguments of a built-in job begin.
const KINDS: &str = "train and hold-keys";

/// Why a built-in job failed.
#[derive(Debug, thiserror::Error)]
pub enum BuiltinError {
    /// No such job.
    #[error("`{0}` is not a built-in job: there are {KINDS}")]
    UnknownKind(String),
    /// Something is missing.
    #[error(
        "a built-in job needs its kind and its description as arguments, and got {0} arguments"
    )]
    Arguments(usize),
    /// Training failed.
    #[error(transparent)]
    Train(#[from] JobError),
    /// The keys are not held.
    #[error("the keys are not held: {0}")]
    HoldKeys(mobula::Error),
}

impl BuiltinError {
    /// Whether another start of the driver would come to the same.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            BuiltinError::UnknownKind(_) | BuiltinError::Arguments(_) => true,
            BuiltinError::Train(error) => error.is_final(),
            // Whoever asked for it waits, and asks again.
            BuiltinError::HoldKeys(_) => true,
        }
    }
}

/// Drives the job that `arguments` describe: its kind, its description as TOML or JSON, and the name of the file
/// that this came from, for errors.
pub async fn main(cluster: Cluster, arguments: Vec<String>) -> Result<(), BuiltinError> {
    let [kind, text, file @ ..] = arguments.as_slice() else {
        return Err(BuiltinError::Arguments(arguments.len()));
    };
    let file = file.first().map_or("job.toml", String::as_str);
    let outcome = match kind.as_str() {
        "train" => Box::pin(train(cluster, text, file))
            .await
            .map_err(BuiltinError::from),
        "hold-keys" => key_holder::hold(&cluster, text)
            .await
            .map_err(BuiltinError::HoldKeys),
        unknown => Err(BuiltinError::UnknownKind(unknown.to_owned())),
    };
    if let Err(error) = &outcome {
        // Into the job's log, beside what happened before.
        println!("failed: {error}");
    }
    outcome
}
