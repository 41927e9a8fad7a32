//! The actors of a host, as the head of a test knows them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mobula_core::id::{ActorId, Incarnation, JobId, NodeId};
use mobula_core::order::StartActor;
use mobula_core::spec::{ActorKind, ActorSpec, Program};
use mobula_host::supervision::{ActorEvent, ActorTable};
use mobula_wire::control as api;
use mobula_wire::control::resolve_actor_request::Target;
use tokio::sync::watch;
use tonic::Status;

/// The job that all of them belong to.
pub const JOB: JobId = JobId(3);

/// The node that all of them run on.
pub(crate) const NODE: NodeId = NodeId(1);

/// One actor.
#[derive(Debug, Clone)]
pub struct Known {
    /// As it was asked for.
    pub spec: ActorSpec,
    /// As the head tells of it.
    pub row: api::Actor,
}

impl Known {
    /// Whether it has not ended, or is to be started again.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.row.state != "ended"
    }
}

/// The actors of one host by their ids, and what became of them.
pub struct Actors {
    table: Arc<ActorTable>,
    /// Where the host takes calls.
    call_address: String,
    known: watch::Sender<BTreeMap<u64, Known>>,
    /// That of the next start.
    incarnation: AtomicU64,
}

impl Actors {
    pub(crate) fn new(table: Arc<ActorTable>, call_address: String) -> Self {
        Actors {
            table,
            call_address,
            known: watch::Sender::new(BTreeMap::new()),
            incarnation: AtomicU64::new(1),
        }
    }

    /// All of them as they are now. Nothing changes while this is held.
    pub fn now(&self) -> watch::Ref<'_, BTreeMap<u64, Known>> {
        self.known.borrow()
    }

    /// All of them, to wait for a change.
    pub fn watch(&self) -> watch::Receiver<BTreeMap<u64, Known>> {
        self.known.subscribe()
    }

    /// Takes in an actor that is still to be started.
    ///
    /// # Panics
    /// If it is a driver: those have processes of their own.
    pub fn add(&self, id: u64, spec: ActorSpec) {
        let ActorKind::Actor { type_name } = &spec.kind else {
            panic!("actor {id} is a driver, and the host of a test starts none");
        };
        let row = api::Actor {
            id,
            job: JOB.0,
            name: spec.name.clone().unwrap_or_default(),
            type_name: type_name.clone(),
            state: "pending".into(),
            ..Default::default()
        };
        self.known
            .send_modify(|known| drop(known.insert(id, Known { spec, row })));
    }

    /// Has the host start one of them, for the first time or again.
    ///
    /// # Panics
    /// If nobody has added it.
    pub async fn start(&self, id: u64) {
        let spec = self.now()[&id].spec.clone();
        let incarnation = self.incarnation.fetch_add(1, Ordering::SeqCst);
        self.table
            .start_actor(StartActor {
                actor: ActorId(id),
                incarnation: Incarnation(incarnation),
                job: JOB,
                program: Program::Builtin,
                spec,
                args: Vec::new(),
                env: BTreeMap::new(),
                files: Vec::new(),
                secrets: BTreeMap::new(),
            })
            .await;
    }

    /// Ends one of them in the midst of what it does, if it runs.
    ///
    /// # Panics
    /// If nobody has added it.
    pub async fn kill(&self, id: u64) {
        let running = self.now()[&id].row.incarnation;
        if let Some(incarnation) = running {
            self.table
                .stop_actor(ActorId(id), Incarnation(incarnation), Duration::ZERO)
                .await;
        }
    }

    /// Takes in what became of an actor; its id, if it is to be started again.
    pub(crate) fn heard(&self, event: ActorEvent) -> Option<u64> {
        let mut again = None;
        self.known.send_modify(|known| match event {
            ActorEvent::Started { actor, incarnation } => {
                let Known { row, .. } = of(known, actor);
                row.state = "running".into();
                row.node = Some(NODE.0);
                row.incarnation = Some(incarnation.0);
                row.call_address = Some(self.call_address.clone());
            }
            ActorEvent::Exited { actor, reason, .. } => {
                let Known { spec, row } = of(known, actor);
                let is_restarted = !reason.is_wanted() && row.restarts < spec.restart.max_restarts;
                row.exit_reason = Some(reason.to_string());
                row.state = if is_restarted { "pending" } else { "ended" }.into();
                (row.incarnation, row.call_address) = (None, None);
                if is_restarted {
                    row.restarts += 1;
                    again = Some(actor.0);
                }
            }
        });
        again
    }

    /// The actor that is asked for, once it has ended or runs in the start that is asked for, or as it is when the
    /// request's time is over.
    ///
    /// # Errors
    /// `NotFound` if there is no such actor.
    pub async fn resolve(&self, request: api::ResolveActorRequest) -> Result<api::Actor, Status> {
        let after = request.after_incarnation;
        let target = request.target.as_ref();
        let mut known = self.watch();
        let due = known.wait_for(|known| {
            find(known, target).is_none_or(|found| {
                !found.is_alive() || found.row.incarnation.is_some_and(|known| known > after)
            })
        });
        let _ = tokio::time::timeout(Duration::from_millis(request.timeout_ms), due).await;
        let known = self.now();
        let found = find(&known, target).map(|found| found.row.clone());
        found.ok_or(Status::not_found("no such actor"))
    }
}

fn of(known: &mut BTreeMap<u64, Known>, actor: ActorId) -> &mut Known {
    known
        .get_mut(&actor.0)
        .expect("a host tells only of actors that it was told to start")
}

fn find<'a>(known: &'a BTreeMap<u64, Known>, target: Option<&Target>) -> Option<&'a Known> {
    match target? {
        Target::Actor(id) => known.get(id),
        // A name is that of one who lives.
        Target::Named(named) => known
            .values()
            .find(|known| known.row.name == named.name && known.is_alive()),
    }
}
