//! Calls of actors: one ordered stream from each calling process to each host.
//!
//! Invariants:
//! 1. The host handles requests of one stream in the order in which they were sent.
//! 2. Each request that wants an answer gets exactly one, or the stream ends.

use serde::{Deserialize, Serialize};

use mobula_core::error::CallError;
use mobula_core::id::{ActorId, Incarnation};

/// A call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallRequest {
    /// Counts up within the stream; the answer repeats it.
    pub call: u64,
    /// The actor.
    pub actor: ActorId,
    /// The start of it that the caller means: another one refuses.
    pub incarnation: Incarnation,
    /// The method's name.
    pub method: String,
    /// What is left of the caller's deadline, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// The encoded arguments.
    pub arguments: Vec<u8>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallReply {
    /// That of the request.
    pub call: u64,
    /// The encoded value, or why there is none.
    pub result: Result<Vec<u8>, CallError>,
}
