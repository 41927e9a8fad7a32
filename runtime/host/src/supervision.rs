//! The actors of one host process: their starts, their ends and why.
//!
//! Invariants:
//! 1. Each incarnation is started at most once, and its end is reported exactly once.
//! 2. `Started` is reported before `Exited`, and neither before the constructor is over.
//! 3. A panic ends its actor only: whoever waited learns what is known, everybody else goes on.
//! 4. An actor whose end is requested ends within its grace, or is killed at its next await.

mod ends;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::Executed;
use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, Incarnation};
use mobula_core::order::StartActor;
use mobula_wire::object::OBJECTS_ACTOR;
use parking_lot::Mutex;
use ractor::{Actor, ActorRef};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

use self::ends::Supervisor;
use crate::context::{HostRuntime, Notice};
use crate::mailbox::{IncomingCall, Mailbox};
use crate::registry::Registry;
use crate::reply::unavailable;
use crate::shell::{ActorShell, Startup, start_failure};

/// Actors in one host process: beyond this, one process's loss takes too much with it.
pub const ACTORS_PER_HOST_MAX: usize = 10_000;

/// Reports that wait for the agent's link; whoever reports waits when it is full.
pub const EVENTS_WAITING_MAX: usize = 1024;

/// How long a killed actor may take to reach its next await when the host ends.
const KILL_ALLOWANCE: Duration = Duration::from_millis(250);

/// Something that became of an actor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ActorEvent {
    /// It is constructed and takes calls.
    Started {
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// It ended.
    Exited {
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
        /// Why.
        reason: ExitReason,
    },
}

enum Slot {
    Starting {
        incarnation: Incarnation,
        task: Option<AbortHandle>,
    },
    Running(Arc<Mailbox>),
}

impl Slot {
    fn incarnation(&self) -> Incarnation {
        match self {
            Slot::Starting { incarnation, .. } => *incarnation,
            Slot::Running(mailbox) => mailbox.incarnation,
        }
    }
}

/// The actors of one host process.
pub struct ActorTable {
    runtime: Arc<HostRuntime>,
    registry: Registry,
    supervisor: ActorRef<()>,
    slots: Mutex<BTreeMap<ActorId, Slot>>,
    by_ractor_id: Mutex<HashMap<ractor::ActorId, Arc<Mailbox>>>,
    events: mpsc::Sender<ActorEvent>,
    tasks: TaskTracker,
    /// Told after each reported end.
    changed: Notify,
}

/// The host cannot run any actors.
#[derive(Debug, thiserror::Error)]
#[error("the supervisor of this host's actors did not start: {0}")]
pub struct SupervisorStartError(String);

impl ActorTable {
    /// An empty table, and what becomes of its actors.
    pub async fn start(
        runtime: Arc<HostRuntime>,
        registry: Registry,
    ) -> Result<(Arc<Self>, mpsc::Receiver<ActorEvent>), SupervisorStartError> {
        let (ended, mut ends) = mpsc::channel(EVENTS_WAITING_MAX);
        let (supervisor, _task) = Actor::spawn(None, Supervisor { ended }, ())
            .await
            .map_err(|error| SupervisorStartError(error.to_string()))?;
        let (events, receiver) = mpsc::channel(EVENTS_WAITING_MAX);
        let table = Arc::new(ActorTable {
            runtime,
            registry,
            supervisor,
            slots: Mutex::new(BTreeMap::new()),
            by_ractor_id: Mutex::new(HashMap::new()),
            events,
            tasks: TaskTracker::new(),
            changed: Notify::new(),
        });
        let weak = Arc::downgrade(&table);
        // Ends with the supervisor, which the table stops when it is dropped.
        table.tasks.spawn(async move {
            while let Some(end) = ends.recv().await {
                let Some(table) = weak.upgrade() else { break };
                table.finished(end).await;
            }
        });
        Ok((table, receiver))
    }

    /// The types that can be started here.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// What the actors share.
    #[must_use]
    pub fn runtime(&self) -> &Arc<HostRuntime> {
        &self.runtime
    }

    /// Starts an actor; what comes of it is an event. An incarnation that is here already is left
    /// alone, an older one is killed.
    pub async fn start_actor(self: &Arc<Self>, order: StartActor) {
        let (actor, incarnation) = (order.actor, order.incarnation);
        let superseded = {
            let mut slots = self.slots.lock();
            let held = slots.get(&actor).map(Slot::incarnation);
            if held.is_some_and(|held| held >= incarnation) {
                return;
            }
            if held.is_none() && slots.len() >= ACTORS_PER_HOST_MAX {
                Err(format!(
                    "this host runs {ACTORS_PER_HOST_MAX} actors already, its limit"
                ))
            } else {
                Ok(slots.insert(
                    actor,
                    Slot::Starting {
                        incarnation,
                        task: None,
                    },
                ))
            }
        };
        match superseded {
            Ok(old) => self.discard(actor, old).await,
            Err(reason) => {
                let reason = ExitReason::StartFailed(reason);
                return self
                    .report(ActorEvent::Exited {
                        actor,
                        incarnation,
                        reason,
                    })
                    .await;
            }
        }
        let table = Arc::clone(self);
        let task = self
            .tasks
            .spawn(async move { table.construct(order).await });
        if let Some(Slot::Starting {
            incarnation: held,
            task: slot,
        }) = self.slots.lock().get_mut(&actor)
            && *held == incarnation
        {
            *slot = Some(task.abort_handle());
        }
    }

