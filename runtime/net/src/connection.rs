//! A QUIC connection between two members of the cluster, and the streams on it.
//!
//! Invariants:
//! 1. It is closed when the earlier of its two certificates ends.
//! 2. Streams whose hello is outstanding are bounded in number and time, and delay no other.
//! 3. A lane runs on its own class of connection only; Raft lanes are for heads only.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mobula_wire::frame::{FrameKind, FrameLimits};
use mobula_wire::hello::{HelloRefusal, Lane, StreamHello};
use quinn::{ConnectionError, VarInt};
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::identity::{Credentials, Identity, Role};
use crate::lane::{FramedStream, Guard, ReceiveError, SendError};
use crate::transport::LaneClass;

/// Streams of one connection whose hello is outstanding.
const HELLOS_MAX: usize = 64;
/// The hello comes with the first bytes of a stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long opening a stream may wait for the peer to allow one more.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

const CLOSE_DONE: VarInt = VarInt::from_u32(0);
const CLOSE_EXPIRED: VarInt = VarInt::from_u32(1);

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionLost {
    /// The peer closed it.
    #[error("the peer closed the connection: {reason}")]
    ClosedByPeer {
        /// What it said.
        reason: String,
    },
    /// Nobody at the peer's address knows of this connection: its process has ended, or was started again.
    #[error("the peer's process has ended")]
    PeerEnded,
    /// Nothing was heard of the peer for too long.
    #[error("the peer has fallen silent")]
    TimedOut,
    /// We closed it.
    #[error("the connection was closed on this side")]
    ClosedHere,
    /// One side broke the protocol, or refused the other's certificate.
    #[error("the connection broke: {reason}")]
    Broken {
        /// What happened.
        reason: String,
    },
}

impl From<ConnectionError> for ConnectionLost {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => ConnectionLost::ClosedByPeer {
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::Reset => ConnectionLost::PeerEnded,
            ConnectionError::TimedOut => ConnectionLost::TimedOut,
            ConnectionError::LocallyClosed => ConnectionLost::ClosedHere,
            error => ConnectionLost::Broken {
                reason: error.to_string(),
            },
        }
    }
}

/// Why no stream was opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// This lane belongs on the other kind of connection.
    #[error("lane {lane} does not belong on a {class:?} connection")]
    WrongClass {
        /// The lane.
        lane: Lane,
        /// The connection's class.
        class: LaneClass,
    },
    /// The peer allows no more streams.
    #[error(
        "the peer allows no further stream within {limit_ms} ms: too many are open; finish some"
    )]
    TooManyStreams {
        /// How long we waited, in milliseconds.
        limit_ms: u64,
    },
    /// The connection is gone.
    #[error(transparent)]
    Lost(#[from] ConnectionLost),
    /// The hello could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
}

/// What a handshake tells about the other side.
pub(crate) struct Peer {
    pub(crate) identity: Identity,
    pub(crate) not_after: SystemTime,
}

/// A connection to one peer. Cheap to clone; it is closed when the last clone and the last stream
/// are gone.
#[derive(Debug, Clone)]
pub struct Connection(pub(crate) Arc<ConnectionInner>);

#[derive(Debug)]
pub(crate) struct ConnectionInner {
    pub(crate) quinn: quinn::Connection,
    peer: Identity,
    cluster: String,
    class: LaneClass,
    expiry: AbortHandle,
    /// Streams whose hello is outstanding; owned here, so that they end with the connection.
    hellos: AsyncMutex<JoinSet<Option<(Lane, FramedStream)>>>,
}

impl Drop for ConnectionInner {
    fn drop(&mut self) {
        self.expiry.abort();
    }
}

