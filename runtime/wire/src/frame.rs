//! Frames: how messages are cut out of a byte stream, whether it is a QUIC stream or a Unix socket.
//!
//! ```text
//! offset 0        1       2              4                    8
//!        +--------+-------+--------------+--------------------+---------
//!        | version| kind  | flags (zero) | length, bytes (LE) | payload
//!        +--------+-------+--------------+--------------------+---------
//! ```
//!
//! Invariants:
//! 1. Pure: bytes in, frames out. Who reads the socket is `mobula-net`'s business.
//! 2. A length is compared with the lane's limit before anything is allocated for it.
//! 3. Any bytes decode to a frame, to "more is needed", or to an error. Unknown versions, kinds and
//!    flags are refused, never skipped: a peer that sends them is newer, or is not Mobula.

use bytes::{BufMut, Bytes, BytesMut};

use crate::hello::Lane;

/// The version of the frame header itself; what the payloads mean is
/// [`PROTOCOL_VERSION`](crate::PROTOCOL_VERSION)'s matter.
pub const FRAME_VERSION: u8 = 1;

/// Size of a frame's header, in bytes.
pub const HEADER_SIZE_BYTES: usize = 8;

/// How a frame's payload is to be read. Numbers are on the wire and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// A [`StreamHello`](crate::hello::StreamHello): the first frame of every stream.
    Hello = 1,
    /// A [`HelloRefusal`](crate::hello::HelloRefusal): instead of any other answer.
    Refusal = 2,
    /// Empty, and the only frame of its stream: the listening side accepts the connection. TLS 1.3
    /// alone would leave the connecting side in doubt until its first read.
    Welcome = 3,
    /// One encoded message of the stream's lane.
    Message = 16,
    /// Raw bytes that belong to the message before.
    Chunk = 17,
    /// An encoded message that is not what the stream is for, between those that are.
    Aside = 18,
}

impl TryFrom<u8> for FrameKind {
    type Error = FrameError;

    fn try_from(number: u8) -> Result<Self, FrameError> {
        match number {
            1 => Ok(FrameKind::Hello),
            2 => Ok(FrameKind::Refusal),
            3 => Ok(FrameKind::Welcome),
            16 => Ok(FrameKind::Message),
            17 => Ok(FrameKind::Chunk),
            18 => Ok(FrameKind::Aside),
            kind => Err(FrameError::UnknownKind { kind }),
        }
    }
}

/// Why bytes are not a frame. None of these can be cured on the same stream: it is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header is of a version that this build does not know.
    #[error(
        "frame header version {version} is not {FRAME_VERSION}: the peer runs another release, \
         or is not mobula; upgrade the older of the two"
    )]
    UnknownVersion {
        /// What the peer sent.
        version: u8,
    },
    /// A kind of frame that this build does not know.
    #[error("frame kind {kind} is unknown here: the peer runs a newer release")]
    UnknownKind {
        /// What the peer sent.
        kind: u8,
    },
    /// Flags are reserved and must be zero.
    #[error("frame flags {flags:#06x} are unknown here: the peer runs a newer release")]
    UnknownFlags {
        /// What the peer sent.
        flags: u16,
    },
    /// The payload is larger than this lane accepts.
    #[error(
        "frame of {length_bytes} bytes is over the limit of {limit_bytes} bytes of this lane; \
         send it as chunks on the bulk lane or as an object"
    )]
    TooLarge {
        /// The payload's announced length, in bytes.
        length_bytes: u64,
        /// The lane's limit, in bytes.
        limit_bytes: u32,
    },
}

/// How large a frame's payload may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// The largest payload, in bytes.
    pub payload_bytes_max: u32,
}

