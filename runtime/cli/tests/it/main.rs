//! Process-level tests: real binaries, real sockets, real disks. One binary, so that it is linked
//! once.

mod bad_input;
mod chaos;
mod configs;
mod examples;
mod serving;
mod storage;
mod support;
