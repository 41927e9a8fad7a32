//! Sees to it that each endpoint has its router, and each version that it answers with its replicas and
//! its monitor, and that what is not wanted any more has none. It reads the tables and proposes what is
//! missing, so a new leader goes on where the old one was.
//!
//! Names of replicas and monitors carry the version: a promotion then starts and ends nothing that goes
//! on being wanted.

use mobula_core::codec;
use mobula_core::control::{Controller, ModuleId, Proposal, Reader};
use mobula_core::id::{ActorId, JobId};
use mobula_core::resource::Resources;
use mobula_core::spec::{ActorSpec, RestartPolicy, SpreadKey};
use mobula_scheduler::{
    ActorTarget, Command as SchedulerCommand, Query as SchedulerQuery, QueryResponse, Resolution,
};

use super::autoscaler::state::{Command as ScalingCommand, Scaling, find as scaling_of};
use super::experiment::command::Command as ExperimentCommand;
use super::experiment::plan::Experiment;
use super::experiment::state::unfinished;
use super::ingress::plan as ingress;
use super::replica::Replica;
use super::rollout::Rollout;
use super::rollout::command::Command as RolloutCommand;
use super::rollout::plan::{Cleanup, Served};
use super::rollout::state::newest;
use super::router::Router;
use super::state::{Command, Endpoint, endpoints};
use crate::drift::monitor::Monitor;
use crate::registry::versions::find as find_version;

/// The CPU that a router or monitor asks for, in thousandths of a core: they mostly wait.
pub(super) const LIGHT_CPU_MILLI: u64 = 50;

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
pub fn replica_name(endpoint: &str, version: u64, number: u32) -> String {
    format!("serving/{endpoint}/v{version}/replica-{number}")
}

/// The name of a version's monitor.
#[must_use]
pub fn monitor_name(endpoint: &str, version: u64) -> String {
    format!("drift/{endpoint}/v{version}/monitor")
}

/// The serving controller.
#[derive(Debug, Default)]
pub struct ServingController;

impl Controller for ServingController {
    fn name(&self) -> &'static str {
        "serving"
    }

    fn reconcile(&mut self, reader: &dyn Reader, _now_ms: u64) -> Vec<Proposal> {
        let mut proposals = ingress::reconcile(reader);
        proposals.extend(endpoints(reader).iter().flat_map(|endpoint| {
            let rollout = newest(reader, &endpoint.name);
            let experiment = unfinished(reader, &endpoint.name);
            if endpoint.deleting {
                take_down(reader, endpoint, rollout.as_ref(), experiment.as_ref())
            } else {
                let mut proposals =
                    bring_up(reader, endpoint, rollout.as_ref(), experiment.as_ref());
                proposals.extend(end_surplus(reader, endpoint));
                if let Some(rollout) = &rollout {
                    proposals.extend(retire(reader, endpoint, rollout));
                }
                if let Some(experiment) = &experiment {
                    proposals.extend(retire_treatment(reader, endpoint, experiment));
                }
                proposals
            }
        }));
        proposals
    }
}

