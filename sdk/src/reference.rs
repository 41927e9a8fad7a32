//! Finding an actor, whichever start of it lives now, and putting calls on their way to it.
//!
//! Invariants:
//! 1. Where an actor lives is looked up once and kept until a call shows that it moved.
//! 2. Calls through one reference enter the transport in the order in which they began.

use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::{CallError, Executed};
use mobula_core::id::{ActorId, Incarnation, NodeId};
use mobula_core::order::ActorAddress;
use mobula_host::client::{CallClient, CallRoute, OutgoingCall, PendingCall, PendingStream};
use mobula_wire::control as api;

use crate::cluster::Cluster;
use crate::error::{Error, Result};

/// How long one question to the head waits for a restarted actor before we look again.
const RESOLVE_WAIT: Duration = Duration::from_secs(5);

/// How long to wait for a newer start before the same one is tried again.
const SAME_START_WAIT: Duration = Duration::from_millis(500);

/// Between two questions, in case the head answers at once that it is not decided yet.
const PAUSE: Duration = Duration::from_millis(20);

/// A reference without the actor's type.
#[derive(Clone)]
pub(crate) struct UntypedRef(Arc<RefInner>);

struct RefInner {
    id: ActorId,
    cluster: Option<Cluster>,
    /// Held while a call is put on its way, so that calls keep their order.
    route: tokio::sync::Mutex<Route>,
}

#[derive(Default)]
struct Route {
    known: Option<CallRoute>,
    /// A start that did not take a call; a newer one is hoped for.
    failed: Option<Incarnation>,
}

impl UntypedRef {
    pub(crate) fn new(id: ActorId, cluster: Option<Cluster>) -> Self {
        UntypedRef(Arc::new(RefInner {
            id,
            cluster,
            route: tokio::sync::Mutex::default(),
        }))
    }

    pub(crate) fn id(&self) -> ActorId {
        self.0.id
    }

    pub(crate) fn cluster(&self) -> Result<Cluster> {
        match &self.0.cluster {
            Some(cluster) => Ok(cluster.clone()),
            None => Cluster::current().ok_or_else(|| {
                Error::NotInCluster(format!(
                    "{} was received outside a cluster's process: use ActorRef::from_id with a \
                     connected cluster",
                    self.0.id
                ))
            }),
        }
    }

    /// Puts a call on its way to the actor's present start, and says which that is.
    pub(crate) async fn start(
        &self,
        cluster: &Cluster,
        call: OutgoingCall,
    ) -> Result<(Incarnation, PendingCall)> {
        let calls = client(cluster).await?;
        let mut route = self.0.route.lock().await;
        let known = self.find(cluster, &mut route).await?;
        let pending = calls.start_on(known, call).await;
        Ok((known.incarnation(), pending))
    }

    /// The same for a call that brings several values, of which `window` may wait here.
    pub(crate) async fn start_stream(
        &self,
        cluster: &Cluster,
        call: OutgoingCall,
        window: u32,
    ) -> Result<(Incarnation, PendingStream)> {
        let calls = client(cluster).await?;
        let mut route = self.0.route.lock().await;
        let known = self.find(cluster, &mut route).await?;
        let pending = calls.start_stream_on(known, call, window).await;
        Ok((known.incarnation(), pending))
    }

    /// The same if nothing has to be waited for, as is nearly always so: the actor is where it was,
    /// and there is room for the call.
    pub(crate) fn start_now(
        &self,
        cluster: &Cluster,
        call: &OutgoingCall,
    ) -> Option<(Incarnation, PendingCall)> {
        // Fails if somebody waits for the route: this call's place is behind that one's.
        let route = self.0.route.try_lock().ok()?;
        let known = route.known.as_ref()?;
        let calls = cluster.ready_calls()?;
        let pending = calls.try_start_on(known, &mut Some(call.clone()))?;
        Some((known.incarnation(), pending))
    }

    async fn find<'a>(&self, cluster: &Cluster, route: &'a mut Route) -> Result<&'a CallRoute> {
        if route.known.is_none() {
            // Rare, and large: boxed, so that it is no part of every call.
            let resolving = Box::pin(resolve(cluster, self.0.id, route.failed));
            route.known = Some(CallRoute::new(&resolving.await?)?);
        }
        Ok(route.known.as_ref().expect("it was put there just now"))
    }

    /// Has the next call look for a newer start than this one.
    pub(crate) async fn mark_failed(&self, start: Incarnation) {
        let mut route = self.0.route.lock().await;
        if route
            .known
            .as_ref()
            .is_some_and(|known| known.incarnation() == start)
        {
            route.known = None;
        }
        route.failed = route.failed.max(Some(start));
    }
}

