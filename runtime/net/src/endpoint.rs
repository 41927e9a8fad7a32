//! QUIC between members of the cluster: one endpoint a process, which both connects and accepts.
//!
//! Invariants:
//! 1. Both sides know each other by certificate before the first stream. `connect` returns only when
//!    the other side has accepted us as well.
//! 2. Handshakes and connections are bounded, and a slow one delays no other.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use mobula_wire::frame::{FrameKind, FrameLimits};
use parking_lot::Mutex;
use quinn::{ConnectionError, Runtime, TokioRuntime, TransportErrorCode, VarInt};
use rustls_pki_types::CertificateDer;
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::connection::Peer;
use crate::identity::{Credentials, Identity, Role, not_after, peer_identity};
use crate::threads::NetworkThreads;
use crate::tls::{PeerRejection, RejectionSlot, SERVER_NAME, TlsError};
use crate::transport::{claimed_class, client_config, endpoint_config, server_config};

pub use crate::connection::{Connection, ConnectionLost, OpenError};
pub use crate::transport::LaneClass;

/// An honest handshake takes two round trips.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at one time: some 100 KiB and a signature each, and more than a fleet's worth.
const HANDSHAKES_MAX: usize = 256;
/// Above this many, a client must first prove that its address is its own.
const HANDSHAKES_BEFORE_RETRY: usize = 64;
/// A thousand workers, two connections each, twice over.
const CONNECTIONS_MAX: usize = 4096;
/// Rides out a burst of a hundred gigabit for some hundred microseconds of ours not reading.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// For our farewell to reach the peers.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

const CLOSE_DONE: VarInt = VarInt::from_u32(0);
const CLOSE_REFUSED: VarInt = VarInt::from_u32(2);

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address is taken, or not ours.
    #[error("cannot open udp {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system answered.
        source: io::Error,
    },
    /// The credentials cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// No answer in time. Over UDP this is also how it looks when nobody listens.
    #[error(
        "no answer from {address} within {limit_ms} ms: nothing listens there, or the network \
             does not lead there"
    )]
    TimedOut {
        /// The address.
        address: SocketAddr,
        /// The limit, in milliseconds.
        limit_ms: u64,
    },
    /// Somebody answers, but not whom we want to talk to.
    #[error("refusing to talk to {address}: {rejection}")]
    WrongPeer {
        /// The address.
        address: SocketAddr,
        /// Why not.
        rejection: PeerRejection,
    },
    /// The peer does not want to talk to us: our certificate, or its limits.
    #[error("{address} refuses us: {reason}")]
    Refused {
        /// The address.
        address: SocketAddr,
        /// What it said.
        reason: String,
    },
    /// The connection broke off while it was being made.
    #[error("connecting to {address} failed: {reason}")]
    Failed {
        /// The address.
        address: SocketAddr,
        /// What happened.
        reason: String,
    },
    /// Our own credentials cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl ConnectError {
    /// Whether the same attempt may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            ConnectError::TimedOut { .. } | ConnectError::Failed { .. }
        )
    }
}

/// A process's QUIC socket. Cheap to clone; it closes when the last clone and the last connection
/// are gone.
#[derive(Debug, Clone)]
pub struct Endpoint(Arc<EndpointInner>);

#[derive(Debug)]
struct EndpointInner {
    quinn: quinn::Endpoint,
    local_address: SocketAddr,
    current: Mutex<Current>,
    /// Owned here, so that they end with the endpoint.
    handshakes: AsyncMutex<JoinSet<Option<Connection>>>,
}

#[derive(Debug)]
struct Current {
    credentials: Credentials,
    server: Option<ServerConfigs>,
}

#[derive(Debug, Clone)]
struct ServerConfigs {
    control: Arc<quinn::ServerConfig>,
    bulk: Arc<quinn::ServerConfig>,
}

impl ServerConfigs {
    fn new(credentials: &Credentials) -> Result<Self, TlsError> {
        Ok(ServerConfigs {
            control: Arc::new(server_config(LaneClass::Control, credentials)?),
            bulk: Arc::new(server_config(LaneClass::Bulk, credentials)?),
        })
    }
}

impl Endpoint {
    /// An endpoint at `address` (which may have port 0) that accepts and connects.
    pub fn bind(address: SocketAddr, credentials: &Credentials) -> Result<Self, EndpointError> {
        let server = ServerConfigs::new(credentials)?;
        Endpoint::open(address, credentials, Some(server), Arc::new(TokioRuntime))
    }

    /// The same on threads of its own, which must live as long as it.
    pub fn bind_on(
        threads: &NetworkThreads,
        address: SocketAddr,
        credentials: &Credentials,
    ) -> Result<Self, EndpointError> {
        let server = ServerConfigs::new(credentials)?;
        Endpoint::open(address, credentials, Some(server), threads.runtime())
    }

