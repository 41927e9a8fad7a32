//! The server's side: a stream of connections whose handshake is done.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures::Stream;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Sleep;
use tokio_rustls::{TlsAcceptor, server};
use tonic::transport::server::Connected;

use super::places::{ApiConnections, ConnectionLimits, HANDSHAKES_MAX, Place};
use super::requests::{Idleness, Requests};
use crate::identity::{Credentials, Identity, not_after, peer_identity};
use crate::tls::{self, TlsError};

/// An honest handshake takes two round trips; whoever needs longer holds a slot for nothing.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Finished connections that wait to be served; the server takes them at once.
const READY_MAX: usize = 64;
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
    /// What it asks, of one that showed none.
    pub(super) requests: Option<Requests>,
}

/// The gRPC port: a stream of connections whose handshake is done. A server on it has the layer
/// [`CountRequests`](super::CountRequests), as strangers who ask for nothing are disconnected.
#[derive(Debug)]
pub struct ApiListener {
    local_address: SocketAddr,
    ready: mpsc::Receiver<ApiStream>,
    credentials: ApiCredentials,
    connections: ApiConnections,
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
    /// Listens on `address`, which may have port 0, for as many as this process has file descriptors for.
    pub async fn bind(address: SocketAddr, credentials: &Credentials) -> Result<Self, ListenError> {
        ApiListener::bind_within(address, credentials, ConnectionLimits::of_this_process()).await
    }

    /// The same for as many as `limits` says.
    pub async fn bind_within(
        address: SocketAddr,
        credentials: &Credentials,
        limits: ConnectionLimits,
    ) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Bind { address, source };
        let credentials = ApiCredentials(Arc::new(Mutex::new(Served::new(credentials)?)));
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local_address = listener.local_addr().map_err(failed)?;
        let (sender, ready) = mpsc::channel(READY_MAX);
        let connections = ApiConnections::new(limits);
        let accepting = accept_all(listener, credentials.clone(), connections.clone(), sender);
        Ok(ApiListener {
            local_address,
            ready,
            credentials,
            connections,
            acceptor: tokio::spawn(accepting).abort_handle(),
        })
    }

    /// The address with its real port.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Its connections, to be counted after the listener itself has gone into the server.
    #[must_use]
    pub fn connections(&self) -> ApiConnections {
        self.connections.clone()
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
    connections: ApiConnections,
    ready: mpsc::Sender<ApiStream>,
) {
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = handshakes.join_next() => {}
            accepted = listener.accept(), if handshakes.len() < HANDSHAKES_MAX => match accepted {
                Ok((stream, peer_address)) => {
                    let Some(place) = connections.enter(peer_address.ip()) else {
                        tracing::debug!(%peer_address, "too many grpc handshakes from one address");
                        continue;
                    };
                    let (credentials, ready) = (credentials.clone(), ready.clone());
                    handshakes.spawn(async move {
                        match handshake(stream, peer_address, &credentials, place).await {
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
    place: Place,
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
    let Some(place) = place.settle(identity.is_some()) else {
        if let Some(identity) = &identity {
            tracing::warn!(%identity, "too many grpc connections, refusing one of the cluster");
        }
        return Err(io::Error::other("there are too many connections"));
    };
    let leaf = stream.get_ref().1.peer_certificates();
    let end = leaf.and_then(|chain| chain.first()).map(not_after);
    let end = end.transpose().map_err(io::Error::other)?;
    let requests = place.idle_max().map(Requests::new);
    Ok(ApiStream {
        stream,
        end: end.map(|end| Box::pin(tokio::time::sleep(left_until(end)))),
        idleness: requests.as_ref().map(Idleness::of),
        peer: PeerInfo {
            peer_address,
            identity,
            requests,
        },
        _place: place,
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
    /// Whether a stranger has asked for anything lately.
    idleness: Option<Idleness>,
    /// Given back with the connection.
    _place: Place,
}

impl ApiStream {
    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }

    /// Fails when the time of the connection is over. Asked by who reads and by who writes: a peer that takes nothing
    /// keeps its server from reading.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let end = self.end.as_mut();
        let idleness = self.idleness.as_mut();
        let reason = if end.is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
            "the peer's certificate has run out"
        } else if idleness.is_some_and(|idleness| idleness.poll_exceeded(cx).is_ready()) {
            "the peer has no certificate, and has asked for nothing for too long"
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::TimedOut, reason))
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
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for ApiStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
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
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
