//! Endpoints, replicated: their table and its changes. What is asked of it is in `query`.
//!
//! Invariants:
//! 1. An endpoint has one active version: the one in its row. Only a rollout changes it
//!    (`rollout/state.rs`).
//! 2. Where it answers is written by the router's newest incarnation only.
//! 3. A deleted endpoint is kept until the controller has ended its actors.

mod query;

use mobula_core::codec;
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Origin, Reader, StateModule, Table, TableGauge, Txn,
};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{Incarnation, JobId};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::access::state as access;
use super::autoscaler::state as scaling;
use super::cache::setting as cache;
use super::experiment::{command as experiments, state as experiment};
use super::graph::state as graph;
use super::replica_settings::ReplicaSettings;
use super::rollout::{command, state as rollout};
use super::sentinels::state as sentinels;
use crate::device::ComputeDevice;
use crate::drift::state::forget as forget_drift;
use crate::registry;
use crate::registry::versions::ModelVersion;

pub use self::query::{Query, Routing, Steered};

/// Endpoint name → [`Endpoint`].
const ENDPOINTS: Table = Table {
    module: ModuleId::SERVING,
    tag: 1,
};

/// The largest command or question.
const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// Endpoints of a cluster: each has at least two actors.
const ENDPOINTS_MAX: usize = 1_000;

/// Replicas of an endpoint.
pub const REPLICAS_MAX: u32 = 64;

/// An endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its name, which also is the model's name in its URLs.
    pub name: String,
    /// The model that it serves.
    pub model: String,
    /// Which version of it is active.
    pub version: u64,
    /// BLAKE3 of that version's file.
    pub digest: String,
    /// Size of that file, in bytes.
    pub size_bytes: u64,
    /// How many replicas it shall have now.
    pub replicas: u32,
    /// What its replicas are given.
    pub settings: ReplicaSettings,
    /// BLAKE3 of the bearer token that its callers show.
    pub token_hash: [u8; 32],
    /// When it was deployed, in milliseconds since the Unix epoch.
    pub deployed_ms: u64,
    /// Where it answers, `ip:port`; absent until its router says so.
    pub http_address: Option<String>,
    /// The incarnation of the router that said so; before, the log index of the deployment, which
    /// routers of this endpoint are younger than and those of an earlier one of the name are not.
    pub router_incarnation: Incarnation,
    /// Whether it is being taken down.
    pub deleting: bool,
}

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Serves a version. Answer: [`Endpoint`].
    Deploy {
        /// The endpoint's name.
        endpoint: String,
        /// The model.
        model: String,
        /// Which version; the newest if absent.
        version: Option<u64>,
        /// How many replicas.
        replicas: u32,
        /// What each of them is given.
        settings: ReplicaSettings,
        /// BLAKE3 of the callers' token.
        token_hash: [u8; 32],
    },
    /// Stops serving. Answer: nothing.
    Delete {
        /// The endpoint's name.
        endpoint: String,
    },
    /// A router answers at this address. Answer: nothing.
    RouterReady {
        /// The endpoint's name.
        endpoint: String,
        /// The router's incarnation; an older one than is known is refused.
        incarnation: Incarnation,
        /// `ip:port`.
        http_address: String,
    },
    /// All actors of a deleted endpoint have ended. Answer: nothing.
    Gone {
        /// The endpoint's name.
        endpoint: String,
    },
    /// A change of a rollout. Answer: [`Rollout`](super::rollout::Rollout).
    Rollout(command::Command),
    /// A change of how an endpoint is scaled. Answer: [`Scaling`](super::autoscaler::Scaling).
    Scaling(scaling::Command),
    /// A change of an experiment. Answer: [`Experiment`](super::experiment::Experiment).
    Experiment(experiments::Command),
    /// A change of who may ask an endpoint, or of its rules. Answer: [`access::Access`].
    Access(access::Command),
    /// A change of a graph. Answer: [`graph::Graph`].
    Graph(graph::Command),
    /// A change of how an endpoint keeps answers. Answer: nothing.
    Cache(cache::Command),
    /// What a router says of the sentinels of the version beside the active one. Answer: nothing.
    Sentinels(sentinels::Command),
}

/// The replicated part of serving.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serving;

/// All endpoints, by name.
pub fn endpoints(reader: &dyn Reader) -> Vec<Endpoint> {
    row::all(reader, ENDPOINTS, &[])
        .into_iter()
        .map(|(_, endpoint)| endpoint)
        .collect()
}

