//! The scheduler from outside: commands in, tables, effects and answers out. After every accepted
//! command all invariants are checked.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod cluster;
mod explain;
mod jobs;
mod kept;
mod limits;
mod namespaces;
mod nodes;
mod placement;
mod properties;
mod restored;
mod tokens;
