//! An S3 server over a temporary folder, on a port of this machine that may be closed at first.

use std::net::SocketAddr;
use std::path::PathBuf;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::files_under;

pub(super) const BUCKET: &str = "bucket";
pub(super) const PREFIX: &str = "clusters/one";
pub(super) const ACCESS_KEY: &str = "mobula-test";
pub(super) const SECRET_KEY: &str = "not-a-secret";

/// Connections that wait to be accepted.
const BACKLOG: u32 = 64;

/// The address of an S3 server that does not answer yet: its port is taken, so that nobody else
/// gets it, but connections to it are refused.
pub(super) struct ClosedPort {
    socket: TcpSocket,
    pub(super) address: SocketAddr,
}

impl ClosedPort {
    pub(super) fn take() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        ClosedPort { socket, address }
    }
}

/// An S3 server over a folder, until it is dropped.
pub(super) struct S3Server {
    folder: tempfile::TempDir,
    // Ends the server and its connections when dropped.
    _runtime: Runtime,
}

impl S3Server {
    pub(super) fn start(port: ClosedPort) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(BUCKET)).unwrap();
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder.path()).unwrap());
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener: TcpListener = {
            let _entered = runtime.enter();
            port.socket.listen(BACKLOG).unwrap()
        };
        runtime.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                connections.spawn(async move {
                    // A client that goes away is no concern of the server.
                    let _ = Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        S3Server {
            folder,
            _runtime: runtime,
        }
    }

    /// The files under a folder of the cluster's prefix.
    pub(super) fn files(&self, folder: &str) -> Vec<PathBuf> {
        files_under(&self.folder.path().join(BUCKET).join(PREFIX).join(folder))
    }
}
