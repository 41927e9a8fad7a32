//! The handshake: the first frame of every stream says which lane it is, which protocol the sender
//! speaks and which cluster it believes to be in.
//!
//! Who opens a stream does not wait for an answer: it sends its hello and its first message
//! together. Only a refusal comes back, in place of the answer, so agreement costs no round trip.

use std::fmt;

use mobula_core::codec::{self, DecodeError};
use serde::{Deserialize, Serialize};

use crate::PROTOCOL_VERSION;
use crate::frame::FrameLimits;

/// What a stream carries; decides its limits and which connection it runs on. Numbers are on the
/// wire and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
#[repr(u8)]
pub enum Lane {
    /// Sessions between the leader and workers, and between an agent and its hosts.
    Control = 1,
    /// Raft messages between heads; heartbeats have a stream of their own on this lane.
    Raft = 2,
    /// Calls to actors, and their results.
    Call = 3,
    /// Objects, snapshots, checkpoints, gradients.
    Bulk = 4,
    /// Asks a host for a Unix socket to make calls over, where both are on one machine.
    SameMachine = 5,
    /// Calls that need no order, on connections for large things.
    LargeCall = 6,
}

/// A lane number that this build does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("lane {0} is unknown here: the peer runs a newer release")]
pub struct UnknownLane(u8);

impl From<Lane> for u8 {
    fn from(lane: Lane) -> u8 {
        lane as u8
    }
}

impl TryFrom<u8> for Lane {
    type Error = UnknownLane;

    fn try_from(number: u8) -> Result<Self, UnknownLane> {
        match number {
            1 => Ok(Lane::Control),
            2 => Ok(Lane::Raft),
            3 => Ok(Lane::Call),
            4 => Ok(Lane::Bulk),
            5 => Ok(Lane::SameMachine),
            6 => Ok(Lane::LargeCall),
            number => Err(UnknownLane(number)),
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Lane::Control => "control",
            Lane::Raft => "raft",
            Lane::Call => "call",
            Lane::Bulk => "bulk",
            Lane::SameMachine => "same-machine",
            Lane::LargeCall => "large-call",
        })
    }
}

/// The first frame of a stream. The version comes first, so that even a build that knows none of
/// the rest can say what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHello {
    /// The sender's [`PROTOCOL_VERSION`]: the version of everything that travels inside frames.
    pub protocol_version: u16,
    /// What the stream is for.
    pub lane: Lane,
    /// The cluster that the sender believes to be in.
    pub cluster_id: String,
}

/// Why a stream is not accepted. Sent back in a refusal frame; the tags are the order, append only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum HelloRefusal {
    /// The two sides run releases that do not understand each other.
    #[error(
        "protocol version skew: the peer that opened the stream speaks version {offered}, this \
         side speaks {spoken}; upgrade the older of the two"
    )]
    VersionSkew {
        /// What the opener speaks.
        offered: u16,
        /// What the refusing side speaks.
        spoken: u16,
    },
    /// The stream was meant for another cluster.
    #[error(
        "the stream is for cluster `{offered}`, this is cluster `{expected}`; check the address"
    )]
    WrongCluster {
        /// The cluster that the opener named.
        offered: String,
        /// The cluster of the refusing side.
        expected: String,
    },
    /// The bytes are not a hello at all.
    #[error("the first frame is not a hello: {reason}")]
    Malformed {
        /// What was found instead.
        reason: String,
    },
    /// This side does not serve that lane, or not for this peer.
    #[error("lane {lane} is not served here: {reason}")]
    LaneRefused {
        /// Which lane.
        lane: Lane,
        /// Why not.
        reason: String,
    },
}

impl StreamHello {
    /// A hello of this build.
    pub fn new(lane: Lane, cluster_id: impl Into<String>) -> Self {
        StreamHello {
            protocol_version: PROTOCOL_VERSION,
            lane,
            cluster_id: cluster_id.into(),
        }
    }

    /// The payload of a hello frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    /// Reads a hello frame's payload and judges it from the side of a member of `cluster_id`.
    pub fn accept(payload: &[u8], cluster_id: &str) -> Result<StreamHello, HelloRefusal> {
        // The version is judged alone first: what follows it may look different in other versions.
        if let Some([low, high]) = payload.first_chunk() {
            let offered = u16::from_le_bytes([*low, *high]);
            if offered != PROTOCOL_VERSION {
                return Err(HelloRefusal::VersionSkew {
                    offered,
                    spoken: PROTOCOL_VERSION,
                });
            }
        }
        let hello: StreamHello =
            codec::decode(payload, FrameLimits::HELLO.payload_bytes_max as usize).map_err(
                |error| HelloRefusal::Malformed {
                    reason: error.to_string(),
                },
            )?;
        if hello.cluster_id == cluster_id {
            Ok(hello)
        } else {
            Err(HelloRefusal::WrongCluster {
                offered: hello.cluster_id,
                expected: cluster_id.to_owned(),
            })
        }
    }
}

impl HelloRefusal {
    /// The payload of a refusal frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    /// Reads a refusal frame's payload.
    pub fn decode(payload: &[u8]) -> Result<HelloRefusal, DecodeError> {
        codec::decode(payload, FrameLimits::HELLO.payload_bytes_max as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lane_numbers_are_what_they_always_were() {
        for (lane, number) in [
            (Lane::Control, 1),
            (Lane::Raft, 2),
            (Lane::Call, 3),
            (Lane::Bulk, 4),
            (Lane::SameMachine, 5),
            (Lane::LargeCall, 6),
        ] {
            assert_eq!(codec::encode_plain(&lane), [number]);
            assert_eq!(codec::decode::<Lane>(&[number], 1).unwrap(), lane);
        }
        assert!(codec::decode::<Lane>(&[0], 1).is_err());
    }

    #[test]
    fn a_hello_of_the_same_cluster_and_version_is_accepted() {
        let hello = StreamHello::new(Lane::Call, "demo");
        assert_eq!(StreamHello::accept(&hello.encode(), "demo").unwrap(), hello);
    }

    #[test]
    fn another_version_is_named_even_if_the_rest_is_unreadable() {
        let refusal = StreamHello::accept(&[7, 0, 250, 250], "demo").unwrap_err();
        assert_eq!(
            refusal,
            HelloRefusal::VersionSkew {
                offered: 7,
                spoken: PROTOCOL_VERSION
            }
        );
        assert!(refusal.to_string().contains("upgrade the older"));
        assert_eq!(HelloRefusal::decode(&refusal.encode()).unwrap(), refusal);
    }

    #[test]
    fn another_cluster_is_refused() {
        let hello = StreamHello::new(Lane::Call, "other").encode();
        assert!(matches!(
            StreamHello::accept(&hello, "demo"),
            Err(HelloRefusal::WrongCluster { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_accepted_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = StreamHello::accept(&bytes, "demo");
            let _ = HelloRefusal::decode(&bytes);
        }
    }
}
