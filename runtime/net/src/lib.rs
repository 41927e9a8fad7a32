//! Connections between Mobula's processes: who is who, and how frames get from one to the other.
//!
//! * [`identity`]: the cluster's CA, certificates, tokens. [`tls`]: TLS 1.3 with them.
//! * [`tcp`]: the transport of gRPC.
//! * [`endpoint`]: QUIC between heads, workers and hosts; [`lane`]: framed streams on it; [`pool`]:
//!   connections kept by address.
//! * [`probe`]: whether a port is closed for sure. [`tombstone`]: what answers in the place of a killed process.
//! * [`local`]: the same framed streams over a Unix socket; [`same_machine`]: how two processes that
//!   know each other by certificate change over to one.
//!
//! Invariants:
//! 1. There is no listener without authentication, and no way to switch it off.
//! 2. Every buffer, queue and number of connections has a bound; past it, a typed error.
//! 3. No connection outlives the certificates that it was made with.
//! 4. Nothing in here knows what the messages mean.

pub mod descriptor;
pub mod endpoint;
pub mod identity;
pub mod lane;
pub mod local;
pub mod pool;
pub mod probe;
pub mod same_machine;
pub mod tcp;
pub mod threads;
pub mod tls;
pub mod tombstone;

mod connection;
mod transport;

#[cfg(test)]
mod testing;

pub use endpoint::{Connection, Endpoint, LaneClass};
pub use identity::{
    CaKeyHash, ClusterCa, Credentials, Identity, PrivateKey, Role, Token, Validity,
};
pub use lane::{FramedReceiver, FramedSender, FramedStream};
pub use mobula_wire::frame::{Frame, FrameKind};
pub use mobula_wire::hello::Lane;
pub use tcp::{ApiListener, ClientTls, PeerInfo, connect_channel};
pub use threads::NetworkThreads;
