//! Any sequence of commands keeps every invariant, and gives the same tables on every replica.

use mobula_core::control::{ApplyContext, StateModule};
use mobula_core::kept::KeptCommand;
use mobula_core::namespace::NamespaceEntry;
use mobula_core::order::WorkerEvent;
use mobula_core::spec::SpreadKey;
use mobula_core::{ActorId, ExitReason, HostId, Incarnation, JobId, NodeId, Resources};
use mobula_scheduler::memory_txn::MemoryTables;
use mobula_scheduler::{
    ActorIncarnation, Command, KeptObjects, Query, QueryResponse, Response, Role, Scheduler,
    invariants, orders_for_node, placement_pass,
};
use proptest::prelude::*;

use crate::cluster::{actor_spec, job_spec};
use crate::kept::value;

/// One step; numbers choose among what exists when it is its turn.
#[derive(Debug, Clone)]
enum Step {
    Register {
        name: u8,
        boot: u8,
        cpus: u64,
        gpus: u64,
    },
    Lose {
        node: u8,
    },
    Drain {
        node: u8,
        on: bool,
    },
    Preempt {
        node: u8,
    },
    Withdraw {
        node: u8,
    },
    Submit {
        key: Option<u8>,
        restarts: u32,
        namespace: Option<u8>,
        principal: u8,
    },
    StopJob {
        job: u8,
    },
    Create {
        job: u8,
        shapes: Vec<Shape>,
        gang: bool,
        get_or_create: bool,
        detached: bool,
    },
    StopActor {
        actor: u8,
        by: Option<u8>,
    },
    Started {
        actor: u8,
        stale: bool,
    },
    Exited {
        actor: u8,
        stale: bool,
        reason: u8,
    },
    Yield {
        actor: u8,
    },
    Place {
        late: Option<u8>,
    },
    Wait {
        ms: u64,
    },
    Session,
    Token {
        id: u8,
        uses: Option<u32>,
    },
    UseToken {
        id: u8,
    },
    Keep {
        actor: u8,
        stale: bool,
        name: u8,
        size_bytes: Option<u64>,
    },
}

#[derive(Debug, Clone)]
struct Shape {
    name: Option<u8>,
    cpus: u64,
    gpu_milli: u64,
    strict: bool,
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let gpu = prop_oneof![3 => Just(0u64), 1 => Just(300u64), 1 => Just(700), 1 => Just(1000)];
    (proptest::option::of(0..4u8), 0..3u64, gpu, any::<bool>()).prop_map(
        |(name, cpus, gpu_milli, strict)| Shape {
            name,
            cpus,
            gpu_milli,
            strict,
        },
    )
}

fn any_step() -> impl Strategy<Value = Step> {
    let shapes = proptest::collection::vec(any_shape(), 1..4);
    prop_oneof![
        3 => (0..4u8, 0..2u8, 0..6u64, 0..3u64)
            .prop_map(|(name, boot, cpus, gpus)| Step::Register { name, boot, cpus, gpus }),
        1 => any::<u8>().prop_map(|node| Step::Lose { node }),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(node, on)| Step::Drain { node, on }),
        1 => any::<u8>().prop_map(|node| Step::Preempt { node }),
        1 => any::<u8>().prop_map(|node| Step::Withdraw { node }),
        2 => (proptest::option::of(0..3u8), 0..3u32, proptest::option::of(0..2u8), 0..2u8).prop_map(
            |(key, restarts, namespace, principal)| {
                Step::Submit { key, restarts, namespace, principal }
            }),
        1 => any::<u8>().prop_map(|job| Step::StopJob { job }),
        4 => (any::<u8>(), shapes, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(job, shapes, gang, get_or_create, detached)| {
                Step::Create { job, shapes, gang, get_or_create, detached }
            }),
        2 => (any::<u8>(), proptest::option::of(any::<u8>()))
            .prop_map(|(actor, by)| Step::StopActor { actor, by }),
        6 => (any::<u8>(), proptest::bool::weighted(0.2))
            .prop_map(|(actor, stale)| Step::Started { actor, stale }),
        6 => (any::<u8>(), proptest::bool::weighted(0.2), any::<u8>())
            .prop_map(|(actor, stale, reason)| Step::Exited { actor, stale, reason }),
        2 => any::<u8>().prop_map(|actor| Step::Yield { actor }),
        6 => proptest::option::weighted(0.2, any::<u8>()).prop_map(|late| Step::Place { late }),
        2 => (0..5_000u64).prop_map(|ms| Step::Wait { ms }),
        1 => Just(Step::Session),
        1 => (0..3u8, proptest::option::of(0..3u32)).prop_map(|(id, uses)| Step::Token { id, uses }),
        1 => (0..3u8).prop_map(|id| Step::UseToken { id }),
        3 => (any::<u8>(), proptest::bool::weighted(0.2), 0..3u8, proptest::option::weighted(0.8, 0..3u64))
            .prop_map(|(actor, stale, name, size_bytes)| {
                Step::Keep { actor, stale, name, size_bytes }
            }),
    ]
}

