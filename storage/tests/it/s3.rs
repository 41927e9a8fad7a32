//! An S3 server over a temporary directory, on a free port of this machine.

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use mobula_storage::blob::{BlobStore, S3Options};
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

const ACCESS_KEY: &str = "mobula-test";
const SECRET_KEY: &str = "not-a-secret";
pub(crate) const BUCKET: &str = "bucket";

pub(crate) struct S3Server {
    endpoint: String,
    // Ends the server, and with it every connection, when the test ends.
    _server: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl S3Server {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(BUCKET)).unwrap();
        let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(dir.path()).unwrap());
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = service.build();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let mut server = JoinSet::new();
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                connections.spawn(async move {
                    let builder = Builder::new(TokioExecutor::new());
                    let _ = builder
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        S3Server {
            endpoint,
            _server: server,
            _dir: dir,
        }
    }

    pub(crate) fn options(&self) -> S3Options {
        S3Options {
            endpoint: Some(self.endpoint.clone()),
            region: Some("us-east-1".to_owned()),
            allow_http: true,
            access_key_id: Some(ACCESS_KEY.to_owned()),
            secret_access_key: Some(SECRET_KEY.to_owned()),
            session_token: None,
        }
    }

    pub(crate) fn open(&self, prefix: &str) -> BlobStore {
        BlobStore::open(&format!("s3://{BUCKET}/{prefix}"), &self.options()).unwrap()
    }
}
