//! Why a worker cannot start or go on. A head that is away is not among these once the worker has
//! joined: it waits for it and its actors run on.

use std::path::PathBuf;

/// Why a worker cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// An option is wrong in itself.
    #[error("worker option `{option}` is not usable: {reason}")]
    BadOption {
        /// Which one.
        option: &'static str,
        /// What is wrong with it, and what to use.
        reason: String,
    },
    /// The worker could not become part of a cluster, or is of another one.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Another agent uses the same data directory.
    #[error(
        "another worker agent is running with data directory `{}`: stop it, or choose another \
         data directory", path.display()
    )]
    DataDirInUse {
        /// The data directory.
        path: PathBuf,
    },
    /// The operating system refuses something that the agent cannot do without.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A local endpoint cannot be set up.
    #[error("cannot {action}: {reason}")]
    Setup {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        reason: String,
    },
}

impl WorkerError {
    /// A function that wraps an I/O error with what was tried on which file.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> WorkerError {
        let path = path.into();
        move |source| WorkerError::Io {
            action,
            path,
            source,
        }
    }
}

/// Why a worker is not part of a cluster.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The first start needs a token.
    #[error(
        "worker `{name}` has not joined a cluster yet and was given no token: make one with `mobula \
         tokens create --role worker`, and name its file with --join-token-file or worker.token_file"
    )]
    TokenAbsent {
        /// The worker's name.
        name: String,
    },
    /// The text is no token.
    #[error("the join token is not usable: {reason}; copy it whole, or make a new one on the head")]
    TokenMalformed {
        /// What is wrong with it.
        reason: String,
    },
    /// The token is for something else.
    #[error("the token is for role `{role}`, a worker needs a worker token: make one on the head")]
    TokenOfOtherRole {
        /// What it is for.
        role: String,
    },
    /// The head does not accept the token: wrong, expired or used up.
    #[error("the head refuses the join token: {reason}; make a new worker token on the head")]
    TokenRefused {
        /// What the head says.
        reason: String,
    },
    /// The head answers, but is of another cluster than the token or the stored identity.
    #[error(
        "{address} is not a head of the cluster that {expected_by} names ({reason}): check the \
         address, or to join another cluster remove `{}` and use a token of it",
        identity_dir.display()
    )]
    OtherCluster {
        /// The head's address.
        address: String,
        /// What names the expected cluster: the token, or the stored identity.
        expected_by: &'static str,
        /// What is wrong with whoever answered.
        reason: String,
        /// Where the stored identity is.
        identity_dir: PathBuf,
    },
    /// The identity in the data directory belongs to a worker of another name.
    #[error(
        "`{}` holds the identity of worker `{stored}`, this worker is named `{name}`: use that \
         name, or another data directory", identity_dir.display()
    )]
    OtherName {
        /// The name that is asked for.
        name: String,
        /// The name that the certificate says.
        stored: String,
        /// Where the stored identity is.
        identity_dir: PathBuf,
    },
    /// No head can be reached.
    #[error("no head can be reached at {addresses}: {reason}; check that a head runs there")]
    HeadUnreachable {
        /// All addresses that were tried.
        addresses: String,
        /// What the last attempt met.
        reason: String,
    },
    /// The certificate has run out and there is no way to get another one.
    #[error(
        "the certificate of worker `{name}` has expired and it was given no token to join again: make \
         one with `mobula tokens create --role worker`, and name its file with --join-token-file or \
         worker.token_file"
    )]
    Expired {
        /// The worker's name.
        name: String,
    },
    /// The head refuses for another reason.
    #[error("the head refuses worker `{name}`: {reason}")]
    Refused {
        /// The worker's name.
        name: String,
        /// What the head says.
        reason: String,
    },
    /// The stored identity cannot be read, written or used.
    #[error(
        "identity in `{}` is not usable: {reason}; remove the directory and join again with a \
         token", identity_dir.display()
    )]
    IdentityUnusable {
        /// Where it is.
        identity_dir: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}
