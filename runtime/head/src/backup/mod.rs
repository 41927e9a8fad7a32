//! Backups: everything that a cluster's heads hold in one checked file, and the way back from it.
//!
//! ```text
//! "mobula backup 1\n"
//! identity    the CA: certificate and private key, PEM
//! header, rows …, end      the snapshot stream of mobula_storage::snapshot
//! manifest    JSON: what this is a backup of, and the hash of everything before
//! ```
//!
//! Each part is a frame with a checksum of its own. The end frame holds the hash of all rows (the state
//! hash), the manifest repeats it, and restoring computes it once more over what it has written (I20).
//!
//! The private key of the CA is inside, because without it a restored cluster would be another one to
//! all workers, tokens and sealed secrets. So a backup is as secret as a head's data directory: it is
//! written with mode 0600, and on its way from the head the key is sealed for the one who asked
//! ([`mobula_net::identity::seal`]).
//!
//! Invariants:
//! 1. A backup shows one moment: it is read from a pinned view of the store.
//! 2. A file under its final name is whole: it is written beside, synced, read back, and renamed.
//! 3. Nothing is written by a restore before the whole file was verified, and a directory in which
//!    one broke off is refused by every later start.
//! 4. What is restored fences what ran before: terms, Raft ids, incarnations and ids of the restored
//!    group begin far above any that the old one can have given out after the backup.

mod read;
mod restore;
mod write;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use mobula_core::control::ModuleId;
use mobula_storage::engine::EngineError;
use mobula_storage::snapshot::SnapshotError;
use serde::{Deserialize, Serialize};

pub use read::verify;
pub(crate) use restore::is_unfinished;
pub use restore::{RestoreOptions, Restored, restore};
pub use write::{BackupFile, BackupStart, BackupTarget, Unwritten};

/// What a backup begins with; the number is its format.
const MAGIC: &[u8; 16] = b"mobula backup 1\n";

/// What backups of any format begin with.
const MAGIC_OF_ANY: &[u8] = b"mobula backup ";

/// The frame with the CA.
const KIND_IDENTITY: u8 = 16;

/// The frame with the manifest, which is the last one.
const KIND_MANIFEST: u8 = 17;

/// What a backup is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The cluster.
    pub cluster_id: String,
    /// The Raft id of the head that it was read from.
    pub raft_id: u64,
    /// The version of that head.
    pub version: String,
    /// When, in milliseconds since the Unix epoch.
    pub made_ms: u64,
    /// The last entry whose effect is in it.
    pub index: u64,
    /// The term of that entry.
    pub term: u64,
    /// Rows in all tables.
    pub rows: u64,
    /// Their bytes in this file.
    pub rows_bytes: u64,
    /// Rows of each module, by its number: whoever restores must know all of them.
    pub modules: BTreeMap<u8, u64>,
    /// BLAKE3 of all rows in key order, in hex: the state hash.
    pub state_hash: String,
    /// BLAKE3 of everything in the file before the manifest, in hex.
    pub file_hash: String,
}

impl Manifest {
    /// The modules that have rows in it.
    pub fn module_ids(&self) -> impl Iterator<Item = ModuleId> + '_ {
        self.modules.keys().map(|id| ModuleId(*id))
    }
}

/// Why a backup was not made.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file cannot be written.
    #[error("the backup {path} cannot be written: {source}; nothing is left under that name")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk is full.
    #[error(
        "no space is left on the disk of {path}: nothing is left under that name; free some space \
         or name a file elsewhere"
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
    },
    /// There is something under the name already.
    #[error("{path} is there already: a backup never replaces a file, choose another name")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// What came from the head is not a whole, undamaged stream.
    #[error("what the head sent is damaged ({0}); nothing was kept: try again")]
    Stream(String),
    /// What was written reads back as something else.
    #[error("the backup was written, and what is on the disk is not what was written: {0}")]
    ReadBack(RestoreError),
}

impl BackupError {
    fn write(path: &std::path::Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                BackupError::NoSpace { path }
            }
            _ => BackupError::Write { path, source },
        }
    }
}

/// Why a backup was not restored. Unless the text says otherwise nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file cannot be read.
    #[error("the backup {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is something else.
    #[error("{path} is no backup: it does not begin as one; `mobula head backup` makes them")]
    NotABackup {
        /// The file.
        path: PathBuf,
    },
    /// It is of another version of this program.
    #[error(
        "{path} is a backup of format `{found}`, this binary ({ours}) reads format 1: restore it with \
         the version that made it"
    )]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: String,
        /// This binary's version.
        ours: &'static str,
    },
    /// Something in it is not what was written.
    #[error(
        "the backup is damaged at byte {offset}: {reason}; use another copy of it, or an older backup"
    )]
    Damaged {
        /// Bytes before what is damaged.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// It holds tables that this binary does not know.
    #[error(
        "the backup was made by version {version} and holds rows of modules {modules:?}, which this \
         binary ({ours}) does not know: restore it with the version that made it"
    )]
    UnknownModules {
        /// The version that made it.
        version: String,
        /// The modules' numbers.
        modules: Vec<u8>,
        /// This binary's version.
        ours: &'static str,
    },
    /// The directory holds something.
    #[error(
        "{path} is not empty (there is `{found}` in it): a backup is restored into an empty directory \
         only; if a head runs there, or its state may still be needed, leave it and name another one"
    )]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// Something in it.
        found: String,
    },
    /// The directory cannot be written.
    #[error("{path} cannot be written: {source}; what was written is removed again")]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk is full.
    #[error(
        "no space is left on the disk of {path}: what was written is removed again; free some space \
         (the backup needs {needed_bytes} bytes) or name a directory elsewhere"
    )]
    NoSpace {
        /// The directory.
        path: PathBuf,
        /// What the rows need, roughly.
        needed_bytes: u64,
    },
    /// The store in the directory failed.
    #[error("the restored state cannot be written: {0}; what was written is removed again")]
    Store(String),
    /// The identity in it is of no use.
    #[error("the identity in the backup cannot be used: {0}")]
    Identity(String),
    /// What was written is not what the backup holds.
    #[error(
        "the restored state has the hash {found} and not {expected}: the disk of {path} does not keep \
         what is written; what was written is removed again"
    )]
    HashDiffers {
        /// The directory.
        path: PathBuf,
        /// What is in the backup.
        expected: String,
        /// What is on the disk.
        found: String,
    },
}

impl RestoreError {
    fn damaged(offset: u64, reason: impl Into<String>) -> Self {
        RestoreError::Damaged {
            offset,
            reason: reason.into(),
        }
    }

    fn write(path: &std::path::Path, source: std::io::Error, needed_bytes: u64) -> Self {
        let path = path.to_owned();
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                RestoreError::NoSpace { path, needed_bytes }
            }
            _ => RestoreError::Write { path, source },
        }
    }

    fn engine(error: EngineError, needed_bytes: u64) -> Self {
        match error {
            EngineError::NoSpace { path, .. } => RestoreError::NoSpace { path, needed_bytes },
            error => RestoreError::Store(error.to_string()),
        }
    }
}

/// What went wrong within the stream of rows.
fn in_stream(error: &SnapshotError, before_bytes: u64) -> (u64, String) {
    match error {
        SnapshotError::Damaged { offset, reason } => (before_bytes + offset, reason.clone()),
        other => (before_bytes, other.to_string()),
    }
}
