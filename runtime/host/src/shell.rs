//! The ractor actor around each of ours: constructs it, hands it its calls, and tidies up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use mobula_core::exit::ExitReason;
use mobula_core::order::StartActor;
use mobula_core::spec::ActorKind;
use ractor::{Actor, ActorProcessingErr, ActorRef, SpawnErr};

use crate::actor::DynActor;
use crate::context::ActorContext;
use crate::mailbox::{Envelope, InFlight, Mailbox, run_call};
use crate::registry::ConstructError;
use crate::supervision::{ActorEvent, ActorTable};

/// The longest text of a panic or failure that is reported; the log has all of it.
const REASON_BYTES_MAX: usize = 4096;

/// The ractor actor around every one of ours.
pub(crate) struct ActorShell;

/// What it is started with.
pub(crate) struct Startup {
    pub(crate) table: Weak<ActorTable>,
    pub(crate) order: StartActor,
}

/// What it holds while it runs.
pub(crate) struct Running {
    actor: Box<dyn DynActor>,
    context: ActorContext,
    in_flight: InFlight,
    notice_waits: Arc<AtomicBool>,
}

#[derive(Debug, thiserror::Error)]
enum StartupError {
    #[error("the host is shutting down")]
    ShuttingDown,
    #[error("it was stopped while it started")]
    Stopped,
    #[error("a driver is a process of its own and cannot be started in a host of actors")]
    IsDriver,
    #[error(
        "this program has no actor type `{name}`; it has: {known}; was the job submitted with an \
         older binary?"
    )]
    UnknownType { name: String, known: String },
    #[error("{0}")]
    Construct(ConstructError),
}

impl Actor for ActorShell {
    type Msg = Envelope;
    type State = Running;
    type Arguments = Startup;

    async fn pre_start(
        &self,
        myself: ActorRef<Envelope>,
        startup: Startup,
    ) -> Result<Running, ActorProcessingErr> {
        let StartActor {
            actor,
            incarnation,
            spec,
            ..
        } = startup.order;
        let table = startup.table.upgrade().ok_or(StartupError::ShuttingDown)?;
        let ActorKind::Actor { type_name } = spec.kind else {
            return Err(StartupError::IsDriver.into());
        };
        let actor_type =
            table
                .registry()
                .get(&type_name)
                .ok_or_else(|| StartupError::UnknownType {
                    known: table.registry().names().join(", "),
                    name: type_name,
                })?;
        let context = ActorContext::new(actor, incarnation, spec.name, Arc::clone(table.runtime()));
        let constructed = (actor_type.constructor)(spec.init, context.clone())
            .await
            .map_err(StartupError::Construct)?;

        let in_flight = InFlight::default();
        let notice_waits = Arc::new(AtomicBool::new(false));
        let mailbox = Arc::new(Mailbox::new(
            context.clone(),
            myself.clone(),
            spec.mailbox_capacity,
            Arc::clone(&in_flight),
            Arc::clone(&notice_waits),
        ));
        if !table.enter(mailbox.clone()) {
            return Err(StartupError::Stopped.into());
        }
        context.attach(myself.get_cell());
        table
            .report(ActorEvent::Started { actor, incarnation })
            .await;
        if let Some(notice) = context.notice() {
            mailbox.notify(notice.deadline_ms);
        }
        Ok(Running {
            actor: constructed,
            context,
            in_flight,
            notice_waits,
        })
    }

    async fn post_start(
        &self,
        _myself: ActorRef<Envelope>,
        running: &mut Running,
    ) -> Result<(), ActorProcessingErr> {
        running.actor.started(&running.context).await;
        Ok(())
    }

    async fn handle(
        &self,
        _myself: ActorRef<Envelope>,
        message: Envelope,
        running: &mut Running,
    ) -> Result<(), ActorProcessingErr> {
        let Running {
            actor,
            context,
            in_flight,
            notice_waits,
        } = running;
        match message {
            Envelope::Call { call, permit } => {
                run_call(actor.as_mut(), context, in_flight, call, permit).await;
            }
            Envelope::Notice { deadline_ms } => {
                notice_waits.store(false, Ordering::Release);
                actor.on_notice(deadline_ms, context).await;
            }
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _myself: ActorRef<Envelope>,
        running: &mut Running,
    ) -> Result<(), ActorProcessingErr> {
        running.actor.on_stop(&running.context).await;
        Ok(())
    }
}

/// A reason of bearable length.
pub(crate) fn shortened(text: String) -> String {
    match text.char_indices().find(|(at, _)| *at >= REASON_BYTES_MAX) {
        Some((at, _)) => format!("{} …", &text[..at]),
        None => text,
    }
}

/// Why a start failed, told apart by what the shell itself reported.
pub(crate) fn start_failure(error: SpawnErr) -> ExitReason {
    match error {
        SpawnErr::StartupFailed(error) => match error.downcast::<StartupError>() {
            Ok(error) => match *error {
                StartupError::Construct(ConstructError::Failed(text)) => {
                    ExitReason::Failed(shortened(text))
                }
                other => ExitReason::StartFailed(shortened(other.to_string())),
            },
            Err(panic) => ExitReason::Panicked(shortened(panic.to_string())),
        },
        other => ExitReason::StartFailed(other.to_string()),
    }
}