    /// An endpoint that connects only.
    pub fn bind_client(
        address: SocketAddr,
        credentials: &Credentials,
    ) -> Result<Self, EndpointError> {
        Endpoint::open(address, credentials, None, Arc::new(TokioRuntime))
    }

    fn open(
        address: SocketAddr,
        credentials: &Credentials,
        server: Option<ServerConfigs>,
        runtime: Arc<dyn Runtime>,
    ) -> Result<Self, EndpointError> {
        let failed = |source| EndpointError::Bind { address, source };
        let socket = UdpSocket::bind(address).map_err(failed)?;
        enlarge_buffers(&socket);
        let quinn = quinn::Endpoint::new(
            endpoint_config(credentials),
            server.as_ref().map(|configs| (*configs.control).clone()),
            socket,
            runtime,
        )
        .map_err(failed)?;
        let local_address = quinn.local_addr().map_err(failed)?;
        let current = Mutex::new(Current {
            credentials: credentials.clone(),
            server,
        });
        let handshakes = AsyncMutex::new(JoinSet::new());
        Ok(Endpoint(Arc::new(EndpointInner {
            quinn,
            local_address,
            current,
            handshakes,
        })))
    }

    /// The address with its real port.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.0.local_address
    }

    /// Who we are.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.0.current.lock().credentials.identity().clone()
    }

    /// Uses `credentials` for connections from now on. Those that exist keep theirs, and end with
    /// them.
    pub fn replace_credentials(&self, credentials: &Credentials) -> Result<(), TlsError> {
        let mut current = self.0.current.lock();
        if current.server.is_some() {
            let server = ServerConfigs::new(credentials)?;
            self.0
                .quinn
                .set_server_config(Some((*server.control).clone()));
            current.server = Some(server);
        }
        current.credentials = credentials.clone();
        Ok(())
    }

    /// Connects to a process of role `expected` of our cluster. When this returns, both sides have
    /// accepted each other.
    pub async fn connect(
        &self,
        address: SocketAddr,
        class: LaneClass,
        expected: Role,
    ) -> Result<Connection, ConnectError> {
        let credentials = self.0.current.lock().credentials.clone();
        let slot = RejectionSlot::default();
        let config = client_config(class, &credentials, expected, &slot)?;
        let connecting = self
            .0
            .quinn
            .connect_with(config, address, SERVER_NAME)
            .map_err(|error| ConnectError::Failed {
                address,
                reason: error.to_string(),
            })?;
        let attempt = async {
            let connection = connecting.await.map_err(|error| match slot.take() {
                Some(rejection) => ConnectError::WrongPeer { address, rejection },
                None => connect_failed(address, error),
            })?;
            let identity = await_welcome(&connection)
                .await
                .map_err(|error| connect_failed(address, error))
                .and_then(|()| {
                    peer_of(&connection).map_err(|reason| ConnectError::Failed { address, reason })
                })?;
            Ok(Connection::new(connection, identity, class, &credentials))
        };
        timeout(HANDSHAKE_TIMEOUT, attempt)
            .await
            .unwrap_or_else(|_| {
                let limit_ms = HANDSHAKE_TIMEOUT.as_millis() as u64;
                Err(ConnectError::TimedOut { address, limit_ms })
            })
    }

    /// The next connection that a member of our cluster has made to us, or `None` when the endpoint
    /// is closed (or only connects). Handshakes that fail are logged here. Cancel safe; new
    /// handshakes begin only while somebody waits here.
    pub async fn accept(&self) -> Option<Connection> {
        let mut handshakes = self.0.handshakes.lock().await;
        loop {
            tokio::select! {
                Some(done) = handshakes.join_next() => {
                    if let Ok(Some(connection)) = done {
                        return Some(connection);
                    }
                }
                incoming = self.0.quinn.accept(), if handshakes.len() < HANDSHAKES_MAX => {
                    self.admit(incoming?, &mut handshakes);
                }
            }
        }
    }

    fn admit(&self, incoming: quinn::Incoming, handshakes: &mut JoinSet<Option<Connection>>) {
        let address = incoming.remote_address();
        if self.0.quinn.open_connections() >= CONNECTIONS_MAX {
            tracing::warn!(%address, limit = CONNECTIONS_MAX, "too many connections, refusing one");
            return incoming.refuse();
        }
        let busy = handshakes.len() >= HANDSHAKES_BEFORE_RETRY;
        if busy && !incoming.remote_address_validated() && incoming.may_retry() {
            if incoming.retry().is_err() {
                tracing::debug!(%address, "cannot ask for address validation");
            }
            return;
        }
        let class = claimed_class(&incoming.orig_dst_cid());
        let (credentials, config) = {
            let current = self.0.current.lock();
            let Some(server) = &current.server else {
                return incoming.refuse();
            };
            let config = match class {
                LaneClass::Control => server.control.clone(),
                LaneClass::Bulk => server.bulk.clone(),
            };
            (current.credentials.clone(), config)
        };
        handshakes.spawn(async move {
            match timeout(
                HANDSHAKE_TIMEOUT,
                welcome(incoming, config, class, &credentials),
            )
            .await
            {
                Ok(Ok(connection)) => Some(connection),
                Ok(Err(reason)) => {
                    tracing::debug!(%address, %reason, "quic handshake failed");
                    None
                }
                Err(_) => {
                    tracing::debug!(%address, "quic handshake timed out");
                    None
                }
            }
        });
    }

    /// Closes all connections, telling the peers, and stops accepting.
    pub async fn close(&self, reason: &str) {
        self.0.quinn.close(CLOSE_DONE, reason.as_bytes());
        // Peers that do not answer find out by their idle timeout.
        let _ = timeout(CLOSE_TIMEOUT, self.0.quinn.wait_idle()).await;
    }
}

