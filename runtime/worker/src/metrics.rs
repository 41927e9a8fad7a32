//! What a worker counts and measures, its hosts included, in Prometheus' names and text format.
//!
//! The agent counts what passes through it; hosts count their calls and are asked for them when
//! somebody reads. `docs/metrics.md` lists every name, and a test compares the two.
//!
//! Invariants:
//! 1. Counting never waits and never fails.
//! 2. Only living hosts and GPUs have series of their own, so their number is bounded by the machine. What actors measure
//!    themselves is bounded for each process, and here for all of them.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

use mobula_core::id::{HostId, JobId};
use mobula_gpu::Usage;
use mobula_wire::host::{CALL_OUTCOMES, HostMetrics, call_bucket_bound_us};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use own::OwnMetrics;

mod gpus;
mod own;

type Count = Gauge<u64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

/// A host process among those of this worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Host {
    host: String,
    job: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HostOutcome {
    host: String,
    job: String,
    outcome: &'static str,
}

/// What the agent counts as it happens.
#[derive(Debug)]
pub(crate) struct WorkerMetrics {
    orders: Family<Kind, Counter>,
    hosts_started: Counter,
    hosts_ended: Family<Kind, Counter>,
    stopped_hosts_killed: Counter,
    launch_failures: Counter,
    launch_seconds: Histogram,
    actor_exits: Family<Kind, Counter>,
    log_reads: Counter,
    log_read_bytes: Counter,
}

impl Default for WorkerMetrics {
    fn default() -> Self {
        WorkerMetrics {
            orders: Family::default(),
            hosts_started: Counter::default(),
            hosts_ended: Family::default(),
            stopped_hosts_killed: Counter::default(),
            launch_failures: Counter::default(),
            // 1 ms to 65 s: from a warm start to a program that comes over a slow network.
            launch_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 17)),
            actor_exits: Family::default(),
            log_reads: Counter::default(),
            log_read_bytes: Counter::default(),
        }
    }
}

/// What is so at the moment when somebody asks.
#[derive(Debug, Default)]
pub(crate) struct Now {
    pub(crate) connected: bool,
    pub(crate) stale_messages: u64,
    pub(crate) actors: usize,
    pub(crate) waiting_actors: usize,
    pub(crate) outbox: usize,
    pub(crate) hosts: BTreeMap<HostId, HostNow>,
    /// Of the GPUs that say so, by UUID.
    pub(crate) gpus: BTreeMap<String, Usage>,
}

/// One living host.
#[derive(Debug)]
pub(crate) struct HostNow {
    pub(crate) job: JobId,
    /// What the system says of its process: resident bytes, and milliseconds of CPU time.
    pub(crate) usage: Option<(u64, u64)>,
    /// What it counted; absent if it did not answer in time.
    pub(crate) counted: Option<HostMetrics>,
}

impl WorkerMetrics {
    pub(crate) fn ordered(&self, kind: &'static str) {
        self.orders.get_or_create(&Kind { kind }).inc();
    }

    pub(crate) fn started_host(&self, seconds: f64) {
        self.hosts_started.inc();
        self.launch_seconds.observe(seconds);
    }

    pub(crate) fn failed_launch(&self) {
        self.launch_failures.inc();
    }

    pub(crate) fn ended_host(&self, kind: &'static str) {
        self.hosts_ended.get_or_create(&Kind { kind }).inc();
    }

    pub(crate) fn killed_stopped_host(&self) {
        self.stopped_hosts_killed.inc();
    }

    pub(crate) fn exited(&self, kind: &'static str) {
        self.actor_exits.get_or_create(&Kind { kind }).inc();
    }

    pub(crate) fn read_log(&self, bytes: usize) {
        self.log_reads.inc();
        self.log_read_bytes.inc_by(bytes as u64);
    }

