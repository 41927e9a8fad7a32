//! The way from the coordinator to a trainer on some worker.

use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mobula::{CallFailure, Cluster};
use mobula_core::Incarnation;
use mobula_core::spec::RestartPolicy;
use mobula_storage::checkpoint::Piece;

use super::crew::{LinkError, Preparation, TrainerLink};
use super::messages::{Admission, Epoch, Greeting, Handover, KeepOrder, News, TrainerError};
use super::named_actor::NamedActor;
use super::parts::PART_BYTES;
use super::protocol::leader::StateDigest;
use super::protocol::plan::Plan;
use super::spec::TrainSpec;
use super::trainer::{Trainer, TrainerCalls, trainer_name};
use delivery::deliver;

mod delivery;

/// How long one greeting waits for a trainer that is still to be placed or started.
const GREET_MAX: Duration = Duration::from_secs(20);
/// How long a trainer may take to load its data and take over a state.
const PREPARE_MAX: Duration = Duration::from_secs(60);
/// How long a piece of a state may be on its way.
const PIECE_MAX: Duration = Duration::from_secs(20);
/// How long its first piece may be: the state is between two steps, and a trainer copies it when it has computed the shard
/// that it is at.
const STATE_MAX: Duration = Duration::from_secs(60);
/// How long a trainer may be silent before it is given up. It says every tenth of a second that it
/// lives, also while it computes.
const SILENT_MAX: Duration = Duration::from_millis(1250);
/// After this the head is asked whether a silent trainer still lives: a little later than it would have
/// said so itself. On its own machine the end of a process is known at once, by its closed socket.
const SUSPECT_AFTER: Duration = Duration::from_millis(150);
/// How long a trainer may take to get some parts of a state from others; it says so itself when they do not come.
const FETCH_MAX: Duration = Duration::from_secs(60);
/// How long a trainer may take to store some pieces of a checkpoint: 32 MiB at half a megabyte a second.
const STORE_MAX: Duration = Duration::from_secs(60);
/// How long it may take to leave.
const LEAVE_MAX: Duration = Duration::from_secs(5);
/// Starts of a trainer, at most enough for any cluster, and an end to one that cannot start; soon, because
/// the others do its work meanwhile.
const RESTARTS: RestartPolicy = RestartPolicy {
    max_restarts: 1000,
    backoff_initial_ms: 100,
    backoff_max_ms: 1_000,
};
/// A trainer's share of a machine: it computes for a part of each step only.
const TRAINER_CPUS: f64 = 0.5;

/// The way to one trainer.
#[derive(Clone)]
pub struct ClusterLink(Arc<Inner>);

struct Inner {
    actor: NamedActor<Trainer>,
    /// The start that was greeted last; 0 if it was never met, or is known to be over.
    incarnation: AtomicU64,
}

impl ClusterLink {
    /// The way to trainer number `slot` of the job that this process drives.
    #[must_use]
    pub fn new(cluster: &Cluster, spec: &TrainSpec, slot: usize) -> Self {
        let spec = spec.clone();
        let actor = NamedActor::new(cluster, move |cluster| {
            cluster
                .actor(Trainer::new(spec.clone(), slot as u32))
                .name(trainer_name(slot as u32))
                .cpus(TRAINER_CPUS)
                .gpus(f64::from(spec.device.gpus()))
                .spread("trainers")
                .restart(RESTARTS)
        });
        ClusterLink(Arc::new(Inner {
            actor,
            incarnation: AtomicU64::new(0),
        }))
    }

    /// The state that the trainer holds, of `size_bytes` at most.
    pub async fn state(&self, size_bytes: u64) -> Result<Vec<u8>, LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let mut state = Vec::new();
        loop {
            let limit = if state.is_empty() {
                STATE_MAX
            } else {
                PIECE_MAX
            };
            let call = actor.state(state.len() as u64, PART_BYTES as u64);
            let piece = self.unless_it_ends(call.timeout(limit)).await?;
            let piece = piece.map_err(|failure| self.failed(failure))?;
            if piece.is_empty() {
                return Ok(state);
            }
            state.extend_from_slice(&piece);
            if state.len() as u64 > size_bytes {
                return Err(LinkError::Lost(format!(
                    "its state is larger than the {size_bytes} bytes of this job's"
                )));
            }
        }
    }

    /// Whether its process runs, as far as the head knows; it may well where the head does not say.
    pub async fn runs(&self) -> bool {
        self.0.actor.runs().await.unwrap_or(true)
    }

    /// What a driver that left has left with the trainer.
    pub async fn handover(&self) -> Result<Option<Handover>, LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let handover = actor.handover().timeout(SILENT_MAX).await;
        handover.map_err(|error| self.broken(error))
    }

    /// The start `known` is over: the next call goes to another one, unless that was met meanwhile.
    fn note_end(&self, known: Incarnation) {
        let order = Ordering::Relaxed;
        let met = self
            .0
            .incarnation
            .compare_exchange(known.0, 0, order, order);
        if met.is_ok() {
            self.0.actor.moved();
        }
    }

    fn failed(&self, failure: CallFailure<TrainerError>) -> LinkError {
        match failure {
            CallFailure::User(error) => LinkError::Trainer(error),
            CallFailure::System(error) => self.broken(error),
        }
    }

    /// The answer to a call, unless the trainer ends meanwhile. The head learns of a killed process in
    /// milliseconds, the transport by its silence only after seconds.
    async fn unless_it_ends<T>(&self, call: impl IntoFuture<Output = T>) -> Result<T, LinkError> {
        let known = Incarnation(self.0.incarnation.load(Ordering::Relaxed));
        let ended = async {
            if known == Incarnation::default() {
                // It was never met, or its end is known: nothing is there that could end.
                return std::future::pending().await;
            }
            tokio::time::sleep(SUSPECT_AFTER).await;
            self.0.actor.ended(known).await
        };
        tokio::select! {
            answer = call.into_future() => Ok(answer),
            () = ended => {
                self.note_end(known);
                Err(LinkError::Lost("its process has ended".to_owned()))
            }
        }
    }

    fn broken(&self, error: mobula::Error) -> LinkError {
        self.0.actor.after(&error);
        lost(error)
    }
}

