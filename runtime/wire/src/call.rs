//! Calls of actors: one ordered stream from each calling process to each host.
//!
//! ```text
//! caller ──► host   Request   Cancel   Credit
//! host ──► caller   Item …    Answer
//! ```
//!
//! A message is a short head of fixed layout (little endian, written out at each variant) and then
//! its payload, which is the rest of the frame: it is neither copied nor scanned on either side.
//! The heads are written by hand because this is the hottest path between processes; everything
//! that is rare goes through [`codec`](mobula_core::codec).
//!
//! Invariants:
//! 1. The host handles messages of one stream in the order in which they were sent.
//! 2. Each request gets exactly one answer, and nothing after it, or the stream ends.
//! 3. A call's number is free again once its answer has arrived. Numbers are smaller than
//!    [`CALLS_IN_FLIGHT_MAX`], so both sides find a call by index.
//! 4. A host sends no more items of a call than its caller has given credit for.
//! 5. Any bytes decode to a message or an error; nothing is allocated for a length that has not
//!    arrived.

mod layout;

use std::fmt;
use std::ops::Deref;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use mobula_core::error::CallError;
use mobula_core::id::{ActorId, Incarnation};

/// Unanswered calls on one stream. Every actor of a host may have some of one process's calls
/// under way for long, and a host runs ten thousand actors at most; an entry is about a hundred
/// bytes on either side.
pub const CALLS_IN_FLIGHT_MAX: u32 = 65_536;

/// The longest method name, in bytes.
pub const METHOD_BYTES_MAX: usize = 256;

/// The most items that a stream's caller may ask for ahead of reading them.
pub const STREAM_WINDOW_MAX: u32 = 1 << 16;

/// The longest head of a message: the frame's limit less this is what a payload may have.
pub const HEAD_BYTES_MAX: usize = 512;

/// A process that makes calls: random, drawn once in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CallerId(pub u128);

/// Names one call over all the times that it is sent: a host that remembers it executes it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CallKey {
    /// Who calls.
    pub caller: CallerId,
    /// Counts up with each of its calls that carry a key.
    pub sequence: u64,
}

impl fmt::Display for CallKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}/{}", self.caller.0, self.sequence)
    }
}

/// A method's name: text that shares the memory it arrived in.
#[derive(Clone, PartialEq, Eq)]
pub struct MethodName(Bytes);

impl MethodName {
    /// The name in `bytes`, if it is text.
    fn from_utf8(bytes: Bytes) -> Result<Self, CallMessageError> {
        match std::str::from_utf8(&bytes) {
            Ok(_) => Ok(MethodName(bytes)),
            Err(_) => Err(CallMessageError::NotText),
        }
    }
}

impl Deref for MethodName {
    type Target = str;

    fn deref(&self) -> &str {
        std::str::from_utf8(&self.0).expect("checked when it was made")
    }
}

impl From<&'static str> for MethodName {
    fn from(name: &'static str) -> Self {
        MethodName(Bytes::from_static(name.as_bytes()))
    }
}

impl From<String> for MethodName {
    fn from(name: String) -> Self {
        MethodName(name.into())
    }
}

impl fmt::Debug for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Display for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

/// A call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallRequest {
    /// Its number on this stream, until it is answered.
    pub call: u32,
    /// The actor.
    pub actor: ActorId,
    /// The start of it that the caller means: another one refuses.
    pub incarnation: Incarnation,
    /// The method's name.
    pub method: MethodName,
    /// What is left of the caller's deadline, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// By which a repetition is recognized, where the caller wants exactly one execution.
    pub key: Option<CallKey>,
    /// The caller wants items, and takes so many before it gives credit for more.
    pub window: Option<u32>,
    /// The encoded arguments.
    pub arguments: Bytes,
}

/// From a caller to a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallerMessage {
    /// Tag 1: `flags u8, method length u16, call u32, actor u64, incarnation u64`, then as the
    /// flags say `timeout u64` (1), `caller u128, sequence u64` (2), `window u32` (4), then the
    /// method's name; the payload is the arguments.
    Request(CallRequest),
    /// Tag 2: `forced u8, call u32`. The caller wants the call no more. It is answered all the
    /// same: with its value if that came first.
    Cancel {
        /// Which call.
        call: u32,
        /// Drop the method at its next await, instead of only telling it.
        forced: bool,
    },
    /// Tag 3: `call u32, items u32`. The caller takes more items.
    Credit {
        /// Which call.
        call: u32,
        /// How many more.
        items: u32,
    },
}

/// From a host to a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CalleeMessage {
    /// The end of a call. Tag 1, `call u32`, with the value as payload; or tag 2, `call u32`, with
    /// the encoded error.
    Answer {
        /// That of the request.
        call: u32,
        /// The encoded value, or why there is none.
        result: Result<Bytes, CallError>,
    },
    /// Tag 3: `call u32, sequence u64`, with the value as payload. One of several values.
    Item {
        /// That of the request.
        call: u32,
        /// Counts the call's items from 0.
        sequence: u64,
        /// The encoded value.
        value: Bytes,
    },
}

/// Why bytes are not a message of this lane. The stream ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallMessageError {
    /// The head is longer than the frame.
    #[error("a call message ends {missing_bytes} bytes inside its head")]
    Truncated {
        /// How much is missing, in bytes, at least.
        missing_bytes: usize,
    },
    /// A kind of message, or flags, that this build does not know.
    #[error("call message tag {tag} with flags {flags:#04x} is unknown here: the peer is newer")]
    Unknown {
        /// The tag.
        tag: u8,
        /// The flags.
        flags: u8,
    },
    /// The method's name is too long.
    #[error("a method's name has {length_bytes} bytes, the limit is {METHOD_BYTES_MAX}")]
    MethodTooLong {
        /// Its length, in bytes.
        length_bytes: usize,
    },
    /// The method's name is not UTF-8.
    #[error("a method's name is not text")]
    NotText,
    /// A message without a payload has one.
    #[error("{count} bytes follow a complete call message")]
    TrailingBytes {
        /// How many.
        count: usize,
    },
    /// An error does not decode.
    #[error("a call's error does not decode: {0}")]
    Error(String),
}