    /// Everything of this worker as text, in the OpenMetrics format.
    pub(crate) fn text(&self, now: Now) -> Result<String, std::fmt::Error> {
        let mut registry = Registry::with_prefix("mobula_worker");
        self.register(&mut registry);
        let mut gauge = |name: &str, help: &str, value: u64| {
            let gauge = Count::default();
            gauge.set(value);
            registry.register(name, help, gauge);
        };
        let connected = u64::from(now.connected);
        gauge(
            "connected",
            "Whether there is a session with the leader",
            connected,
        );
        gauge("actors", "Actors that live here", now.actors as u64);
        let waiting = now.waiting_actors as u64;
        gauge(
            "actors_waiting_for_gpu",
            "Actors that wait for a GPU",
            waiting,
        );
        gauge(
            "outbox_events",
            "Events that the leader has not acknowledged",
            now.outbox as u64,
        );
        gauge("hosts", "Host processes that run", now.hosts.len() as u64);
        let stale = now.stale_messages;
        gauge(
            "stale_messages",
            "Messages of replaced leaders that were dropped",
            stale,
        );
        let own = OwnMetrics::of(&now.hosts);
        gauge(
            "own_series_dropped",
            "Series of actors that found no room here",
            own.dropped,
        );
        register_hosts(&mut registry, now.hosts);
        gpus::register(&mut registry, now.gpus);
        // Under the names that they were given, without ours before them.
        let mut actors = Registry::default();
        actors.register_collector(Box::new(own));
        let mut text = String::new();
        encode_registry(&mut text, &registry)?;
        encode_registry(&mut text, &actors)?;
        encode_eof(&mut text)?;
        Ok(text)
    }

    fn register(&self, r: &mut Registry) {
        r.register(
            "orders",
            "Orders of the leader, by kind",
            self.orders.clone(),
        );
        let help = "Host processes that were started";
        r.register("hosts_started", help, self.hosts_started.clone());
        let help = "Host processes that ended, by how";
        r.register("hosts_ended", help, self.hosts_ended.clone());
        let help = "Host processes that were killed because they were stopped for too long";
        let killed = self.stopped_hosts_killed.clone();
        r.register("stopped_hosts_killed", help, killed);
        let help = "Host processes that could not be started";
        r.register("launch_failures", help, self.launch_failures.clone());
        let help = "From the decision to start a host process to its first instruction";
        r.register("launch_duration_seconds", help, self.launch_seconds.clone());
        let help = "Ends of actors that were reported, by reason";
        r.register("actor_exits", help, self.actor_exits.clone());
        r.register(
            "log_reads",
            "Pieces of logs that were read",
            self.log_reads.clone(),
        );
        r.register("log_read_bytes", "Their bytes", self.log_read_bytes.clone());
    }
}

/// Puts what hosts are and count into the registry, one series a host.
fn register_hosts(registry: &mut Registry, hosts: BTreeMap<HostId, HostNow>) {
    let memory = Family::<Host, Count>::default();
    let cpu = Family::<Host, Gauge<f64, AtomicU64>>::default();
    let actors = Family::<Host, Count>::default();
    let in_flight = Family::<Host, Count>::default();
    let spans_dropped = Family::<Host, Counter>::default();
    let calls = Family::<HostOutcome, Counter>::default();
    let mut durations = Vec::new();
    for (host, now) in hosts {
        let (host, job) = (host.to_string(), now.job.to_string());
        let labels = Host { host, job };
        if let Some((bytes, cpu_ms)) = now.usage {
            memory.get_or_create(&labels).set(bytes);
            cpu.get_or_create(&labels).set(cpu_ms as f64 / 1000.0);
        }
        let Some(counted) = now.counted else { continue };
        actors.get_or_create(&labels).set(counted.actors);
        in_flight
            .get_or_create(&labels)
            .set(counted.calls_in_flight);
        spans_dropped
            .get_or_create(&labels)
            .inc_by(counted.spans_dropped);
        for (outcome, count) in CALL_OUTCOMES.into_iter().zip(&counted.calls) {
            let Host { host, job } = labels.clone();
            calls
                .get_or_create(&HostOutcome { host, job, outcome })
                .inc_by(*count);
        }
        durations.push((labels, Durations::of(&counted)));
    }
    let r = registry;
    let help = "Memory of a host process";
    r.register("host_resident_memory_bytes", help, memory);
    let help = "CPU time that a host process has used";
    r.register("host_cpu_seconds", help, cpu);
    r.register("host_actors", "Actors in a host process", actors);
    let help = "Calls that a host has taken and not answered";
    r.register("host_calls_in_flight", help, in_flight);
    r.register(
        "host_calls",
        "Calls that a host has answered, by outcome",
        calls,
    );
    let help = "Spans of the timeline that were forgotten for want of room";
    r.register("host_spans_dropped", help, spans_dropped);
    r.register_collector(Box::new(CallDurations(durations)));
}

