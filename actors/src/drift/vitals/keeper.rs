//! What keeps a version's vitals in its monitor's process: takes what the actor is told, asks the sentinels, and tells
//! the head.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mobula::Cluster;
use mobula_core::error::ErrorCode;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::sentinels::{SENTINEL_INTERVAL, SENTINEL_PAUSE, SENTINEL_TIMEOUT, Sentinels};
use super::{Label, LabelReply, VitalsMonitor};
use crate::drift::client;
use crate::drift::log::tap::Tap;
use crate::drift::signals::VitalsReport;
use crate::drift::window::WindowMonitor;
use crate::registry::version_file::VersionFile;
use crate::serving;
use crate::serving::controller::replica_name;
use crate::serving::feed::{Observation, ObservedRequest};
use crate::serving::replica::{Replica, ReplicaCalls, classes_of};

/// How often the head is told while nothing begins: each report is a log entry.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// The pause before a report is sent again.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// Whose vitals these are.
#[derive(Debug, Clone)]
pub(in crate::drift) struct Identity {
    pub(in crate::drift) endpoint: String,
    pub(in crate::drift) model: String,
    pub(in crate::drift) version: u64,
    pub(in crate::drift) incarnation: u64,
}

/// Keeps vitals. Clones keep the same.
#[derive(Clone)]
pub(in crate::drift) struct Keeper {
    identity: Identity,
    monitor: Arc<Mutex<VitalsMonitor>>,
    sentinels: Arc<Sentinels>,
    signalled: Arc<Notify>,
}

impl Keeper {
    /// For a version, with slices like `window`, or the reason why there is none. Runs the version over its reference rows.
    pub(in crate::drift) fn new(
        identity: Identity,
        file: &VersionFile,
        window: &Result<WindowMonitor, String>,
    ) -> Self {
        let sentinels = Sentinels::of(file);
        Keeper {
            identity,
            monitor: Arc::new(Mutex::new(VitalsMonitor::new(file, &sentinels, window))),
            sentinels: Arc::new(sentinels),
            signalled: Arc::default(),
        }
    }

    /// Runs what this does by itself, in `tasks`; reports tell of `log` as well.
    pub(in crate::drift) fn spawn(&self, log: &Tap, tasks: &mut JoinSet<()>, cluster: &Cluster) {
        tasks.spawn(self.clone().send_reports(log.clone(), cluster.clone()));
        tasks.spawn(self.clone().ask_sentinels(cluster.clone()));
    }

    /// How many windows of slices it compared: none while windows rest.
    pub(in crate::drift) fn observe(&self, observation: &Observation, windows_rest: bool) -> u64 {
        self.with(|monitor| monitor.observe(observation, now_ms(), windows_rest))
    }

    /// Takes what other versions answered.
    pub(in crate::drift) fn observe_elsewhere(&self, requests: &[&ObservedRequest]) {
        let now_ms = now_ms();
        self.with(|monitor| {
            for request in requests {
                monitor.observe_elsewhere(request, now_ms);
            }
        });
    }

    pub(in crate::drift) fn label(&self, labels: &[Label]) -> LabelReply {
        self.with(|monitor| monitor.label(labels, now_ms()))
    }

    #[cfg(test)]
    pub(in crate::drift) fn vitals(&self) -> super::Vitals {
        self.monitor.lock().vitals()
    }

    fn with<T>(&self, change: impl FnOnce(&mut VitalsMonitor) -> T) -> T {
        let mut monitor: MutexGuard<'_, VitalsMonitor> = self.monitor.lock();
        let done = change(&mut monitor);
        if monitor.has_signals() {
            self.signalled.notify_one();
        }
        done
    }

    /// Tells the head: at once when something begins, else now and then.
    async fn send_reports(self, log: Tap, cluster: Cluster) {
        let mut sequence = 0;
        loop {
            let _ = tokio::time::timeout(REPORT_INTERVAL, self.signalled.notified()).await;
            if log.take_news() {
                self.monitor.lock().note_news();
            }
            let news = self.monitor.lock().take_news(now_ms());
            let Some((mut vitals, signals, signals_lost)) = news else {
                continue;
            };
            vitals.log = log.status();
            sequence += 1;
            let Identity {
                endpoint,
                model,
                version,
                incarnation,
            } = self.identity.clone();
            let report = VitalsReport {
                endpoint,
                model,
                version,
                incarnation,
                sequence,
                vitals,
                signals,
                signals_lost,
            };
            send_report(&cluster, report).await;
        }
    }

    /// Puts the sentinels to every replica, over and over.
    async fn ask_sentinels(self, cluster: Cluster) {
        if self.sentinels.count() == 0 {
            return;
        }
        loop {
            let pause = match self.ask_round(&cluster).await {
                Ok(true) => SENTINEL_INTERVAL,
                Ok(false) => SENTINEL_PAUSE,
                Err(error) => {
                    tracing::debug!(endpoint = self.identity.endpoint, %error, "no sentinels now");
                    SENTINEL_PAUSE
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Whether every replica answered.
    async fn ask_round(&self, cluster: &Cluster) -> mobula::Result<bool> {
        let Identity {
            endpoint, version, ..
        } = &self.identity;
        let known = serving::client::find(cluster, endpoint).await?;
        if known.version != *version || known.replicas == 0 {
            // Nobody is there to be asked: that is no failure.
            return Ok(true);
        }
        let mut has_all = true;
        for number in 1..=known.replicas {
            let name = replica_name(endpoint, *version, number);
            let answered = self.ask(cluster, &name).await;
            has_all &= answered.is_some();
            self.with(|monitor| {
                monitor.sentinel_answered(&self.sentinels, number, answered.as_deref());
            });
        }
        self.with(|monitor| monitor.sentinel_round_ended(known.replicas));
        Ok(has_all)
    }

    async fn ask(&self, cluster: &Cluster, name: &str) -> Option<Vec<u32>> {
        let asked = async {
            let replica = cluster.get_actor::<Replica>(name).await?;
            let asked = self.sentinels.batch();
            let answer = replica.infer(asked).timeout(SENTINEL_TIMEOUT).await;
            Ok::<_, mobula::Error>(answer?)
        };
        match asked.await {
            // Another answer than a classifier's is none to a sentinel.
            Ok(answer) => Some(classes_of(&answer.outputs).unwrap_or_default()),
            Err(error) => {
                tracing::debug!(name, %error, "a replica did not answer the sentinels");
                None
            }
        }
    }
}

async fn send_report(cluster: &Cluster, report: VitalsReport) {
    while let Err(error) = client::report_vitals(cluster, report.clone()).await {
        let is_final = matches!(
            error.code(),
            Some(ErrorCode::InvalidArgument | ErrorCode::Fenced | ErrorCode::PermissionDenied)
        );
        let sequence = report.sequence;
        tracing::warn!(sequence, %error, is_final, "a report of vitals was not taken");
        if is_final {
            return;
        }
        tokio::time::sleep(REPORT_PAUSE).await;
    }
}

/// Milliseconds since the Unix epoch.
pub(in crate::drift) fn now_ms() -> u64 {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}