/// One endpoint.
pub fn find(reader: &dyn Reader, name: &str) -> Result<Endpoint, Rejection> {
    row::get(reader, ENDPOINTS, name.as_bytes()).ok_or_else(|| {
        Rejection::not_found(format!(
            "no endpoint is called `{name}`: see `mobula serve list`"
        ))
    })
}

/// Writes an endpoint's row.
pub(super) fn put_endpoint(txn: &mut dyn Txn, endpoint: &Endpoint) {
    row::put(txn, ENDPOINTS, endpoint.name.as_bytes(), endpoint);
}

fn deploy(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    name: String,
    (model, version): (&str, Option<u64>),
    (replicas, settings): (u32, ReplicaSettings),
    token_hash: [u8; 32],
) -> Result<Endpoint, Rejection> {
    crate::name::check("an endpoint", &name)?;
    if replicas == 0 || replicas > REPLICAS_MAX {
        return Err(Rejection::invalid(format!(
            "{replicas} replicas (`--replicas`) are not possible: ask for 1 to {REPLICAS_MAX}"
        )));
    }
    settings.check()?;
    graph::check_free(txn, &name)?;
    let version = registry::state::find(txn, model, version)?;
    check_device(settings.device, &version)?;
    if let Some(existing) = row::get::<Endpoint>(txn, ENDPOINTS, name.as_bytes()) {
        let message = if existing.deleting {
            format!(
                "endpoint `{name}` is being taken down: deploy it again when `mobula serve list` \
                 shows it no more"
            )
        } else {
            format!(
                "endpoint `{name}` serves {}:{} already: roll out another version with `mobula \
                 rollout start {name} {}`, or delete it first with `mobula serve delete {name}`",
                existing.model, existing.version, existing.model
            )
        };
        return Err(Rejection::new(ErrorCode::AlreadyExists, message));
    }
    if endpoints(txn).len() >= ENDPOINTS_MAX {
        return Err(Rejection::new(
            ErrorCode::Overloaded,
            format!("there are {ENDPOINTS_MAX} endpoints, the limit: delete one first"),
        ));
    }
    let endpoint = Endpoint {
        name: name.clone(),
        model: model.to_owned(),
        version: version.version,
        digest: version.description.digest,
        size_bytes: version.description.size_bytes,
        replicas,
        settings,
        token_hash,
        deployed_ms: context.now_ms,
        http_address: None,
        router_incarnation: Incarnation(context.index),
        deleting: false,
    };
    put_endpoint(txn, &endpoint);
    access::touch(context, txn);
    Ok(endpoint)
}

/// Refuses what no replica computes on that device.
pub(super) fn check_device(device: ComputeDevice, version: &ModelVersion) -> Result<(), Rejection> {
    if device == ComputeDevice::Cpu || !version.is_imported() {
        return Ok(());
    }
    Err(Rejection::invalid(format!(
        "{}:{} is imported, and imported models answer on CPUs only, not on {device}: deploy it as an endpoint of its own, \
         without a device",
        version.description.model, version.version
    )))
}

fn router_ready(
    txn: &mut dyn Txn,
    name: &str,
    incarnation: Incarnation,
    http_address: String,
) -> Result<(), Rejection> {
    let endpoint = find(txn, name)?;
    let is_stale = incarnation < endpoint.router_incarnation;
    if is_stale && !is_planted(Mutant::StaleRouterHeard) {
        return Err(Rejection::fenced(format!(
            "router {incarnation} of endpoint `{name}` is stale: {} has taken over",
            endpoint.router_incarnation
        )));
    }
    let endpoint = Endpoint {
        http_address: Some(http_address),
        router_incarnation: incarnation,
        ..endpoint
    };
    put_endpoint(txn, &endpoint);
    Ok(())
}

impl StateModule for Serving {
    fn id(&self) -> ModuleId {
        ModuleId::SERVING
    }

