//! Sees to it that each endpoint has its router, its replicas and its monitor, and that a deleted
//! one has none. It reads the tables and proposes what is missing, so a new leader goes on where
//! the old one was.

use mobula_core::codec;
use mobula_core::control::{Controller, ModuleId, Proposal, Reader};
use mobula_core::id::{ActorId, JobId};
use mobula_core::resource::Resources;
use mobula_core::spec::{ActorSpec, RestartPolicy, SpreadKey};
use mobula_scheduler::{
    ActorTarget, Command as SchedulerCommand, Query as SchedulerQuery, QueryResponse, Resolution,
};

use super::replica::Replica;
use super::router::Router;
use super::state::{Command, Endpoint, endpoints};
use crate::drift::monitor::Monitor;

/// The CPU that a router or monitor asks for, in thousandths of a core: they mostly wait.
const LIGHT_CPU_MILLI: u64 = 50;

/// The CPU that a replica asks for, in thousandths of a core.
const REPLICA_CPU_MILLI: u64 = 250;

/// How long an actor of a deleted endpoint may take to end.
const STOP_GRACE_MS: u64 = 2_000;

/// How often an actor of an endpoint is started again: practically always, with a back-off.
const RESTARTS: RestartPolicy = RestartPolicy {
    max_restarts: 1_000_000,
    backoff_initial_ms: 100,
    backoff_max_ms: 5_000,
};

/// The router's name.
#[must_use]
pub fn router_name(endpoint: &str) -> String {
    format!("serving/{endpoint}/router")
}

/// A replica's name; `number` counts from 1.
#[must_use]
pub fn replica_name(endpoint: &str, number: u32) -> String {
    format!("serving/{endpoint}/replica-{number}")
}

/// The monitor's name.
#[must_use]
pub fn monitor_name(endpoint: &str) -> String {
    format!("drift/{endpoint}/monitor")
}

/// The serving controller.
#[derive(Debug, Default)]
pub struct ServingController;

impl Controller for ServingController {
    fn name(&self) -> &'static str {
        "serving"
    }

    fn reconcile(&mut self, reader: &dyn Reader, _now_ms: u64) -> Vec<Proposal> {
        endpoints(reader)
            .iter()
            .flat_map(|endpoint| {
                if endpoint.deleting {
                    take_down(reader, endpoint)
                } else {
                    bring_up(reader, endpoint)
                }
            })
            .collect()
    }
}

/// The living actor of this name, and whether it is already being stopped.
fn living(reader: &dyn Reader, name: &str) -> Option<(ActorId, bool)> {
    let target = ActorTarget::Name(name.to_owned());
    let query = SchedulerQuery::ResolveActor {
        job: JobId::SYSTEM,
        target,
    };
    match mobula_scheduler::answer(reader, 0, query) {
        Ok(QueryResponse::Resolved(Resolution::Address(address))) => Some((address.actor, false)),
        Ok(QueryResponse::Resolved(Resolution::NotRunning { actor, state, .. })) => {
            Some((actor, state == "stopping"))
        }
        _ => None,
    }
}

fn scheduler(command: &SchedulerCommand) -> Proposal {
    Proposal {
        module: ModuleId::SCHEDULER,
        payload: command.encode(),
    }
}

fn bring_up(reader: &dyn Reader, endpoint: &Endpoint) -> Vec<Proposal> {
    let missing: Vec<ActorSpec> = actors_of(endpoint)
        .into_iter()
        .filter(|spec| {
            spec.name
                .as_deref()
                .is_some_and(|name| living(reader, name).is_none())
        })
        .collect();
    if missing.is_empty() {
        return Vec::new();
    }
    vec![scheduler(&SchedulerCommand::CreateActors {
        job: JobId::SYSTEM,
        actors: missing,
        gang: false,
        // Two leaders in a row may both propose this; the second finds them.
        get_or_create: true,
        creator: None,
    })]
}

fn take_down(reader: &dyn Reader, endpoint: &Endpoint) -> Vec<Proposal> {
    let left: Vec<(ActorId, bool)> = actors_of(endpoint)
        .iter()
        .filter_map(|spec| living(reader, spec.name.as_deref()?))
        .collect();
    if left.is_empty() {
        let gone = Command::Gone {
            endpoint: endpoint.name.clone(),
        };
        return vec![Proposal {
            module: ModuleId::SERVING,
            payload: codec::encode_plain(&gone),
        }];
    }
    left.into_iter()
        .filter(|(_, is_stopping)| !is_stopping)
        .map(|(actor, _)| {
            scheduler(&SchedulerCommand::StopActor {
                job: Some(JobId::SYSTEM),
                actor,
                grace_ms: STOP_GRACE_MS,
            })
        })
        .collect()
}

/// Everything that runs for an endpoint.
fn actors_of(endpoint: &Endpoint) -> Vec<ActorSpec> {
    let name = &endpoint.name;
    let replicas = (1..=endpoint.replicas).map(|number| {
        let init = Replica::new(
            endpoint.model.clone(),
            endpoint.version,
            endpoint.digest.clone(),
            endpoint.size_bytes,
        );
        let mut spec = spec_of(init, replica_name(name, number), REPLICA_CPU_MILLI);
        // Apart where there are enough nodes: one lost machine leaves the others.
        spec.placement.spread_key = Some(SpreadKey {
            key: format!("serving/{name}"),
            strict: false,
        });
        spec
    });
    let mut router = spec_of(
        Router::new(endpoint.clone()),
        router_name(name),
        LIGHT_CPU_MILLI,
    );
    // A process of its own: what kills a replica must not close the front door.
    router.isolated = true;
    let monitor = Monitor::new(
        name.clone(),
        endpoint.model.clone(),
        endpoint.version,
        endpoint.digest.clone(),
        endpoint.size_bytes,
    );
    replicas
        .chain([
            router,
            spec_of(monitor, monitor_name(name), LIGHT_CPU_MILLI),
        ])
        .collect()
}

fn spec_of<A: mobula::Actor>(init: mobula::Init<A>, name: String, cpu_milli: u64) -> ActorSpec {
    let spec = init
        .into_spec()
        .expect("names, numbers and digests can be encoded");
    ActorSpec {
        name: Some(name),
        resources: Resources::cpu_milli(cpu_milli),
        restart: RESTARTS,
        ..spec
    }
}
