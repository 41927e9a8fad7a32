//! All heads away at once: what runs goes on without them, and is adopted when they are back.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mobula_wire::control::MetricsRequest;
use tokio::task::block_in_place;

use super::cluster::RealCluster;
use super::injector::{Injector, text, turn};
use super::node::{Node, NodeError};
use super::timeline::Planned;

/// How long the cluster may take to be whole again before that counts as never.
const WHOLE_MAX: Duration = Duration::from_secs(60);

/// How often is asked whether it is.
const ASK_INTERVAL: Duration = Duration::from_millis(20);

impl Injector {
    /// Kills every head, starts all of them when the time is over, and takes how long it is from then until
    /// one leads and every worker answers through it.
    pub(super) async fn black_out(&self, planned: &Planned) -> Result<(), String> {
        let heads = self.cluster.heads();
        let turns: Result<Vec<_>, _> = heads.iter().map(|head| turn(head)).collect();
        let _turns = turns?;
        let (at, wall) = (self.began.elapsed(), SystemTime::now());
        let killed: Result<(), NodeError> =
            block_in_place(|| heads.iter().try_for_each(|head| head.kill()));
        // What was killed is started again, also when another could not be.
        tokio::time::sleep(planned.lasts).await;
        let back = Instant::now();
        for head in heads {
            head.start().map_err(text)?;
        }
        killed.map_err(text)?;
        for head in heads {
            head.wait_ready().await.map_err(text)?;
        }
        let whole = tokio::time::timeout(WHOLE_MAX, answered_by_all(&self.cluster));
        whole.await.map_err(|_| {
            let limit = WHOLE_MAX.as_secs();
            format!("{limit} s after the heads are back, not every worker answers through them")
        })?;
        let reconciled = back.elapsed();
        self.done_with_all(planned.kind, at, wall, reconciled);
        Ok(())
    }
}

/// Waits until each worker has answered a question that the leader passed on to it.
async fn answered_by_all(cluster: &Arc<RealCluster>) {
    for worker in cluster.workers() {
        while !answers(cluster, worker).await {
            tokio::time::sleep(ASK_INTERVAL).await;
        }
    }
}

async fn answers(cluster: &RealCluster, worker: &Node) -> bool {
    let node = worker.name().to_owned();
    let asked = cluster.admin().control().read("metrics", |mut api| {
        let request = MetricsRequest { node: node.clone() };
        async move { api.metrics(request).await }
    });
    asked.await.is_ok()
}
