//! What the head counts and measures, in Prometheus' names and text format.
//!
//! Counters are kept where things happen; what the tables and sessions know anyway is read when
//! somebody asks. `docs/metrics.md` lists every name, and a test compares the two.
//!
//! Invariants:
//! 1. Counting never waits and never fails.
//! 2. Labels have few values: methods, codes, kinds, endpoints (of which there are a thousand at the most); never an id of a
//!    job, actor or client.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use mobula_core::control::{StateModule, TableGauge};
use mobula_net::tcp::ConnectionCounts;
use mobula_scheduler::{ClusterStatus, Query, QueryResponse};

use crate::api::LOG_STREAMS_MAX;
use crate::context::HeadContext;

/// 0.1 ms to 6.5 s: from an fsync on a good disk to what nobody waits for any more.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_1, 2.0, 17))
}

type Count = Gauge<u64, AtomicU64>;

/// A module's commands by what became of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Proposal {
    module: String,
    outcome: &'static str,
}

/// A request of the control API.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ApiRequest {
    method: String,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Method {
    method: String,
}

/// One of a few words.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Kind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: String,
}

/// What is counted as it happens.
#[derive(Debug, Clone)]
pub(crate) struct HeadMetrics {
    proposals: Family<Proposal, Counter>,
    proposals_in_flight: Count,
    proposed_bytes: Counter,
    commit_seconds: Histogram,
    api_requests: Family<ApiRequest, Counter>,
    api_in_flight: Count,
    api_seconds: Family<Method, Histogram>,
    orders: Family<Kind, Counter>,
    effects_lost: Counter,
    placement_passes: Family<Kind, Counter>,
    placement_seconds: Histogram,
    sessions_opened: Counter,
    worker_events: Family<Kind, Counter>,
    host_certificates: Counter,
    leases_expired: Counter,
    uploads: Counter,
    uploaded_bytes: Counter,
}

impl Default for HeadMetrics {
    fn default() -> Self {
        HeadMetrics {
            proposals: Family::default(),
            proposals_in_flight: Count::default(),
            proposed_bytes: Counter::default(),
            commit_seconds: seconds(),
            api_requests: Family::default(),
            api_in_flight: Count::default(),
            api_seconds: Family::new_with_constructor(seconds),
            orders: Family::default(),
            effects_lost: Counter::default(),
            placement_passes: Family::default(),
            placement_seconds: seconds(),
            sessions_opened: Counter::default(),
            worker_events: Family::default(),
            host_certificates: Counter::default(),
            leases_expired: Counter::default(),
            uploads: Counter::default(),
            uploaded_bytes: Counter::default(),
        }
    }
}

/// Counts something as under way for as long as it lives.
pub(crate) struct InFlight(Count);

