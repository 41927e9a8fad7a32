//! Creating actors, and referring to them.
//!
//! Invariants:
//! 1. A reference names an actor over all its restarts; where it lives now is looked up and kept.
//! 2. A call whose answer says *not executed* is sent to the actor's present start, within the
//!    call's time; every other failure is the caller's to judge.
//! 3. Calls through one reference enter the transport in the order in which they began.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::{CallError, Executed};
use mobula_core::id::{ActorId, Incarnation, NodeId};
use mobula_core::label::Requirement;
use mobula_core::order::ActorAddress;
use mobula_core::resource::Resources;
use mobula_core::spec::{
    ActorKind, ActorSpec, DEFAULT_MAILBOX_CAPACITY, PlacementPolicy, RestartPolicy, SpreadKey,
    Strategy,
};
use mobula_host::client::PendingCall;
use mobula_host::mailbox::Deadline;
use mobula_wire::control as api;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::error::{Error, Result};

/// A type that `#[mobula::actor]` has made an actor.
pub trait Actor: Send + 'static {
    /// Its name, by which a host finds its constructor.
    const TYPE_NAME: &'static str;
}

/// An actor that is described but not created: what `Counter::new(5)` gives.
pub struct Init<A> {
    encoded: Result<Vec<u8>>,
    actor: PhantomData<fn() -> A>,
}

impl<A> Init<A> {
    pub(crate) fn new(encoded: Result<Vec<u8>>) -> Self {
        Init { encoded, actor: PhantomData }
    }
}

/// An actor about to be created.
#[must_use = "nothing is created before `spawn`"]
pub struct ActorBuilder<A> {
    cluster: Cluster,
    init: Init<A>,
    spec: ActorSpec,
    get_or_create: bool,
}

impl<A: Actor> ActorBuilder<A> {
    pub(crate) fn new(cluster: Cluster, init: Init<A>) -> Self {
        let spec = ActorSpec {
            kind: ActorKind::Actor { type_name: A::TYPE_NAME.to_owned() },
            name: None,
            init: Vec::new(),
            resources: Resources::default(),
            placement: PlacementPolicy::default(),
            restart: RestartPolicy::NEVER,
            isolated: false,
            mailbox_capacity: DEFAULT_MAILBOX_CAPACITY,
        };
        ActorBuilder { cluster, init, spec, get_or_create: false }
    }

    /// A name, unique within the job, by which [`Cluster::get_actor`] finds it.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.spec.name = Some(name.into());
        self
    }

    /// How often it is started again after an end that nobody asked for; losses of a node do not
    /// count.
    pub fn max_restarts(self, times: u32) -> Self {
        self.restart(RestartPolicy::times(times))
    }

    /// When it is started again, in full.
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.spec.restart = policy;
        self
    }

    /// CPU cores that it needs while it runs; thousandths count.
    pub fn cpus(mut self, cpus: f64) -> Self {
        self.spec.resources.cpu_milli = milli(cpus);
        self
    }

    /// Memory that it needs while it runs.
    pub fn memory_bytes(mut self, memory_bytes: u64) -> Self {
        self.spec.resources.memory_bytes = memory_bytes;
        self
    }

    /// GPUs that it needs while it runs; thousandths count.
    pub fn gpus(mut self, gpus: f64) -> Self {
        self.spec.resources.gpu_milli = milli(gpus);
        self
    }

    /// All that it needs while it runs.
    pub fn resources(mut self, resources: Resources) -> Self {
        self.spec.resources = resources;
        self
    }

    /// A host process of its own.
    pub fn isolated(mut self) -> Self {
        self.spec.isolated = true;
        self
    }

    /// Keeps actors with the same key on different nodes where that fits.
    pub fn spread(self, key: impl Into<String>) -> Self {
        self.spread_key(key, false)
    }

    /// Never puts two actors with the same key on one node.
    pub fn spread_strict(self, key: impl Into<String>) -> Self {
        self.spread_key(key, true)
    }

    fn spread_key(mut self, key: impl Into<String>, strict: bool) -> Self {
        self.spec.placement.spread_key = Some(SpreadKey { key: key.into(), strict });
        self
    }

    /// Keeps actors with the same key on one node where that fits.
    pub fn affinity(mut self, key: impl Into<String>) -> Self {
        self.spec.placement.affinity_key = Some(key.into());
        self
    }

    /// Something that the node's labels must meet.
    pub fn require(mut self, requirement: Requirement) -> Self {
        self.spec.placement.selector.push(requirement);
        self
    }

    /// How to choose among nodes that fit.
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.spec.placement.strategy = strategy;
        self
    }

    /// How many calls may wait in front of it before callers are told `Overloaded`.
    pub fn mailbox_capacity(mut self, calls: u32) -> Self {
        self.spec.mailbox_capacity = calls;
        self
    }

    /// Takes a living actor of the same name instead of failing.
    pub fn get_or_create(mut self) -> Self {
        self.get_or_create = true;
        self
    }

    /// Creates it. It may still be pending when this returns: calls wait for it.
    pub async fn spawn(self) -> Result<ActorRef<A>> {
        let (cluster, get_or_create) = (self.cluster.clone(), self.get_or_create);
        let created = cluster.create_actors(vec![self.finish()?], false, get_or_create).await?;
        let id = created.first().copied().ok_or_else(|| missing("an actor"))?;
        Ok(ActorRef::from_id(&cluster, id))
    }

    fn finish(mut self) -> Result<ActorSpec> {
        self.spec.init = self.init.encoded?;
        Ok(self.spec)
    }
}

