//! Objects: immutable values that processes share by reference.
//!
//! Each belongs to the process that created it, its *owner*: the owner counts who refers to it and
//! knows where its bytes are. Nothing about objects is replicated; with its owner an object is lost.
//! What is to survive that is kept ([`crate::kept`]).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{CallError, Executed};

/// A process, over its own life only: drawn at random when it starts, so that a successor at the
/// same address is not taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ProcessId(pub u64);

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process-{:016x}", self.0)
    }
}

/// An object. Never used again, not even by a later process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectId {
    /// Who created it and answers for it.
    pub owner: ProcessId,
    /// Counts up within the owner.
    pub sequence: u64,
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "object-{:016x}-{}", self.owner.0, self.sequence)
    }
}

/// How the bytes of a value are to be read. On the wire and in rows: new variants go at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Format {
    /// As one encoded value.
    Encoded,
    /// As numbers, one after another, in the machine's own (little-endian) order.
    Plain(Element),
}

/// The numbers of a plain object. The order is on the wire: new ones go at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Element {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
}

/// Why an object has no value here. Sent between processes: new variants go at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ObjectError {
    /// Its bytes are gone for good, or its owner is out of reach.
    #[error("{object} is lost: {reason}; create it again")]
    Lost {
        /// Which.
        object: ObjectId,
        /// What happened to it.
        reason: String,
    },
    /// Nobody referred to it any more, so that its owner has freed it.
    #[error(
        "{object} is freed: its owner knew of no reference to it; keep a reference to it where it \
         comes from until it has arrived"
    )]
    Freed {
        /// Which.
        object: ObjectId,
    },
    /// What was to produce the value failed.
    #[error(transparent)]
    Failed(CallError),
    /// There was no value in time.
    #[error("no value of {object} within {limit_ms} ms; it may still come")]
    DeadlineExceeded {
        /// Which.
        object: ObjectId,
        /// The limit that was given, in milliseconds.
        limit_ms: u64,
    },
    /// The node's memory for objects is full, and nothing in it could be moved to disk in time.
    #[error(
        "object store of {node} is full: {needed_bytes} bytes are needed, {used_bytes} of \
         {limit_bytes} are used; drop references or views, or raise worker.object_store_bytes"
    )]
    StoreFull {
        /// The node's name.
        node: String,
        /// What was asked for, in bytes.
        needed_bytes: u64,
        /// What is taken, in bytes.
        used_bytes: u64,
        /// The limit, in bytes.
        limit_bytes: u64,
    },
    /// Memory is full and the disk that objects are moved to does not take them.
    #[error("cannot move objects of {node} to disk: {reason}; free space in its data directory")]
    DiskFull {
        /// The node's name.
        node: String,
        /// What the disk said.
        reason: String,
    },
    /// The node's agent, which keeps large objects, cannot be reached.
    #[error("object store is unavailable: {reason}")]
    Unavailable {
        /// What stands in the way.
        reason: String,
    },
    /// The object is not of the kind that was asked for.
    #[error("{object} is not what is asked for: {reason}")]
    WrongType {
        /// Which.
        object: ObjectId,
        /// What it is, and how it can be read.
        reason: String,
    },
    /// The process that the object belongs to has ended.
    #[error(
        "{object} is lost with its owner: {reason}; create it again, in a process that lives, or get \
         it by its name if it was kept (`Cluster::kept`)"
    )]
    OwnerDied {
        /// Which.
        object: ObjectId,
        /// How that is known.
        reason: String,
    },
    /// Its owner does not let this process read it: it belongs to another job.
    #[error("{object} is not permitted: {reason}")]
    NotPermitted {
        /// Which.
        object: ObjectId,
        /// Why not, and what can be done instead.
        reason: String,
    },
}

impl ObjectError {
    /// Whether what was to produce the value took effect; asking for it again is always harmless.
    #[must_use]
    pub fn executed(&self) -> Executed {
        match self {
            ObjectError::Failed(error) => error.executed(),
            _ => Executed::No,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_survive_the_wire_and_say_what_to_do() {
        let object = ObjectId {
            owner: ProcessId(0xab),
            sequence: 3,
        };
        let error = ObjectError::Lost {
            object,
            reason: "its owner ended".into(),
        };
        let bytes = crate::codec::encode_plain(&error);
        assert_eq!(
            crate::codec::decode::<ObjectError>(&bytes, 1024).unwrap(),
            error
        );
        assert_eq!(
            error.to_string(),
            "object-00000000000000ab-3 is lost: its owner ended; create it again"
        );
    }
}
