//! What a training job leaves as its result, in stable names.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::pauses::Pause;

/// What a training job leaves as its result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainResult {
    /// BLAKE3 of weights and optimizer state, in hex.
    pub weights_blake3: String,
    /// Share of the held-out samples that are classified correctly; of predicted tokens, for text. Absent
    /// where nothing is classified.
    pub accuracy: Option<f64>,
    /// Mean loss of the held-out samples.
    pub held_out_loss: f64,
    /// All that was measured on the held-out samples, as means over them.
    pub metrics: BTreeMap<String, f64>,
    /// Steps taken.
    pub steps: u64,
    /// Whether it stopped before its last step, because nothing became better.
    pub stopped_early: bool,
    /// The best value of what early stopping watches, and after how many steps it was measured.
    pub best: Option<(f64, u64)>,
    /// Mean loss of the last step's batch, before its update; absent if this driver took none.
    pub last_loss: Option<f64>,
    /// Norm of that step's mean gradient, before clipping.
    pub last_gradient_norm: Option<f64>,
    /// Learning rate of that step.
    pub last_learning_rate: Option<f64>,
    /// The share of the last driver's time in which steps were taken.
    pub goodput: f64,
    /// Starts of the driver after the first.
    pub restarts: u32,
    /// Steps that had to be taken again.
    pub lost_steps: u64,
    /// Whether `lost_steps` is complete: false if once nobody was left who knew.
    pub lost_steps_known: bool,
    /// Starts of trainers after the first ones.
    pub trainer_restarts: u64,
    /// Trainers that were lost while they took part, as far as this driver or a checkpoint knows.
    pub trainers_lost: u64,
    /// Trainers that left a node with notice.
    pub handoffs: u64,
    /// Shards that were given to other trainers because theirs was lost.
    pub reassigned_shards: u64,
    /// Sums that were refused because they came from other bits.
    pub digest_mismatches: u64,
    /// Trainers that were not let in, because their machines compute other bits.
    pub trainers_refused: u64,
    /// Trainers that took part although their machines compute other bits: if any did, the result depends on who
    /// computed what.
    pub trainers_mixed: u64,
    /// Trainers that hold the final bits at the end.
    pub replicas_agreeing: u64,
    /// Checkpoints that were committed.
    pub checkpoints: u64,
    /// Checkpoints that failed verification.
    pub rejected_checkpoints: u64,
    /// The longest that a snapshot for a checkpoint stalled training, in microseconds.
    pub snapshot_stall_us: u64,
    /// The longest pauses between two steps of the last driver, the longest first; at most 64.
    pub pauses: Vec<Pause>,
    /// BLAKE3 of the run's record in the object store, in hex.
    pub record: String,
    /// From the first start of the driver until now.
    pub wall_ms: u64,
    /// Samples in a second, of the last driver that took steps.
    pub samples_per_second: f64,
    /// BLAKE3 of the model version's file, which is also its name in the object store.
    pub model_digest: String,
    /// Its size.
    pub model_size_bytes: u64,
    /// The name under which it was registered, if it was.
    pub model: Option<String>,
    /// The version that it got there.
    pub model_version: Option<u64>,
}
