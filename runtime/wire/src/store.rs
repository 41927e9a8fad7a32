//! The shared memory of a node: a process and its agent, over a Unix socket of its own that
//! carries file descriptors; and agent to agent, on the bulk lane.
//!
//! Invariants:
//! 1. A message that says so comes with exactly one descriptor, all others with none.
//! 2. A process is given memory of its own job only.

use serde::{Deserialize, Serialize};

use mobula_core::id::JobId;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};

/// The largest message on the Unix socket: they carry ids and errors, never values.
pub const STORE_MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// The pieces in which an object goes from node to node: a quarter of what the bulk lane's frames
/// may have, so that a piece is checked before much of the next one has arrived.
pub const PIECE_BYTES: usize = 1024 * 1024;

/// From a process to its agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoreRequest {
    /// The first message.
    Hello {
        /// The secret that the process found in its bootstrap: it says which host this is.
        key: String,
        /// The process.
        process: ProcessId,
    },
    /// Memory to write objects into. Answered by `Granted` or `Refused`.
    Grant {
        /// The answer repeats it.
        request: u64,
        /// At least so much, in bytes.
        size_bytes: u64,
    },
    /// A `Grant` is not waited for any more: room was found otherwise.
    Withdraw {
        /// That of the `Grant`.
        request: u64,
    },
    /// An arena of the process is empty and not wanted any more.
    ReturnArena {
        /// Which.
        arena: u64,
    },
    /// An object is written, and will not be changed any more.
    Publish {
        /// Which.
        object: ObjectId,
        /// The arena.
        arena: u64,
        /// Where in it.
        offset: u64,
        /// Its size, in bytes.
        size_bytes: u64,
        /// Whether it ends with this process; otherwise another process will own it.
        is_owned_here: bool,
    },
    /// To read an object; it stays where it is until `Close`. Answered by `Opened` or `Refused`.
    Open {
        /// The answer repeats it.
        request: u64,
        /// Which.
        object: ObjectId,
        /// The agent that has it, if this one does not.
        agent: String,
        /// Its size, in bytes.
        size_bytes: u64,
    },
    /// One `Open` is over.
    Close {
        /// Which object.
        object: ObjectId,
    },
    /// Nobody refers to the object any more.
    Free {
        /// Which.
        object: ObjectId,
        /// The agent that has it.
        agent: String,
    },
    /// To be told `ProcessGone` as soon as a process of the same job has ended, at once if it has.
    Watch {
        /// Which.
        process: ProcessId,
        /// The agent of its node.
        agent: String,
    },
    /// A `Watch` is over.
    Unwatch {
        /// Which process.
        process: ProcessId,
    },
}

/// From an agent to a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoreReply {
    /// The answer to `Hello`.
    Welcome {
        /// Where this agent serves objects to others.
        agent: String,
        /// The size of an arena, in bytes, unless one object needs more.
        arena_bytes: u64,
    },
    /// The answer to `Grant`, with a descriptor to write through.
    Granted {
        /// That of the request.
        request: u64,
        /// The arena's name.
        arena: u64,
        /// Its size, in bytes.
        size_bytes: u64,
    },
    /// The answer to `Open`.
    Opened {
        /// That of the request.
        request: u64,
        /// The arena's name.
        arena: u64,
        /// Where in it.
        offset: u64,
        /// The object's size, in bytes.
        size_bytes: u64,
        /// The arena's size, in bytes, if a descriptor to read through comes with this: the first
        /// time that the process reads in it.
        arena_bytes: Option<u64>,
    },
    /// No.
    Refused {
        /// That of the request.
        request: u64,
        /// Why.
        error: ObjectError,
    },
    /// A published object's memory is the writer's again: it is freed, or on disk.
    Reclaimed {
        /// Which object.
        object: ObjectId,
    },
    /// An arena that the process reads in is gone; nothing of it is open.
    Forget {
        /// Which.
        arena: u64,
    },
    /// Memory is short: give back arenas that are empty.
    Pressure,
    /// A process has ended: one of the same job on this node, or one that is watched.
    ProcessGone {
        /// Which.
        process: ProcessId,
    },
}

