//! The actors that the suite calls: as in Ray's `ray_perf.py`, they do nothing.

use futures::future::try_join_all;
use mobula::prelude::*;

/// What Ray's benchmark returns from every method.
const OK: [u8; 2] = *b"ok";

/// Answers one call after another.
pub(crate) struct Server;

#[mobula::actor]
impl Server {
    pub(crate) fn new() -> Self {
        Server
    }

    pub(crate) async fn small_value(&mut self) -> [u8; 2] {
        OK
    }

    pub(crate) async fn small_value_arg(&mut self, _argument: u64) -> [u8; 2] {
        OK
    }

    pub(crate) async fn length(&mut self, payload: Payload) -> u64 {
        payload.0.len() as u64
    }
}

/// Answers several calls at once: Ray's async actor, and its actor with `max_concurrency=16`.
pub(crate) struct ConcurrentServer;

#[mobula::actor(max_concurrency = 16)]
impl ConcurrentServer {
    pub(crate) fn new() -> Self {
        ConcurrentServer
    }

    pub(crate) async fn small_value(&self) -> [u8; 2] {
        OK
    }

    pub(crate) async fn small_value_arg(&self, _argument: u64) -> [u8; 2] {
        OK
    }
}

/// Calls servers from a process of its own.
pub(crate) struct Client {
    servers: Vec<ActorRef<Server>>,
    concurrent: Vec<ActorRef<ConcurrentServer>>,
}

#[mobula::actor]
impl Client {
    pub(crate) fn new(
        servers: Vec<ActorRef<Server>>,
        concurrent: Vec<ActorRef<ConcurrentServer>>,
    ) -> Self {
        Client {
            servers,
            concurrent,
        }
    }

    /// So many calls to the servers in turn, all at once.
    pub(crate) async fn batch(&mut self, count: usize) -> Result<(), mobula::Error> {
        let calls = self.servers.iter().cycle().take(count);
        try_join_all(calls.map(|server| server.small_value().into_future())).await?;
        Ok(())
    }

    /// The same with an argument.
    pub(crate) async fn batch_arg(&mut self, count: usize) -> Result<(), mobula::Error> {
        let calls = self.servers.iter().cycle().take(count);
        try_join_all(calls.map(|server| server.small_value_arg(7).into_future())).await?;
        Ok(())
    }

    /// The same to actors that run several methods at once.
    pub(crate) async fn batch_concurrent(&mut self, count: usize) -> Result<(), mobula::Error> {
        let calls = self.concurrent.iter().cycle().take(count);
        try_join_all(calls.map(|server| server.small_value().into_future())).await?;
        Ok(())
    }

    /// One call after another; how long they took, in nanoseconds.
    pub(crate) async fn one_by_one(&mut self, count: usize) -> Result<u64, mobula::Error> {
        let began = std::time::Instant::now();
        for server in self.servers.iter().cycle().take(count) {
            server.small_value().await?;
        }
        Ok(began.elapsed().as_nanos() as u64)
    }
}

/// Bytes that are encoded in one piece.
#[derive(Clone)]
pub(crate) struct Payload(pub(crate) Vec<u8>);

impl serde::Serialize for Payload {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for Payload {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl serde::de::Visitor<'_> for Bytes {
            type Value = Payload;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Payload, E> {
                Ok(Payload(bytes.to_vec()))
            }

            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Payload, E> {
                Ok(Payload(bytes))
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}