impl FrameLimits {
    /// For a stream whose lane is not known yet: a hello or a refusal is a few short texts.
    pub const HELLO: FrameLimits = FrameLimits {
        payload_bytes_max: 4 << 10,
    };
    /// Sessions and leases: ids and decisions only, never data.
    pub const CONTROL: FrameLimits = FrameLimits {
        payload_bytes_max: 1 << 20,
    };
    /// A batch of log entries.
    pub const RAFT: FrameLimits = FrameLimits {
        payload_bytes_max: 8 << 20,
    };
    /// A call with its arguments.
    pub const CALL: FrameLimits = FrameLimits {
        payload_bytes_max: 8 << 20,
    };
    /// One chunk of an object, snapshot or checkpoint.
    pub const BULK: FrameLimits = FrameLimits {
        payload_bytes_max: 4 << 20,
    };

    /// The limits of `lane`.
    #[must_use]
    pub const fn of(lane: Lane) -> Self {
        match lane {
            Lane::Control => FrameLimits::CONTROL,
            Lane::SameMachine => FrameLimits::HELLO,
            Lane::Raft => FrameLimits::RAFT,
            Lane::Call | Lane::LargeCall => FrameLimits::CALL,
            Lane::Bulk => FrameLimits::BULK,
        }
    }

    fn check(self, length_bytes: usize) -> Result<u32, FrameError> {
        u32::try_from(length_bytes)
            .ok()
            .filter(|length| *length <= self.payload_bytes_max)
            .ok_or(FrameError::TooLarge {
                length_bytes: length_bytes as u64,
                limit_bytes: self.payload_bytes_max,
            })
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// How to read the payload.
    pub kind: FrameKind,
    /// The payload; shares the receive buffer's memory.
    pub payload: Bytes,
}

/// Appends the frame of `kind` with `payload` to `buffer`, which is left alone on an error.
pub fn encode_frame(
    kind: FrameKind,
    payload: &[u8],
    limits: FrameLimits,
    buffer: &mut BytesMut,
) -> Result<(), FrameError> {
    let header = encode_header(kind, payload.len(), limits)?;
    buffer.reserve(HEADER_SIZE_BYTES + payload.len());
    buffer.put_slice(&header);
    buffer.put_slice(payload);
    Ok(())
}

/// The header of a frame whose payload of `length_bytes` follows from elsewhere, for senders that
/// do not want to copy it.
pub fn encode_header(
    kind: FrameKind,
    length_bytes: usize,
    limits: FrameLimits,
) -> Result<[u8; HEADER_SIZE_BYTES], FrameError> {
    let length = limits.check(length_bytes)?.to_le_bytes();
    let [a, b, c, d] = length;
    Ok([FRAME_VERSION, kind as u8, 0, 0, a, b, c, d])
}

/// What [`decode_frame`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A whole frame, which has been taken out of the buffer.
    Frame(Frame),
    /// The buffer ends before the frame does; at least this many bytes are missing.
    Incomplete {
        /// Bytes still to come, at least 1.
        missing_bytes: usize,
    },
}

/// Takes the first frame out of `buffer` if it is there whole.
///
/// The header is judged as soon as it is complete, so an excessive length is refused before a byte
/// of the payload is waited for. After an error the buffer is unspecified; close the stream.
pub fn decode_frame(buffer: &mut BytesMut, limits: FrameLimits) -> Result<Decoded, FrameError> {
    let Some(header) = buffer.first_chunk::<HEADER_SIZE_BYTES>() else {
        // A wrong version is reported at its first byte: a foreign protocol may never send eight.
        check_version(buffer.first().copied().unwrap_or(FRAME_VERSION))?;
        return Ok(Decoded::Incomplete {
            missing_bytes: HEADER_SIZE_BYTES - buffer.len(),
        });
    };
    let [version, kind, flags @ .., a, b, c, d] = *header;
    check_version(version)?;
    let kind = FrameKind::try_from(kind)?;
    match u16::from_le_bytes(flags) {
        0 => {}
        flags => return Err(FrameError::UnknownFlags { flags }),
    }
    let length = limits.check(u32::from_le_bytes([a, b, c, d]) as usize)? as usize;
    let total = HEADER_SIZE_BYTES + length;
    if buffer.len() < total {
        return Ok(Decoded::Incomplete {
            missing_bytes: total - buffer.len(),
        });
    }
    let payload = buffer.split_to(total).freeze().slice(HEADER_SIZE_BYTES..);
    Ok(Decoded::Frame(Frame { kind, payload }))
}