/// How long calls took, as a host counted it.
#[derive(Debug)]
struct Durations {
    sum_seconds: f64,
    count: u64,
    /// Upper bounds in seconds, and how many calls fell below each and above the one before.
    buckets: Vec<(f64, u64)>,
}

impl Durations {
    fn of(counted: &HostMetrics) -> Self {
        let last = counted.call_buckets.len().saturating_sub(1);
        let bound = |place: usize| match place {
            place if place == last => f64::INFINITY,
            place => call_bucket_bound_us(place) as f64 / 1e6,
        };
        let counts = counted.call_buckets.iter().enumerate();
        Durations {
            sum_seconds: counted.call_total_us as f64 / 1e6,
            count: counted.call_buckets.iter().sum(),
            buckets: counts
                .map(|(place, count)| (bound(place), *count))
                .collect(),
        }
    }
}

impl EncodeMetric for Durations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.encode_histogram::<NoLabelSet>(self.sum_seconds, self.count, &self.buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[derive(Debug)]
struct CallDurations(Vec<(Host, Durations)>);

impl Collector for CallDurations {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "host_call_duration_seconds",
            "From a call's arrival at a host to its answer",
            None,
            MetricType::Histogram,
        )?;
        for (labels, durations) in &self.0 {
            durations.encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_wire::host::CALL_BUCKETS;

    #[test]
    fn a_hosts_counts_become_series_of_its_own() {
        let mut call_buckets = vec![0; CALL_BUCKETS];
        (
            call_buckets[0],
            call_buckets[3],
            call_buckets[CALL_BUCKETS - 1],
        ) = (2, 1, 1);
        let counted = HostMetrics {
            actors: 3,
            calls_in_flight: 1,
            calls: vec![3, 0, 0, 1, 0, 0, 0],
            call_buckets,
            call_total_us: 2_500_000,
            spans_dropped: 0,
            own: Vec::new(),
        };
        let host = HostNow {
            job: JobId(2),
            usage: Some((4096, 1500)),
            counted: Some(counted),
        };
        let silent = HostNow {
            job: JobId(2),
            usage: None,
            counted: None,
        };
        let metrics = WorkerMetrics::default();
        metrics.exited("out_of_memory");
        metrics.killed_stopped_host();
        let hosts = BTreeMap::from([(HostId(1), host), (HostId(2), silent)]);
        let now = Now {
            connected: true,
            hosts,
            ..Now::default()
        };
        let text = metrics.text(now).unwrap();
        for line in [
            "mobula_worker_connected 1",
            "mobula_worker_hosts 2",
            "mobula_worker_actor_exits_total{kind=\"out_of_memory\"} 1",
            "mobula_worker_stopped_hosts_killed_total 1",
            "mobula_worker_host_actors{host=\"host-1\",job=\"job-2\"} 3",
            "mobula_worker_host_cpu_seconds{host=\"host-1\",job=\"job-2\"} 1.5",
            "mobula_worker_host_calls_total{host=\"host-1\",job=\"job-2\",outcome=\"overloaded\"} 1",
            "mobula_worker_host_call_duration_seconds_bucket{le=\"+Inf\",host=\"host-1\",job=\"job-2\"} 4",
            "mobula_worker_host_call_duration_seconds_sum{host=\"host-1\",job=\"job-2\"} 2.5",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} in:\n{text}"
            );
        }
        assert!(!text.contains("host-2"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
