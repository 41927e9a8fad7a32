//! Why a head does not start, or stops.

use std::net::SocketAddr;
use std::path::PathBuf;

use mobula_storage::engine::EngineError;
use mobula_storage::raft_log::{CommittedConflict, LostEntries};

/// Why a head does not start, or stops.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The data directory cannot be used.
    #[error("{path} cannot be used: {source}")]
    DataDir {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The store cannot be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The Raft log is not usable.
    #[error("the raft log cannot be used: {0}")]
    Log(String),
    /// The certificate authority or a certificate is not usable.
    #[error("the head's identity cannot be used: {reason}")]
    Identity {
        /// What is wrong.
        reason: String,
    },
    /// An address cannot be listened on.
    #[error(
        "{what} cannot listen on {address}: {reason}; stop what uses the port, or give another \
         one in the configuration"
    )]
    Listen {
        /// Which listener.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        reason: String,
    },
    /// An address in the configuration is not one.
    #[error("`{what}` is `{text}`: {reason}; expected ip:port")]
    Address {
        /// The key.
        what: &'static str,
        /// The value.
        text: String,
        /// Why it is not an address.
        reason: String,
    },
    /// The object store's URL or settings are wrong.
    #[error("the object store cannot be used: {0}")]
    Storage(String),
    /// The identity says that there was a log, and there is none.
    #[error(
        "head {raft_id} has an identity but its log is gone: under the old id it could vote twice; \
         remove it from the group (`mobula head remove {raft_id}`), empty {data_dir} and join \
         again with a new token"
    )]
    LostLog {
        /// Its id in Raft.
        raft_id: u64,
        /// Its data directory.
        data_dir: PathBuf,
    },
    /// A restore broke off here.
    #[error(
        "a restore into {data_dir} broke off: what is there is no head's whole state; empty the \
         directory and restore again"
    )]
    UnfinishedRestore {
        /// The data directory.
        data_dir: PathBuf,
    },
    /// Its state was found to be wrong.
    #[error(
        "the state of head {raft_id} was found to differ from that of a majority at entry {index}: \
         it must not serve again; keep its data directory for whoever looks into this, remove it \
         from the group (`mobula head remove {raft_id}`), and join again with an empty directory, \
         under a new id"
    )]
    Diverged {
        /// Its id in Raft.
        raft_id: u64,
        /// The entry.
        index: u64,
    },
    /// Its log lacks what it has acknowledged.
    #[error(
        "head {raft_id} must not serve again: {lost}; so an older copy of its data directory, or one out \
         of a backup of the disk, was started under its id, or the disk has lost what it had synced, and \
         going on could lose commands that clients were told are done; remove it from the group (`mobula \
         head remove {raft_id}`), and join again with an empty directory and a new token (`mobula head \
         add`)"
    )]
    LostEntries {
        /// Its id in Raft.
        raft_id: u64,
        /// What it lacks.
        lost: LostEntries,
    },
    /// Its leader lacks what is committed in its log.
    #[error(
        "head {raft_id} does not follow its leader: {conflict}; so a majority of the heads has lost \
         entries that it had acknowledged, because older copies of their data directories were started \
         or their disks have lost what they had synced; the data directory of this head holds entries \
         that the leader lacks: do not delete it, and do not remove this head; stop the other heads, \
         start this one alone, take a backup of what it holds (`mobula head backup --local FILE`, with \
         `--api` and `--token-file`), stop it, and begin a new group with that in an empty directory \
         (`mobula head restore FILE --data-dir DIR`): what the others have acknowledged since they lost \
         entries is then gone"
    )]
    CommittedConflict {
        /// Its id in Raft.
        raft_id: u64,
        /// In what the two logs differ.
        conflict: CommittedConflict,
    },
    /// This head is no member of its group any more.
    #[error(
        "head {raft_id} was removed from its group; to bring this machine back, empty {data_dir} \
         and join again with a new token"
    )]
    Removed {
        /// Its id in Raft.
        raft_id: u64,
        /// Its data directory.
        data_dir: PathBuf,
    },
    /// Another process runs under its id.
    #[error(
        "another process runs as head {raft_id}, so there is a copy of {data_dir} somewhere: two heads \
         with one id could vote twice, and this one ends because the other was started later; stop the \
         one that is not to be, and let a machine that is to be a head of its own join with an empty \
         directory and a new token"
    )]
    Replaced {
        /// Its id in Raft.
        raft_id: u64,
        /// Its data directory.
        data_dir: PathBuf,
    },
    /// The group cannot be joined.
    #[error("cannot join the group of heads at {address}: {reason}")]
    Join {
        /// Where it was tried.
        address: String,
        /// What went wrong, and what to do.
        reason: String,
    },
    /// A thread or listener ended that must not.
    #[error("{0} ended unexpectedly")]
    Ended(&'static str),
    /// A thread or listener failed that must not.
    #[error(
        "{what} failed: {reason}; start the head again, and where it fails again, keep its log and its \
         data directory for whoever looks into this"
    )]
    Failed {
        /// Which one.
        what: &'static str,
        /// What it said.
        reason: String,
    },
}
