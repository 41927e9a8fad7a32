//! Process-level tests: real binaries, real sockets, real disks. One binary, so that it is linked
//! once.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a panic is the failure, and says where"
)]

mod any_bytes;
mod audit;
mod backup;
mod bad_input;
mod chaos;
mod checkpoints;
mod configs;
mod detached;
mod drift;
mod drift_labels;
mod drift_log;
mod exactly_once;
mod examples;
mod experiments;
mod extra_worker;
mod head_faults;
mod head_states;
mod heads;
mod in_process;
mod isolation;
mod jobs;
mod kept;
mod notices;
mod objects;
mod observe;
mod overload;
mod placement;
mod policy;
mod python;
mod registry;
mod replay;
mod rollouts;
mod serving;
mod sessions;
mod simulation;
mod small_disk;
mod storage;
mod support;
mod sweep;
mod tasks;
mod train;
