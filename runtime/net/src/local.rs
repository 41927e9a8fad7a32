//! The same framed streams between processes of one machine, over a Unix socket.
//!
//! Who may connect is decided by the kernel's word on the peer's user, in addition to the socket
//! file's mode: both ends belong to the same user, or there is no stream.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use mobula_wire::frame::{FrameKind, FrameLimits};
use mobula_wire::hello::{Lane, StreamHello};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::JoinSet;

use crate::connection::accept_stream;
use crate::lane::{FramedStream, SendError};

/// Streams whose hello is outstanding: all hosts of a machine may start at once.
const HELLOS_MAX: usize = 64;

/// Why there is no local socket, or no stream over it.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The socket file cannot be made or reached.
    #[error("cannot {action} socket {path}: {source}")]
    Socket {
        /// What was tried.
        action: &'static str,
        /// The socket's path.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The other end runs as another user.
    #[error("the process at the other end of {path} runs as user {found}, this one as {expected}")]
    OtherUser {
        /// The socket's path.
        path: PathBuf,
        /// Our user.
        expected: u32,
        /// The peer's user.
        found: u32,
    },
    /// The hello could not be sent.
    #[error(transparent)]
    Send(#[from] SendError),
}

/// Who is at the other end, by the kernel's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalPeer {
    /// Its process, if the system tells.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
}

/// A listening Unix socket; its file goes away with it.
#[derive(Debug)]
pub struct LocalListener {
    path: PathBuf,
    cluster_id: String,
    listener: UnixListener,
    hellos: AsyncMutex<JoinSet<Option<(Lane, FramedStream, LocalPeer)>>>,
}

impl LocalListener {
    /// Listens at `path`, for streams of cluster `cluster_id`. A socket file that an earlier process
    /// left there is replaced.
    pub fn bind(path: &Path, cluster_id: impl Into<String>) -> Result<Self, LocalError> {
        let failed = |action| {
            move |source| LocalError::Socket {
                action,
                path: path.to_owned(),
                source,
            }
        };
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("replace")(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(failed("protect"))?;
        Ok(LocalListener {
            path: path.to_owned(),
            cluster_id: cluster_id.into(),
            listener,
            hellos: AsyncMutex::new(JoinSet::new()),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next stream from a process of our user. What begins badly is refused and logged here.
    /// Cancel safe.
    pub async fn accept(&self) -> Result<(Lane, FramedStream, LocalPeer), LocalError> {
        let mut hellos = self.hellos.lock().await;
        loop {
            tokio::select! {
                Some(done) = hellos.join_next() => {
                    if let Ok(Some(accepted)) = done {
                        return Ok(accepted);
                    }
                }
                accepted = self.listener.accept(), if hellos.len() < HELLOS_MAX => {
                    let (stream, _) = accepted.map_err(|source| LocalError::Socket {
                        action: "accept on",
                        path: self.path.clone(),
                        source,
                    })?;
                    match check_peer(&stream, &self.path) {
                        Ok(peer) => {
                            let cluster_id = self.cluster_id.clone();
                            hellos.spawn(greet(stream, cluster_id, peer));
                        }
                        Err(error) => tracing::warn!(%error, "local connection refused"),
                    }
                }
            }
        }
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        // Gone already if someone has cleaned up behind us.
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn greet(
    stream: UnixStream,
    cluster_id: String,
    peer: LocalPeer,
) -> Option<(Lane, FramedStream, LocalPeer)> {
    let stream = match FramedStream::local(stream, FrameLimits::HELLO) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(pid = peer.pid, %error, "local connection refused");
            return None;
        }
    };
    // Raft has no business on a local socket: heads know each other by certificate.
    let judge = |lane| match lane {
        Lane::Raft => Err("heads talk over quic".to_owned()),
        Lane::SameMachine | Lane::LargeCall => Err("this is a local socket already".to_owned()),
        Lane::Control | Lane::Call | Lane::Bulk => Ok(()),
    };
    match accept_stream(stream, &cluster_id, judge).await {
        Ok((lane, stream)) => Some((lane, stream, peer)),
        Err(error) => {
            tracing::debug!(pid = peer.pid, %error, "local stream refused");
            None
        }
    }
}

/// Opens a stream to the process that listens at `path`.
pub async fn connect_local(
    path: &Path,
    cluster_id: &str,
    lane: Lane,
) -> Result<FramedStream, LocalError> {
    let failed = |source| LocalError::Socket {
        action: "connect to",
        path: path.to_owned(),
        source,
    };
    let stream = UnixStream::connect(path).await.map_err(failed)?;
    check_peer(&stream, path)?;
    let mut stream = FramedStream::local(stream, FrameLimits::of(lane)).map_err(failed)?;
    let hello = StreamHello::new(lane, cluster_id);
    stream
        .sender
        .send(FrameKind::Hello, &hello.encode())
        .await?;
    Ok(stream)
}

pub(crate) fn check_peer(stream: &UnixStream, path: &Path) -> Result<LocalPeer, LocalError> {
    let credentials = stream.peer_cred().map_err(|source| LocalError::Socket {
        action: "learn who is at",
        path: path.to_owned(),
        source,
    })?;
    let expected = rustix::process::geteuid().as_raw();
    match credentials.uid() {
        uid if uid == expected => Ok(LocalPeer {
            pid: credentials.pid(),
            uid,
        }),
        found => Err(LocalError::OtherUser {
            path: path.to_owned(),
            expected,
            found,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::ReceiveError;
    use mobula_wire::hello::HelloRefusal;

    #[tokio::test]
    async fn processes_of_one_user_talk() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let listener = LocalListener::bind(&path, "demo").unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let (client, server) = tokio::join!(
            connect_local(&path, "demo", Lane::Control),
            listener.accept()
        );
        let (mut client, (lane, mut server, peer)) = (client.unwrap(), server.unwrap());
        assert_eq!(lane, Lane::Control);
        assert_eq!(peer.pid, Some(std::process::id() as i32));
        client.sender.send_message("hello").await.unwrap();
        assert_eq!(
            server
                .receiver
                .receive_message::<String>()
                .await
                .unwrap()
                .unwrap(),
            "hello"
        );
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn another_cluster_is_refused_and_told_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let listener = LocalListener::bind(&path, "demo").unwrap();
        let mut client = connect_local(&path, "other", Lane::Control).await.unwrap();
        let answer = tokio::select! {
            answer = client.receiver.receive() => answer,
            accepted = listener.accept() => panic!("accepted {accepted:?}"),
        };
        assert!(matches!(
            answer,
            Err(ReceiveError::Refused(HelloRefusal::WrongCluster { .. }))
        ));
    }
}
