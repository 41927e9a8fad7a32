//! An actor of this job that is found by its name, and created where it is not there.

use std::time::Duration;

use mobula::actor::ActorBuilder;
use mobula::{Actor, ActorRef, Cluster};
use mobula_core::Incarnation;
use parking_lot::Mutex;

type Describe<A> = Box<dyn Fn(&Cluster) -> ActorBuilder<A> + Send + Sync>;

/// The way to an actor over all its restarts, and over the restarts of the driver that created it.
pub struct NamedActor<A> {
    cluster: Cluster,
    describe: Describe<A>,
    found: Mutex<Option<ActorRef<A>>>,
}

/// How long one question for the end of a start waits at the head.
const ENDED_WAIT: Duration = Duration::from_secs(10);
/// The pause where the head does not answer.
const ENDED_PAUSE: Duration = Duration::from_secs(1);

impl<A: Actor> NamedActor<A> {
    /// `describe` gives the actor with its name.
    pub fn new(
        cluster: &Cluster,
        describe: impl Fn(&Cluster) -> ActorBuilder<A> + Send + Sync + 'static,
    ) -> Self {
        NamedActor {
            cluster: cluster.clone(),
            describe: Box::new(describe),
            found: Mutex::new(None),
        }
    }

    /// The actor. It may still be pending: calls wait for it.
    pub async fn get(&self) -> mobula::Result<ActorRef<A>> {
        if let Some(found) = self.found.lock().clone() {
            return Ok(found);
        }
        let actor = (self.describe)(&self.cluster)
            .get_or_create()
            .spawn()
            .await?;
        *self.found.lock() = Some(actor.clone());
        Ok(actor)
    }

    /// Looks at a failed call: an actor that has ended for good is created anew next time.
    pub fn after(&self, error: &mobula::Error) {
        if error.actor_has_ended() {
            *self.found.lock() = None;
        }
    }

    /// Forgets where the actor was: the next call asks the head. For when it is known to have left
    /// sooner than its silence would tell.
    pub fn moved(&self) {
        let mut found = self.found.lock();
        *found = found
            .take()
            .map(|old| ActorRef::from_id(&self.cluster, old.actor_id()));
    }

    /// Whether a start of the actor runs, as far as the head knows.
    pub async fn runs(&self) -> mobula::Result<bool> {
        let actor = self.get().await?.actor_id();
        let any = Incarnation::default();
        let now = self.cluster.resolve_actor(actor, any, Duration::ZERO);
        Ok(now.await?.state == "running")
    }

    /// Answers once the start `known` of the actor is over, whether or not another one runs.
    pub async fn ended(&self, known: Incarnation) {
        loop {
            let actor = self.found.lock().as_ref().map(ActorRef::actor_id);
            let over = match actor {
                Some(actor) => self.cluster.is_actor_over(actor, known, ENDED_WAIT).await,
                None => Ok(false),
            };
            match over {
                Ok(true) => return,
                Ok(false) if actor.is_some() => {}
                Ok(false) | Err(_) => tokio::time::sleep(ENDED_PAUSE).await,
            }
        }
    }
}
