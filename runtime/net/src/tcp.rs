//! gRPC's transport: TLS 1.3 over TCP.
//!
//! The listener is a stream of finished connections for tonic's `serve_with_incoming`. A handshake
//! that dawdles delays nobody: handshakes run beside each other, bounded in number and time.

use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures::Stream;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Sleep;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Uri};

use crate::identity::{
    CaKeyHash, Credentials, CurrentCredentials, Identity, Role, not_after, peer_identity,
};
use crate::tls::{self, ALPN_API, PeerRejection, RejectionSlot, SERVER_NAME, TlsError};

/// An honest handshake takes two round trips; whoever needs longer holds a slot for nothing.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at one time: each costs some 100 KiB and a signature, so 256 is 25 MiB and well above
/// what a fleet that reconnects at once needs.
const HANDSHAKES_MAX: usize = 256;
/// Finished connections that wait to be served; the server takes them at once.
const READY_MAX: usize = 64;
/// Connecting to a head: TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A head that is gone without a word, or paused, is noticed within interval + timeout, also by a
/// call that is under way: little later than another head leads. A head that is only short of a
/// processor answers sooner, and being asked again costs nothing but a handshake.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// After a failed `accept` (no file descriptors left): long enough not to spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Why the gRPC port cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}: {source}")]
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

/// Who is at the other end of a gRPC connection; in every request's extensions.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// The address.
    pub peer_address: SocketAddr,
    /// The name in its certificate, if it showed one. Without, only a token can say who it is.
    pub identity: Option<Identity>,
}

/// The gRPC port: a stream of connections whose handshake is done.
#[derive(Debug)]
pub struct ApiListener {
    local_address: SocketAddr,
    ready: mpsc::Receiver<ApiStream>,
    credentials: ApiCredentials,
    acceptor: AbortHandle,
}

/// Replaces the listener's certificate after the listener itself has gone into the server.
#[derive(Clone)]
pub struct ApiCredentials(Arc<Mutex<Served>>);

struct Served {
    acceptor: TlsAcceptor,
    cluster: Arc<str>,
}

impl std::fmt::Debug for ApiCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiCredentials(..)")
    }
}

impl Served {
    fn new(credentials: &Credentials) -> Result<Self, TlsError> {
        Ok(Served {
            acceptor: TlsAcceptor::from(Arc::new(tls::server_config_api(credentials)?)),
            cluster: credentials.identity().cluster.as_str().into(),
        })
    }
}

impl ApiCredentials {
    /// New connections see `credentials` from now on.
    pub fn replace(&self, credentials: &Credentials) -> Result<(), TlsError> {
        *self.0.lock() = Served::new(credentials)?;
        Ok(())
    }
}

impl ApiListener {
    /// Listens on `address`, which may have port 0.
    pub async fn bind(address: SocketAddr, credentials: &Credentials) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Bind { address, source };
        let credentials = ApiCredentials(Arc::new(Mutex::new(Served::new(credentials)?)));
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local_address = listener.local_addr().map_err(failed)?;
        let (sender, ready) = mpsc::channel(READY_MAX);
        let acceptor =
            tokio::spawn(accept_all(listener, credentials.clone(), sender)).abort_handle();
        Ok(ApiListener {
            local_address,
            ready,
            credentials,
            acceptor,
        })
    }

    /// The address with its real port.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// A handle to renew the certificate with.
    #[must_use]
    pub fn credentials(&self) -> ApiCredentials {
        self.credentials.clone()
    }
}

impl Drop for ApiListener {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

impl Stream for ApiListener {
    type Item = io::Result<ApiStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready.poll_recv(cx).map(|stream| stream.map(Ok))
    }
}

async fn accept_all(
    listener: TcpListener,
    credentials: ApiCredentials,
    ready: mpsc::Sender<ApiStream>,
) {
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = handshakes.join_next() => {}
            accepted = listener.accept(), if handshakes.len() < HANDSHAKES_MAX => match accepted {
                Ok((stream, peer_address)) => {
                    let (credentials, ready) = (credentials.clone(), ready.clone());
                    handshakes.spawn(async move {
                        match handshake(stream, peer_address, &credentials).await {
                            // The server has stopped if nobody receives: the connection just ends.
                            Ok(stream) => drop(ready.send(stream).await),
                            Err(error) => {
                                tracing::debug!(%peer_address, %error, "grpc handshake failed");
                            }
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept grpc connections");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            },
        }
    }
}

async fn handshake(
    stream: TcpStream,
    peer_address: SocketAddr,
    credentials: &ApiCredentials,
) -> io::Result<ApiStream> {
    stream.set_nodelay(true)?;
    let (acceptor, cluster) = {
        let served = credentials.0.lock();
        (served.acceptor.clone(), served.cluster.clone())
    };
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "handshake timed out"))??;
    let identity = stream
        .get_ref()
        .1
        .peer_certificates()
        .map(peer_identity)
        .transpose()
        .map_err(io::Error::other)?;
    if let Some(identity) = identity
        .as_ref()
        .filter(|identity| *identity.cluster != *cluster)
    {
        return Err(io::Error::other(format!(
            "{identity} is not of cluster {cluster}"
        )));
    }
    let leaf = stream.get_ref().1.peer_certificates();
    let end = leaf.and_then(|chain| chain.first()).map(not_after);
    let end = end.transpose().map_err(io::Error::other)?;
    Ok(ApiStream {
        stream,
        peer: PeerInfo {
            peer_address,
            identity,
        },
        end: end.map(|end| Box::pin(tokio::time::sleep(left_until(end)))),
    })
}

/// How long it is until then; a clock that is set back makes it no longer than it is now.
fn left_until(end: SystemTime) -> Duration {
    end.duration_since(SystemTime::now()).unwrap_or_default()
}

/// A gRPC connection on the server's side.
#[derive(Debug)]
pub struct ApiStream {
    stream: server::TlsStream<TcpStream>,
    peer: PeerInfo,
    /// The end of the peer's certificate, which the connection does not outlive.
    end: Option<Pin<Box<Sleep>>>,
}

impl ApiStream {
    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }
}

impl Connected for ApiStream {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl AsyncRead for ApiStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let end = self.end.as_mut();
        if end.is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
            let reason = "the peer's certificate has run out";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, reason)));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for ApiStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

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
