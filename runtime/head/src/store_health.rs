//! Whether the object store answers this head.

use std::time::Duration;

use mobula_storage::blob::BlobStore;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// A name that is asked for to see whether the store answers; it need not exist.
const PROBE_PATH: &str = "probe/status";

/// How long a store may take to answer before it counts as one that does not.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an answer is good for whoever asks about a job: many may, many times a second.
const REMEMBERED: Duration = Duration::from_secs(2);

/// The store as this head sees it.
pub(crate) struct StoreHealth {
    blobs: BlobStore,
    /// When it was asked, and what it said; locked while it is being asked, so that one asks.
    last: Mutex<Option<(Instant, Option<String>)>>,
}

impl StoreHealth {
    pub(crate) fn new(blobs: BlobStore) -> Self {
        StoreHealth {
            blobs,
            last: Mutex::default(),
        }
    }

    /// What is wrong with it, asked now.
    pub(crate) async fn problem_now(&self) -> Option<String> {
        match tokio::time::timeout(PROBE_TIMEOUT, self.blobs.head(PROBE_PATH)).await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!(
                "{} does not answer within {} s",
                self.blobs.url(),
                PROBE_TIMEOUT.as_secs()
            )),
        }
    }

    /// The same, as it was a moment ago.
    pub(crate) async fn problem(&self) -> Option<String> {
        let mut last = self.last.lock().await;
        if let Some((asked, said)) = &*last
            && asked.elapsed() < REMEMBERED
        {
            return said.clone();
        }
        let said = self.problem_now().await;
        *last = Some((Instant::now(), said.clone()));
        said
    }
}
