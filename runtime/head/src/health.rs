//! Leases of workers: renewed in the leader's memory only, expired through the log.
//!
//! A new leader knows no renewals, so it gives every node a whole lease from its own start. So does one that has
//! not run for a while (its process or its machine was stopped): what was said to it meanwhile is still to be read.

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

/// A leader that has not come to look for this share of a lease was stopped, or as good as stopped.
const STOPPED_SHARE: u32 = 5;

/// Since when this process has run without being stopped, as far as its own clock tells.
#[derive(Debug)]
struct Attention {
    looked: Instant,
    since: Instant,
    /// A longer gap between two looks is a stop.
    gap_max: Duration,
}

impl Attention {
    fn new(now: Instant, lease: Duration) -> Self {
        Attention {
            looked: now,
            since: now,
            gap_max: INTERVAL + lease / STOPPED_SHARE,
        }
    }

    /// To be called every [`INTERVAL`].
    fn look(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(std::mem::replace(&mut self.looked, now));
        if gap > self.gap_max {
            let stopped_ms = gap.as_millis() as u64;
            tracing::warn!(stopped_ms, "this head was stopped; leases begin anew");
            self.since = now;
        }
    }

    /// Waits for `future`, and looks meanwhile.
    async fn during<T>(&mut self, future: impl Future<Output = T>) -> T {
        tokio::pin!(future);
        loop {
            tokio::select! {
                value = &mut future => {
                    self.look(Instant::now());
                    return value;
                }
                () = tokio::time::sleep(INTERVAL) => self.look(Instant::now()),
            }
        }
    }
}

/// Expires leases until it is ended.
pub(crate) async fn run(context: Arc<HeadContext>) {
    let lease = Duration::from_millis(context.limits.lease_ms);
    let suspect_after = Duration::from_millis(context.limits.suspect_ms);
    let mut suspects: BTreeMap<NodeId, Incarnation> = BTreeMap::new();
    // When each node's session was last seen, kept across sessions: a worker that reconnects
    // within its lease loses nothing.
    let mut seen: BTreeMap<(NodeId, Incarnation), Instant> = BTreeMap::new();
    let mut attention = Attention::new(Instant::now(), lease);
    loop {
        attention.during(tokio::time::sleep(INTERVAL)).await;
        let before = context.sessions.lives();
        let reader = match attention.during(context.raft.read()).await {
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
        // One moment for all: if this process is stopped from here on, nobody's silence grows by it.
        let now = Instant::now();
        attention.look(now);
        for (node, incarnation) in live {
            let last = seen.entry((node, incarnation)).or_insert(now);
            if let Some(renewed) = context.sessions.last_renewal(node, incarnation) {
                *last = (*last).max(renewed);
            }
            let silence = now.saturating_duration_since((*last).max(attention.since));
            if silence >= lease {
                attention
                    .during(expire(&context, node, incarnation, silence))
                    .await;
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

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(10);

    #[test]
    fn a_process_that_was_stopped_counts_from_when_it_went_on() {
        let begun = Instant::now();
        let mut attention = Attention::new(begun, LEASE);
        let mut now = begun;
        // As slow as a busy machine makes it.
        for _ in 0..20 {
            now += INTERVAL * 5;
            attention.look(now);
        }
        assert_eq!(attention.since, begun);
        now += 3 * LEASE;
        attention.look(now);
        assert_eq!(attention.since, now);
        attention.look(now + INTERVAL);
        assert_eq!(attention.since, now);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_something_slow_is_not_being_stopped() {
        let begun = Instant::now();
        let mut attention = Attention::new(begun, LEASE);
        attention.during(tokio::time::sleep(2 * LEASE)).await;
        assert_eq!(attention.since, begun);
        assert_eq!(begun.elapsed(), 2 * LEASE);
    }
}
