//! An actor of this job that is found by its name, and created where it is not there.

use mobula::actor::ActorBuilder;
use mobula::{Actor, ActorRef};
use mobula_core::CallError;
use parking_lot::Mutex;

/// The way to an actor over all its restarts, and over the restarts of the driver that created it.
pub struct NamedActor<A> {
    describe: Box<dyn Fn() -> ActorBuilder<A> + Send + Sync>,
    found: Mutex<Option<ActorRef<A>>>,
}

impl<A: Actor> NamedActor<A> {
    /// `describe` gives the actor with its name.
    pub fn new(describe: impl Fn() -> ActorBuilder<A> + Send + Sync + 'static) -> Self {
        NamedActor { describe: Box::new(describe), found: Mutex::new(None) }
    }

    /// The actor. It may still be pending: calls wait for it.
    pub async fn get(&self) -> mobula::Result<ActorRef<A>> {
        if let Some(found) = self.found.lock().clone() {
            return Ok(found);
        }
        let actor = (self.describe)().get_or_create().spawn().await?;
        *self.found.lock() = Some(actor.clone());
        Ok(actor)
    }

    /// Looks at a failed call: an actor that has ended for good is created anew next time.
    pub fn after(&self, error: &mobula::Error) {
        if matches!(error, mobula::Error::Call(CallError::ActorDied { .. })) {
            *self.found.lock() = None;
        }
    }
}
