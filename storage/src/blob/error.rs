//! Why a blob operation failed, in words that say what to do about it.

use std::error::Error as _;
use std::fmt;
use std::io;

use object_store::client::{HttpError, HttpErrorKind};

/// What was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobOperation {
    /// Opening the store.
    Open,
    /// Creating a blob under a free name.
    Create,
    /// Writing a blob whose name is its hash.
    Write,
    /// Reading a blob.
    Read,
    /// Asking for a blob's size and age.
    Head,
    /// Listing blobs.
    List,
    /// Deleting a blob.
    Delete,
}

impl fmt::Display for BlobOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BlobOperation::Open => "open",
            BlobOperation::Create => "create",
            BlobOperation::Write => "write",
            BlobOperation::Read => "read",
            BlobOperation::Head => "look up",
            BlobOperation::List => "list",
            BlobOperation::Delete => "delete",
        })
    }
}

/// The kinds of failure that a caller tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobErrorKind {
    /// There is no such blob, or no such bucket.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The credentials are missing, wrong or not enough; or the directory is not ours.
    PermissionDenied,
    /// The disk is full.
    NoSpace,
    /// The store does not answer, or answers that it cannot now.
    Unreachable,
    /// Larger, or more, than the caller allows.
    TooLarge,
    /// The name or URL is not one.
    InvalidName,
    /// The options cannot open the store, such as half of a key.
    InvalidOptions,
    /// The store lacks a feature that is needed.
    Unsupported,
    /// Anything else.
    Failed,
}

impl BlobErrorKind {
    fn advice(self) -> &'static str {
        match self {
            BlobErrorKind::NotFound => "not found; check the name and that the bucket exists",
            BlobErrorKind::AlreadyExists => "the name is taken",
            BlobErrorKind::PermissionDenied => {
                "permission denied; check the credentials and what they allow"
            }
            BlobErrorKind::NoSpace => "no space is left; free some and try again",
            BlobErrorKind::Unreachable => "the store cannot be reached now; trying again may help",
            BlobErrorKind::TooLarge => "too large",
            BlobErrorKind::InvalidName => "not a valid name",
            BlobErrorKind::InvalidOptions => "the options do not fit",
            BlobErrorKind::Unsupported => "not supported by this store",
            BlobErrorKind::Failed => "failed",
        }
    }
}

#[derive(Debug)]
struct Details {
    operation: BlobOperation,
    url: String,
    path: String,
    kind: BlobErrorKind,
    reason: String,
    attempts: u32,
}

/// A blob operation that did not succeed.
#[derive(Debug)]
pub struct BlobError(Box<Details>);

impl BlobError {
    pub(super) fn new(
        operation: BlobOperation,
        url: &str,
        path: &str,
        kind: BlobErrorKind,
        reason: String,
        attempts: u32,
    ) -> Self {
        let (url, path) = (url.to_owned(), path.to_owned());
        BlobError(Box::new(Details {
            operation,
            url,
            path,
            kind,
            reason,
            attempts,
        }))
    }

    /// Which kind of failure.
    #[must_use]
    pub fn kind(&self) -> BlobErrorKind {
        self.0.kind
    }

    /// What was tried.
    #[must_use]
    pub fn operation(&self) -> BlobOperation {
        self.0.operation
    }

    /// The blob's name, relative to the store's URL.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.0.path
    }

    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub fn retry_may_help(&self) -> bool {
        self.0.kind == BlobErrorKind::Unreachable
    }
}

impl fmt::Display for BlobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Details {
            operation,
            url,
            path,
            kind,
            reason,
            attempts,
        } = &*self.0;
        write!(f, "cannot {operation} ")?;
        if !path.is_empty() {
            write!(f, "`{path}` in ")?;
        }
        write!(f, "{url}: {}", kind.advice())?;
        if *attempts > 1 {
            write!(f, " (tried {attempts} times)")?;
        }
        write!(f, ": {reason}")
    }
}

impl std::error::Error for BlobError {}

/// Sorts the library's errors into ours. What it calls generic is looked into: the cause is
/// somewhere in the chain.
pub(super) fn kind_of(error: &object_store::Error) -> BlobErrorKind {
    use object_store::Error;
    match error {
        Error::NotFound { .. } => BlobErrorKind::NotFound,
        Error::AlreadyExists { .. } | Error::Precondition { .. } => BlobErrorKind::AlreadyExists,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            BlobErrorKind::PermissionDenied
        }
        Error::NotSupported { .. } | Error::NotImplemented { .. } => BlobErrorKind::Unsupported,
        Error::InvalidPath { .. } => BlobErrorKind::InvalidName,
        Error::Generic { store, .. } => {
            let mut cause = error.source();
            while let Some(inner) = cause {
                if let Some(kind) = inner.downcast_ref::<io::Error>().and_then(kind_of_io) {
                    return kind;
                }
                if let Some(http) = inner.downcast_ref::<HttpError>() {
                    return match http.kind() {
                        HttpErrorKind::Decode => BlobErrorKind::Failed,
                        _ => BlobErrorKind::Unreachable,
                    };
                }
                cause = inner.source();
            }
            // What S3 answers with a server error arrives as a text.
            if *store == "S3" {
                BlobErrorKind::Unreachable
            } else {
                BlobErrorKind::Failed
            }
        }
        _ => BlobErrorKind::Failed,
    }
}

fn kind_of_io(error: &io::Error) -> Option<BlobErrorKind> {
    use io::ErrorKind as Io;
    match error.kind() {
        Io::NotFound => Some(BlobErrorKind::NotFound),
        Io::PermissionDenied | Io::ReadOnlyFilesystem => Some(BlobErrorKind::PermissionDenied),
        Io::StorageFull | Io::QuotaExceeded => Some(BlobErrorKind::NoSpace),
        Io::ConnectionRefused
        | Io::ConnectionReset
        | Io::ConnectionAborted
        | Io::NotConnected
        | Io::BrokenPipe
        | Io::HostUnreachable
        | Io::NetworkUnreachable
        | Io::NetworkDown
        | Io::TimedOut
        | Io::Interrupted
        | Io::StaleNetworkFileHandle => Some(BlobErrorKind::Unreachable),
        _ => None,
    }
}
