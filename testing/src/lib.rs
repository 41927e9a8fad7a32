//! What tests of several crates need. Only tests import it.
//!
//! * [`ScriptedHead`]: a head that does as its test says; [`Actors`]: the actors that it knows.
//! * [`ScriptedCluster`]: such a head and one host, in the test's process. gRPC, TLS and QUIC are real, and so are the actors.

mod actors;
mod cluster;
mod head;

pub use actors::{Actors, JOB, Known};
pub use cluster::ScriptedCluster;
pub use head::ScriptedHead;
