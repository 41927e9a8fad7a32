//! What writes the prediction log in a monitor's process: follows the policy, fills files, writes them, and deletes those
//! whose time is over, whether or not others are written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mobula::Cluster;
use mobula_storage::blob::BlobStore;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::files::{self, Pages};
use super::policy::LogPolicy;
use super::rows::{Layout, LogRows};
use super::{LogStatus, folder};
use crate::drift::client;
use crate::drift::vitals::keeper::{Identity, now_ms};
use crate::serving::feed::Observation;

/// How often it is asked whether there is a policy, and which.
const POLICY_INTERVAL: Duration = Duration::from_secs(5);

/// How often it is looked whether a file is old enough to be written.
const ROLL_INTERVAL: Duration = Duration::from_millis(500);

/// How often files whose time is over are deleted: for each the store lists all files of the endpoint.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3600);

/// Files that wait to be written, beside the one that is: further ones are shed.
const FULL_MAX: usize = 1;

/// How long a monitor that ends waits for its last file.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// How often it looks whether that is written.
const FLUSH_POLL: Duration = Duration::from_millis(20);

/// Rows on their way to a file.
struct Full {
    rows: LogRows,
    layout: Arc<Layout>,
}

struct Filling {
    policy: LogPolicy,
    layout: Arc<Layout>,
    rows: LogRows,
}

#[derive(Default)]
struct State {
    filling: Option<Filling>,
    status: LogStatus,
}

/// Takes what is answered. Clones are the same.
#[derive(Clone)]
pub(in crate::drift) struct Tap {
    identity: Identity,
    features: Arc<Vec<String>>,
    state: Arc<Mutex<State>>,
    full: mpsc::Sender<Full>,
    has_news: Arc<AtomicBool>,
}

impl Tap {
    /// A tap that is closed until there is a policy, with its tasks in `tasks`.
    pub(in crate::drift) fn spawn(
        identity: Identity,
        features: Vec<String>,
        blobs: BlobStore,
        tasks: &mut JoinSet<()>,
        cluster: &Cluster,
    ) -> Self {
        let (full, waiting) = mpsc::channel(FULL_MAX);
        let tap = Tap {
            identity,
            features: Arc::new(features),
            state: Arc::default(),
            full,
            has_news: Arc::default(),
        };
        tasks.spawn(tap.clone().follow_policy(cluster.clone()));
        tasks.spawn(tap.clone().roll_in_time());
        tasks.spawn(tap.clone().sweep_in_time(blobs.clone()));
        tasks.spawn(tap.clone().write(blobs, waiting));
        tap
    }

    /// Takes answered requests.
    pub(in crate::drift) fn observe(&self, observation: &Observation) {
        let mut state = self.state.lock();
        let State { filling, status } = &mut *state;
        let Some(filling) = filling else { return };
        let Filling {
            policy,
            layout,
            rows,
        } = filling;
        status.rows_sampled_out += rows.add(policy, layout, observation, now_ms());
        if rows.count() >= policy.roll_rows as usize || rows.bytes >= policy.roll_bytes {
            self.seal(filling, status);
        }
    }

    /// Where it stands, if there is a policy.
    pub(in crate::drift) fn status(&self) -> Option<LogStatus> {
        let state = self.state.lock();
        let filling = state.filling.as_ref()?;
        Some(LogStatus {
            rows_waiting: state.status.rows_waiting + filling.rows.count() as u64,
            ..state.status.clone()
        })
    }

    /// Whether something was written or failed since the last time.
    pub(in crate::drift) fn take_news(&self) -> bool {
        self.has_news.swap(false, Ordering::Relaxed)
    }

    /// Writes what there is, before the monitor ends.
    pub(in crate::drift) async fn flush(&self) {
        let full = {
            let mut state = self.state.lock();
            let State { filling, status } = &mut *state;
            filling.as_mut().and_then(|filling| take(filling, status))
        };
        let Some(full) = full else { return };
        let flushed = async {
            let _ = self.full.send(full).await;
            while self.state.lock().status.rows_waiting > 0 {
                tokio::time::sleep(FLUSH_POLL).await;
            }
        };
        if tokio::time::timeout(FLUSH_TIMEOUT, flushed).await.is_err() {
            tracing::warn!(
                endpoint = self.identity.endpoint,
                "a monitor ends before its last predictions are logged"
            );
        }
    }

    /// Sends what fills on to be written, and begins anew.
    fn seal(&self, filling: &mut Filling, status: &mut LogStatus) {
        let Some(full) = take(filling, status) else {
            return;
        };
        if let Err(error) = self.full.try_send(full) {
            let rows = error.into_inner().rows.count() as u64;
            status.rows_waiting -= rows;
            status.rows_shed += rows;
        }
        self.has_news.store(true, Ordering::Relaxed);
    }

