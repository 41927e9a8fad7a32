//! Creating actors, and referring to them.
//!
//! Invariants:
//! 1. A reference names an actor over all its restarts, and can be sent anywhere in the cluster.
//! 2. Nothing is created before `spawn`, and then exactly once.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::Executed;
use mobula_core::id::ActorId;
use mobula_core::label::Requirement;
use mobula_core::resource::Resources;
use mobula_core::spec::{ActorSpec, RestartPolicy, SpreadKey, Strategy};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::reference::UntypedRef;

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
        Init {
            encoded,
            actor: PhantomData,
        }
    }
}

impl<A: Actor> Init<A> {
    /// The actor's specification with nothing asked for yet, as a controller in a head needs it.
    pub fn into_spec(self) -> Result<ActorSpec> {
        Ok(ActorSpec {
            init: self.encoded?,
            ..empty_spec::<A>()
        })
    }
}

fn empty_spec<A: Actor>() -> ActorSpec {
    ActorSpec::of_type(A::TYPE_NAME)
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
        let spec = empty_spec::<A>();
        ActorBuilder {
            cluster,
            init,
            spec,
            get_or_create: false,
        }
    }

    /// A name, unique within the job or within the namespace that the job is in, by which
    /// [`Cluster::get_actor`] finds it.
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
        self.spec.placement.spread_key = Some(SpreadKey {
            key: key.into(),
            strict,
        });
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

    /// Lets it live on when this job ends, until it is stopped, completes, or runs out of restarts. It
    /// needs a name, and the job a [namespace](crate::job::JobBuilder::namespace), through which later
    /// jobs find it.
    ///
    /// It runs in a job of its own, which has this one's program, environment, files and secrets, and
    /// ends with its last detached actor. What it creates itself belongs to that job. Other jobs of the
    /// namespace call it like an actor of their own, but object references do not cross: pass values.
    pub fn detached(mut self) -> Self {
        self.spec.detached = true;
        self
    }

    /// Takes a living actor of the same name instead of failing: of the whole namespace, if the job is
    /// in one. One that ends with its job is not taken for a detached one.
    pub fn get_or_create(mut self) -> Self {
        self.get_or_create = true;
        self
    }

    /// Creates it. It may still be pending when this returns: calls wait for it.
    pub async fn spawn(self) -> Result<ActorRef<A>> {
        let (cluster, get_or_create) = (self.cluster.clone(), self.get_or_create);
        let spec = self.finish()?;
        let id = if spec.name.is_none() && !get_or_create {
            let creations = Arc::clone(&cluster.inner.creations);
            creations.create(&cluster, spec).await?
        } else {
            let created = cluster
                .create_actors(vec![spec], false, get_or_create)
                .await?;
            let id = created.first().copied();
            id.ok_or_else(|| missing("an actor"))?
        };
        Ok(ActorRef::from_id(&cluster, id))
    }

    fn finish(mut self) -> Result<ActorSpec> {
        self.spec.init = self.init.encoded?;
        Ok(self.spec)
    }
}

pub(crate) fn milli(amount: f64) -> u64 {
    // Saturates for what is negative, too large or not a number; the head checks the rest.
    (amount * 1000.0).round() as u64
}

pub(crate) fn missing(what: &str) -> Error {
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
        let specs = self
            .members
            .into_iter()
            .map(ActorBuilder::finish)
            .collect::<Result<_>>()?;
        let created = cluster.create_actors(specs, true, false).await?;
        if created.len() != count {
            return Err(missing("a member of the group"));
        }
        Ok(created
            .into_iter()
            .map(|id| ActorRef::from_id(&cluster, id))
            .collect())
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
        ActorRef {
            untyped: UntypedRef::new(id, Some(cluster.clone())),
            actor: PhantomData,
        }
    }

    pub(crate) fn untyped(&self) -> UntypedRef {
        self.untyped.clone()
    }
}

impl<A> ActorRef<A> {
    /// The actor.
    #[must_use]
    pub fn actor_id(&self) -> ActorId {
        self.untyped.id()
    }

    /// Ends the actor for good: it may take `grace` to finish and tidy up.
    pub async fn stop_actor(&self, grace: Duration) -> Result<()> {
        self.untyped
            .cluster()?
            .stop_actor(self.actor_id(), grace)
            .await
    }

    /// Ends the actor for good without any grace: its method is dropped at its next await.
    pub async fn kill_actor(&self) -> Result<()> {
        self.stop_actor(Duration::ZERO).await
    }
}

impl<A> Clone for ActorRef<A> {
    fn clone(&self) -> Self {
        ActorRef {
            untyped: self.untyped.clone(),
            actor: PhantomData,
        }
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
        Ok(ActorRef {
            untyped: UntypedRef::new(id, None),
            actor: PhantomData,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_become_thousandths() {
        assert_eq!([0.25, 1.0, -3.0, f64::NAN].map(milli), [250, 1000, 0, 0]);
    }
}
