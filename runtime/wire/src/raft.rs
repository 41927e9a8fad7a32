//! Head and head: Raft messages travel as the bytes that raft-rs makes of them, so that its
//! version of prost stays its own affair.

use serde::{Deserialize, Serialize};

/// One message of the Raft protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaftFrame {
    /// The group member it is from.
    pub from: u64,
    /// The group member it is for.
    pub to: u64,
    /// The message, in raft-rs's own encoding.
    pub message: Vec<u8>,
}