    async fn follow_policy(self, cluster: Cluster) {
        loop {
            match client::log_policy(&cluster, &self.identity.endpoint).await {
                Ok(policy) => self.adopt(policy),
                Err(error) => {
                    tracing::debug!(%error, "whether predictions are logged is not known now");
                }
            }
            tokio::time::sleep(POLICY_INTERVAL).await;
        }
    }

    fn adopt(&self, policy: Option<LogPolicy>) {
        let mut state = self.state.lock();
        let State { filling, status } = &mut *state;
        if filling.as_ref().map(|filling| &filling.policy) == policy.as_ref() {
            return;
        }
        if let Some(filling) = filling {
            self.seal(filling, status);
        }
        let waiting = status.rows_waiting;
        *status = LogStatus {
            rows_waiting: waiting,
            ..LogStatus::default()
        };
        *filling = policy.map(|policy| {
            let layout = Arc::new(Layout::new(&policy, &self.features));
            status.unknown_features = layout.unknown;
            Filling {
                rows: LogRows::new(&layout, now_ms()),
                layout,
                policy,
            }
        });
        self.has_news.store(true, Ordering::Relaxed);
    }

    async fn roll_in_time(self) {
        loop {
            tokio::time::sleep(ROLL_INTERVAL).await;
            let mut state = self.state.lock();
            let State { filling, status } = &mut *state;
            if let Some(filling) = filling
                && now_ms().saturating_sub(filling.rows.began_ms) >= filling.policy.roll_ms
            {
                self.seal(filling, status);
            }
        }
    }

    /// Deletes files whose time is over while there is a policy, which says how long that is: also when nothing is asked, and so
    /// nothing written, any more. There may be very many of them, and rows do not wait for that.
    async fn sweep_in_time(self, blobs: BlobStore) {
        loop {
            let Some(keep_ms) = self.keep_ms() else {
                tokio::time::sleep(POLICY_INTERVAL).await;
                continue;
            };
            sweep(&blobs, &self.identity.endpoint, keep_ms).await;
            tokio::time::sleep(SWEEP_INTERVAL).await;
        }
    }

    /// For how long files are kept, if there is a policy.
    fn keep_ms(&self) -> Option<u64> {
        let state = self.state.lock();
        let filling = state.filling.as_ref()?;
        Some(filling.policy.keep_ms)
    }

    async fn write(self, blobs: BlobStore, mut waiting: mpsc::Receiver<Full>) {
        let mut sequence = 0u64;
        while let Some(full) = waiting.recv().await {
            sequence += 1;
            let count = full.rows.count() as u64;
            let written = self.write_file(&blobs, &full, sequence).await;
            {
                let status = &mut self.state.lock().status;
                status.rows_waiting = status.rows_waiting.saturating_sub(count);
                match written {
                    Ok(bytes) => {
                        status.rows += count;
                        status.files += 1;
                        status.bytes += bytes;
                    }
                    Err(error) => {
                        tracing::warn!(
                            endpoint = self.identity.endpoint,
                            error,
                            "predictions are not logged"
                        );
                        status.rows_shed += count;
                        status.last_error = Some(error);
                    }
                }
            }
            self.has_news.store(true, Ordering::Relaxed);
        }
    }

    async fn write_file(
        &self,
        blobs: &BlobStore,
        full: &Full,
        sequence: u64,
    ) -> Result<u64, String> {
        let Identity {
            endpoint,
            version,
            incarnation,
            ..
        } = &self.identity;
        let file =
            tokio::task::block_in_place(|| full.rows.to_parquet(&full.layout, endpoint, *version))
                .map_err(|error| cut(&error.to_string()))?;
        let bytes = file.len() as u64;
        let path = format!(
            "{}/v{version}/{}-{incarnation}-{sequence}.parquet",
            folder(endpoint),
            full.rows.began_ms
        );
        // The name is this start's own, so one that is taken is our own write whose answer was lost.
        blobs
            .put_if_absent(&path, file.into())
            .await
            .map_err(|error| cut(&error.to_string()))?;
        Ok(bytes)
    }
}

/// Deletes files of an endpoint whose time is over.
async fn sweep(blobs: &BlobStore, endpoint: &str, keep_ms: u64) {
    if let Err(error) = files::sweep(Pages::of(blobs, endpoint), keep_ms, now_ms()).await {
        tracing::warn!(
            endpoint,
            %error,
            "the prediction log cannot be listed, so old files of it stay until the next time"
        );
    }
}

/// What fills, if that is anything, counted as waiting.
fn take(filling: &mut Filling, status: &mut LogStatus) -> Option<Full> {
    let fresh = LogRows::new(&filling.layout, now_ms());
    let rows = std::mem::replace(&mut filling.rows, fresh);
    if rows.count() == 0 {
        return None;
    }
    status.rows_waiting += rows.count() as u64;
    Some(Full {
        rows,
        layout: Arc::clone(&filling.layout),
    })
}

/// An error's text, short enough to report.
fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
