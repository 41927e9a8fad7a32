//! Mobula's batteries: everything here could be a user's own crate, for it is written against the
//! public SDK.
//!
//! * [`training`] trains, with the arithmetic of [`kernels`]; [`checkpoint`] saves and restores; [`registry`] names what came of it;
//!   [`serving`] answers requests with it; [`drift`] watches what is asked.
//! * Each domain keeps its replicated table (`state.rs`, pure) beside its actors; [`modules`] and
//!   [`controllers`] plug them into a head.
//! * [`device`] says where a model is computed.
//! * [`builtin`] is the `main` of jobs that are a TOML file.

pub mod builtin;
pub mod checkpoint;
pub mod device;
pub mod drift;
pub mod kernels;
pub mod registry;
pub mod serving;
pub mod training;

mod ask;
mod name;
mod panics;
mod payload;
mod plug;
pub mod storage;
mod units;

pub use candle_core;
pub use plug::{controllers, modules, retention};

#[doc(hidden)]
pub use inventory as __inventory;