/// From an agent to another one: the first message of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerRequest {
    /// Answered by `Begin` and then, for each piece, its digest and its bytes.
    Fetch {
        /// Which.
        object: ObjectId,
        /// For a process of this job.
        job: JobId,
    },
    /// Its owner, a process of `job`, does not need it any more.
    Free {
        /// Which.
        object: ObjectId,
        /// The job.
        job: JobId,
    },
    /// Answered by `Gone` when a process has ended, at once if it has. More of the same follow on
    /// the stream.
    Watch {
        /// Which.
        process: ProcessId,
        /// Its job.
        job: JobId,
    },
}

/// From an agent that is asked for an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerReply {
    /// It comes.
    Begin {
        /// Its size, in bytes.
        size_bytes: u64,
    },
    /// The next frame is a piece with this BLAKE3 digest.
    Piece {
        /// The digest.
        digest: [u8; 32],
    },
    /// It does not come.
    Refused(ObjectError),
    /// A watched process has ended, or is not known.
    Gone {
        /// Which.
        process: ProcessId,
        /// The job that it was asked for with.
        job: JobId,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::codec;
    use proptest::prelude::*;

    #[test]
    fn requests_survive_the_round_trip() {
        let request = StoreRequest::Open {
            request: 4,
            object: ObjectId {
                owner: ProcessId(7),
                sequence: 9,
            },
            agent: "10.0.0.1:7".into(),
            size_bytes: 1 << 30,
        };
        let bytes = codec::encode_plain(&request);
        assert_eq!(
            codec::decode::<StoreRequest>(&bytes, STORE_MESSAGE_BYTES_MAX).unwrap(),
            request
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = codec::decode::<StoreRequest>(&bytes, STORE_MESSAGE_BYTES_MAX);
            let _ = codec::decode::<StoreReply>(&bytes, STORE_MESSAGE_BYTES_MAX);
            let _ = codec::decode::<PeerRequest>(&bytes, STORE_MESSAGE_BYTES_MAX);
            let _ = codec::decode::<PeerReply>(&bytes, STORE_MESSAGE_BYTES_MAX);
        }

        /// Real messages that something happened to: a wrong length or tag in the midst of them.
        #[test]
        fn damaged_messages_decode_or_are_refused(
            at in any::<prop::sample::Index>(),
            bytes in prop_oneof![any::<[u8; 8]>(), Just(u64::MAX.to_le_bytes())],
            cut in any::<Option<prop::sample::Index>>(),
        ) {
            let object = ObjectId {
                owner: ProcessId(7),
                sequence: 9,
            };
            let error = ObjectError::StoreFull {
                node: "one".into(),
                needed_bytes: 1,
                used_bytes: 2,
                limit_bytes: 3,
            };
            let agent = || "10.0.0.1:7".to_owned();
            let messages = [
                codec::encode_plain(&StoreRequest::Hello {
                    key: "key".into(),
                    process: ProcessId(1),
                }),
                codec::encode_plain(&StoreRequest::Open {
                    request: 4,
                    object,
                    agent: agent(),
                    size_bytes: 1 << 30,
                }),
                codec::encode_plain(&StoreRequest::Watch {
                    process: ProcessId(1),
                    agent: agent(),
                }),
                codec::encode_plain(&StoreReply::Welcome {
                    agent: agent(),
                    arena_bytes: 1,
                }),
                codec::encode_plain(&StoreReply::Refused {
                    request: 1,
                    error: error.clone(),
                }),
                codec::encode_plain(&PeerReply::Refused(error)),
            ];
            for message in messages {
                let mut damaged = message;
                let start = at.index(damaged.len());
                for (target, byte) in damaged[start..].iter_mut().zip(bytes) {
                    *target = byte;
                }
                if let Some(cut) = cut {
                    damaged.truncate(cut.index(damaged.len()));
                }
                let _ = codec::decode::<StoreRequest>(&damaged, STORE_MESSAGE_BYTES_MAX);
                let _ = codec::decode::<StoreReply>(&damaged, STORE_MESSAGE_BYTES_MAX);
                let _ = codec::decode::<PeerRequest>(&damaged, STORE_MESSAGE_BYTES_MAX);
                let _ = codec::decode::<PeerReply>(&damaged, STORE_MESSAGE_BYTES_MAX);
            }
        }
    }
}
