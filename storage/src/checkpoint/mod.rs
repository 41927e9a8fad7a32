//! Checkpoints in a blob store: chunks named by their hash, and a manifest that names the chunks.
//!
//! ```text
//! chunks/<blake3>                                  immutable, shared between checkpoints
//! manifest/<job>/<step, 12 digits>-<incarnation>.json   created last, once
//! gc/<time>-<digest>.json                          what a sweep deletes; stays for a while
//! gc/<time>-<digest>.done                          that sweep is over
//! gc/owner                                         the cluster that sweeps
//! ```
//!
//! Chunks need no manifest where something else names them, as the replicated table of kept objects does.
//!
//! Invariants:
//! 1. A checkpoint is visible when its manifest exists and verifies; there is no mutable "latest".
//!    The manifest is created after every chunk was acknowledged, so no crash leaves one half
//!    visible.
//! 2. A manifest's name holds the writer's incarnation, and is created at most once: a stale writer
//!    cannot replace what a newer one wrote. Which manifest counts is decided by the replicated
//!    state, which holds its digest.
//! 3. A load verifies the manifest's digest, each chunk's length and hash, and the whole's hash. It
//!    gives exactly the saved bytes, or an error.
//! 4. What is damaged or missing makes a restore go to the next older checkpoint and say why; what
//!    is out of reach for now does not: an outage must not turn back time.
//! 5. A sweep deletes only what neither a kept manifest nor the tables name, and what is older than the longest upload.
//!    What it deletes of a save that runs at the same time, that save finds out and writes again before it names it.

mod chunk;
mod confirming;
mod gc;
mod manifest;
mod once;
mod pace;
mod plans;
mod reader;
mod source;
mod writer;

#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use chunk::{CHUNK_BYTES_DEFAULT, ChunkRef, Piece, split_pieces};
pub use gc::{GcError, GcReport, Kept, Stored, Sweeper};
pub use manifest::{InvalidManifest, Manifest, ManifestName, ManifestRef, Section, manifest_path};
pub use plans::GcPlan;
pub use reader::{
    Checkpoint, CheckpointReader, LoadError, Rejected, RestoreError, Restored, StoredManifest,
};
pub use source::CheckpointSource;
pub use writer::{CheckpointWriter, Prepared, SAVE_TIME_MAX, SaveError, SaveRequest, Saved};

/// A checkpoint whose manifest was written or verified here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointHandle {
    /// Where its manifest is, and its digest: what the replicated state keeps.
    pub reference: ManifestRef,
    /// What it holds.
    pub manifest: Arc<Manifest>,
}
