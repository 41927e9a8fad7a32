//! How the node's object store does, in numbers.

/// A snapshot. Totals count since the agent's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ObjectStoreMetrics {
    /// Memory that may be used, in bytes.
    pub limit_bytes: u64,
    /// Memory that is taken from the system, in bytes.
    pub used_bytes: u64,
    /// Arenas.
    pub arenas: u64,
    /// Objects, in memory or on disk.
    pub objects: u64,
    /// Their size, in bytes.
    pub objects_bytes: u64,
    /// Those of them that are on disk.
    pub spilled_objects: u64,
    /// Their size, in bytes.
    pub spilled_bytes: u64,
    /// Hosts that are connected.
    pub hosts: u64,
    /// Requests that wait for memory, or for an object that is about to be published.
    pub waiting_requests: u64,
    /// Objects that were moved to disk.
    pub spills_total: u64,
    /// Objects that were brought back.
    pub restores_total: u64,
    /// Objects whose file on disk was not what had been written.
    pub corrupt_total: u64,
    /// Copies of other nodes' objects that were dropped for lack of memory.
    pub evictions_total: u64,
    /// Objects fetched from other nodes.
    pub fetches_total: u64,
    /// Bytes of those.
    pub fetched_bytes_total: u64,
    /// Objects served to other nodes.
    pub serves_total: u64,
    /// Requests that were refused for lack of memory or disk.
    pub refusals_total: u64,
}
