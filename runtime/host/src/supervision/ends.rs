//! Ends of actors: heard from ractor, taken out of the table, and reported once nothing of the actor
//! runs any more.

use std::sync::Arc;

use mobula_core::exit::ExitReason;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::mpsc;

use super::{ActorEvent, ActorTable};
use crate::mailbox::{Intake, Mailbox};
use crate::shell::shortened;

impl ActorTable {
    /// Takes the actor out of the table, and reports its end when all of it is over.
    pub(super) async fn finished(self: &Arc<Self>, end: End) {
        let Some(mailbox) = self.by_ractor_id.lock().remove(&end.ractor_id) else {
            return;
        };
        let (actor, incarnation) = (mailbox.actor, mailbox.incarnation);
        {
            let mut slots = self.slots.lock();
            if slots
                .get(&actor)
                .is_some_and(|slot| slot.incarnation() == incarnation)
            {
                slots.remove(&actor);
            }
        }
        match &mailbox.intake {
            Intake::Slot(slot) => {
                let slot = Arc::clone(slot);
                // Its resources are in use until its thread has let go of the last task.
                let rest = async move {
                    slot.kill();
                    slot.ended().await;
                };
                self.finish_beside(mailbox, end.panic, rest);
            }
            Intake::Serial(serial) => {
                let waiting = serial.in_flight.lock().take();
                let reason = match end.panic {
                    Some(text) => {
                        if let Some(reply) = waiting {
                            reply.send(Err(mobula_core::CallError::Panicked(text.clone())));
                        }
                        ExitReason::Panicked(text)
                    }
                    // Dropping the answer says that the method was under way.
                    None => mailbox.context.ending().unwrap_or(ExitReason::Completed),
                };
                self.report(ActorEvent::Exited {
                    actor,
                    incarnation,
                    reason,
                })
                .await;
            }
            Intake::Concurrent(runner) => {
                let runner = Arc::clone(runner);
                // A method may take its time to reach its next await.
                let rest = async move {
                    runner.kill();
                    runner.close().await;
                };
                self.finish_beside(mailbox, end.panic, rest);
            }
        }
    }

    /// Reports an actor's end when `rest` of it is over, beside the ends of the others.
    fn finish_beside(
        self: &Arc<Self>,
        mailbox: Arc<Mailbox>,
        panic: Option<String>,
        rest: impl Future<Output = ()> + Send + 'static,
    ) {
        let table = Arc::clone(self);
        self.tasks.spawn(async move {
            rest.await;
            let reason = panic
                .map(ExitReason::Panicked)
                .or_else(|| mailbox.context.ending())
                .unwrap_or(ExitReason::Completed);
            let (actor, incarnation) = (mailbox.actor, mailbox.incarnation);
            table
                .report(ActorEvent::Exited {
                    actor,
                    incarnation,
                    reason,
                })
                .await;
        });
    }
}

/// An actor's end, as ractor tells it.
pub(super) struct End {
    ractor_id: ractor::ActorId,
    panic: Option<String>,
}

/// The parent of all actors here. It never stops of itself: ractor's default would end it, and
/// with it every other actor, at the first child's end.
pub(super) struct Supervisor {
    pub(super) ended: mpsc::Sender<End>,
}

impl Actor for Supervisor {
    type Msg = ();
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<()>,
        event: SupervisionEvent,
        _state: &mut (),
    ) -> Result<(), ActorProcessingErr> {
        let end = match event {
            SupervisionEvent::ActorTerminated(cell, _state, _reason) => End {
                ractor_id: cell.get_id(),
                panic: None,
            },
            SupervisionEvent::ActorFailed(cell, error) => End {
                ractor_id: cell.get_id(),
                panic: Some(shortened(error.to_string())),
            },
            _ => return Ok(()),
        };
        // Fails only when the table is gone, and then there is nothing to supervise.
        let _ = self.ended.send(end).await;
        Ok(())
    }
}