    fn name(&self) -> &'static str {
        "serving"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let response = match crate::payload::decode(payload, PAYLOAD_BYTES_MAX)? {
            Command::Deploy {
                endpoint,
                model,
                version,
                replicas,
                settings,
                token_hash,
            } => {
                let of = (model.as_str(), version);
                let replicas = (replicas, settings);
                codec::encode_plain(&deploy(context, txn, endpoint, of, replicas, token_hash)?)
            }
            Command::Delete { endpoint: name } => {
                let endpoint = Endpoint {
                    deleting: true,
                    ..find(txn, &name)?
                };
                put_endpoint(txn, &endpoint);
                access::touch(context, txn);
                Vec::new()
            }
            Command::RouterReady {
                endpoint,
                incarnation,
                http_address,
            } => {
                router_ready(txn, &endpoint, incarnation, http_address)?;
                Vec::new()
            }
            Command::Gone { endpoint } => {
                if find(txn, &endpoint)?.deleting {
                    rollout::forget(txn, &endpoint);
                    experiment::forget(txn, &endpoint);
                    scaling::forget(txn, &endpoint);
                    access::forget(txn, &endpoint);
                    cache::forget(txn, &endpoint);
                    sentinels::forget(txn, &endpoint);
                    forget_drift(txn, &endpoint);
                    txn.delete(ENDPOINTS, endpoint.as_bytes());
                }
                Vec::new()
            }
            Command::Rollout(command) => {
                codec::encode_plain(&rollout::apply(context, txn, command)?)
            }
            Command::Scaling(command) => {
                codec::encode_plain(&scaling::apply(context, txn, command)?)
            }
            Command::Experiment(command) => {
                codec::encode_plain(&experiment::apply(context, txn, command)?)
            }
            Command::Access(command) => codec::encode_plain(&access::apply(context, txn, command)?),
            Command::Graph(command) => codec::encode_plain(&graph::apply(context, txn, command)?),
            Command::Cache(command) => {
                cache::apply(txn, command)?;
                Vec::new()
            }
            Command::Sentinels(command) => {
                sentinels::apply(context, txn, command)?;
                Vec::new()
            }
        };
        Ok(Applied::changed(self.id(), response))
    }

    fn apply_from(
        &self,
        context: &ApplyContext,
        origin: Option<&Origin>,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let command = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        super::gate::pass(context, origin, txn, &command)?;
        self.apply(context, txn, payload)
    }

    fn query(
        &self,
        reader: &dyn Reader,
        _now_ms: u64,
        payload: &[u8],
    ) -> Result<Vec<u8>, Rejection> {
        let query = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        query::answer(reader, query)
    }

    fn gauges(&self, reader: &dyn Reader) -> Vec<TableGauge> {
        let mut standing = endpoints(reader);
        standing.retain(|endpoint| !endpoint.deleting);
        let answering = standing
            .iter()
            .filter(|endpoint| endpoint.http_address.is_some());
        let active = TableGauge {
            name: "ml_model_deployments_active",
            help: "Endpoints that answer",
            label: None,
            value: answering.count() as u64,
        };
        // The only series that name an endpoint whose router is gone. There are `ENDPOINTS_MAX` of them at the most, so
        // that none is left out.
        let wanted = standing.into_iter().map(|endpoint| TableGauge {
            name: "mobula_endpoint_replicas_wanted",
            help: "Replicas that an endpoint shall have",
            label: Some(("endpoint", endpoint.name.into())),
            value: endpoint.replicas.into(),
        });
        std::iter::once(active).chain(wanted).collect()
    }

    fn authorize(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let command: Command = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        let is_allowed = match (caller, command) {
            (Caller::Head, _) => true,
            (caller, Command::Rollout(command)) => command::is_allowed(caller, &command),
            (caller, Command::Scaling(command)) => scaling::is_allowed(caller, &command),
            (caller, Command::Experiment(command)) => experiments::is_allowed(caller, &command),
            (caller, Command::Access(_)) => access::is_allowed(caller),
            (caller, Command::Graph(_)) => graph::is_allowed(caller),
            (caller, Command::Cache(_)) => cache::is_allowed(caller),
            (caller, Command::Sentinels(_)) => sentinels::is_allowed(caller),
            (Caller::Client, Command::Deploy { .. } | Command::Delete { .. }) => true,
            // Routers are the platform's own actors.
            (Caller::Host { job, .. }, Command::RouterReady { .. }) => *job == JobId::SYSTEM,
            _ => false,
        };
        if is_allowed {
            return Ok(());
        }
        Err(Rejection::new(
            ErrorCode::PermissionDenied,
            "endpoints are deployed, scaled, deleted, rolled out and compared with a client token",
        ))
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
