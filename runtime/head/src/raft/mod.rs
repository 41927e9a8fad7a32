//! The replicated log and what drives it.
//!
//! `proposals` (async) → `inputs` → `node_loop` (one thread, owns raft-rs) → `apply` (pure modules)
//! → effects. Other heads are behind `transport`.
//!
//! Invariants:
//! 1. raft-rs and the log are touched by the driver's thread only.
//! 2. What a client is told was fsynced before, on a majority.
//! 3. A failed write ends the process: what is on disk is then unknown (the kernel may call pages
//!    clean that never reached it).

mod proposals;

mod inputs;

mod driver;
mod node_loop;

mod agreement;
mod apply;
mod chance;
mod changes;
mod committed_conflict;
mod configuration;
mod log_clock;
mod lost_entries;
mod membership;
mod reads;
mod snapshots;

mod peer;
mod snapshot_stream;
mod transport;

#[cfg(test)]
mod group_tests;
#[cfg(test)]
mod stepped_tests;
#[cfg(test)]
mod test_group;
#[cfg(test)]
mod test_network;
#[cfg(test)]
mod tests;

pub use agreement::PeerState;
pub(crate) use apply::module_revisions;
pub(crate) use chance::Chance;
pub(crate) use driver::{Driver, DriverEnd, DriverOptions, EmptyLog, is_log_lost};
pub(crate) use inputs::input_queue;
pub(crate) use membership::{GroupChange, HeadCommand, MEMBERS_MAX, allocated_id};
pub use membership::{GroupView, Member};
pub(crate) use proposals::TableView;
pub use proposals::{
    ChangeError, GroupProgress, Leadership, MemberProgress, Outcome, ProposeError, RaftHandle,
};
pub(crate) use transport::{End, PeerNetwork};

/// What [`crate::simulation`] is made of.
pub(crate) mod simulation {
    pub(crate) use super::apply::Applier;
    pub(crate) use super::chance::{Chance, ElectionTimeouts};
    pub(crate) use super::driver::{DriverOptions, open};
    pub(crate) use super::inputs::Input;
    pub(crate) use super::log_clock::LogClock;
    pub(crate) use super::membership::{Configuration, GroupChange, HeadCommand, HeadsModule};
    pub(crate) use super::node_loop::{Fault, Loop};
    pub(crate) use super::snapshots::PinnedTables;
    pub(crate) use super::transport::Peers;
}
