//! What a job counts of its trainers.

use serde::{Deserialize, Serialize};

/// What happened so far, over all starts of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Trainers that were lost while they took part.
    pub trainers_lost: u64,
    /// New starts of trainers that were seen.
    pub trainer_restarts: u64,
    /// Trainers that left a node with notice.
    pub handoffs: u64,
    /// Shards that another trainer had to compute because theirs was lost.
    pub reassigned_shards: u64,
    /// Trainers that took so long that others computed the same shards.
    pub slow_orders: u64,
    /// Trainers that were found with other bits, and given the state again.
    pub digest_mismatches: u64,
    /// Trainers that were not let in, because their machines compute other bits.
    pub trainers_refused: u64,
    /// Trainers that take part although their machines compute other bits.
    pub trainers_mixed: u64,
}
