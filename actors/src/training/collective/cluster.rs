//! Members anywhere in the cluster: calls of their trainers, over several connections between machines; on one
//! machine the sums lie in shared memory, and calls say where.
//!
//! Invariants:
//! 1. Before the first sums to a start of a trainer, both sides have found out whether they read each other's
//!    memory.
//! 2. Calls need no order, so that one connection's limits are not the limits of them all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mobula::{ActorRef, CallFailure, Cluster};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use super::runner::NOT_YET_AFTER;
use super::segment::SegmentName;
use super::shared_memory::SharedMemory;
use super::{Collective, Unreachable};
use crate::training::messages::TrainerError;
use crate::training::protocol::exchange::{Ask, Contribution, Refusal};
use crate::training::protocol::plan::MemberId;
use crate::training::reduction::Partial;
use crate::training::trainer::{Trainer, TrainerCalls, trainer_name};

/// How long sums may take to arrive; then they are sent again.
const CONTRIBUTE_MAX: Duration = Duration::from_secs(20);
/// How long a question may go without an answer: its owner says in time if the sum is not there yet, and a sum takes as
/// long to arrive here as there.
const ASK_MAX: Duration = NOT_YET_AFTER.saturating_add(CONTRIBUTE_MAX);
/// How long a trainer may take to say whether it reads our memory.
const MEET_MAX: Duration = Duration::from_secs(5);

/// What a trainer says to another process that will exchange sums with it.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Met {
    /// Whether it reads the other's memory.
    pub reads: bool,
    /// Where its own memory is found, on its machine.
    pub memory: Option<SegmentName>,
}

/// How two processes exchange large sums.
#[derive(Debug, Clone, Copy)]
struct Ways {
    /// The other reads what we write.
    to_there: bool,
    /// We read what the other writes.
    from_there: bool,
}

/// Calls of the trainers of this job.
#[derive(Clone)]
pub struct ClusterCollective {
    cluster: Cluster,
    memory: Arc<SharedMemory>,
    /// By slot.
    trainers: Arc<Mutex<BTreeMap<u32, Called>>>,
}

/// A trainer that was called.
#[derive(Clone)]
struct Called {
    trainer: ActorRef<Trainer>,
    /// The start that was meant last.
    incarnation: u64,
    /// What was found out of that start.
    ways: Arc<OnceCell<Ways>>,
}

impl ClusterCollective {
    /// The trainers of the job that this process belongs to. What this process writes for those of its machine is in
    /// `memory`.
    #[must_use]
    pub fn new(cluster: &Cluster, memory: Arc<SharedMemory>) -> Self {
        ClusterCollective {
            cluster: cluster.clone(),
            memory,
            trainers: Arc::default(),
        }
    }

    /// The trainer, and how sums go there and come from there.
    async fn reach(&self, member: MemberId) -> Result<(ActorRef<Trainer>, Ways), Unreachable> {
        let called = self.find(member).await?;
        let meet = || async {
            let call = called.trainer.meet(member, self.memory.name());
            let met = call.timeout(MEET_MAX).await;
            let met = met.map_err(|failure| self.failed(member, failure))?;
            let can_read = |name| self.memory.can_read(name);
            Ok(Ways {
                to_there: met.reads,
                from_there: met.memory.is_some_and(can_read),
            })
        };
        let ways = *called.ways.get_or_try_init(meet).await?;
        Ok((called.trainer, ways))
    }

    async fn find(&self, member: MemberId) -> Result<Called, Unreachable> {
        if let Some(known) = self.known(member) {
            return Ok(known);
        }
        let name = trainer_name(member.slot);
        let found = self.cluster.get_actor::<Trainer>(&name).await;
        let trainer = found.map_err(|error| Unreachable {
            member,
            reason: error.to_string(),
        })?;
        let called = Called {
            trainer,
            incarnation: member.incarnation,
            ways: Arc::default(),
        };
        self.trainers.lock().insert(member.slot, called.clone());
        Ok(called)
    }

    /// The trainer, if it was called before. Of a start that is newer than the one that was called, the way is
    /// asked for anew: the old one may lead to a dead process, of whose end no packet tells.
    fn known(&self, member: MemberId) -> Option<Called> {
        let mut trainers = self.trainers.lock();
        let called = trainers.get_mut(&member.slot)?;
        if called.incarnation < member.incarnation {
            called.incarnation = member.incarnation;
            called.trainer = ActorRef::from_id(&self.cluster, called.trainer.actor_id());
            called.ways = Arc::default();
        }
        Some(called.clone())
    }

    fn failed(&self, member: MemberId, failure: CallFailure<TrainerError>) -> Unreachable {
        if let CallFailure::System(error) = &failure
            && error.actor_has_ended()
        {
            // One of the same name may be created anew.
            self.trainers.lock().remove(&member.slot);
        }
        Unreachable {
            member,
            reason: failure.to_string(),
        }
    }
}

impl Collective for ClusterCollective {
    async fn contribute(
        &self,
        to: MemberId,
        contribution: Contribution,
    ) -> Result<Result<(), Refusal>, Unreachable> {
        let (trainer, ways) = self.reach(to).await?;
        let Contribution {
            from,
            step,
            digest,
            bucket,
            partials,
        } = contribution;
        let at = Ask {
            from,
            step,
            digest,
            bucket,
            at_once: false,
        };
        let sums = partials
            .into_iter()
            .map(|sums| self.memory.pack(sums, ways.to_there))
            .collect();
        let call = trainer.contribute(to, at, sums).any_order();
        let answer = call.timeout(CONTRIBUTE_MAX).await;
        answer.map_err(|failure| self.failed(to, failure))
    }

    async fn ask(&self, to: MemberId, ask: Ask) -> Result<Result<Partial, Refusal>, Unreachable> {
        let (trainer, ways) = self.reach(to).await?;
        let call = trainer.ask(to, ask, ways.from_there).any_order();
        let answer = call.timeout(ASK_MAX).await;
        match answer.map_err(|failure| self.failed(to, failure))? {
            Ok(parcel) => match self.memory.unpack(parcel) {
                Ok(partial) => Ok(Ok(partial)),
                Err(damaged) => Err(Unreachable {
                    member: to,
                    reason: damaged.to_string(),
                }),
            },
            Err(refusal) => Ok(Err(refusal)),
        }
    }
}
