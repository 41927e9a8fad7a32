//! What the owner of an endpoint says about its replicas: what each computes on, the memory that it may have, and how requests are
//! joined for it.

use std::time::Duration;

use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

use super::batcher::{BatcherConfig, Delay};
use super::fleet::BATCH_ROWS_MAX;
use crate::device::ComputeDevice;
use crate::units;

/// How long a request may be kept waiting for others: callers that are asked to wait at all wait for models that take as long.
pub const DELAY_MAX: Duration = Duration::from_millis(50);

/// Requests that wait for one replica if nothing is said: two or three batches of single rows. More would only wait longer than
/// their callers do.
pub const QUEUED_REQUESTS: u32 = 256;

/// Requests that may be said to wait for one replica: each holds a caller's connection.
const QUEUED_REQUESTS_MAX: u32 = 8_192;

/// Preferred sizes: more than these would be no preference.
const PREFERRED_MAX: usize = 8;

/// The least memory a replica may be limited to: its process needs some before it has read a model.
const MEMORY_BYTES_MIN: u64 = 128 << 20;

/// What each replica of an endpoint gets. Persisted: the order of fields never changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReplicaSettings {
    /// What it computes on.
    pub device: ComputeDevice,
    /// The memory that its process may use, in bytes; absent if nothing limits it. A limited replica has a process of its own.
    pub memory_bytes: Option<u64>,
    /// How requests are joined for it.
    pub batching: Batching,
}

/// How requests are joined. Persisted: the order of fields never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batching {
    /// How long a request waits for others, in microseconds; absent if that is found out ([`super::patience`]).
    pub delay_us: Option<u64>,
    /// Sizes, in rows, at which a batch leaves at once.
    pub preferred_rows: Vec<u32>,
    /// Requests that wait while a batch runs; one more is refused.
    pub queued_requests_max: u32,
}

impl Default for Batching {
    fn default() -> Self {
        Batching {
            delay_us: None,
            preferred_rows: Vec::new(),
            queued_requests_max: QUEUED_REQUESTS,
        }
    }
}

impl ReplicaSettings {
    /// Refuses what no replica can be given.
    ///
    /// # Errors
    /// The value, its bounds, the option that sets it, in whose units both stand, and what to do.
    pub fn check(&self) -> Result<(), Rejection> {
        if let Some(bytes) = self.memory_bytes.filter(|bytes| *bytes < MEMORY_BYTES_MIN) {
            return Err(Rejection::invalid(format!(
                "a replica with {} of memory (`--memory`) would not start: give it at least {}, and room for its model and a \
                 batch's values, or leave the limit out",
                units::memory(bytes),
                units::memory(MEMORY_BYTES_MIN)
            )));
        }
        self.batching.check()
    }
}

impl Batching {
    fn check(&self) -> Result<(), Rejection> {
        let delay_max_us = DELAY_MAX.as_micros() as u64;
        if let Some(delay_us) = self.delay_us.filter(|delay| *delay > delay_max_us) {
            return Err(Rejection::invalid(format!(
                "a batch delay (`--batch-delay`) of {} is above {}: a request that waits so long for others is answered too \
                 late; give a shorter one, or leave it out to have it found out",
                units::micros(delay_us),
                units::micros(delay_max_us)
            )));
        }
        let sizes = &self.preferred_rows;
        let is_size = |rows: &u32| (1..=BATCH_ROWS_MAX as u32).contains(rows);
        if sizes.len() > PREFERRED_MAX || !sizes.iter().all(is_size) {
            return Err(Rejection::invalid(format!(
                "batch sizes (`--batch-sizes`) of {sizes:?} rows are not possible: name up to {PREFERRED_MAX}, each of 1 to \
                 {BATCH_ROWS_MAX} rows"
            )));
        }
        if !(1..=QUEUED_REQUESTS_MAX).contains(&self.queued_requests_max) {
            return Err(Rejection::invalid(format!(
                "a queue (`--queue`) of {} requests is not possible: let 1 to {QUEUED_REQUESTS_MAX} wait for a replica",
                self.queued_requests_max
            )));
        }
        Ok(())
    }

    /// For the batcher of one replica.
    pub(super) fn to_config(&self) -> BatcherConfig {
        let preferred = self.preferred_rows.iter();
        BatcherConfig {
            max_batch_rows: BATCH_ROWS_MAX,
            preferred_rows: preferred.map(|rows| *rows as usize).collect(),
            delay: match self.delay_us {
                Some(delay_us) => Delay::Fixed(Duration::from_micros(delay_us)),
                // What queues up while a batch runs is the next batch; an idle replica answers at once, unless batches cost
                // so much by themselves that the next request is worth waiting for.
                None => Delay::Adaptive { max: DELAY_MAX },
            },
            max_queued_requests: self.queued_requests_max as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_possible_is_refused_with_its_bounds() {
        let usual = ReplicaSettings::default();
        usual.check().unwrap();
        let with = |batching| ReplicaSettings {
            batching,
            ..ReplicaSettings::default()
        };
        let small = ReplicaSettings {
            memory_bytes: Some(1 << 20),
            ..ReplicaSettings::default()
        };
        let slow = with(Batching {
            delay_us: Some(50_001),
            ..Batching::default()
        });
        let large = with(Batching {
            preferred_rows: vec![16, 129],
            ..Batching::default()
        });
        let none = with(Batching {
            queued_requests_max: 0,
            ..Batching::default()
        });
        for (settings, expected) in [
            (
                small,
                "1 MiB of memory (`--memory`) would not start: give it at least 128 MiB",
            ),
            (slow, "(`--batch-delay`) of 50001us is above 50ms"),
            (large, "(`--batch-sizes`) of [16, 129] rows"),
            (
                none,
                "(`--queue`) of 0 requests is not possible: let 1 to 8192",
            ),
        ] {
            let refused = settings.check().unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
