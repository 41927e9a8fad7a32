//! Actors that are created at the same time, in as few requests as possible.
//!
//! A change of the head's state takes a round trip and an fsync, so they are made one after the other:
//! what is asked for meanwhile waits and goes together with the next.
//!
//! Invariants:
//! 1. Only actors that nothing but a limit can refuse share a request: unnamed ones. If the head
//!    refuses them together, each is asked for alone, so that none is refused for another's sake.
//! 2. Requests are made in the order in which actors were asked for.

use std::collections::VecDeque;
use std::sync::Arc;

use mobula_core::error::{ErrorCode, Executed};
use mobula_core::id::{ActorId, Incarnation, JobId};
use mobula_core::spec::ActorSpec;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::cluster::Cluster;
use crate::error::{Error, Result};

/// Actors in one request: half of what the head takes, so that its entries stay small.
const TOGETHER_MAX: usize = 512;

/// The same in bytes of their constructors' arguments.
const TOGETHER_INIT_BYTES_MAX: usize = 512 << 10;

/// Actors that wait for their request: as many as a cluster runs.
const WAITING_MAX: usize = 100_000;

/// What waits to be created through one connection to a cluster.
#[derive(Default)]
pub(crate) struct Creations(Mutex<State>);

#[derive(Default)]
struct State {
    waiting: VecDeque<Creation>,
    /// A task is at work on what waits, and ends when nothing does.
    busy: bool,
}

/// For whom actors are created: only what is for the same may share a request.
type Purpose = (Option<JobId>, Option<(ActorId, Incarnation)>);

struct Creation {
    cluster: Cluster,
    spec: ActorSpec,
    created: oneshot::Sender<Result<ActorId>>,
}

impl Creation {
    fn purpose(&self) -> Purpose {
        (self.cluster.job, self.cluster.holder)
    }
}

impl Creations {
    /// Creates an actor without a name.
    pub(crate) async fn create(
        self: &Arc<Self>,
        cluster: &Cluster,
        spec: ActorSpec,
    ) -> Result<ActorId> {
        let (created, outcome) = oneshot::channel();
        let start = {
            let mut state = self.0.lock();
            if state.waiting.len() >= WAITING_MAX {
                return Err(Error::Control {
                    operation: "create actors".to_owned(),
                    code: ErrorCode::Overloaded,
                    message: format!(
                        "{WAITING_MAX} actors wait to be created by this process, its limit; \
                         create more when these are"
                    ),
                    executed: Executed::No,
                });
            }
            state.waiting.push_back(Creation {
                cluster: cluster.clone(),
                spec,
                created,
            });
            !std::mem::replace(&mut state.busy, true)
        };
        if start {
            let creations = Arc::clone(self);
            // Apart from its first caller, who may be dropped while others wait. Ends when nothing
            // waits.
            tokio::spawn(async move {
                while let Some(together) = creations.take() {
                    create_together(together).await;
                }
            });
        }
        outcome
            .await
            .unwrap_or_else(|_| Err(Error::NotInCluster("this process is ending".to_owned())))
    }

    /// What goes into the next request.
    fn take(&self) -> Option<Vec<Creation>> {
        let mut state = self.0.lock();
        let Some(first) = state.waiting.pop_front() else {
            state.busy = false;
            return None;
        };
        let purpose = first.purpose();
        let mut init_bytes = first.spec.init.len();
        let mut together = vec![first];
        while together.len() < TOGETHER_MAX
            && let Some(next) = state.waiting.front()
            && next.purpose() == purpose
            && init_bytes + next.spec.init.len() <= TOGETHER_INIT_BYTES_MAX
        {
            init_bytes += next.spec.init.len();
            together.extend(state.waiting.pop_front());
        }
        Some(together)
    }
}

async fn create_together(together: Vec<Creation>) {
    let specs = together.iter().map(|one| one.spec.clone()).collect();
    let Some(first) = together.first() else {
        return;
    };
    match first.cluster.create_actors(specs, false, false).await {
        Ok(ids) if ids.len() == together.len() => {
            for (one, id) in together.into_iter().zip(ids) {
                // Who asked may be gone; the actor is there all the same, as after any lost answer.
                let _ = one.created.send(Ok(id));
            }
        }
        Ok(_) => {
            for one in together {
                let _ = one.created.send(Err(crate::actor::missing("an actor")));
            }
        }
        Err(error) if together.len() > 1 && error.executed() == Executed::No => {
            for one in together {
                let outcome = one
                    .cluster
                    .create_actors(vec![one.spec], false, false)
                    .await
                    .and_then(|ids| {
                        let id = ids.first().copied();
                        id.ok_or_else(|| crate::actor::missing("an actor"))
                    });
                let _ = one.created.send(outcome);
            }
        }
        Err(error) => {
            for one in together {
                let _ = one.created.send(Err(error.clone()));
            }
        }
    }
}
