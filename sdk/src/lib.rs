//! Mobula in ordinary Rust: actors that run on a cluster, called like local objects.
//!
//! ```no_run
//! use mobula::prelude::*;
//!
//! struct Counter {
//!     n: u64,
//! }
//!
//! #[mobula::actor]
//! impl Counter {
//!     fn new(start: u64) -> Self {
//!         Counter { n: start }
//!     }
//!     async fn add(&mut self, by: u64) -> u64 {
//!         self.n += by;
//!         self.n
//!     }
//! }
//!
//! #[mobula::main]
//! async fn main(cluster: Cluster) -> mobula::Result<()> {
//!     let counter =
//!         cluster.actor(Counter::new(5)).name("counter").max_restarts(3).spawn().await?;
//!     assert_eq!(counter.add(3).await?, 8);
//!     Ok(())
//! }
//! ```
//!
//! `cargo run` runs this as a job on a local cluster of its own; `mobula submit <binary>` runs the
//! same binary on a real one. Either way a worker starts it again as the job's driver and as the
//! host of its actors, in processes of their own.
//!
//! * [`connect`]: the ways into a cluster; [`cluster`]: what can be asked of it; [`control`]: the
//!   head's API under it.
//! * [`object`]: values that are put once and read by reference; kept ones outlive who put them.
//! * [`mod@actor`]: creating actors and referring to them; [`call`]: calling them; [`stream`]: calls
//!   that bring several values.
//! * [`mod@task`]: functions that run somewhere in the cluster.
//! * [`job`]: programs that run on a cluster; [`timeline`]: what took how long in one.
//!   [`process`]: what `#[mobula::main]` does; [`role`]: what else its process may be started for;
//!   [`embedded`]: a cluster for one program.
//! * [`error`]: what can go wrong, and whether it took effect.
//!
//! Invariants:
//! 1. A change is sent again only with the same stamp, a call only if it surely did not run or its
//!    caller says that it may.
//! 2. Every error says whether what was asked for took effect: yes, no, or unknown.

pub mod actor;
pub mod call;
mod calling;
pub mod cluster;
pub mod connect;
pub mod control;
mod creation;
pub mod embedded;
pub mod error;
mod exactly_once;
mod farewell;
mod heads;
pub mod job;
mod kept;
pub mod log_lines;
mod main_end;
pub mod object;
mod plain;
pub mod prelude;
pub mod process;
mod reference;
mod resolution;
pub mod role;
mod stamps;
pub mod stream;
pub mod task;
pub mod timeline;
mod upload;

#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;

pub use actor::{Actor, ActorRef, Init};
pub use call::{Call, FallibleCall, RunningCall, RunningFallibleCall};
pub use cluster::{Cluster, ContextExt};
pub use error::{CallFailure, Error, Result};
pub use job::JobHandle;
pub use mobula_core as core;
pub use mobula_host::CallScope;
pub use mobula_host::actor::run_blocking;
/// What actors measure themselves: gauges and counters that stand beside the worker's own metrics.
pub use mobula_host::own_metrics as metrics;
/// Begins something that shall stand in the job's timeline; it ends when the guard is dropped.
pub use mobula_host::spans::begin as span;
pub use mobula_host::{ActorContext, ActorState, Notice, StateError, TaskContext};
pub use mobula_macros::{actor, main, task};
pub use mobula_wire::session::StorageLocation;
pub use object::{ObjectRef, Waited};
pub use plain::{Plain, SharedSlice};
pub use stream::{ItemStream, StreamCall, StreamOf};
pub use task::{Task, TaskBuilder};
pub use upload::UploadProgress;

/// The pages of `docs/` whose code is compiled with the SDK's tests.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../docs/actors.md")]
    struct Actors;

    #[doc = include_str!("../../docs/errors.md")]
    struct Errors;

    #[doc = include_str!("../../docs/jobs.md")]
    struct Jobs;
    #[doc = include_str!("../../docs/tasks.md")]
    struct Tasks;

    #[doc = include_str!("../../docs/objects.md")]
    struct Objects;

    #[doc = include_str!("../../docs/metrics.md")]
    struct Metrics;
}