/// Best effort: the system's own limit may be lower, and small clusters do not mind.
fn enlarge_buffers(socket: &UdpSocket) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
    for result in [
        set_socket_recv_buffer_size(socket, SOCKET_BUFFER_BYTES),
        set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES),
    ] {
        if let Err(error) = result {
            tracing::debug!(%error, bytes = SOCKET_BUFFER_BYTES, "cannot enlarge a socket buffer");
        }
    }
}

/// The accepting side of a handshake.
async fn welcome(
    incoming: quinn::Incoming,
    config: Arc<quinn::ServerConfig>,
    class: LaneClass,
    credentials: &Credentials,
) -> Result<Connection, String> {
    let text = |error: ConnectionError| error.to_string();
    let connection = incoming
        .accept_with(config)
        .map_err(text)?
        .await
        .map_err(text)?;
    let ours = &credentials.identity().cluster;
    let peer = peer_of(&connection).and_then(|peer| match peer.identity.cluster == *ours {
        true => Ok(peer),
        false => Err(format!("{} is not of cluster {ours}", peer.identity)),
    });
    let peer = peer.inspect_err(|reason| connection.close(CLOSE_REFUSED, reason.as_bytes()))?;
    let mut stream = connection.open_uni().await.map_err(text)?;
    let frame = mobula_wire::frame::encode_header(FrameKind::Welcome, 0, FrameLimits::HELLO)
        .expect("an empty frame is within every limit");
    stream
        .write_all(&frame)
        .await
        .map_err(|error| error.to_string())?;
    stream.finish().map_err(|error| error.to_string())?;
    Ok(Connection::new(connection, peer, class, credentials))
}

/// The connecting side waits for the other's word: TLS 1.3 alone ends a handshake on this side
/// before our own certificate has been looked at.
async fn await_welcome(connection: &quinn::Connection) -> Result<(), ConnectionError> {
    let mut stream = connection.accept_uni().await?;
    let mut frame = [0; mobula_wire::frame::HEADER_SIZE_BYTES];
    let expected = mobula_wire::frame::encode_header(FrameKind::Welcome, 0, FrameLimits::HELLO);
    match stream.read_exact(&mut frame).await {
        Ok(()) if expected.is_ok_and(|expected| expected == frame) => Ok(()),
        Err(quinn::ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error))) => {
            Err(error)
        }
        _ => {
            connection.close(CLOSE_REFUSED, b"expected a welcome");
            Err(ConnectionError::LocallyClosed)
        }
    }
}

fn peer_of(connection: &quinn::Connection) -> Result<Peer, String> {
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or("the peer showed no certificate")?;
    let leaf = chain.first().ok_or("the peer showed no certificate")?;
    Ok(Peer {
        identity: peer_identity(&chain).map_err(|error| error.to_string())?,
        not_after: not_after(leaf).map_err(|error| error.to_string())?,
    })
}

fn connect_failed(address: SocketAddr, error: ConnectionError) -> ConnectError {
    match error {
        ConnectionError::TimedOut => ConnectError::TimedOut {
            address,
            limit_ms: HANDSHAKE_TIMEOUT.as_millis() as u64,
        },
        ConnectionError::ApplicationClosed(close) => ConnectError::Refused {
            address,
            reason: String::from_utf8_lossy(&close.reason).into_owned(),
        },
        ConnectionError::ConnectionClosed(close)
            if close.error_code == TransportErrorCode::CONNECTION_REFUSED =>
        {
            ConnectError::Failed {
                address,
                reason: "its process has ended, or has too many connections".into(),
            }
        }
        // QUIC puts TLS alerts here: the peer does not like our certificate or our protocol name.
        ConnectionError::ConnectionClosed(close) => ConnectError::Refused {
            address,
            reason: close.to_string(),
        },
        error => ConnectError::Failed {
            address,
            reason: error.to_string(),
        },
    }
}

#[cfg(test)]
mod tests;