fn lost(error: mobula::Error) -> LinkError {
    LinkError::Lost(error.to_string())
}

impl TrainerLink for ClusterLink {
    async fn greet(&self) -> Result<Greeting, LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let call = actor.greet().timeout(GREET_MAX);
        let answer = self.unless_it_ends(call).await?;
        let greeting = answer.map_err(|error| self.broken(error))?;
        let incarnation = greeting.incarnation;
        self.0.incarnation.store(incarnation, Ordering::Relaxed);
        Ok(greeting)
    }

    async fn ended(&self) {
        let known = Incarnation(self.0.incarnation.load(Ordering::Relaxed));
        // Where it was never met, or its end is known, there is nothing to wait for.
        if known != Incarnation::default() {
            self.0.actor.ended(known).await;
            self.note_end(known);
        }
    }

    async fn prepare(&self, order: Preparation) -> Result<Admission, LinkError> {
        let Preparation {
            plan,
            state,
            shared,
            probe,
        } = order;
        let actor = self.0.actor.get().await.map_err(lost)?;
        let send = async {
            let (epoch, step) = (plan.epoch, shared.as_ref().map_or(0, |shared| shared.step));
            let fetch = |parts: Vec<Piece>, from: Vec<u32>| {
                let call = actor.fetch(epoch, step, parts, from);
                call.timeout(FETCH_MAX).into_future()
            };
            let receive = |offset: u64, bytes: Vec<u8>| {
                let call = actor.receive(epoch, offset, bytes);
                call.timeout(PIECE_MAX).into_future()
            };
            deliver(&state, shared.as_ref(), fetch, receive).await?;
            actor
                .prepare(plan, state.len() as u64, probe)
                .timeout(PREPARE_MAX)
                .await
        };
        let answer = self.unless_it_ends(send).await?;
        answer.map_err(|failure| self.failed(failure))
    }

    async fn adopt(&self, plan: Plan) -> Result<(), LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let call = actor.adopt(plan).timeout(SILENT_MAX);
        let answer = self.unless_it_ends(call).await?;
        answer.map_err(|failure| self.failed(failure))
    }

    async fn news(&self, epoch: Epoch, known: u64) -> Result<News, LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let call = actor.news(epoch, known).timeout(SILENT_MAX);
        let answer = self.unless_it_ends(call).await?;
        answer.map_err(|failure| self.failed(failure))
    }

    async fn digest_before(&self, step: u64) -> Result<Option<StateDigest>, LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let answer = actor.digest_before(step).timeout(SILENT_MAX).await;
        answer.map_err(|failure| self.failed(failure))
    }

    async fn keep(&self, order: KeepOrder, step: u64) -> Result<bool, LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        // It says so between two shards, and nobody waits for that.
        let call = actor.keep(order, step).timeout(PIECE_MAX);
        let answer = self.unless_it_ends(call).await?;
        answer.map_err(|failure| self.failed(failure))
    }

    async fn store(&self, step: u64, pieces: Vec<Piece>) -> Result<(), LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let call = actor.store(step, pieces).timeout(STORE_MAX);
        let answer = self.unless_it_ends(call).await?;
        answer.map_err(|failure| self.failed(failure))
    }

    async fn release(&self, order: KeepOrder) -> Result<(), LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let answer = actor.release(order).timeout(SILENT_MAX).await;
        answer.map_err(|error| self.broken(error))
    }

    async fn share(&self, order: KeepOrder, step: u64) -> Result<bool, LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        // It says so between two shards, and nobody waits for that.
        let call = actor.share(order, step).timeout(PIECE_MAX);
        let answer = self.unless_it_ends(call).await?;
        answer.map_err(|failure| self.failed(failure))
    }

    async fn unshare(&self, order: KeepOrder) -> Result<(), LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let answer = actor.unshare(order).timeout(PIECE_MAX).await;
        answer.map_err(|error| self.broken(error))
    }

    async fn entrust(&self, epoch: Epoch, handover: Handover) -> Result<(), LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let call = actor.entrust(epoch, handover).timeout(SILENT_MAX);
        let answer = self.unless_it_ends(call).await?;
        answer.map_err(|failure| self.failed(failure))
    }

    async fn leave(&self) -> Result<(), LinkError> {
        let actor = self.0.actor.get().await.map_err(lost)?;
        let left = actor.leave().timeout(LEAVE_MAX).await;
        // Whatever the answer: the process may be gone by now, and then it says nothing more.
        self.0.actor.moved();
        left.map_err(|failure| match failure {
            CallFailure::User(error) => lost(error),
            CallFailure::System(error) => self.broken(error),
        })
    }
}
