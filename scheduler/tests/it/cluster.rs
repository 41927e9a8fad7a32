//! A scheduler over tables in memory, with a log index and a clock that tests move.

use std::collections::BTreeMap;

use mobula_core::control::{Applied, ApplyContext, Effect, StateModule};
use mobula_core::label::Labels;
use mobula_core::order::{Order, WorkerEvent};
use mobula_core::spec::{ActorSpec, JobSpec, PlacementPolicy, Program, RestartPolicy};
use mobula_core::{ActorId, ExitReason, HostId, Incarnation, JobId, NodeId, Rejection, Resources};
use mobula_scheduler::memory_txn::MemoryTables;
use mobula_scheduler::{
    ActorView, Command, JobView, NodeView, Query, QueryResponse, Response, Scheduler, invariants,
    placement_pass,
};

pub(crate) struct Cluster {
    pub(crate) tables: MemoryTables,
    pub(crate) now_ms: u64,
    pub(crate) effects: Vec<Effect>,
    index: u64,
}

impl Cluster {
    pub(crate) fn new() -> Self {
        Cluster {
            tables: MemoryTables::default(),
            now_ms: 1_000,
            effects: Vec::new(),
            index: 0,
        }
    }

    pub(crate) fn apply(&mut self, command: &Command) -> Result<Response, Rejection> {
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: self.now_ms,
        };
        let before = self.tables.clone();
        let outcome = self.tables.apply(&Scheduler, &context, &command.encode());
        match outcome {
            Ok(Applied { response, effects }) => {
                if let Err(violation) = invariants::check(&self.tables) {
                    panic!("after {command:?}: {violation}");
                }
                self.effects = effects;
                Ok(Response::decode(&response).unwrap())
            }
            Err(rejection) => {
                assert_eq!(self.tables, before);
                Err(rejection)
            }
        }
    }

    /// Applies a command without looking at what it did to the tables.
    pub(crate) fn quietly(&mut self, command: &Command) -> Result<Response, Rejection> {
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: self.now_ms,
        };
        let applied = self.tables.apply(&Scheduler, &context, &command.encode())?;
        Ok(Response::decode(&applied.response).unwrap())
    }

    pub(crate) fn ok(&mut self, command: Command) -> Response {
        self.apply(&command)
            .unwrap_or_else(|rejection| panic!("{command:?}: {rejection}"))
    }

    pub(crate) fn refused(&mut self, command: Command) -> String {
        match self.apply(&command) {
            Err(rejection) => rejection.message,
            Ok(response) => panic!("{command:?} was not refused but answered {response:?}"),
        }
    }

    /// Passes until there is nothing more to place. Fresh decisions must all hold.
    pub(crate) fn place(&mut self) {
        while let Some(command) = placement_pass(&self.tables, self.now_ms) {
            match self.ok(command) {
                Response::Assigned { skipped, .. } => assert_eq!(skipped, []),
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    pub(crate) fn query(&self, query: Query) -> QueryResponse {
        let bytes = Scheduler
            .query(&self.tables, self.now_ms, &query.encode())
            .unwrap();
        QueryResponse::decode(&bytes).unwrap()
    }

    pub(crate) fn actor(&self, actor: ActorId) -> ActorView {
        match self.query(Query::Actor { actor }) {
            QueryResponse::Actor(view) => view,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(crate) fn job(&self, job: JobId) -> JobView {
        match self.query(Query::Job { job }) {
            QueryResponse::Job(view) => view,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(crate) fn node(&self, node: NodeId) -> NodeView {
        match self.query(Query::Node { node }) {
            QueryResponse::Node(view) => view,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(crate) fn register(
        &mut self,
        name: &str,
        boot_id: &str,
        cpus: u64,
    ) -> (NodeId, Incarnation) {
        let capacity = Resources::cpu_milli(cpus * 1000);
        self.register_with(name, boot_id, capacity, Labels::new())
    }

    pub(crate) fn register_with(
        &mut self,
        name: &str,
        boot_id: &str,
        capacity: Resources,
        labels: Labels,
    ) -> (NodeId, Incarnation) {
        let (name, boot_id, version) = (name.to_owned(), boot_id.to_owned(), "0.1.0".to_owned());
        match self.ok(Command::RegisterNode {
            name,
            boot_id,
            capacity,
            labels,
            version,
        }) {
            Response::Registered { node, incarnation } => (node, incarnation),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(crate) fn submit(&mut self, spec: JobSpec) -> (JobId, ActorId) {
        match self.ok(Command::SubmitJob { spec }) {
            Response::JobSubmitted { job, driver, .. } => (job, driver),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(crate) fn create(
        &mut self,
        job: JobId,
        actors: Vec<ActorSpec>,
        gang: bool,
    ) -> Vec<ActorId> {
        let command = Command::CreateActors {
            job,
            actors,
            gang,
            get_or_create: false,
            creator: None,
        };
        match self.ok(command) {
            Response::ActorsCreated { actors } => actors,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(crate) fn event(&mut self, node: NodeId, event: WorkerEvent) -> Response {
        let incarnation = self.node(node).incarnation;
        self.ok(Command::NodeEvent {
            node,
            incarnation,
            event,
        })
    }

    /// Has the actor's worker say that it runs.
    pub(crate) fn start(&mut self, actor: ActorId) -> Incarnation {
        let view = self.actor(actor);
        let event = WorkerEvent::ActorStarted {
            actor,
            incarnation: view.incarnation,
            host: HostId(1),
            call_address: "127.0.0.1:7000".to_owned(),
            pid: 77,
        };
        self.event(view.node.unwrap(), event);
        view.incarnation
    }

    /// Has the actor's worker say that it ended.
    pub(crate) fn exit(&mut self, actor: ActorId, reason: ExitReason) {
        let view = self.actor(actor);
        let incarnation = view.incarnation;
        let event = WorkerEvent::ActorExited {
            actor,
            incarnation,
            reason,
        };
        self.event(view.node.unwrap(), event);
    }

    /// The orders among the effects of the last command, in short.
    pub(crate) fn orders(&self) -> Vec<String> {
        let orders = self.effects.iter().filter_map(|effect| match effect {
            Effect::Order { node, order } => Some(format!("{node} {}", short(order))),
            _ => None,
        });
        orders.collect()
    }
}

pub(crate) fn short(order: &Order) -> String {
    match order {
        Order::Start(start) => format!("start {}{}", start.actor, start.incarnation),
        Order::Stop {
            actor,
            incarnation,
            grace_ms,
        } => {
            format!("stop {actor}{incarnation} in {grace_ms} ms")
        }
        Order::Notice { deadline_ms } => format!("notice {deadline_ms}"),
        Order::NoticeWithdrawn => "notice withdrawn".to_owned(),
        Order::JobEnded { job } => format!("{job} ended"),
    }
}

pub(crate) fn job_spec(name: &str, max_restarts: u32) -> JobSpec {
    JobSpec {
        name: name.to_owned(),
        program: Program::Builtin,
        args: vec!["arg".to_owned()],
        env: BTreeMap::from([("KEY".to_owned(), "value".to_owned())]),
        resources: Resources::cpu_milli(1000),
        placement: PlacementPolicy::default(),
        restart: RestartPolicy::times(max_restarts),
        idempotency_key: None,
        files: Vec::new(),
        retry_errors: true,
        secrets: BTreeMap::new(),
        namespace: None,
    }
}

pub(crate) fn actor_spec(name: Option<&str>, cpus: u64) -> ActorSpec {
    ActorSpec {
        name: name.map(str::to_owned),
        init: vec![1, 2, 3],
        resources: Resources::cpu_milli(cpus * 1000),
        restart: RestartPolicy::times(2),
        mailbox_capacity: 16,
        ..ActorSpec::of_type("test")
    }
}
