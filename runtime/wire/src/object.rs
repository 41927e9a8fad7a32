//! Objects: how a reference travels, and what its holders and its owner say to each other.
//!
//! Between processes these are calls of the built-in actor [`OBJECTS_ACTOR`], so that they take
//! the same paths, and are subject to the same permissions, as calls of actors.
//!
//! Invariants:
//! 1. Changes of one holder reach the owner in the order in which they were made; each may arrive
//!    twice without harm.
//! 2. An owner's answer is bounded by [`ANSWER_BYTES_MAX`], whatever the objects' sizes.

use serde::{Deserialize, Serialize};

use mobula_core::id::{ActorId, NodeId};
pub use mobula_core::object::{Element, Format};
use mobula_core::object::{ObjectError, ObjectId, ProcessId};

/// The built-in actor of every process that answers for its objects. The head never gives this
/// id to an actor.
pub const OBJECTS_ACTOR: ActorId = ActorId(u64::MAX);

/// Method: takes in an encoded [`Changes`], answers nothing.
pub const METHOD_CHANGE: &str = "change";

/// Method: takes an encoded [`Next`], answers [`Settled`] as soon as there is something to say.
pub const METHOD_NEXT: &str = "next";

/// Values of up to this size live in their owner's process and travel in messages; larger ones
/// live in the node's shared memory. Copying this much costs about what mapping memory does.
pub const INLINE_BYTES_MAX: usize = 100 * 1024;

/// Changes in one message.
pub const CHANGES_MAX: usize = 4096;

/// Values in one answer of an owner, in bytes: half of what a call's frame takes.
pub const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A reference on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// The object.
    pub object: ObjectId,
    /// Where its owner takes calls.
    pub owner: String,
    /// Keeps the object alive at its owner until the receiver has registered; 0 where something
    /// else does.
    pub transit: u64,
    /// The agent of its owner's node, which knows when that ends; empty where there is none.
    pub agent: String,
}

/// A finished value as it travels from whoever produced it to the object's owner, and from there
/// to its holders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WireValue {
    /// The value itself.
    Inline {
        /// How to read it.
        format: Format,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// It is in a node's shared memory.
    Stored(Stored),
}

/// Where a large value is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Under which id the node keeps it. Usually the object's own.
    pub object: ObjectId,
    /// How to read it.
    pub format: Format,
    /// Its size.
    pub size_bytes: u64,
    /// The node.
    pub node: NodeId,
    /// Where that node's agent serves objects to other nodes.
    pub agent: String,
}

/// From a holder to an owner: what changed about who refers to what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Who says so.
    pub holder: ProcessId,
    /// The process that the holder means; another one at its address refuses.
    pub owner: ProcessId,
    /// In order.
    pub changes: Vec<Change>,
}

/// One change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// The holder refers to the object from now on, and wants to know its value.
    Borrow {
        /// The object's number with its owner.
        sequence: u64,
        /// The reference's transit, which is over.
        transit: u64,
    },
    /// The holder does not refer to it any more.
    Release {
        /// The object's number with its owner.
        sequence: u64,
    },
    /// The holder has sent a reference to somebody who will borrow with this `transit`.
    Transit {
        /// The object's number with its owner.
        sequence: u64,
        /// Names the hold.
        transit: u64,
    },
    /// The holder could not get the bytes where the owner said they are.
    Missing {
        /// The object's number with its owner.
        sequence: u64,
        /// Under which id it looked for them ([`Stored::object`]): a value that was produced again
        /// has another one, and is not missing.
        stored: ObjectId,
    },
}

/// From a holder to an owner: which borrowed objects have come to a value?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Next {
    /// Who asks.
    pub holder: ProcessId,
    /// The process that the holder means.
    pub owner: ProcessId,
    /// The last [`Settled::number`] that arrived: what it said is not repeated.
    pub seen: u64,
}

/// The answer to [`Next`]. Empty when nothing came for a while.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// Grows with every object that is told of.
    pub number: u64,
    /// What the objects have come to.
    pub objects: Vec<(u64, Result<WireValue, ObjectError>)>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::codec;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_the_round_trip() {
        let settled = Settled {
            number: 7,
            objects: vec![
                (
                    1,
                    Ok(WireValue::Inline {
                        format: Format::Plain(Element::F32),
                        bytes: vec![0, 0, 128, 63],
                    }),
                ),
                (
                    2,
                    Err(ObjectError::Freed {
                        object: ObjectId {
                            owner: ProcessId(1),
                            sequence: 2,
                        },
                    }),
                ),
            ],
        };
        let bytes = codec::encode_plain(&settled);
        assert_eq!(
            codec::decode::<Settled>(&bytes, bytes.len()).unwrap(),
            settled
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = codec::decode::<Reference>(&bytes, 512);
            let _ = codec::decode::<Changes>(&bytes, 512);
            let _ = codec::decode::<Next>(&bytes, 512);
            let _ = codec::decode::<Settled>(&bytes, 512);
            let _ = codec::decode::<WireValue>(&bytes, 512);
        }

        /// Real messages that something happened to: a wrong length or tag in the midst of them.
        #[test]
        fn damaged_messages_decode_or_are_refused(
            at in any::<prop::sample::Index>(),
            bytes in prop_oneof![any::<[u8; 8]>(), Just(u64::MAX.to_le_bytes())],
        ) {
            let object = ObjectId {
                owner: ProcessId(1),
                sequence: 2,
            };
            let reference = Reference {
                object,
                owner: "10.0.0.1:7".into(),
                transit: 3,
                agent: "10.0.0.1:8".into(),
            };
            let changes = Changes {
                holder: ProcessId(1),
                owner: ProcessId(2),
                changes: vec![
                    Change::Borrow {
                        sequence: 1,
                        transit: 2,
                    },
                    Change::Missing {
                        sequence: 3,
                        stored: object,
                    },
                ],
            };
            let inline = WireValue::Inline {
                format: Format::Encoded,
                bytes: vec![1; 30],
            };
            let stored = WireValue::Stored(Stored {
                object,
                format: Format::Plain(Element::U8),
                size_bytes: 1,
                node: NodeId(1),
                agent: "10.0.0.1:8".into(),
            });
            let settled = Settled {
                number: 7,
                objects: vec![
                    (1, Ok(inline)),
                    (2, Ok(stored)),
                    (3, Err(ObjectError::Freed { object })),
                ],
            };
            let messages = [
                codec::encode_plain(&reference),
                codec::encode_plain(&changes),
                codec::encode_plain(&settled),
            ];
            for mut damaged in messages {
                let start = at.index(damaged.len());
                for (target, byte) in damaged[start..].iter_mut().zip(bytes) {
                    *target = byte;
                }
                let _ = codec::decode::<Reference>(&damaged, 512);
                let _ = codec::decode::<Changes>(&damaged, 512);
                let _ = codec::decode::<Settled>(&damaged, 512);
            }
        }
    }
}
