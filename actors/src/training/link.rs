//! The way from the coordinator to a trainer on some worker.

use std::sync::Arc;
use std::time::Duration;

use mobula::{CallFailure, Cluster};

use super::coordinator::{LinkError, TrainerLink};
use super::messages::{Epoch, Greeting, Held, StepOrder, StepReply, TrainerError};
use super::named_actor::NamedActor;
use super::spec::TrainSpec;
use super::trainer::{Trainer, TrainerCalls};

/// How long one greeting waits for a trainer that is still to be placed or started.
const GREET_MAX: Duration = Duration::from_secs(20);
/// How long a trainer may take for an order before it is given up; it is called slow well before.
const ORDER_MAX: Duration = Duration::from_secs(60);
/// How long it may take to leave.
const LEAVE_MAX: Duration = Duration::from_secs(5);
/// Starts of a trainer, at most: enough for any cluster, and an end to one that cannot start.
const RESTARTS_MAX: u32 = 1000;
/// A trainer's share of a machine: it computes for a part of each step only.
const TRAINER_CPUS: f64 = 0.5;

/// The way to one trainer.
#[derive(Clone)]
pub struct ClusterLink(Arc<NamedActor<Trainer>>);

impl ClusterLink {
    /// The way to trainer number `slot` of the job that this process drives.
    #[must_use]
    pub fn new(cluster: &Cluster, spec: &TrainSpec, slot: usize) -> Self {
        let (cluster, spec) = (cluster.clone(), spec.clone());
        ClusterLink(Arc::new(NamedActor::new(move || {
            cluster
                .actor(Trainer::new(spec.clone()))
                .name(format!("trainer-{slot}"))
                .cpus(TRAINER_CPUS)
                .spread("trainers")
                .max_restarts(RESTARTS_MAX)
        })))
    }

    /// The state that the trainer holds.
    pub async fn state(&self) -> Result<Vec<u8>, LinkError> {
        let actor = self.0.get().await.map_err(lost)?;
        actor.state().timeout(ORDER_MAX).await.map_err(|failure| self.failed(failure))
    }

    fn failed(&self, failure: CallFailure<TrainerError>) -> LinkError {
        match failure {
            CallFailure::User(error) => LinkError::Trainer(error),
            CallFailure::System(error) => self.broken(error),
        }
    }

    fn broken(&self, error: mobula::Error) -> LinkError {
        self.0.after(&error);
        lost(error)
    }
}

fn lost(error: mobula::Error) -> LinkError {
    LinkError::Lost(error.to_string())
}

impl TrainerLink for ClusterLink {
    async fn greet(&self) -> Result<Greeting, LinkError> {
        let actor = self.0.get().await.map_err(lost)?;
        actor.greet().timeout(GREET_MAX).await.map_err(|error| self.broken(error))
    }

    async fn prepare(&self, epoch: Epoch, state: Vec<u8>) -> Result<Held, LinkError> {
        let actor = self.0.get().await.map_err(lost)?;
        let call = actor.prepare(epoch, Some(state)).timeout(ORDER_MAX);
        call.await.map_err(|failure| self.failed(failure))
    }

    async fn step(&self, order: StepOrder) -> Result<StepReply, LinkError> {
        let actor = self.0.get().await.map_err(lost)?;
        actor.step(order).timeout(ORDER_MAX).await.map_err(|failure| self.failed(failure))
    }

    async fn leave(&self) -> Result<(), LinkError> {
        let actor = self.0.get().await.map_err(lost)?;
        actor.leave().timeout(LEAVE_MAX).await.map_err(|failure| match failure {
            CallFailure::User(error) => lost(error),
            CallFailure::System(error) => self.broken(error),
        })
    }
}