fn milli(amount: f64) -> u64 {
    // Saturates for what is negative, too large or not a number; the head checks the rest.
    (amount * 1000.0).round() as u64
}

fn missing(what: &str) -> Error {
    Error::Control {
        operation: "create actors".to_owned(),
        code: mobula_core::ErrorCode::Internal,
        message: format!("the head's answer lacks the id of {what}"),
        executed: Executed::Yes,
    }
}

/// Actors that are placed all at once or not at all.
#[must_use = "nothing is created before `spawn`"]
pub struct GroupBuilder<A> {
    cluster: Cluster,
    members: Vec<ActorBuilder<A>>,
}

impl<A: Actor> GroupBuilder<A> {
    pub(crate) fn new(cluster: Cluster, members: Vec<ActorBuilder<A>>) -> Self {
        GroupBuilder { cluster, members }
    }

    /// Creates them, in the order given.
    pub async fn spawn(self) -> Result<Vec<ActorRef<A>>> {
        let cluster = self.cluster;
        let count = self.members.len();
        let specs = self.members.into_iter().map(ActorBuilder::finish).collect::<Result<_>>()?;
        let created = cluster.create_actors(specs, true, false).await?;
        if created.len() != count {
            return Err(missing("a member of the group"));
        }
        Ok(created.into_iter().map(|id| ActorRef::from_id(&cluster, id)).collect())
    }
}

/// A reference to an actor: its methods are calls. It can be cloned and sent, also as an argument.
pub struct ActorRef<A> {
    untyped: UntypedRef,
    actor: PhantomData<fn() -> A>,
}

impl<A: Actor> ActorRef<A> {
    /// A reference by id; whether there is such an actor shows with the first call.
    #[must_use]
    pub fn from_id(cluster: &Cluster, id: ActorId) -> Self {
        ActorRef { untyped: UntypedRef::new(id, Some(cluster.clone())), actor: PhantomData }
    }

    pub(crate) fn untyped(&self) -> UntypedRef {
        self.untyped.clone()
    }
}

impl<A> ActorRef<A> {
    /// The actor.
    #[must_use]
    pub fn actor_id(&self) -> ActorId {
        self.untyped.0.id
    }

    /// Ends the actor for good: it may take `grace` to finish and tidy up.
    pub async fn stop_actor(&self, grace: Duration) -> Result<()> {
        self.untyped.cluster()?.stop_actor(self.actor_id(), grace).await
    }
}

impl<A> Clone for ActorRef<A> {
    fn clone(&self) -> Self {
        ActorRef { untyped: self.untyped.clone(), actor: PhantomData }
    }
}

