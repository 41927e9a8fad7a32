//! What users ask for: jobs, actors, groups.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::label::Requirement;
use crate::resource::Resources;

/// Which program a host process runs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Program {
    /// The `mobula` binary itself, for built-in actors.
    Builtin,
    /// A user's binary, shipped by content hash.
    Artifact {
        /// BLAKE3 of the binary, in lower-case hexadecimal.
        blake3: String,
        /// Its size, in bytes.
        size_bytes: u64,
    },
}

/// What an actor is to its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActorKind {
    /// The job's own `main`: a process of its own, whose end is the job's end.
    Driver,
    /// An actor of a type that the program registers under this name.
    Actor {
        /// The registered name of the type.
        type_name: String,
    },
}

/// When an actor that ended without being asked to is started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// How often at most; ends for which the infrastructure is to blame do not count.
    pub max_restarts: u32,
    /// The first delay, in milliseconds; it doubles each time.
    pub backoff_initial_ms: u64,
    /// The largest delay, in milliseconds.
    pub backoff_max_ms: u64,
}

impl RestartPolicy {
    /// Never again.
    pub const NEVER: RestartPolicy = RestartPolicy {
        max_restarts: 0,
        backoff_initial_ms: 0,
        backoff_max_ms: 0,
    };

    /// At most `max_restarts` times, 100 ms after the first end, at most 5 s after later ones.
    #[must_use]
    pub const fn times(max_restarts: u32) -> Self {
        RestartPolicy {
            max_restarts,
            backoff_initial_ms: 100,
            backoff_max_ms: 5_000,
        }
    }

    /// The delay before restart number `restart` (counted from 1), in milliseconds.
    #[must_use]
    pub fn backoff_ms(&self, restart: u32) -> u64 {
        let doublings = restart.saturating_sub(1).min(32);
        self.backoff_initial_ms
            .saturating_mul(1 << doublings)
            .min(self.backoff_max_ms)
    }
}

/// Where an actor may and should run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PlacementPolicy {
    /// Labels the node must have.
    pub selector: Vec<Requirement>,
    /// How to choose among the nodes that fit.
    pub strategy: Strategy,
    /// Actors with the same key are kept on the same node where that fits (affinity).
    pub affinity_key: Option<String>,
    /// Actors with the same key are kept on different nodes. `strict`: or not placed at all.
    pub spread_key: Option<SpreadKey>,
}

/// Keeps actors apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpreadKey {
    /// Actors that share this key avoid each other.
    pub key: String,
    /// Whether sharing a node is forbidden rather than only avoided.
    pub strict: bool,
}

/// How to choose among nodes that fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Strategy {
    /// The fullest node on which it fits, so that whole nodes stay free.
    #[default]
    Pack,
    /// The emptiest node.
    Spread,
}

/// One actor, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActorSpec {
    /// Driver, or an actor of some type.
    pub kind: ActorKind,
    /// A name unique within the job, by which others find it.
    pub name: Option<String>,
    /// The encoded arguments of its constructor (at most [`INIT_LIMIT_BYTES`]).
    pub init: Vec<u8>,
    /// What it needs while it runs.
    pub resources: Resources,
    /// Where it may and should run.
    pub placement: PlacementPolicy,
    /// When it is started again.
    pub restart: RestartPolicy,
    /// Whether it gets a host process of its own.
    pub isolated: bool,
    /// How many calls may wait in front of it; past that, callers get `Overloaded`.
    pub mailbox_capacity: u32,
}

/// The largest constructor argument: specs are replicated, and bulk bytes never pass through Raft.
pub const INIT_LIMIT_BYTES: usize = 256 * 1024;

/// The default bound on waiting calls: at 1 KiB a call, 1 MiB of memory an actor at the most.
pub const DEFAULT_MAILBOX_CAPACITY: u32 = 1024;

/// A job, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// A name for people; need not be unique.
    pub name: String,
    /// The program of its driver and hosts.
    pub program: Program,
    /// Arguments of the driver.
    pub args: Vec<String>,
    /// Environment of the driver and hosts.
    pub env: BTreeMap<String, String>,
    /// What the driver itself needs.
    pub resources: Resources,
    /// Where the driver may run.
    pub placement: PlacementPolicy,
    /// When the driver is started again.
    pub restart: RestartPolicy,
    /// A second submission with the same key returns the same job.
    pub idempotency_key: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_cap() {
        let policy = RestartPolicy::times(10);
        assert_eq!(
            [1, 2, 3, 20, 99].map(|n| policy.backoff_ms(n)),
            [100, 200, 400, 5000, 5000]
        );
        assert_eq!(RestartPolicy::NEVER.backoff_ms(1), 0);
    }
}
