//! Finding actors that were just created, many in one question.
//!
//! Whoever creates a thousand actors and calls each of them wants to know where each of them is,
//! once it runs. A question for each would cost the head more than starting them.
//!
//! Invariants:
//! 1. One question is under way at a time, for all that are looked for; it is answered as soon as
//!    one of them is found. Who comes later does not wait for it: it is asked again, with them.
//! 2. If the head refuses to answer for all together, each is asked for alone.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use mobula_core::id::{ActorId, Incarnation};
use mobula_wire::control as api;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::error::Result;

/// Actors in one question: half of what the head takes.
const TOGETHER_MAX: usize = 512;

/// How long the head may keep a question that asks for all that are looked for.
const WAIT: Duration = Duration::from_secs(5);

/// The same if others had to be left out: those are asked for next.
const WAIT_IN_TURNS: Duration = Duration::from_millis(100);

/// How old a question must be before it is asked again for the sake of those who came since: so
/// that many who come together are one question and not one each.
const GATHER: Duration = Duration::from_millis(2);

type Found = oneshot::Sender<Result<api::Actor>>;

/// The actors that are looked for through one connection to a cluster.
#[derive(Default)]
pub(crate) struct Resolutions {
    state: Mutex<State>,
    came: Notify,
}

#[derive(Default)]
struct State {
    wanted: BTreeMap<ActorId, Vec<Found>>,
    /// The last that was asked for: others have their turn after it.
    last: Option<ActorId>,
    /// A task is at work on what is wanted, and ends when nothing is.
    busy: bool,
}

impl Resolutions {
    /// The actor as the head knows it once it runs or has ended; as it is when the head has waited
    /// long enough.
    pub(crate) async fn find(
        self: &Arc<Self>,
        cluster: &Cluster,
        id: ActorId,
    ) -> Result<api::Actor> {
        let (found, outcome) = oneshot::channel();
        let start = {
            let mut state = self.state.lock();
            state.wanted.entry(id).or_default().push(found);
            !std::mem::replace(&mut state.busy, true)
        };
        self.came.notify_one();
        if start {
            let (resolutions, cluster) = (Arc::clone(self), cluster.clone());
            // Apart from its first caller, who may be dropped while others wait. Ends when nothing
            // is wanted.
            tokio::spawn(async move { resolutions.run(&cluster).await });
        }
        match outcome.await {
            Ok(outcome) => outcome,
            // The task is gone with its runtime; whoever still runs asks for itself.
            Err(_) => cluster.resolve_actor(id, Incarnation(0), WAIT).await,
        }
    }

    async fn run(&self, cluster: &Cluster) {
        loop {
            // Whoever came until now is in the next question.
            let _ = self.came.notified().now_or_never();
            let Some(turn) = self.take() else { return };
            let wait = match turn.is_all {
                true => WAIT,
                false => WAIT_IN_TURNS,
            };
            let came = async {
                tokio::time::sleep_until(Instant::now() + GATHER).await;
                self.came.notified().await;
            };
            let answer = tokio::select! {
                biased;
                answer = cluster.await_actors(&turn.ids, wait) => answer,
                () = came, if turn.is_all => continue,
            };
            match answer {
                Ok(actors) => {
                    for actor in actors {
                        self.deliver(ActorId(actor.id), &Ok(actor));
                    }
                }
                Err(_) => {
                    for id in turn.ids {
                        let alone = cluster.resolve_actor(id, Incarnation(0), Duration::ZERO);
                        self.deliver(id, &alone.await);
                    }
                }
            }
        }
    }

    /// Whom the next question is for.
    fn take(&self) -> Option<Turn> {
        let mut state = self.state.lock();
        let state = &mut *state;
        // Who gave up is not asked for.
        state.wanted.retain(|_, found| {
            found.retain(|found| !found.is_closed());
            !found.is_empty()
        });
        if state.wanted.is_empty() {
            state.busy = false;
            return None;
        }
        let is_all = state.wanted.len() <= TOGETHER_MAX;
        let ids: Vec<ActorId> = if is_all {
            state.wanted.keys().copied().collect()
        } else {
            let from = state.last.map_or(Bound::Unbounded, Bound::Excluded);
            let behind = state.wanted.range((from, Bound::Unbounded));
            // Past the end it begins anew.
            let in_turn = behind.chain(state.wanted.iter()).map(|(id, _)| *id);
            let ids: Vec<ActorId> = in_turn.take(TOGETHER_MAX).collect();
            state.last = ids.last().copied();
            ids
        };
        Some(Turn { ids, is_all })
    }

    fn deliver(&self, id: ActorId, outcome: &Result<api::Actor>) {
        let found = self.state.lock().wanted.remove(&id);
        for found in found.into_iter().flatten() {
            // Who asked may be gone.
            let _ = found.send(outcome.clone());
        }
    }
}

struct Turn {
    ids: Vec<ActorId>,
    /// Nobody is left out.
    is_all: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(
        ids: impl IntoIterator<Item = u64>,
    ) -> (Resolutions, Vec<oneshot::Receiver<Result<api::Actor>>>) {
        let resolutions = Resolutions::default();
        let waiting = ids.into_iter().map(|id| {
            let (found, outcome) = oneshot::channel();
            let mut state = resolutions.state.lock();
            state.wanted.entry(ActorId(id)).or_default().push(found);
            outcome
        });
        let waiting = waiting.collect();
        (resolutions, waiting)
    }

    #[test]
    fn all_go_into_one_question_while_they_fit() {
        let (resolutions, mut waiting) = wanted([3, 1, 2, 1]);
        let turn = resolutions.take().unwrap();
        assert_eq!(turn.ids, [ActorId(1), ActorId(2), ActorId(3)]);
        assert!(turn.is_all);
        // Both who look for it are told.
        let found = api::Actor {
            id: 1,
            ..Default::default()
        };
        resolutions.deliver(ActorId(1), &Ok(found));
        for index in [1, 3] {
            assert_eq!(waiting[index].try_recv().unwrap().unwrap().id, 1);
        }
        // Who gave up is not asked for.
        waiting.remove(0);
        assert_eq!(resolutions.take().unwrap().ids, [ActorId(2)]);
        drop(waiting);
        assert!(resolutions.take().is_none());
        assert!(!resolutions.state.lock().busy);
    }

    #[test]
    fn those_that_do_not_fit_have_their_turn() {
        let count = 2 * TOGETHER_MAX as u64 + 10;
        let (resolutions, _waiting) = wanted(0..count);
        let mut asked = std::collections::BTreeSet::new();
        for _ in 0..3 {
            let turn = resolutions.take().unwrap();
            assert!(!turn.is_all);
            assert_eq!(turn.ids.len(), TOGETHER_MAX);
            asked.extend(turn.ids);
        }
        assert_eq!(asked.len() as u64, count);
    }
}
