//! Leases of workers: renewed in the leader's memory only, expired through the log.
//!
//! A new leader knows no renewals, so it gives every node a whole lease from its own start.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::control::Reader;
use mobula_core::id::{Incarnation, NodeId, SessionId};
use mobula_scheduler::{Command, Query, QueryResponse};
use tokio::time::Instant;

use crate::context::HeadContext;

/// How often leases are looked at.
const INTERVAL: Duration = Duration::from_millis(250);

/// Expires leases until it is ended.
pub(crate) async fn run(context: Arc<HeadContext>) {
    let lease = Duration::from_millis(context.limits.lease_ms);
    let suspect_after = Duration::from_millis(context.limits.suspect_ms);
    let mut suspects: BTreeMap<NodeId, Incarnation> = BTreeMap::new();
    // When each node's session was last seen, kept across sessions: a worker that reconnects
    // within its lease loses nothing.
    let mut seen: BTreeMap<(NodeId, Incarnation), Instant> = BTreeMap::new();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let before = context.sessions.lives();
        let reader = match context.raft.read().await {
            Ok(reader) => reader,
            Err(error) => {
                tracing::warn!(%error, "leases cannot be checked");
                continue;
            }
        };
        let live = live_nodes(&reader);
        drop(reader);
        // Most end with the loss itself, below; a worker may register just before it, and open its session
        // just after it.
        context.sessions.end_lost(&before, &live);
        seen.retain(|key, _| live.contains(key));
        for (node, incarnation) in live {
            let last = seen.entry((node, incarnation)).or_insert_with(Instant::now);
            if let Some(renewed) = context.sessions.last_renewal(node, incarnation) {
                *last = (*last).max(renewed);
            }
            let silence = last.elapsed();
            if silence >= lease {
                expire(&context, node, incarnation, silence).await;
            } else if silence >= suspect_after {
                if suspects.insert(node, incarnation) != Some(incarnation) {
                    tracing::warn!(%node, silence_ms = silence.as_millis() as u64, "worker is suspect");
                }
            } else {
                suspects.remove(&node);
            }
        }
    }
}

fn live_nodes(reader: &dyn Reader) -> Vec<(NodeId, Incarnation)> {
    match mobula_scheduler::answer(reader, 0, Query::ListNodes) {
        Ok(QueryResponse::Nodes(nodes)) => nodes
            .into_iter()
            .filter(|node| node.lost_ms.is_none())
            .map(|node| (node.node, node.incarnation))
            .collect(),
        _ => Vec::new(),
    }
}

async fn expire(context: &HeadContext, node: NodeId, incarnation: Incarnation, silence: Duration) {
    tracing::warn!(
        %node,
        silence_ms = silence.as_millis() as u64,
        lease_ms = context.limits.lease_ms,
        "lease ran out; declaring the node lost"
    );
    context.metrics.expired_lease();
    let command = Command::NodeLost { node, incarnation };
    match context
        .propose_scheduler(SessionId::INTERNAL, 0, &command)
        .await
    {
        // A worker that comes to again in its old session is to learn that it is another node now.
        Ok(_) => context.sessions.end(node, incarnation),
        Err(error) => {
            tracing::warn!(%node, %error, "the node could not be declared lost; trying again");
        }
    }
}