    async fn discard(&self, actor: ActorId, old: Option<Slot>) {
        match old {
            None => {}
            Some(Slot::Starting { incarnation, task }) => {
                if let Some(task) = task {
                    task.abort();
                }
                let reason = ExitReason::Stopped;
                self.report(ActorEvent::Exited {
                    actor,
                    incarnation,
                    reason,
                })
                .await;
            }
            Some(Slot::Running(mailbox)) => {
                mailbox.context.end(ExitReason::Stopped);
                mailbox.kill();
            }
        }
    }

    async fn construct(self: Arc<Self>, order: StartActor) {
        let (actor, incarnation) = (order.actor, order.incarnation);
        let arguments = Startup {
            table: Arc::downgrade(&self),
            order,
        };
        let spawned =
            Actor::spawn_linked(None, ActorShell, arguments, self.supervisor.get_cell()).await;
        let Err(error) = spawned else { return };
        let reason = start_failure(error);
        let owned = {
            let mut slots = self.slots.lock();
            let ours = matches!(
                slots.get(&actor),
                Some(Slot::Starting { incarnation: held, .. }) if *held == incarnation
            );
            if ours {
                slots.remove(&actor);
            }
            ours
        };
        if owned {
            self.report(ActorEvent::Exited {
                actor,
                incarnation,
                reason,
            })
            .await;
        }
    }

    /// Ends an actor: it may finish its present method and tidy up for `grace`, then is killed.
    /// One that is not here has ended, which is said again.
    pub async fn stop_actor(
        self: &Arc<Self>,
        actor: ActorId,
        incarnation: Incarnation,
        grace: Duration,
    ) {
        let (starting, running) = {
            let mut slots = self.slots.lock();
            match slots.get(&actor) {
                Some(Slot::Running(mailbox)) if mailbox.incarnation == incarnation => {
                    (None, Some(Arc::clone(mailbox)))
                }
                Some(slot) if slot.incarnation() == incarnation => (slots.remove(&actor), None),
                _ => (None, None),
            }
        };
        let Some(mailbox) = running else {
            if starting.is_some() {
                return self.discard(actor, starting).await;
            }
            let reason = ExitReason::Stopped;
            return self
                .report(ActorEvent::Exited {
                    actor,
                    incarnation,
                    reason,
                })
                .await;
        };
        mailbox.context.end(ExitReason::Stopped);
        self.tasks.spawn(async move {
            if mailbox.ractor.get_cell().wait(Some(grace)).await.is_err() {
                tracing::warn!(%actor, grace_ms = grace.as_millis() as u64, "killed after its grace");
                mailbox.kill();
            }
        });
    }

    /// Ends every actor, and waits until all have ended or been killed, for about `grace`.
    pub async fn stop_all(self: &Arc<Self>, grace: Duration) {
        let held: Vec<_> = self
            .slots
            .lock()
            .iter()
            .map(|(actor, slot)| (*actor, slot.incarnation()))
            .collect();
        for (actor, incarnation) in held {
            self.stop_actor(actor, incarnation, grace).await;
        }
        // A method that never awaits cannot be killed: the process ends with it.
        let last = tokio::time::Instant::now() + grace + KILL_ALLOWANCE;
        loop {
            let change = self.changed.notified();
            tokio::pin!(change);
            // Registered before the look, so that no end is missed in between.
            change.as_mut().enable();
            if self.count() == 0 || tokio::time::timeout_at(last, change).await.is_err() {
                return;
            }
        }
    }

    /// Tells every actor, and whoever watches, that the node will be gone; `None` takes it back.
    pub fn notify(&self, notice: Option<Notice>) {
        self.runtime.set_notice(notice);
        let Some(Notice { deadline_ms }) = notice else {
            return;
        };
        for slot in self.slots.lock().values() {
            if let Slot::Running(mailbox) = slot {
                mailbox.notify(deadline_ms);
            }
        }
    }

    /// Admits a call to one incarnation of an actor, or answers it with why not.
    pub fn admit(&self, actor: ActorId, incarnation: Incarnation, call: IncomingCall) {
        if actor == OBJECTS_ACTOR
            && let Some(objects) = self.runtime.objects()
        {
            return objects.serve(call);
        }
        let refusal = match self.slots.lock().get(&actor) {
            Some(Slot::Running(mailbox)) if mailbox.incarnation == incarnation => {
                // Under the lock, so that calls enter in the order in which they were read.
                return mailbox.admit(call);
            }
            Some(Slot::Starting { .. }) => "it is starting".to_owned(),
            Some(slot) => format!(
                "the call is meant for start {incarnation}, here runs {}",
                slot.incarnation()
            ),
            None => "it does not run in this host".to_owned(),
        };
        call.reply
            .send(Err(unavailable(actor, refusal, Executed::No)));
    }

    /// How many actors are here, starting ones included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.slots.lock().len()
    }

    /// A constructed actor takes calls from now on; false if its start was called off meanwhile.
    pub(crate) fn enter(&self, mailbox: Arc<Mailbox>) -> bool {
        let mut slots = self.slots.lock();
        match slots.get_mut(&mailbox.actor) {
            Some(slot @ Slot::Starting { .. }) if slot.incarnation() == mailbox.incarnation => {
                self.by_ractor_id
                    .lock()
                    .insert(mailbox.ractor.get_id(), Arc::clone(&mailbox));
                *slot = Slot::Running(mailbox);
                true
            }
            _ => false,
        }
    }

    pub(crate) async fn report(&self, event: ActorEvent) {
        // Nobody listens once the agent is gone; the process is about to end then.
        let _ = self.events.send(event).await;
        self.changed.notify_waiters();
    }
}

impl Drop for ActorTable {
    fn drop(&mut self) {
        for mailbox in self.by_ractor_id.lock().values() {
            mailbox.kill();
        }
        self.supervisor.stop(None);
    }
}
