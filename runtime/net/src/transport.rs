//! QUIC's settings, one set a class of lanes.
//!
//! A server must choose its settings before it can read anything of a connection that is encrypted.
//! So the class stands in one bit of the connection id that the client makes up for its first
//! packet; a lie about it gains nothing, as the protocol name inside the handshake must fit.

use std::sync::Arc;
use std::time::Duration;

use mobula_wire::hello::Lane;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ConnectionId, ConnectionIdGenerator, EndpointConfig, MtuDiscoveryConfig, TransportConfig,
    VarInt,
};
use rand::RngCore;

use crate::identity::{Credentials, Role};
use crate::tls::{self, ALPN_BULK, ALPN_CONTROL, RejectionSlot, TlsError};

/// Lanes that may share a connection. Bulk has its own, so that a full window or a lost packet of
/// a large object delays no call and no heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LaneClass {
    /// Control, Raft and calls: small and urgent.
    Control,
    /// Objects, snapshots, checkpoints, large calls: large and patient.
    Bulk,
}

impl LaneClass {
    /// The class of `lane`.
    #[must_use]
    pub const fn of(lane: Lane) -> Self {
        match lane {
            Lane::Control | Lane::Raft | Lane::Call | Lane::SameMachine => LaneClass::Control,
            Lane::Bulk | Lane::LargeCall => LaneClass::Bulk,
        }
    }

    const fn alpn(self) -> &'static [u8] {
        match self {
            LaneClass::Control => ALPN_CONTROL,
            LaneClass::Bulk => ALPN_BULK,
        }
    }
}

/// The largest datagram to try on the way of large things: ten of them, which quinn hands to the
/// system in one piece, must stay below the 64 KiB that it takes. Discovery finds out whether the way has room for
/// it (one machine's loopback and jumbo frames have); a packet's price hardly depends on its size.
const BULK_DATAGRAM_BYTES_MAX: u16 = 6_500;

/// For as long somebody may wait for a peer that says nothing: that of the patient class.
pub(crate) const IDLE_TIMEOUT_MAX: Duration = Duration::from_secs(15);

const KIB: u32 = 1 << 10;
const MIB: u32 = 1 << 20;

fn transport_config(class: LaneClass) -> TransportConfig {
    struct Settings {
        idle_timeout_ms: u32,
        keep_alive_ms: u64,
        bidi_streams: u32,
        uni_streams: u32,
        stream_window_bytes: u32,
        connection_window_bytes: u32,
    }
    let settings = match class {
        LaneClass::Control => Settings {
            // Failure detection: a worker that says nothing for six seconds is suspect.
            idle_timeout_ms: 6_000,
            keep_alive_ms: 1_000,
            bidi_streams: 1024,
            uni_streams: 256,
            stream_window_bytes: 256 * KIB,
            // Bounds the memory that one peer can make us hold; quinn's default has no bound.
            connection_window_bytes: 8 * MIB,
        },
        LaneClass::Bulk => Settings {
            idle_timeout_ms: IDLE_TIMEOUT_MAX.as_millis() as u32,
            keep_alive_ms: 3_000,
            bidi_streams: 64,
            uni_streams: 64,
            // 10 Gbit/s at 6 ms round trip, and a whole chunk besides the next.
            stream_window_bytes: 8 * MIB,
            connection_window_bytes: 64 * MIB,
        },
    };
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(VarInt::from_u32(settings.idle_timeout_ms).into()))
        .keep_alive_interval(Some(Duration::from_millis(settings.keep_alive_ms)))
        .max_concurrent_bidi_streams(settings.bidi_streams.into())
        .max_concurrent_uni_streams(settings.uni_streams.into())
        .stream_receive_window(settings.stream_window_bytes.into())
        .receive_window(settings.connection_window_bytes.into())
        .send_window(settings.connection_window_bytes.into())
        // Machines of one cluster are near each other: with the default of 333 ms a first lost
        // packet costs a second.
        .initial_rtt(Duration::from_millis(20))
        // Not used; no buffer for it either.
        .datagram_receive_buffer_size(None);
    if class == LaneClass::Bulk {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(BULK_DATAGRAM_BYTES_MAX);
        config.mtu_discovery_config(Some(discovery));
    }
    config
}

pub(crate) fn server_config(
    class: LaneClass,
    credentials: &Credentials,
) -> Result<quinn::ServerConfig, TlsError> {
    let tls = tls::server_config_mtls(credentials, class.alpn())?;
    let crypto = QuicServerConfig::try_from(tls)
        .map_err(|error| TlsError::Verifier(format!("no cipher suite for quic: {error}")))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport_config(class)));
    // Nodes have fixed addresses: a connection that moves is an attack or a mistake.
    config.migration(false);
    Ok(config)
}

pub(crate) fn client_config(
    class: LaneClass,
    credentials: &Credentials,
    expected: Role,
    slot: &RejectionSlot,
) -> Result<quinn::ClientConfig, TlsError> {
    let tls = tls::client_config_mtls(credentials, expected, class.alpn(), slot)?;
    let crypto = QuicClientConfig::try_from(tls)
        .map_err(|error| TlsError::Verifier(format!("no cipher suite for quic: {error}")))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport_config(class)));
    config.initial_dst_cid_provider(Arc::new(move || initial_connection_id(class)));
    Ok(config)
}

/// Settings of the socket itself.
///
/// A process that is started again with the same credentials can tell its old peers that their
/// connections are void: the key that proves it comes from the private key, and connection ids of
/// an earlier life count as possible. (quinn's own ids carry a hash with a key made anew each time,
/// by which it would take the old ones for noise.)
pub(crate) fn endpoint_config(credentials: &Credentials) -> EndpointConfig {
    let key = credentials
        .private_key()
        .derive("mobula 2026-01 quic stateless reset");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
    let mut config = EndpointConfig::new(Arc::new(key));
    config
        .cid_generator(|| Box::new(RandomConnectionIds))
        .max_udp_payload_size(BULK_DATAGRAM_BYTES_MAX)
        .expect("a datagram may have 1200 to 65527 bytes");
    config
}

/// 64 random bits, of which none can be told to be of another life.
struct RandomConnectionIds;

impl ConnectionIdGenerator for RandomConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&rand::rng().next_u64().to_le_bytes())
    }

    fn cid_len(&self) -> usize {
        size_of::<u64>()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// 159 random bits and the class.
fn initial_connection_id(class: LaneClass) -> ConnectionId {
    let mut bytes = [0; 20];
    rand::rng().fill_bytes(&mut bytes);
    bytes[0] = (bytes[0] & !1) | u8::from(class == LaneClass::Bulk);
    ConnectionId::new(&bytes)
}

/// The class that a client claims by its first packet.
pub(crate) fn claimed_class(initial: &ConnectionId) -> LaneClass {
    match initial.first().is_some_and(|byte| byte & 1 == 1) {
        true => LaneClass::Bulk,
        false => LaneClass::Control,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_survives_in_the_connection_id() {
        for class in [LaneClass::Control, LaneClass::Bulk] {
            for _ in 0..64 {
                assert_eq!(claimed_class(&initial_connection_id(class)), class);
            }
        }
    }
}