/// A replica, and the log of what was proposed to it.
struct Replica {
    tables: MemoryTables,
    log: Vec<(&'static dyn StateModule, ApplyContext, Vec<u8>)>,
    now_ms: u64,
}

impl Replica {
    fn query(&self, query: Query) -> Option<QueryResponse> {
        let bytes = Scheduler
            .query(&self.tables, self.now_ms, &query.encode())
            .ok()?;
        Some(QueryResponse::decode(&bytes).unwrap())
    }

    /// The node that `choice` means, with its current incarnation.
    fn node(&self, choice: u8) -> (NodeId, Incarnation) {
        let node = NodeId(u64::from(choice) % 4 + 1);
        match self.query(Query::Node { node }) {
            Some(QueryResponse::Node(view)) => (node, view.incarnation),
            _ => (node, Incarnation(1)),
        }
    }

    fn job(&self, choice: u8) -> JobId {
        JobId(u64::from(choice) % 4)
    }

    /// The actor that `choice` means among all there are, with where it is.
    fn actor(&self, choice: u8) -> Option<(ActorId, JobId, Incarnation, Option<NodeId>)> {
        let query = Query::ListActors {
            job: None,
            after: None,
            limit: 0,
        };
        let Some(QueryResponse::Actors(views)) = self.query(query) else {
            return None;
        };
        let living: Vec<_> = views.iter().filter(|view| view.state != "ended").collect();
        let among = if living.is_empty() {
            views.iter().collect()
        } else {
            living
        };
        let view = among.get(usize::from(choice) % among.len().max(1))?;
        Some((view.actor, view.job, view.incarnation, view.node))
    }

    fn apply(&mut self, command: &Command) -> Option<Response> {
        let response = self.apply_in(&Scheduler, command.encode())?;
        Some(Response::decode(&response).unwrap())
    }

    /// Applies a command of any module; its answer, unless it is refused.
    fn apply_in(&mut self, module: &'static dyn StateModule, payload: Vec<u8>) -> Option<Vec<u8>> {
        let index = self.log.len() as u64 + 1;
        let context = ApplyContext {
            index,
            term: 1,
            now_ms: self.now_ms,
        };
        self.log.push((module, context, payload.clone()));
        let before = self.tables.clone();
        match self.tables.apply(module, &context, &payload) {
            Ok(applied) => {
                if let Err(violation) = invariants::check(&self.tables) {
                    let command = Command::decode(&payload);
                    panic!("after {command:?} of {}: {violation}", module.name());
                }
                for node in 1..=4 {
                    let _ = orders_for_node(&self.tables, NodeId(node));
                }
                Some(applied.response)
            }
            Err(_) => {
                assert_eq!(self.tables, before);
                None
            }
        }
    }

    fn actor_event(
        &self,
        choice: u8,
        stale: bool,
        event: impl Fn(ActorId, Incarnation) -> WorkerEvent,
    ) -> Option<Command> {
        let (actor, _, incarnation, node) = self.actor(choice)?;
        let (node, node_incarnation) = self.node(node.map_or(choice, |node| node.0 as u8 - 1));
        let incarnation = Incarnation(incarnation.0 - u64::from(stale).min(incarnation.0));
        Some(Command::NodeEvent {
            node,
            incarnation: node_incarnation,
            event: event(actor, incarnation),
        })
    }