impl<A> fmt::Debug for ActorRef<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ActorRef").field(&self.actor_id()).finish()
    }
}

impl<A> Serialize for ActorRef<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.actor_id().serialize(serializer)
    }
}

/// Whoever receives a reference calls through the cluster of its own process.
impl<'de, A> Deserialize<'de> for ActorRef<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let id = ActorId::deserialize(deserializer)?;
        Ok(ActorRef { untyped: UntypedRef::new(id, None), actor: PhantomData })
    }
}

/// How long one question to the head waits for a restarted actor before we look again.
const RESOLVE_WAIT: Duration = Duration::from_secs(5);

/// How long an actor that the head calls running may stay out of reach before a call without a
/// timeout gives up; a lost node is replaced well before.
const UNREACHABLE_MAX: Duration = Duration::from_secs(60);

/// How long to wait for a newer start before the same one is tried again.
const SAME_START_WAIT: Duration = Duration::from_millis(500);

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
    fn new(id: ActorId, cluster: Option<Cluster>) -> Self {
        UntypedRef(Arc::new(RefInner { id, cluster, route: tokio::sync::Mutex::default() }))
    }

    fn cluster(&self) -> Result<Cluster> {
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
        arguments: Vec<u8>,
        timeout: Option<Duration>,
    ) -> Result<Vec<u8>> {
        let cluster = self.cluster()?;
        let deadline = timeout.and_then(|timeout| {
            let limit_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            Some(Deadline { at: Instant::now().checked_add(timeout)?, limit_ms })
        });
        let mut unreachable_since: Option<(Incarnation, Instant)> = None;
        loop {
            // Within the deadline: the call has not begun, so giving up is harmless.
            let starting = self.start(&cluster, method, &arguments, deadline);
            let (start, pending) = match deadline {
                None => starting.await?,
                Some(limit) => tokio::time::timeout_at(limit.at, starting).await.map_err(|_| {
                    CallError::DeadlineExceeded {
                        actor: self.0.id.to_string(),
                        limit_ms: limit.limit_ms,
                        executed: Executed::No,
                    }
                })??,
            };
            let error = match pending.answer().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if !matches!(error, CallError::ActorUnavailable { .. } | CallError::Panicked(_)) {
                return Err(error.into());
            }
            self.mark_failed(start).await;
            if !matches!(error, CallError::ActorUnavailable { executed: Executed::No, .. }) {
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
        arguments: &[u8],
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
        let pending = calls.start(&address, method, arguments.to_vec(), deadline).await;
        drop(route);
        Ok((address.incarnation, pending))
    }

    async fn mark_failed(&self, start: Incarnation) {
        let mut route = self.0.route.lock().await;
        if route.address.as_ref().is_some_and(|address| address.incarnation == start) {
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
        (after, wait) = (failed.map_or(0, |failed| failed.0), RESOLVE_WAIT);
    }
}

/// The address in the head's answer; `None` while the actor is on its way.
fn address_of(id: ActorId, actor: &api::Actor) -> Result<Option<ActorAddress>> {
    if actor.state == "ended" {
        return Err(Error::Call(CallError::ActorDied {
            actor: id.to_string(),
            reason: actor.exit_reason.clone().unwrap_or_else(|| "no reason is known".to_owned()),
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
        assert_eq!((address.incarnation, address.node), (Incarnation(9), NodeId(2)));
        let assigned = api::Actor { state: "assigned".into(), ..running.clone() };
        assert_eq!(address_of(ActorId(1), &assigned).unwrap(), None);
        let ended = api::Actor {
            state: "ended".into(),
            exit_reason: Some("panicked: x".into()),
            ..running
        };
        let error = address_of(ActorId(1), &ended).unwrap_err();
        assert_eq!(error.to_string(), "actor-1 has ended: panicked: x (not executed)");
    }

    #[test]
    fn amounts_become_thousandths() {
        assert_eq!([0.25, 1.0, -3.0, f64::NAN].map(milli), [250, 1000, 0, 0]);
    }
}