/// The client for calls, which a process outside the cluster may have to join for first.
async fn client(cluster: &Cluster) -> Result<CallClient> {
    match cluster.ready_calls() {
        Some(calls) => Ok(calls.clone()),
        None => Box::pin(cluster.calls()).await,
    }
}

/// Where an actor takes calls now. After `failed` a newer start is waited for a little, in case the
/// head has not yet seen the end of that one.
async fn resolve(
    cluster: &Cluster,
    id: ActorId,
    failed: Option<Incarnation>,
) -> Result<ActorAddress> {
    let mut known = match failed {
        Some(failed) => cluster.resolve_actor(id, failed, SAME_START_WAIT).await?,
        None => cluster.inner.resolutions.find(cluster, id).await?,
    };
    loop {
        if let Some(address) = address_of(id, &known)? {
            return Ok(address);
        }
        // It is on its way: whatever start comes will do, and the head tells us when.
        tokio::time::sleep(PAUSE).await;
        let after = failed.unwrap_or(Incarnation(0));
        known = cluster.resolve_actor(id, after, RESOLVE_WAIT).await?;
    }
}

/// The end of an actor, as the error of a call to it; `name` is what the error calls it.
pub(crate) fn error_of_end(name: String, actor: &api::Actor, executed: Executed) -> CallError {
    let reason = actor.exit_reason.as_deref().unwrap_or("no reason is known");
    match actor.exit_code.as_deref() {
        Some("node_lost") => CallError::NodeLost {
            actor: name,
            node: actor
                .node
                .map_or_else(|| "its node".to_owned(), |node| NodeId(node).to_string()),
            executed,
        },
        Some("out_of_memory") => CallError::OutOfMemory {
            what: name,
            // The error's own text says what it ran out of.
            reason: reason
                .strip_prefix("out of memory: ")
                .unwrap_or(reason)
                .to_owned(),
            executed,
        },
        _ => CallError::ActorDied {
            actor: name,
            reason: reason.to_owned(),
            executed,
        },
    }
}

/// The address in the head's answer; `None` while the actor is on its way.
pub(crate) fn address_of(id: ActorId, actor: &api::Actor) -> Result<Option<ActorAddress>> {
    if actor.state == "ended" {
        let error = error_of_end(id.to_string(), actor, Executed::No);
        return Err(Error::Call(error));
    }
    let (Some(node), Some(incarnation), Some(call_address)) =
        (actor.node, actor.incarnation, actor.call_address.clone())
    else {
        return Ok(None);
    };
    if actor.state != "running" && actor.state != "stopping" {
        return Ok(None);
    }
    Ok(Some(ActorAddress {
        actor: id,
        incarnation: Incarnation(incarnation),
        node: NodeId(node),
        call_address,
    }))
}

#[cfg(test)]
mod tests {
    use mobula_core::exit::ExitReason;

    use super::*;

    #[test]
    fn an_address_is_taken_from_what_runs_only() {
        let running = api::Actor {
            state: "running".into(),
            node: Some(2),
            incarnation: Some(9),
            call_address: Some("127.0.0.1:5".into()),
            ..Default::default()
        };
        let address = address_of(ActorId(1), &running).unwrap().unwrap();
        assert_eq!(
            (address.incarnation, address.node),
            (Incarnation(9), NodeId(2))
        );
        let assigned = api::Actor {
            state: "assigned".into(),
            ..running.clone()
        };
        assert_eq!(address_of(ActorId(1), &assigned).unwrap(), None);
        let ended = api::Actor {
            state: "ended".into(),
            exit_reason: Some("panicked: x".into()),
            ..running
        };
        let error = address_of(ActorId(1), &ended).unwrap_err();
        assert_eq!(
            error.to_string(),
            "actor-1 has ended: panicked: x (not executed)"
        );
    }

    #[test]
    fn each_end_has_its_own_error() {
        let error = |reason: &ExitReason| {
            let actor = api::Actor {
                state: "ended".into(),
                exit_code: Some(reason.code().to_owned()),
                exit_reason: Some(reason.to_string()),
                ..Default::default()
            };
            address_of(ActorId(1), &actor).unwrap_err()
        };
        let limit = ExitReason::OutOfMemory {
            limit_bytes: 64,
            used_bytes: 70,
        };
        for (reason, expected) in [
            (
                ExitReason::NodeLost,
                "actor-1 was lost with its node (not executed)",
            ),
            (
                limit,
                "actor-1 ran out of memory: limit 64 bytes, used 70 bytes (not executed)",
            ),
            (
                ExitReason::HostExited(3),
                "actor-1 has ended: host process exited with code 3 (not executed)",
            ),
        ] {
            let error = error(&reason);
            assert_eq!(error.to_string(), expected);
            assert!(error.actor_has_ended(), "{error}");
        }
    }
}
