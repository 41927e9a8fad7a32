//! Asking the head for slots, and waiting until they run.
//!
//! Slots are asked for one by one at first and then in batches that double while tasks wait, so that
//! a few small tasks do not take a cluster, callers who begin together share it, and many large tasks
//! have it soon. What is asked for and finds no room stays
//! pending in the head, where `mobula explain` says why, and is withdrawn when no task waits any
//! more.
//!
//! Invariants:
//! 1. One batch of a pool is being asked for at a time, and at most [`SLOTS_MAX`] slots are held.
//! 2. A slot that was asked for either takes tasks or is given back.

use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::{CallError, ErrorCode, Executed};
use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, Incarnation};
use mobula_core::order::ActorAddress;
use mobula_core::spec::ActorSpec;
use mobula_host::spans;
use mobula_host::tasks::SLOT_TYPE;

use super::drive;
use super::pace::IN_FLIGHT_MAX;
use super::pool::{Pool, PoolState};
use crate::cluster::Cluster;
use crate::error::Error;
use crate::reference::address_of;

/// Slots that one pool holds: as many as a process calls hosts.
const SLOTS_MAX: usize = 4096;

/// Slots in the first batch. Small tasks are done by one before another would run.
const BATCH_FIRST: usize = 1;

/// Slots in one batch, so that the head's log entry stays small.
const BATCH_MAX: usize = 256;

/// Between two batches: most small tasks are done by then.
const GROW_PAUSE: Duration = Duration::from_millis(10);

/// How long one question to the head waits for slots to start.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Between two questions, in case the head answers at once.
const PAUSE: Duration = Duration::from_millis(20);

/// After a batch that the head refused for now.
const REFUSED_PAUSE: Duration = Duration::from_millis(500);

/// Starts of slots in a row that may fail before the tasks are told why.
const FAILURES_MAX: u32 = 8;

impl Pool {
    /// Begins to ask for slots if tasks wait that no idle slot will take.
    pub(super) fn lease_if_short(self: &Arc<Self>, state: &mut PoolState, cluster: &Cluster) {
        if state.leasing || self.shortage(state) == 0 {
            return;
        }
        state.leasing = true;
        let (pool, cluster) = (Arc::clone(self), cluster.clone());
        self.running
            .spawn(async move { pool.lease(&cluster).await });
    }

    /// How many slots the next batch should have.
    fn shortage(&self, state: &PoolState) -> usize {
        let wanted = state
            .waiting_count()
            .saturating_sub(state.idle + state.coming);
        let held = state.slots + state.coming;
        // Twice as many each time, but only once most of the last batch are there.
        let batch = held.clamp(BATCH_FIRST, BATCH_MAX);
        let room = SLOTS_MAX.saturating_sub(held);
        match state.coming > state.slots.max(BATCH_FIRST) {
            true => 0,
            false => wanted.min(batch).min(room),
        }
    }

    async fn lease(self: Arc<Self>, cluster: &Cluster) {
        loop {
            // What is short now may be done by what there is.
            tokio::time::sleep(self.grow_pause()).await;
            let count = {
                let mut state = self.state.lock();
                let count = self.shortage(&state);
                if count == 0 {
                    state.leasing = false;
                    return;
                }
                state.coming += count;
                count
            };
            let asked = cluster
                .create_actors(vec![self.slot_spec(); count], false, false)
                .await;
            match asked {
                Ok(slots) => {
                    for slot in slots {
                        let (pool, cluster) = (Arc::clone(&self), cluster.clone());
                        self.running
                            .spawn(async move { pool.hold(&cluster, slot).await });
                    }
                }
                Err(error) => {
                    self.state.lock().coming -= count;
                    tracing::warn!(%error, "the head grants no slots for tasks");
                    let is_final = !matches!(
                        error.code(),
                        Some(ErrorCode::Unavailable | ErrorCode::Overloaded)
                    );
                    if is_final && self.state.lock().slots == 0 {
                        self.fail_waiting(&no_slot(&error));
                    }
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
            }
        }
    }

    /// The first slots are asked for at once.
    fn grow_pause(&self) -> Duration {
        let state = self.state.lock();
        match state.slots + state.coming {
            0 => Duration::ZERO,
            _ => GROW_PAUSE,
        }
    }

    fn slot_spec(&self) -> ActorSpec {
        ActorSpec {
            resources: self.kind.resources.clone(),
            placement: self.kind.placement.clone(),
            // Two pools never share a slot, but tasks that were given up may still stand in line.
            mailbox_capacity: 2 * IN_FLIGHT_MAX as u32,
            // It is not started again: the pool asks for another one where it needs it.
            ..ActorSpec::of_type(SLOT_TYPE)
        }
    }

    /// Waits until a slot runs, keeps it busy until the pool has no more tasks, gives it back.
    async fn hold(self: Arc<Self>, cluster: &Cluster, slot: ActorId) {
        let begun = {
            let _shown = spans::begin("wait for a slot", "lease").with("slot", slot.to_string());
            self.wait_for_slot(cluster, slot).await
        };
        {
            let mut state = self.state.lock();
            state.coming -= 1;
            match &begun {
                Begun::Runs(_) => {
                    state.slots += 1;
                    state.failures = 0;
                    // The next batch may be larger now.
                    self.lease_if_short(&mut state, cluster);
                }
                Begun::Failed(_) => state.failures += 1,
                Begun::Withdrawn => {}
            }
        }
        match begun {
            Begun::Runs(address) => drive::drive(&self, cluster, address).await,
            Begun::Withdrawn => {}
            Begun::Failed(error) => {
                let failures = self.state.lock().failures;
                if failures >= FAILURES_MAX {
                    self.state.lock().failures = 0;
                    self.fail_waiting(&error);
                }
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
        }
        let mut state = self.state.lock();
        self.lease_if_short(&mut state, cluster);
    }

    async fn wait_for_slot(&self, cluster: &Cluster, slot: ActorId) -> Begun {
        loop {
            if self.waiting() == 0 && self.withdraw(cluster, slot).await {
                return Begun::Withdrawn;
            }
            let resolved = cluster.resolve_actor(slot, Incarnation(0), ASK_AGAIN).await;
            if let Ok(actor) = &resolved
                && actor.exit_code.as_deref() == Some(ExitReason::Stopped.code())
                && self.waiting() == 0
            {
                // With its job, and no task waits for it.
                return Begun::Withdrawn;
            }
            match resolved.and_then(|actor| address_of(slot, &actor)) {
                Ok(Some(address)) => return Begun::Runs(address),
                Ok(None) => tokio::time::sleep(PAUSE).await,
                Err(error) => {
                    tracing::warn!(%slot, %error, "a slot for tasks did not start");
                    return Begun::Failed(no_slot(&error));
                }
            }
        }
    }

    /// Gives back a slot that does not run yet; false if that did not succeed.
    async fn withdraw(&self, cluster: &Cluster, slot: ActorId) -> bool {
        cluster.stop_actor(slot, Duration::ZERO).await.is_ok()
    }
}

enum Begun {
    Runs(ActorAddress),
    /// Nobody needs it any more.
    Withdrawn,
    Failed(CallError),
}

/// Why no slot came, as an error of the tasks that wait for one.
pub(super) fn no_slot(error: &Error) -> CallError {
    let reason = match error {
        error if error.actor_has_ended() => format!("its slots end: {error}"),
        other => format!("there is no slot for it: {other}"),
    };
    CallError::ActorUnavailable {
        actor: String::new(),
        reason,
        executed: Executed::No,
    }
}
