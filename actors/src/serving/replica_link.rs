//! From an arm of the router to what it has to do with: finds the replicas, watches them, feeds the monitor, and asks the
//! registry about the version.

use std::sync::Arc;
use std::time::Duration;

use mobula::{ActorRef, CallFailure, Cluster};
use mobula_core::error::CallError;
use mobula_core::id::{ActorId, Incarnation, NodeId};
use tokio::sync::watch;

use super::arm::Origin;
use super::feed::FeedReader;
use super::fleet::{BATCH_TIMEOUT, Backend, BackendFailure, Berth};
use super::replica::{InferError, Inference, Replica, ReplicaCalls};
use super::rows::Batch;
use crate::drift::monitor::{Monitor, MonitorCalls};
use crate::registry::client as registry;

/// How long a probe of a replica waits; it includes waiting for a replica that is being started.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long one question to the head waits for news of a replica.
const WATCH_WAIT: Duration = Duration::from_secs(30);

/// The first pause before a replica that does not answer yet is asked again; it doubles up to [`RETRY_PAUSE`]. Of an endpoint that
/// wakes the router often knows before there is an actor of that name, and a request waits for it.
const PROBE_PAUSE_FIRST: Duration = Duration::from_millis(2);

/// The pause after something that could not be done now.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// How often the registry is asked who has signed a version: signatures come by hand, and answers may name them a little
/// later.
const ORIGIN_INTERVAL: Duration = Duration::from_secs(30);

/// How long the monitor may take for a call, its start included.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(10);

/// Finds a replica and opens its berth; again whenever it has failed or was started again, until it is
/// wanted no more.
pub(super) async fn keep_open(
    cluster: Cluster,
    name: String,
    berth: Arc<Berth<ActorRef<Replica>>>,
) {
    tokio::select! {
        () = berth.retired() => {}
        () = find_again_and_again(&cluster, &name, &berth) => {}
    }
}

async fn find_again_and_again(cluster: &Cluster, name: &str, berth: &Berth<ActorRef<Replica>>) {
    let mut known: Option<ActorId> = None;
    let mut pause = PROBE_PAUSE_FIRST;
    loop {
        match probe(cluster, name, known).await {
            Ok((replica, incarnation)) => {
                let id = replica.actor_id();
                known = Some(id);
                pause = PROBE_PAUSE_FIRST;
                berth.open(replica);
                tokio::select! {
                    () = berth.failed() => {}
                    () = ended(cluster, id, incarnation, berth) => berth.close(),
                }
            }
            Err(error) => {
                tracing::debug!(name, %error, "a replica does not answer yet");
                if error.actor_has_ended() {
                    known = None;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_PAUSE);
            }
        }
    }
}

/// A replica that answers, by a new reference: an old one remembers where it was.
async fn probe(
    cluster: &Cluster,
    name: &str,
    known: Option<ActorId>,
) -> mobula::Result<(ActorRef<Replica>, Incarnation)> {
    let replica = match known {
        Some(id) => ActorRef::from_id(cluster, id),
        None => cluster.get_actor::<Replica>(name).await?,
    };
    let incarnation = replica.ping().timeout(PROBE_TIMEOUT).await?;
    Ok((replica, incarnation))
}

/// Waits until the head knows that this start of a replica is over: it learns of a lost process
/// long before a caller does. Before that it says where this start runs.
async fn ended(
    cluster: &Cluster,
    id: ActorId,
    incarnation: Incarnation,
    berth: &Berth<ActorRef<Replica>>,
) {
    let mut is_placed = false;
    loop {
        let (after, wait) = if is_placed {
            (incarnation, WATCH_WAIT)
        } else {
            (Incarnation(0), Duration::ZERO)
        };
        match cluster.resolve_actor(id, after, wait).await {
            Ok(actor) => {
                let is_newer = actor
                    .incarnation
                    .is_some_and(|newest| newest > incarnation.0);
                if is_newer || actor.state == "ended" {
                    return;
                }
                if !is_placed
                    && actor.incarnation == Some(incarnation.0)
                    && let Some(node) = actor.node
                {
                    berth.runs_on(NodeId(node));
                }
                is_placed = true;
            }
            // Without a head the replica is judged by its answers alone.
            Err(error) => {
                tracing::debug!(%id, %error, "a replica cannot be watched now");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

impl Backend for ActorRef<Replica> {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        self.infer_within(rows, BATCH_TIMEOUT).await
    }

    async fn infer_within(
        &self,
        rows: Batch,
        limit: Duration,
    ) -> Result<Inference, BackendFailure> {
        // The call carries its deadline: a replica does not begin what nobody waits for any more. And a batch is called back when
        // all of its callers have gone before the answer.
        let call = ReplicaCalls::infer(self, rows);
        Ok(call.timeout(limit).cancel_on_drop().await?)
    }
}

impl From<CallFailure<InferError>> for BackendFailure {
    fn from(failure: CallFailure<InferError>) -> Self {
        match failure {
            CallFailure::User(InferError::RowsRefused(rows)) => BackendFailure::RowsRefused(rows),
            CallFailure::User(InferError::RowsFailed(rows)) => BackendFailure::RowsFailed(rows),
            CallFailure::User(InferError::OutputsTooLarge { size_bytes, .. }) => {
                BackendFailure::OutputsTooLarge(size_bytes)
            }
            CallFailure::User(error) => BackendFailure::Refused(error.to_string()),
            CallFailure::System(mobula::Error::Call(
                CallError::DeadlineExceeded { .. } | CallError::Cancelled { .. },
            )) => BackendFailure::Late,
            CallFailure::System(error) => BackendFailure::Lost(error.to_string()),
        }
    }
}

/// Keeps up with what the registry knows of a version: a stage may be signed while it answers.
pub(super) async fn follow_origin(
    cluster: Cluster,
    model: String,
    version: u64,
    learnt: watch::Sender<Origin>,
) {
    loop {
        let pause = match origin(&cluster, &model, version).await {
            Ok(origin) => {
                learnt.send_replace(origin);
                ORIGIN_INTERVAL
            }
            Err(error) => {
                tracing::debug!(model, version, %error, "the registry does not answer");
                RETRY_PAUSE
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn origin(cluster: &Cluster, model: &str, version: u64) -> mobula::Result<Origin> {
    let known = registry::version(cluster, model, Some(version)).await?;
    let signed = registry::signed(cluster, model, version).await?;
    let signatures = signed.map_or(Vec::new(), |edge| edge.promotion.signatures);
    Ok(Origin {
        digest: Some(known.description.digest),
        signers: signatures
            .into_iter()
            .map(|signature| signature.key)
            .collect(),
    })
}

/// Sends what was answered to the monitor. Whatever does not arrive is dropped and counted.
pub(super) async fn feed_monitor(cluster: Cluster, name: String, mut reader: FeedReader) {
    let mut known: Option<ActorRef<Monitor>> = None;
    while let Some(observation) = reader.next().await {
        let rows = observation.classes.len() as u64;
        let dropped = reader.take_dropped();
        let sending = async {
            let monitor = match known.take() {
                Some(monitor) => monitor,
                None => cluster.get_actor::<Monitor>(&name).await?,
            };
            monitor
                .observe(observation, dropped)
                .timeout(MONITOR_TIMEOUT)
                .await?;
            Ok::<_, mobula::Error>(monitor)
        };
        match sending.await {
            Ok(monitor) => known = Some(monitor),
            Err(error) => {
                tracing::warn!(name, rows, %error, "the monitor misses rows");
                reader.count_dropped(rows + dropped);
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}
