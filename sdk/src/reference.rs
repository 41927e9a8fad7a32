//! Finding an actor and sending it a call, whichever start of it lives now.
//!
//! Invariants:
//! 1. Where an actor lives is looked up once and kept until a call shows that it moved.
//! 2. A call whose answer says *not executed* is sent to the actor's present start, within the
//!    call's time; every other failure is the caller's to judge.
//! 3. Calls through one reference enter the transport in the order in which they began.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::{ActorId, Incarnation, NodeId};
use mobula_core::order::ActorAddress;
use mobula_host::client::{OutgoingCall, PendingCall};
use mobula_host::mailbox::Deadline;
use mobula_wire::control as api;
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::error::{Error, Result};

/// How long one question to the head waits for a restarted actor before we look again.
const RESOLVE_WAIT: Duration = Duration::from_secs(5);

/// How long an actor that the head calls running may stay out of reach before a call without a
/// timeout gives up; a lost node is replaced well before.
const UNREACHABLE_MAX: Duration = Duration::from_secs(60);

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
    address: Option<ActorAddress>,
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

    pub(crate) async fn call(
        &self,
        method: &'static str,
        arguments: Bytes,
        timeout: Option<Duration>,
    ) -> Result<Bytes> {
        let cluster = self.cluster()?;
        let deadline = timeout.and_then(|timeout| {
            let limit_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            Some(Deadline {
                at: Instant::now().checked_add(timeout)?,
                limit_ms,
            })
        });
        let mut unreachable_since: Option<(Incarnation, Instant)> = None;
        loop {
            // Within the deadline: the call has not begun, so giving up is harmless.
            let starting = self.start(&cluster, method, &arguments, deadline);
            let (start, pending) = match deadline {
                None => starting.await?,
                Some(limit) => {
                    tokio::time::timeout_at(limit.at, starting)
                        .await
                        .map_err(|_| CallError::DeadlineExceeded {
                            actor: self.0.id.to_string(),
                            limit_ms: limit.limit_ms,
                            executed: Executed::No,
                        })??
                }
            };
            let error = match pending.answer().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if !matches!(
                error,
                CallError::ActorUnavailable { .. } | CallError::Panicked(_)
            ) {
                return Err(error.into());
            }
            // Another caller may hold the route for as long as the actor is pending; this call's
            // own time is not to be spent on that.
            let marking = self.mark_failed(start);
            match deadline {
                // In vain is no harm: the next call finds the failure by itself.
                Some(limit) => drop(tokio::time::timeout_at(limit.at, marking).await),
                None => marking.await,
            }
            if !matches!(
                error,
                CallError::ActorUnavailable {
                    executed: Executed::No,
                    ..
                }
            ) {
                return Err(error.into());
            }
            let since = match unreachable_since {
                Some((same, since)) if same == start => since,
                _ => Instant::now(),
            };
            if since.elapsed() > UNREACHABLE_MAX {
                return Err(error.into());
            }
            unreachable_since = Some((start, since));
        }
    }

    /// Puts a call on its way to the actor's present start, and says which that is.
    async fn start(
        &self,
        cluster: &Cluster,
        method: &'static str,
        arguments: &Bytes,
        deadline: Option<Deadline>,
    ) -> Result<(Incarnation, PendingCall)> {
        let calls = cluster.calls().await?;
        let mut route = self.0.route.lock().await;
        let address = match &route.address {
            Some(address) => address.clone(),
            None => {
                let address = resolve(cluster, self.0.id, route.failed).await?;
                route.address.insert(address).clone()
            }
        };
        let call = OutgoingCall::new(method, arguments.clone()).with_deadline(deadline);
        let pending = calls.start(&address, call).await;
        drop(route);
        Ok((address.incarnation, pending))
    }

    async fn mark_failed(&self, start: Incarnation) {
        let mut route = self.0.route.lock().await;
        if route
            .address
            .as_ref()
            .is_some_and(|address| address.incarnation == start)
        {
            route.address = None;
        }
        route.failed = route.failed.max(Some(start));
    }
}

/// Where an actor takes calls now. After `failed` a newer start is waited for a little, in case the
/// head has not yet seen the end of that one.
async fn resolve(
    cluster: &Cluster,
    id: ActorId,
    failed: Option<Incarnation>,
) -> Result<ActorAddress> {
    let (mut after, mut wait) = match failed {
        Some(failed) => (failed.0, SAME_START_WAIT),
        None => (0, RESOLVE_WAIT),
    };
    loop {
        let actor = cluster.resolve_actor(id, Incarnation(after), wait).await?;
        if let Some(address) = address_of(id, &actor)? {
            return Ok(address);
        }
        // It is on its way: whatever start comes will do, and the head tells us when.
        tokio::time::sleep(PAUSE).await;
        (after, wait) = (failed.map_or(0, |failed| failed.0), RESOLVE_WAIT);
    }
}

/// The address in the head's answer; `None` while the actor is on its way.
fn address_of(id: ActorId, actor: &api::Actor) -> Result<Option<ActorAddress>> {
    if actor.state == "ended" {
        return Err(Error::Call(CallError::ActorDied {
            actor: id.to_string(),
            reason: actor
                .exit_reason
                .clone()
                .unwrap_or_else(|| "no reason is known".to_owned()),
            executed: Executed::No,
        }));
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
}
