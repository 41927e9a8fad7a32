//! The trainer: a replica of the model as an actor.

use mobula::{ActorContext, ContextExt};
use mobula_storage::blob::BlobError;
use tokio::runtime::Handle;

use super::data::Files;
use super::messages::{Epoch, Greeting, Held, StepOrder, StepReply, TrainerError};
use super::replica::Replica;
use super::spec::TrainSpec;
use crate::kernels::memory::keep_freed_memory;
use crate::storage::open_blobs;

/// Computes shards of a training job. Everything it does is ordered by the job's coordinator.
pub struct Trainer {
    replica: Replica,
}

#[mobula::actor(name = "mobula.trainer")]
impl Trainer {
    /// A trainer of the job that `spec` describes. Data is loaded when it is prepared, so that a
    /// missing file is an answer and not a crash that is tried again and again.
    pub fn new(ctx: &ActorContext, spec: TrainSpec) -> Result<Self, BlobError> {
        keep_freed_memory();
        let files = Files::with_store(open_blobs(ctx.storage())?, Handle::current());
        Ok(Trainer {
            replica: Replica::reading(spec, files),
        })
    }

    /// Who and where it is, and the state it holds.
    pub fn greet(&self, ctx: &ActorContext) -> Greeting {
        Greeting {
            incarnation: ctx.incarnation().0,
            node_name: ctx.node_name().to_owned(),
            held: self.replica.held(),
            notice_ms: ctx.notice().map(|notice| notice.deadline_ms),
        }
    }

    /// Takes over a state; without one, the state before the first step.
    pub fn prepare(&mut self, epoch: Epoch, state: Option<Vec<u8>>) -> Result<Held, TrainerError> {
        // Computing must not keep the host's other tasks from running.
        tokio::task::block_in_place(|| self.replica.prepare(epoch, state.as_deref()))
    }

    /// Applies the updates it lacks and computes its share of a step.
    pub fn step(
        &mut self,
        ctx: &ActorContext,
        order: StepOrder,
    ) -> Result<StepReply, TrainerError> {
        let mut reply = tokio::task::block_in_place(|| self.replica.step(&order))?;
        reply.notice_ms = ctx.notice().map(|notice| notice.deadline_ms);
        Ok(reply)
    }

    /// Its state, for another replica.
    pub fn state(&self) -> Result<Vec<u8>, TrainerError> {
        self.replica.state()
    }

    /// Leaves a node that was given notice: it is started elsewhere, without state.
    pub async fn leave(&self, ctx: &ActorContext) -> Result<(), mobula::Error> {
        ctx.yield_now().await
    }
}
