//! Members anywhere in the cluster: their trainers' calls, which take the shortest way there is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mobula::{ActorRef, CallFailure, Cluster};
use parking_lot::Mutex;

use super::sealed::Sealed;
use super::{Collective, Unreachable};
use crate::training::messages::TrainerError;
use crate::training::protocol::exchange::{Ask, Contribution, Refusal};
use crate::training::protocol::plan::MemberId;
use crate::training::reduction::Partial;
use crate::training::trainer::{Trainer, TrainerCalls, trainer_name};

/// How long sums may take to arrive; then they are sent again.
const CONTRIBUTE_MAX: Duration = Duration::from_secs(20);
/// How long a question may wait for its sum: longer than a step of most jobs, and asked again after.
const ASK_MAX: Duration = Duration::from_secs(60);

/// Calls of the trainers of this job.
#[derive(Clone)]
pub struct ClusterCollective {
    cluster: Cluster,
    /// By slot.
    trainers: Arc<Mutex<BTreeMap<u32, Called>>>,
}

/// A trainer that was called.
struct Called {
    trainer: ActorRef<Trainer>,
    /// The start that was meant last.
    incarnation: u64,
}

impl ClusterCollective {
    /// The trainers of the job that this process belongs to.
    #[must_use]
    pub fn new(cluster: &Cluster) -> Self {
        ClusterCollective {
            cluster: cluster.clone(),
            trainers: Arc::default(),
        }
    }

    async fn find(&self, member: MemberId) -> Result<ActorRef<Trainer>, Unreachable> {
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
            trainer: trainer.clone(),
            incarnation: member.incarnation,
        };
        self.trainers.lock().insert(member.slot, called);
        Ok(trainer)
    }

    /// The trainer, if it was called before. Of a start that is newer than the one that was called, the way is
    /// asked for anew: the old one may lead to a dead process, of whose end no packet tells.
    fn known(&self, member: MemberId) -> Option<ActorRef<Trainer>> {
        let mut trainers = self.trainers.lock();
        let called = trainers.get_mut(&member.slot)?;
        if called.incarnation < member.incarnation {
            called.incarnation = member.incarnation;
            called.trainer = ActorRef::from_id(&self.cluster, called.trainer.actor_id());
        }
        Some(called.trainer.clone())
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
        let trainer = self.find(to).await?;
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
        };
        let sums = partials.into_iter().map(Sealed::new).collect();
        let call = trainer.contribute(to, at, sums);
        let answer = call.timeout(CONTRIBUTE_MAX).await;
        answer.map_err(|failure| self.failed(to, failure))
    }

    async fn ask(&self, to: MemberId, ask: Ask) -> Result<Result<Partial, Refusal>, Unreachable> {
        let trainer = self.find(to).await?;
        let answer = trainer.ask(to, ask).timeout(ASK_MAX).await;
        match answer.map_err(|failure| self.failed(to, failure))? {
            Ok(sealed) => match sealed.open() {
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