impl InFlight {
    fn new(gauge: &Count) -> Self {
        gauge.inc();
        InFlight(gauge.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl HeadMetrics {
    pub(crate) fn proposing(&self, bytes: usize) -> InFlight {
        self.proposed_bytes.inc_by(bytes as u64);
        InFlight::new(&self.proposals_in_flight)
    }

    pub(crate) fn proposed(&self, module: &str, outcome: &'static str, took: Duration) {
        let module = module.to_owned();
        self.proposals
            .get_or_create(&Proposal { module, outcome })
            .inc();
        self.commit_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn requesting(&self) -> InFlight {
        InFlight::new(&self.api_in_flight)
    }

    pub(crate) fn requested(&self, method: &str, code: &str, took: Duration) {
        let method = method.to_owned();
        let request = ApiRequest {
            method: method.clone(),
            code: code.to_owned(),
        };
        self.api_requests.get_or_create(&request).inc();
        self.api_seconds
            .get_or_create(&Method { method })
            .observe(took.as_secs_f64());
    }

    pub(crate) fn ordered(&self, kind: &'static str) {
        self.orders.get_or_create(&Kind { kind }).inc();
    }

    pub(crate) fn lost_effects(&self) {
        self.effects_lost.inc();
    }

    pub(crate) fn placed(&self, kind: &'static str, took: Duration) {
        self.placement_passes.get_or_create(&Kind { kind }).inc();
        self.placement_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn opened_session(&self) {
        self.sessions_opened.inc();
    }

    pub(crate) fn heard(&self, kind: &'static str) {
        self.worker_events.get_or_create(&Kind { kind }).inc();
    }

    pub(crate) fn signed_host(&self) {
        self.host_certificates.inc();
    }

    pub(crate) fn expired_lease(&self) {
        self.leases_expired.inc();
    }

    pub(crate) fn uploaded(&self, bytes: u64) {
        self.uploads.inc();
        self.uploaded_bytes.inc_by(bytes);
    }

    /// Everything that is counted, under its name.
    fn register(&self, registry: &mut Registry) {
        let r = registry;
        r.register(
            "raft_proposals",
            "Commands put into the log, by module and outcome",
            self.proposals.clone(),
        );
        r.register(
            "raft_proposals_in_flight",
            "Commands whose outcome is awaited",
            self.proposals_in_flight.clone(),
        );
        r.register(
            "raft_proposed_bytes",
            "Bytes of commands put into the log",
            self.proposed_bytes.clone(),
        );
        r.register(
            "raft_commit_duration_seconds",
            "From proposing a command to its outcome",
            self.commit_seconds.clone(),
        );
        r.register(
            "api_requests",
            "Requests of the control API, by method and status code",
            self.api_requests.clone(),
        );
        r.register(
            "api_requests_in_flight",
            "Requests of the control API that are being answered",
            self.api_in_flight.clone(),
        );
        r.register(
            "api_request_duration_seconds",
            "From a request to the head of its answer; of a stream, to its beginning",
            self.api_seconds.clone(),
        );
        r.register(
            "dispatcher_orders",
            "Orders sent to workers, by kind",
            self.orders.clone(),
        );
        r.register(
            "dispatcher_effects_lost",
            "Times that the queue of effects was full and all orders were sent again",
            self.effects_lost.clone(),
        );
        r.register(
            "placement_passes",
            "Placement passes, by what they did",
            self.placement_passes.clone(),
        );
        r.register(
            "placement_pass_duration_seconds",
            "One placement pass, its commit included",
            self.placement_seconds.clone(),
        );
        r.register(
            "worker_sessions_opened",
            "Sessions that workers have opened",
            self.sessions_opened.clone(),
        );
        r.register(
            "worker_events",
            "Events that workers reported, by kind",
            self.worker_events.clone(),
        );
        r.register(
            "host_certificates",
            "Certificates given to host processes",
            self.host_certificates.clone(),
        );
        r.register(
            "worker_leases_expired",
            "Workers given up because their lease ran out",
            self.leases_expired.clone(),
        );
        r.register(
            "artifact_uploads",
            "Programs and files that were uploaded",
            self.uploads.clone(),
        );
        r.register(
            "artifact_uploaded_bytes",
            "Their bytes",
            self.uploaded_bytes.clone(),
        );
    }
}

/// Everything of this head as text, in the OpenMetrics format.
pub(crate) async fn text(context: &Arc<HeadContext>) -> Result<String, tonic::Status> {
    let mut registry = Registry::default();
    // A head that cannot read its tables still has counters to show.
    if let Ok(reader) = context.raft.read().await {
        let modules: Vec<Arc<dyn StateModule>> = context.modules.values().cloned().collect();
        // Thousands of rows, which must not keep other requests waiting.
        let reading = tokio::task::spawn_blocking(move || {
            let gauges = modules.iter().flat_map(|module| module.gauges(&reader));
            gauges.collect::<Vec<TableGauge>>()
        });
        register_tables(&mut registry, reading.await.unwrap_or_default());
    }
    registry.register(
        "ml_agent_orchestration_requests",
        "What was asked of worker agents, by kind",
        context.metrics.orders.clone(),
    );
    let r = registry.sub_registry_with_prefix("mobula");
    context.metrics.register(r);
    let leadership = *context.raft.leadership().borrow();
    let gauge = |registry: &mut Registry, name: &str, help: &str, value: u64| {
        let gauge = Count::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let started = context.started_ms / 1000;
    gauge(
        r,
        "head_start_time_seconds",
        "When this head was started, since the Unix epoch",
        started,
    );
    let leads = u64::from(leadership.is_leader);
    gauge(r, "raft_is_leader", "Whether this head leads", leads);
    gauge(r, "raft_term", "The Raft term", leadership.term);
    let applied = leadership.applied_index;
    gauge(r, "raft_applied_index", "The last applied entry", applied);
    let entries = (applied + 1).saturating_sub(leadership.first_log_index);
    gauge(
        r,
        "raft_log_entries",
        "Applied entries that the log still holds",
        entries,
    );
    let states = context.raft.peer_states();
    let differing = states.iter().filter(|state| state.differs).count() as u64;
    gauge(
        r,
        "raft_states_compared",
        "Other heads whose state was compared with this one's",
        states.len() as u64,
    );
    gauge(
        r,
        "raft_states_differing",
        "Those among them whose state differs",
        differing,
    );
    let followers = LOG_STREAMS_MAX - context.log_streams.available_permits();
    gauge(
        r,
        "log_streams",
        "Logs that are being read",
        followers as u64,
    );
    register_connections(r, context.api_connections.counts());
    let (sessions, queued) = context.sessions.count();
    gauge(
        r,
        "worker_sessions",
        "Workers that have a session",
        sessions,
    );
    gauge(
        r,
        "worker_outbox_messages",
        "Messages that wait for workers, all together",
        queued,
    );
    // A head that cannot read its tables still has counters to show.
    if let Ok(QueryResponse::Status(counts)) = context.ask(Query::Status).await {
        register_counts(r, &counts);
    }
    if let Ok(QueryResponse::PendingReasons(reasons)) = context.ask(Query::PendingReasons).await {
        let family = Family::<Reason, Count>::default();
        for (reason, actors) in reasons {
            family.get_or_create(&Reason { reason }).set(actors);
        }
        let help = "Pending actors, by the first thing in their way; of the first 256";
        r.register("actors_pending_by_reason", help, family);
    }
    let mut text = String::new();
    encode(&mut text, &registry).map_err(|error| tonic::Status::internal(error.to_string()))?;
    Ok(text)
}

/// Who is connected to the control API.
fn register_connections(registry: &mut Registry, counts: ConnectionCounts) {
    let family = Family::<Kind, Count>::default();
    for (kind, value) in [
        ("certified", counts.certified),
        ("anonymous", counts.anonymous),
    ] {
        family.get_or_create(&Kind { kind }).set(value as u64);
    }
    let help = "Connections to the control API, by whether they show a certificate";
    registry.register("api_connections", help, family);
    let refused: Counter = Counter::default();
    refused.inc_by(counts.refused);
    let help = "Connections to the control API that found no place";
    registry.register("api_connections_refused", help, refused);
}

/// What the modules say of their tables.
fn register_tables(registry: &mut Registry, gauges: Vec<TableGauge>) {
    type Labelled = Family<[(&'static str, Cow<'static, str>); 1], Count>;
    let mut families = BTreeMap::<&str, (&str, Labelled)>::new();
    for gauge in gauges {
        let Some(label) = gauge.label else {
            let count = Count::default();
            count.set(gauge.value);
            registry.register(gauge.name, gauge.help, count);
            continue;
        };
        let (_, family) = families
            .entry(gauge.name)
            .or_insert_with(|| (gauge.help, Family::default()));
        family.get_or_create(&[label]).set(gauge.value);
    }
    for (name, (help, family)) in families {
        registry.register(name, help, family);
    }
}

fn register_counts(registry: &mut Registry, counts: &ClusterStatus) {
    let states = |values: &[(&'static str, u64)]| {
        let family = Family::<State, Count>::default();
        for (state, value) in values {
            family.get_or_create(&State { state }).set(*value);
        }
        family
    };
    let nodes = states(&[
        ("alive", counts.nodes_alive.into()),
        ("noticed", counts.nodes_noticed.into()),
        ("draining", counts.nodes_draining.into()),
        ("lost", counts.nodes_lost.into()),
    ]);
    registry.register("nodes", "Workers, by state", nodes);
    let actors = states(&[
        ("pending", counts.actors_pending),
        ("placed", counts.actors_live - counts.actors_pending),
    ]);
    registry.register("actors", "Actors that have not ended, by state", actors);
    let jobs = states(&[("live", counts.jobs_live)]);
    registry.register("jobs", "Jobs that have not ended", jobs);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tables_hold_is_shown_by_its_label() {
        let gauge = |label, value| TableGauge {
            name: "mobula_endpoint_replicas_wanted",
            help: "Replicas that an endpoint shall have",
            label: Some(("endpoint", Cow::Borrowed(label))),
            value,
        };
        let mut registry = Registry::default();
        register_tables(&mut registry, vec![gauge("digits", 2), gauge("asleep", 0)]);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            "mobula_endpoint_replicas_wanted{endpoint=\"digits\"} 2",
            "mobula_endpoint_replicas_wanted{endpoint=\"asleep\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{text}");
        }
    }
}
