//! The ractor actor around each of ours: constructs it, hands it its calls, and tidies up.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, Incarnation};
use mobula_core::order::StartActor;
use mobula_core::spec::ActorKind;
use ractor::{Actor, ActorProcessingErr, ActorRef, SpawnErr};

use crate::actor::{ActorBody, DynActor};
use crate::concurrent::ConcurrentRunner;
use crate::context::{ActorContext, HostRuntime};
use crate::mailbox::{Envelope, Intake, Mailbox, SerialIntake, run_call};
use crate::registry::ConstructError;
use crate::state::{ActorState, StateError};
use crate::supervision::{ActorEvent, ActorTable};
use crate::tasks::slot::{SLOT_TYPE, SlotRunner};

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
    context: ActorContext,
    body: Body,
}

enum Body {
    Serial {
        actor: Box<dyn DynActor>,
        intake: Arc<SerialIntake>,
    },
    /// Its calls do not come this way.
    Concurrent(Arc<ConcurrentRunner>),
    /// Neither do these.
    Slot(Arc<SlotRunner>),
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
    #[error(transparent)]
    State(#[from] StateError),
    #[error("the system gives the slot no thread: {0}")]
    SlotThread(std::io::Error),
}

/// Takes over what the actor's earlier starts have kept.
async fn restore(
    runtime: &HostRuntime,
    actor: ActorId,
    incarnation: Incarnation,
) -> Result<ActorState, StartupError> {
    let store = runtime
        .blobs()
        .map_err(|error| StateError::NotRestored(error.to_string()))?;
    let state = ActorState::open(store, &runtime.info().cluster_id, actor, incarnation).await?;
    Ok(state)
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
        let runtime = Arc::clone(table.runtime());
        let capacity = spec.mailbox_capacity;
        let (context, body, intake) = if type_name == SLOT_TYPE {
            let context = ActorContext::new(actor, incarnation, spec.name, runtime);
            let tasks = table.registry().tasks().clone();
            let slot = SlotRunner::start(context.clone(), spec.resources, tasks, capacity)
                .map_err(StartupError::SlotThread)?;
            (context, Body::Slot(Arc::clone(&slot)), Intake::Slot(slot))
        } else {
            let registry = table.registry();
            let actor_type = registry
                .get(&type_name)
                .ok_or_else(|| StartupError::UnknownType {
                    known: registry.names().join(", "),
                    name: type_name,
                })?;
            let state = match actor_type.durable {
                true => restore(&runtime, actor, incarnation).await?,
                false => ActorState::default(),
            };
            let context = ActorContext::with_state(actor, incarnation, spec.name, runtime, state);
            let constructed = (actor_type.constructor)(spec.init, context.clone())
                .await
                .map_err(StartupError::Construct)?;
            let (body, intake) = around(constructed, &context, capacity);
            (context, body, intake)
        };
        let mailbox = Arc::new(Mailbox::new(context.clone(), myself.clone(), intake));
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
        Ok(Running { context, body })
    }

    async fn post_start(
        &self,
        _myself: ActorRef<Envelope>,
        running: &mut Running,
    ) -> Result<(), ActorProcessingErr> {
        match &mut running.body {
            Body::Serial { actor, .. } => actor.started(&running.context).await,
            Body::Concurrent(runner) => runner.started().await,
            Body::Slot(_) => {}
        }
        Ok(())
    }

    async fn handle(
        &self,
        _myself: ActorRef<Envelope>,
        message: Envelope,
        running: &mut Running,
    ) -> Result<(), ActorProcessingErr> {
        let Running { context, body } = running;
        let Body::Serial { actor, intake } = body else {
            return Ok(());
        };
        match message {
            Envelope::Call { call, permit } => {
                drop(permit);
                run_call(actor.as_mut(), context, &intake.in_flight, call).await;
            }
            Envelope::Notice { deadline_ms } => {
                intake.notice_waits.store(false, Ordering::Release);
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
        match &mut running.body {
            Body::Serial { actor, .. } => actor.on_stop(&running.context).await,
            Body::Concurrent(runner) => runner.stopped().await,
            Body::Slot(slot) => slot.stopped().await,
        }
        Ok(())
    }
}

/// What a constructed actor is to its ractor actor, and where its mailbox puts its calls.
fn around(constructed: ActorBody, context: &ActorContext, capacity: u32) -> (Body, Intake) {
    match constructed {
        ActorBody::Serial(actor) => {
            let intake = Arc::new(SerialIntake::new(capacity));
            let body = Body::Serial {
                actor,
                intake: Arc::clone(&intake),
            };
            (body, Intake::Serial(intake))
        }
        ActorBody::Concurrent(actor, concurrency) => {
            let runner = ConcurrentRunner::new(actor, concurrency, context.clone(), capacity);
            let body = Body::Concurrent(Arc::clone(&runner));
            (body, Intake::Concurrent(runner))
        }
    }
}

/// What a panic said, as far as it is text.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
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
                // The store may be back at the next try.
                StartupError::State(error) => ExitReason::Failed(shortened(error.to_string())),
                other => ExitReason::StartFailed(shortened(other.to_string())),
            },
            Err(panic) => ExitReason::Panicked(shortened(panic.to_string())),
        },
        other => ExitReason::StartFailed(other.to_string()),
    }
}