/// The living actor of this name, and whether it is already being stopped.
pub(super) fn living(reader: &dyn Reader, name: &str) -> Option<(ActorId, bool)> {
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

fn serving(command: &Command) -> Proposal {
    Proposal {
        module: ModuleId::SERVING,
        payload: codec::encode_plain(command),
    }
}

fn bring_up(
    reader: &dyn Reader,
    endpoint: &Endpoint,
    rollout: Option<&Rollout>,
    experiment: Option<&Experiment>,
) -> Vec<Proposal> {
    let mut wanted = match rollout.filter(|rollout| rollout.phase.is_open()) {
        Some(rollout) => {
            let (stable, candidate) = rollout.replica_counts(endpoint.replicas);
            let mut replicas = replicas_of(endpoint, &rollout.stable, stable);
            let candidates = replicas_of(endpoint, &rollout.candidate, candidate);
            replicas.extend(candidates.into_iter().map(apart));
            replicas
        }
        None => {
            let active = Served {
                version: endpoint.version,
                digest: endpoint.digest.clone(),
                size_bytes: endpoint.size_bytes,
            };
            replicas_of(endpoint, &active, endpoint.replicas)
        }
    };
    if let Some(experiment) = experiment.filter(|experiment| experiment.is_open()) {
        let treatment = &experiment.plan.treatment;
        let treated = replicas_of(endpoint, treatment, endpoint.replicas);
        wanted.extend(treated.into_iter().map(apart));
    }
    wanted.extend(companions_of(reader, endpoint));
    create(reader, wanted)
}

/// Creates those of these actors that do not live.
pub(super) fn create(reader: &dyn Reader, wanted: Vec<ActorSpec>) -> Vec<Proposal> {
    let missing: Vec<ActorSpec> = wanted
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

/// Ends the replicas whose place the candidate's have taken: what they have not answered, the router
/// sends to another one of their version.
fn replace(reader: &dyn Reader, endpoint: &Endpoint, rollout: &Rollout) -> Vec<Proposal> {
    let (stable, _) = rollout.replica_counts(endpoint.replicas);
    let names: Vec<String> = (stable + 1..=endpoint.replicas)
        .map(|number| replica_name(&endpoint.name, rollout.stable.version, number))
        .collect();
    stop(reader, &names)
}

/// Ends the replicas that are too many, once the router has none of its requests with them.
fn end_surplus(reader: &dyn Reader, endpoint: &Endpoint) -> Vec<Proposal> {
    let Scaling {
        surplus,
        is_drained,
        revision,
        ..
    } = scaling_of(reader, endpoint);
    if !is_drained {
        return Vec::new();
    }
    let names: Vec<String> = (endpoint.replicas + 1..=surplus)
        .map(|number| replica_name(&endpoint.name, endpoint.version, number))
        .collect();
    let ended = ScalingCommand::Ended {
        endpoint: endpoint.name.clone(),
        revision,
    };
    stop_or(reader, &names, &Command::Scaling(ended))
}

/// Ends what a rollout needs no more: actors of the version that it left with nothing to answer, the
/// replicas among them once the router has none of its requests.
fn retire(reader: &dyn Reader, endpoint: &Endpoint, rollout: &Rollout) -> Vec<Proposal> {
    let Some(retiring) = rollout.retiring() else {
        return replace(reader, endpoint, rollout);
    };
    match rollout.cleanup {
        // At once: if its version becomes active again, its monitor must be younger than the other's.
        Cleanup::Draining => stop(reader, &[monitor_name(&endpoint.name, retiring.version)]),
        Cleanup::Ending => {
            let retired = RolloutCommand::Retired {
                endpoint: endpoint.name.clone(),
                rollout: rollout.number,
                revision: rollout.revision,
            };
            let names = names_of(reader, endpoint, retiring.version);
            stop_or(reader, &names, &Command::Rollout(retired))
        }
        Cleanup::Waiting | Cleanup::Done => Vec::new(),
    }
}

/// Ends the treatment's replicas once an experiment is over and the router has none of its requests with them.
fn retire_treatment(
    reader: &dyn Reader,
    endpoint: &Endpoint,
    experiment: &Experiment,
) -> Vec<Proposal> {
    if experiment.cleanup != Cleanup::Ending {
        return Vec::new();
    }
    let retired = ExperimentCommand::Retired {
        endpoint: endpoint.name.clone(),
        experiment: experiment.number,
        revision: experiment.revision,
    };
    let names = names_of(reader, endpoint, experiment.plan.treatment.version);
    stop_or(reader, &names, &Command::Experiment(retired))
}

fn take_down(
    reader: &dyn Reader,
    endpoint: &Endpoint,
    rollout: Option<&Rollout>,
    experiment: Option<&Experiment>,
) -> Vec<Proposal> {
    let mut versions = rollout.map_or_else(
        || vec![endpoint.version],
        |rollout| vec![rollout.stable.version, rollout.candidate.version],
    );
    versions.extend(experiment.map(|experiment| experiment.plan.treatment.version));
    let names = versions
        .into_iter()
        .flat_map(|version| names_of(reader, endpoint, version))
        .chain([router_name(&endpoint.name)]);
    let names: Vec<String> = names.collect();
    let gone = Command::Gone {
        endpoint: endpoint.name.clone(),
    };
    stop_or(reader, &names, &gone)
}

/// Stops these actors; proposes `ended` when none of them is left.
fn stop_or(reader: &dyn Reader, names: &[String], ended: &Command) -> Vec<Proposal> {
    if names.iter().all(|name| living(reader, name).is_none()) {
        return vec![serving(ended)];
    }
    stop(reader, names)
}

/// Stops those of these actors that live and are not being stopped.
pub(super) fn stop(reader: &dyn Reader, names: &[String]) -> Vec<Proposal> {
    names
        .iter()
        .filter_map(|name| living(reader, name))
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

/// The names of all actors of one version of an endpoint.
fn names_of(reader: &dyn Reader, endpoint: &Endpoint, version: u64) -> Vec<String> {
    (1..=scaling_of(reader, endpoint).replicas_living(endpoint))
        .map(|number| replica_name(&endpoint.name, version, number))
        .chain([monitor_name(&endpoint.name, version)])
        .collect()
}

/// The router, and the monitor of a version that was trained here: there is nothing to compare another one with.
fn companions_of(reader: &dyn Reader, endpoint: &Endpoint) -> Vec<ActorSpec> {
    let name = &endpoint.name;
    let mut router = spec_of(
        Router::new(endpoint.clone()),
        router_name(name),
        LIGHT_CPU_MILLI,
    );
    // A process of its own: what kills a replica must not close the front door.
    router.isolated = true;
    let version = find_version(reader, &endpoint.model, Some(endpoint.version));
    if version.is_ok_and(|version| version.is_imported()) {
        return vec![router];
    }
    let monitor = Monitor::new(
        name.clone(),
        endpoint.model.clone(),
        endpoint.version,
        endpoint.digest.clone(),
        endpoint.size_bytes,
    );
    let monitor = spec_of(
        monitor,
        monitor_name(name, endpoint.version),
        LIGHT_CPU_MILLI,
    );
    vec![router, monitor]
}

/// The replicas of one version.
pub(super) fn replicas_of(endpoint: &Endpoint, served: &Served, count: u32) -> Vec<ActorSpec> {
    let replicas = (1..=count).map(|number| {
        let init = Replica::new(
            endpoint.model.clone(),
            served.version,
            served.digest.clone(),
            served.size_bytes,
            endpoint.settings.device,
        );
        let name = replica_name(&endpoint.name, served.version, number);
        let mut spec = spec_of(init, name, REPLICA_CPU_MILLI);
        spec.resources.gpu_milli = 1000 * u64::from(endpoint.settings.device.gpus());
        if let Some(memory_bytes) = endpoint.settings.memory_bytes {
            spec.resources.memory_bytes = memory_bytes;
            // What actors share a process use cannot be told apart, and its end must be nobody else's.
            spec.isolated = true;
        }
        // Apart where there are enough nodes: one lost machine leaves the others.
        spec.placement.spread_key = Some(SpreadKey {
            key: format!("serving/{}/v{}", endpoint.name, served.version),
            strict: false,
        });
        spec
    });
    replicas.collect()
}

/// The same in a process of its own: a version that is only tried must not take the stable one's replicas with
/// it when it ends its process.
fn apart(spec: ActorSpec) -> ActorSpec {
    ActorSpec {
        isolated: true,
        ..spec
    }
}

pub(super) fn spec_of<A: mobula::Actor>(
    init: mobula::Init<A>,
    name: String,
    cpu_milli: u64,
) -> ActorSpec {
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