impl Connection {
    pub(crate) fn new(
        quinn: quinn::Connection,
        peer: Peer,
        class: LaneClass,
        credentials: &Credentials,
    ) -> Self {
        let expires_at = peer.not_after.min(credentials.not_after());
        let life = expires_at
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        let expiring = quinn.clone();
        let expiry = tokio::spawn(async move {
            tokio::select! {
                _ = expiring.closed() => {}
                () = tokio::time::sleep(life) => {
                    expiring.close(CLOSE_EXPIRED, b"a certificate has expired");
                }
            }
        })
        .abort_handle();
        Connection(Arc::new(ConnectionInner {
            quinn,
            peer: peer.identity,
            cluster: credentials.identity().cluster.clone(),
            class,
            expiry,
            hellos: AsyncMutex::new(JoinSet::new()),
        }))
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Identity {
        &self.0.peer
    }

    /// Where it is.
    #[must_use]
    pub fn peer_address(&self) -> SocketAddr {
        self.0.quinn.remote_address()
    }

    /// Which lanes it carries.
    #[must_use]
    pub fn class(&self) -> LaneClass {
        self.0.class
    }

    /// The current estimate of the round trip.
    #[must_use]
    pub fn round_trip(&self) -> Duration {
        self.0.quinn.rtt()
    }

    pub(crate) fn guard(&self) -> Guard {
        Some(self.0.clone())
    }

    /// Opens a stream; its hello is on its way when this returns. A peer that does not accept it
    /// says so as [`ReceiveError::Refused`].
    pub async fn open(&self, lane: Lane) -> Result<FramedStream, OpenError> {
        if LaneClass::of(lane) != self.0.class {
            return Err(OpenError::WrongClass {
                lane,
                class: self.0.class,
            });
        }
        let opened = timeout(OPEN_TIMEOUT, self.0.quinn.open_bi()).await;
        let limit_ms = OPEN_TIMEOUT.as_millis() as u64;
        let (sender, receiver) = opened
            .map_err(|_| OpenError::TooManyStreams { limit_ms })?
            .map_err(ConnectionLost::from)?;
        let limits = FrameLimits::of(lane);
        let mut stream = FramedStream::quic(sender, receiver, limits, self.guard());
        let hello = StreamHello::new(lane, self.0.cluster.as_str());
        stream
            .sender
            .send(FrameKind::Hello, &hello.encode())
            .await?;
        Ok(stream)
    }

    /// The next stream that the peer has opened. Streams that begin badly are refused and logged
    /// here. Cancel safe.
    pub async fn accept(&self) -> Result<(Lane, FramedStream), ConnectionLost> {
        let mut hellos = self.0.hellos.lock().await;
        loop {
            tokio::select! {
                Some(done) = hellos.join_next() => {
                    if let Ok(Some((lane, mut stream))) = done {
                        stream.set_guard(self.guard());
                        return Ok((lane, stream));
                    }
                }
                opened = self.0.quinn.accept_bi(), if hellos.len() < HELLOS_MAX => {
                    let (sender, receiver) = opened?;
                    let stream = FramedStream::quic(sender, receiver, FrameLimits::HELLO, None);
                    let (peer, cluster) = (self.0.peer.clone(), self.0.cluster.clone());
                    let class = self.0.class;
                    hellos.spawn(async move {
                        accept_stream(stream, &cluster, |lane| judge(lane, class, &peer))
                            .await
                            .inspect_err(|error| {
                                tracing::debug!(%peer, %error, "stream refused");
                            })
                            .ok()
                    });
                }
            }
        }
    }

    /// Whether both are handles to one connection.
    #[must_use]
    pub fn is_same_as(&self, other: &Connection) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Closes it for both sides. What the peer has not received by now is lost.
    pub fn close(&self, reason: &str) {
        self.0.quinn.close(CLOSE_DONE, reason.as_bytes());
    }

    /// Waits for its end, and says how it came.
    pub async fn closed(&self) -> ConnectionLost {
        self.0.quinn.closed().await.into()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.quinn.close_reason().is_some()
    }
}

/// Which lanes a peer may open here.
fn judge(lane: Lane, class: LaneClass, peer: &Identity) -> Result<(), String> {
    if LaneClass::of(lane) != class {
        return Err(format!(
            "this is a {class:?} connection; open another for it"
        ));
    }
    match (lane, peer.role) {
        (Lane::Raft, Role::Node | Role::Host | Role::Client) => {
            Err(format!("it is for heads, the peer is a {}", peer.role))
        }
        _ => Ok(()),
    }
}

/// Why a stream was not accepted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HelloError {
    #[error("refused: {0}")]
    Refused(HelloRefusal),
    #[error("no hello within {} ms", HELLO_TIMEOUT.as_millis())]
    TimedOut,
    #[error("the stream ended before its hello")]
    Ended,
    #[error(transparent)]
    Receive(#[from] ReceiveError),
}

/// Reads and judges the first frame of a stream that a peer has opened; a refusal is sent back.
pub(crate) async fn accept_stream(
    mut stream: FramedStream,
    cluster: &str,
    judge: impl FnOnce(Lane) -> Result<(), String>,
) -> Result<(Lane, FramedStream), HelloError> {
    let frame = timeout(HELLO_TIMEOUT, stream.receiver.receive_any())
        .await
        .map_err(|_| HelloError::TimedOut)??
        .ok_or(HelloError::Ended)?;
    let accepted = match frame.kind {
        FrameKind::Hello => StreamHello::accept(&frame.payload, cluster),
        kind => Err(HelloRefusal::Malformed {
            reason: format!("it is of kind {kind:?}"),
        }),
    }
    .and_then(|hello| match judge(hello.lane) {
        Ok(()) => Ok(hello.lane),
        Err(reason) => Err(HelloRefusal::LaneRefused {
            lane: hello.lane,
            reason,
        }),
    });
    match accepted {
        Ok(lane) => {
            stream.set_limits(FrameLimits::of(lane));
            Ok((lane, stream))
        }
        Err(refusal) => {
            // The peer may be gone already; then nobody needs the reason.
            let answer = async {
                stream
                    .sender
                    .send(FrameKind::Refusal, &refusal.encode())
                    .await?;
                stream.sender.finish().await
            };
            let _ = timeout(HELLO_TIMEOUT, answer).await;
            Err(HelloError::Refused(refusal))
        }
    }
}