    fn command(&self, step: Step) -> Option<Command> {
        Some(match step {
            Step::Register {
                name,
                boot,
                cpus,
                gpus,
            } => Command::RegisterNode {
                name: format!("node-{name}"),
                boot_id: format!("boot-{boot}"),
                capacity: Resources {
                    cpu_milli: cpus * 1000,
                    gpu_milli: gpus * 1000,
                    ..Resources::default()
                },
                labels: Default::default(),
                version: "1".into(),
            },
            Step::Lose { node } => {
                let (node, incarnation) = self.node(node);
                Command::NodeLost { node, incarnation }
            }
            Step::Drain { node, on } => Command::DrainNode {
                node: self.node(node).0,
                on,
            },
            Step::Preempt { node } => Command::PreemptNode {
                node: self.node(node).0,
                grace_ms: 1_000,
            },
            Step::Withdraw { node } => {
                let (node, incarnation) = self.node(node);
                Command::NodeEvent {
                    node,
                    incarnation,
                    event: WorkerEvent::NoticeWithdrawn,
                }
            }
            Step::Submit {
                key,
                restarts,
                namespace,
                principal,
            } => {
                let mut spec = job_spec("job", restarts);
                spec.namespace = namespace.map(|name| NamespaceEntry {
                    name: name.to_string(),
                    principal: principal.to_string(),
                });
                spec.idempotency_key = key.map(|key| key.to_string());
                Command::SubmitJob { spec }
            }
            Step::StopJob { job } => Command::StopJob { job: self.job(job) },
            Step::Create {
                job,
                shapes,
                gang,
                get_or_create,
                detached,
            } => {
                let job = self.job(job);
                let actors = shapes.into_iter().map(|shape| {
                    let mut spec = actor_spec(None, shape.cpus);
                    spec.name = shape.name.map(|name| name.to_string());
                    spec.detached = detached && spec.name.is_some();
                    spec.resources.gpu_milli = shape.gpu_milli;
                    let key = "spread".to_owned();
                    spec.placement.spread_key = Some(SpreadKey {
                        key,
                        strict: shape.strict,
                    });
                    spec
                });
                let actors = actors.collect();
                Command::CreateActors {
                    job,
                    actors,
                    gang,
                    get_or_create,
                    creator: None,
                }
            }
            Step::StopActor { actor, by } => {
                let (actor, ..) = self.actor(actor)?;
                Command::StopActor {
                    job: by.map(|job| self.job(job)),
                    actor,
                    grace_ms: 10,
                }
            }
            Step::Started { actor, stale } => {
                self.actor_event(actor, stale, |actor, incarnation| {
                    WorkerEvent::ActorStarted {
                        actor,
                        incarnation,
                        host: HostId(1),
                        call_address: "127.0.0.1:1".into(),
                        pid: 1,
                    }
                })?
            }
            Step::Exited {
                actor,
                stale,
                reason,
            } => {
                let reasons = [
                    ExitReason::Completed,
                    ExitReason::Failed("x".repeat(5_000)),
                    ExitReason::HostSignaled(9),
                    ExitReason::Preempted,
                ];
                let reason = reasons[usize::from(reason) % reasons.len()].clone();
                self.actor_event(actor, stale, |actor, incarnation| {
                    WorkerEvent::ActorExited {
                        actor,
                        incarnation,
                        reason: reason.clone(),
                    }
                })?
            }
            Step::Yield { actor } => {
                let (actor, job, incarnation, _) = self.actor(actor)?;
                Command::YieldActor {
                    job,
                    actor,
                    incarnation,
                }
            }
            Step::Session => Command::OpenSession { client: "c".into() },
            Step::Token { id, uses } => Command::CreateToken {
                id: id.to_string(),
                secret_hash: [id; 32],
                role: Role::Client,
                expires_at_ms: self.now_ms + 1_000,
                uses,
                ends_with: String::new(),
                principal: None,
            },
            Step::UseToken { id } => Command::UseToken {
                secret_hash: [id; 32],
            },
            Step::Place { .. } | Step::Wait { .. } | Step::Keep { .. } => return None,
        })
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Wait { ms } => self.now_ms += ms,
            Step::Place { late } => {
                let Some(pass) = placement_pass(&self.tables, self.now_ms) else {
                    return;
                };
                if let Some(node) = late {
                    // Something happens between the decision and its application.
                    let (node, incarnation) = self.node(node);
                    self.apply(&Command::NodeLost { node, incarnation });
                }
                let decided = pass.clone();
                match self.apply(&decided) {
                    Some(Response::Assigned { skipped, .. }) if late.is_none() => {
                        assert_eq!(skipped, []);
                    }
                    Some(Response::Assigned { assigned, .. }) => distinct(&assigned),
                    other => panic!("unexpected {other:?}"),
                }
            }
            Step::Keep {
                actor,
                stale,
                name,
                size_bytes,
            } => {
                let Some((actor, job, incarnation, _)) = self.actor(actor) else {
                    return;
                };
                let incarnation = Incarnation(incarnation.0 - u64::from(stale).min(incarnation.0));
                let (holder, name) = (Some((actor, incarnation)), name.to_string());
                let command = match size_bytes {
                    Some(size_bytes) => KeptCommand::Keep {
                        job,
                        holder,
                        name,
                        value: value(7, size_bytes),
                    },
                    None => KeptCommand::Drop { job, holder, name },
                };
                self.apply_in(&KeptObjects, command.encode());
            }
            step => {
                if let Some(command) = self.command(step) {
                    self.apply(&command);
                }
            }
        }
    }
}

fn distinct(assigned: &[ActorIncarnation]) {
    let mut actors: Vec<ActorId> = assigned.iter().map(|one| one.actor).collect();
    actors.sort();
    actors.dedup();
    assert_eq!(actors.len(), assigned.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 768, ..ProptestConfig::default() })]

    #[test]
    fn any_history_keeps_the_invariants_and_replays_to_the_same_tables(
        steps in proptest::collection::vec(any_step(), 1..120)
    ) {
        let mut replica =
            Replica { tables: MemoryTables::default(), log: Vec::new(), now_ms: 1_000 };
        for step in steps {
            replica.step(step);
        }
        let mut other = MemoryTables::default();
        for (module, context, payload) in &replica.log {
            let _ = other.apply(*module, context, payload);
        }
        prop_assert_eq!(other, replica.tables);
    }

    #[test]
    fn any_bytes_are_a_command_or_a_refusal(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Command::decode(&bytes);
        let _ = Query::decode(&bytes);
    }
}