fn check_version(version: u8) -> Result<(), FrameError> {
    match version {
        FRAME_VERSION => Ok(()),
        version => Err(FrameError::UnknownVersion { version }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KINDS: [(FrameKind, u8); 6] = [
        (FrameKind::Hello, 1),
        (FrameKind::Refusal, 2),
        (FrameKind::Welcome, 3),
        (FrameKind::Message, 16),
        (FrameKind::Chunk, 17),
        (FrameKind::Aside, 18),
    ];

    #[test]
    fn kind_numbers_are_what_they_always_were() {
        for (kind, number) in KINDS {
            assert_eq!(kind as u8, number);
            assert_eq!(FrameKind::try_from(number).unwrap(), kind);
        }
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_at_its_header() {
        let mut buffer = BytesMut::from(&[FRAME_VERSION, 16, 0, 0, 1, 0, 16, 0][..]);
        let capacity = buffer.capacity();
        let error = decode_frame(&mut buffer, FrameLimits::CONTROL).unwrap_err();
        assert_eq!(
            error,
            FrameError::TooLarge {
                length_bytes: (1 << 20) + 1,
                limit_bytes: 1 << 20
            }
        );
        assert_eq!(buffer.capacity(), capacity, "nothing was allocated");
        let payload = vec![0; (1 << 20) + 1];
        let mut sent = BytesMut::new();
        assert!(
            encode_frame(
                FrameKind::Message,
                &payload,
                FrameLimits::CONTROL,
                &mut sent
            )
            .is_err()
        );
        assert!(sent.is_empty());
    }

    #[test]
    fn what_is_unknown_is_refused() {
        let cases: [(&[u8], FrameError); 4] = [
            (&[2], FrameError::UnknownVersion { version: 2 }),
            (
                b"GET / HTTP/1.1",
                FrameError::UnknownVersion { version: b'G' },
            ),
            (
                &[1, 99, 0, 0, 0, 0, 0, 0],
                FrameError::UnknownKind { kind: 99 },
            ),
            (
                &[1, 16, 0, 1, 0, 0, 0, 0],
                FrameError::UnknownFlags { flags: 0x100 },
            ),
        ];
        for (bytes, expected) in cases {
            let mut buffer = BytesMut::from(bytes);
            assert_eq!(
                decode_frame(&mut buffer, FrameLimits::CALL).unwrap_err(),
                expected
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_frames_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..512),
            plausible in any::<bool>(),
        ) {
            let mut buffer = BytesMut::from(&bytes[..]);
            if plausible && buffer.len() >= HEADER_SIZE_BYTES {
                buffer[..4].copy_from_slice(&[FRAME_VERSION, 16, 0, 0]);
                buffer[5..8].fill(0);
            }
            loop {
                let before = buffer.len();
                match decode_frame(&mut buffer, FrameLimits::HELLO) {
                    Ok(Decoded::Frame(frame)) => {
                        prop_assert_eq!(buffer.len() + HEADER_SIZE_BYTES + frame.payload.len(), before);
                    }
                    Ok(Decoded::Incomplete { missing_bytes }) => {
                        prop_assert!(missing_bytes > 0);
                        prop_assert_eq!(buffer.len(), before);
                        break;
                    }
                    Err(_) => break,
                }
            }
        }

        #[test]
        fn frames_survive_any_cutting(
            payloads in proptest::collection::vec(
                proptest::collection::vec(any::<u8>(), 0..64), 0..8),
            step in 1_usize..32,
        ) {
            let mut sent = BytesMut::new();
            for payload in &payloads {
                encode_frame(FrameKind::Message, payload, FrameLimits::HELLO, &mut sent).unwrap();
            }
            let mut buffer = BytesMut::new();
            let mut received = Vec::new();
            for piece in sent.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Decoded::Frame(frame) = decode_frame(&mut buffer, FrameLimits::HELLO).unwrap() {
                    received.push(frame.payload.to_vec());
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(received, payloads);
        }
    }
}
