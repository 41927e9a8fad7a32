//! gRPC's transport: TLS 1.3 over TCP.
//!
//! The listener is a stream of finished connections for tonic's `serve_with_incoming`. A handshake
//! that dawdles delays nobody: handshakes run beside each other, bounded in number and time. So are
//! connections in number, by who is at their other end, and those of strangers in how long they are idle.

mod listener;
mod places;
mod requests;

use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client};
use tonic::transport::{Channel, Uri};

pub use self::listener::{ApiCredentials, ApiListener, ApiStream, ListenError, PeerInfo};
pub use self::places::{ApiConnections, ConnectionCounts, ConnectionLimits};
pub use self::requests::{CountRequests, Counting};
use crate::identity::{CaKeyHash, Credentials, CurrentCredentials, Role};
use crate::tls::{self, ALPN_API, PeerRejection, RejectionSlot, SERVER_NAME, TlsError};

/// Connecting to a head: TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A head that is gone without a word, or paused, is noticed within interval + timeout, also by a
/// call that is under way: little later than another head leads. A head that is only short of a
/// processor answers sooner, and being asked again costs nothing but a handshake.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// How a client knows the head, and the head the client.
#[derive(Debug, Clone)]
pub enum ClientTls {
    /// By the CA's key hash out of a token; the token then goes with each request.
    Pinned(CaKeyHash),
    /// By certificates on both sides.
    Mutual(Credentials),
    /// The same, with the newest certificate at each connection: for channels that live longer
    /// than one.
    MutualRenewed(CurrentCredentials),
}

/// Why there is no connection to a head.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiConnectError {
    /// Nobody listens there.
    #[error("connection to {address} refused: no head listens there; is it running?")]
    ConnectionRefused {
        /// The address.
        address: SocketAddr,
    },
    /// The network does not lead there.
    #[error("cannot reach {address}: {reason}")]
    Unreachable {
        /// The address.
        address: SocketAddr,
        /// What the system answered.
        reason: String,
    },
    /// No answer in time.
    #[error(
        "no connection to {address} within {limit_ms} ms: the head, or the network to it, does \
             not answer"
    )]
    TimedOut {
        /// The address.
        address: SocketAddr,
        /// The limit, in milliseconds.
        limit_ms: u64,
    },
    /// Somebody listens there, but it is not a head of our cluster.
    #[error("refusing to talk to {address}: {rejection}")]
    WrongPeer {
        /// The address.
        address: SocketAddr,
        /// Why not.
        rejection: PeerRejection,
    },
    /// The connection broke before it could be used: whoever listens there is going, or coming.
    #[error("the connection to {address} broke while it was set up: {reason}; try again")]
    Interrupted {
        /// The address.
        address: SocketAddr,
        /// What happened.
        reason: String,
    },
    /// The TLS handshake failed in another way: not Mobula, or it refused us.
    #[error("tls handshake with {address} failed: {reason}")]
    Handshake {
        /// The address.
        address: SocketAddr,
        /// What happened.
        reason: String,
    },
    /// TLS is fine, HTTP/2 is not.
    #[error("{address} does not speak http/2 as expected: {reason}")]
    Protocol {
        /// The address.
        address: SocketAddr,
        /// What happened.
        reason: String,
    },
    /// Our own credentials cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl ApiConnectError {
    /// Whether the same attempt may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            ApiConnectError::ConnectionRefused { .. }
                | ApiConnectError::Unreachable { .. }
                | ApiConnectError::TimedOut { .. }
                | ApiConnectError::Interrupted { .. }
        )
    }
}

/// Connects to the head at `address`. The channel connects again by itself when the connection is
/// lost, with the same checks.
///
/// A head that does not like *our* certificate says so only after the handshake (so TLS 1.3 has
/// it): the first call fails then.
pub async fn connect_channel(
    address: SocketAddr,
    client_tls: ClientTls,
) -> Result<Channel, ApiConnectError> {
    let endpoint = Channel::builder(
        Uri::builder()
            .scheme("http")
            .authority(address.to_string())
            .path_and_query("/")
            .build()
            .expect("a socket address is a valid authority"),
    )
    .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
    .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
    .keep_alive_while_idle(true);
    let connector = tower::service_fn(move |_: Uri| {
        let client_tls = client_tls.clone();
        async move { connect_stream(address, &client_tls).await.map(TokioIo::new) }
    });
    endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|error| {
            let mut source = error.source();
            while let Some(inner) = source {
                if let Some(ours) = inner.downcast_ref::<ApiConnectError>() {
                    return ours.clone();
                }
                if let Some(error) = inner.downcast_ref::<io::Error>() {
                    return interrupted(address, error);
                }
                source = inner.source();
            }
            ApiConnectError::Protocol {
                address,
                reason: error.to_string(),
            }
        })
}

async fn connect_stream(
    address: SocketAddr,
    client_tls: &ClientTls,
) -> Result<client::TlsStream<TcpStream>, ApiConnectError> {
    let slot = RejectionSlot::default();
    let config = match client_tls {
        ClientTls::Pinned(hash) => tls::client_config_pinned(*hash, Role::Head, ALPN_API, &slot)?,
        ClientTls::Mutual(credentials) => {
            tls::client_config_mtls(credentials, Role::Head, ALPN_API, &slot)?
        }
        ClientTls::MutualRenewed(current) => {
            tls::client_config_mtls(&current.get(), Role::Head, ALPN_API, &slot)?
        }
    };
    let attempt = async {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| match error.kind() {
                io::ErrorKind::ConnectionRefused => ApiConnectError::ConnectionRefused { address },
                io::ErrorKind::TimedOut => timed_out(address),
                _ => ApiConnectError::Unreachable {
                    address,
                    reason: error.to_string(),
                },
            })?;
        let failed = |error: io::Error| match error.kind() {
            // What rustls says of a peer that speaks, but not as it must.
            io::ErrorKind::InvalidData => ApiConnectError::Handshake {
                address,
                reason: error.to_string(),
            },
            _ => interrupted(address, &error),
        };
        stream.set_nodelay(true).map_err(failed)?;
        let name = ServerName::try_from(SERVER_NAME).expect("the fixed name is a DNS name");
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .map_err(|error| match slot.take() {
                Some(rejection) => ApiConnectError::WrongPeer { address, rejection },
                None => failed(error),
            })
    };
    tokio::time::timeout(CONNECT_TIMEOUT, attempt)
        .await
        .unwrap_or_else(|_| Err(timed_out(address)))
}

fn interrupted(address: SocketAddr, error: &io::Error) -> ApiConnectError {
    ApiConnectError::Interrupted {
        address,
        reason: error.to_string(),
    }
}

fn timed_out(address: SocketAddr) -> ApiConnectError {
    ApiConnectError::TimedOut {
        address,
        limit_ms: CONNECT_TIMEOUT.as_millis() as u64,
    }
}
