//! A real head in the test's own process, whose clock and loops the test can set.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mobula::Cluster;
use mobula_core::clock::Clock;
use mobula_core::config::Config;
use mobula_head::raft::RaftHandle;
use mobula_head::{CLIENT_TOKEN_FILE, Head, HeadError, HeadOptions};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::support::LIMIT;

/// One head without workers.
pub(crate) struct InProcessHead {
    dir: tempfile::TempDir,
    api_address: String,
    raft: RaftHandle,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), HeadError>>,
}

impl InProcessHead {
    /// Starts it with what `set` changes.
    pub(crate) async fn start(
        clock: Arc<dyn Clock>,
        set: impl FnOnce(&mut HeadOptions),
    ) -> InProcessHead {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.head.data_dir = dir.path().join("head").display().to_string();
        config.head.api_listen = "127.0.0.1:0".into();
        config.head.cluster_listen = "127.0.0.1:0".into();
        config.storage.url = format!("file://{}", dir.path().join("store").display());
        let mut options = HeadOptions::from_config(&config, clock).unwrap();
        set(&mut options);
        let head = Head::start(options).await.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        InProcessHead {
            dir,
            api_address: head.api_address().to_string(),
            raft: head.raft(),
            stop,
            running: tokio::spawn(head.run(async move {
                // A dropped sender is a stop as well.
                let _ = stopped.await;
            })),
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The log, for what only a head proposes.
    pub(crate) fn raft(&self) -> &RaftHandle {
        &self.raft
    }

    /// A client, as soon as the head leads.
    pub(crate) async fn client(&self) -> Cluster {
        let path = self.dir().join("head").join(CLIENT_TOKEN_FILE);
        let token = async {
            loop {
                // It is renamed into place, so that what is there is whole.
                if let Ok(text) = std::fs::read_to_string(&path) {
                    return text;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let token = tokio::time::timeout(LIMIT, token).await.unwrap();
        Cluster::connect(&self.api_address, token.trim())
            .await
            .unwrap()
    }

    /// Ends it, in order.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        tokio::time::timeout(LIMIT, self.running)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}
