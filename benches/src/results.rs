//! The figures of a suite: printed as they come, written as JSON at the end.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// All figures of one run.
#[derive(Debug)]
pub struct Results {
    suite: &'static str,
    rows: Vec<Value>,
    started_at: SystemTime,
}

fn profile() -> &'static str {
    if cfg!(debug_assertions) {
        "dev"
    } else {
        "release"
    }
}

impl Results {
    /// Nothing yet; says on standard output what begins.
    #[must_use]
    pub fn begin(suite: &'static str) -> Self {
        let load = read("/proc/loadavg");
        println!(
            "{suite} suite, {} profile, {} CPUs, load {load}",
            profile(),
            cpus()
        );
        Results {
            suite,
            rows: Vec::new(),
            started_at: SystemTime::now(),
        }
    }

    /// One figure with its unit.
    pub fn figure(&mut self, name: &str, value: f64, unit: &str) {
        println!("{name:<60} {value:>12.2} {unit}");
        let row = json!({ "name": name, "unit": unit, "mean": value });
        self.rows.push(row);
    }

    /// How often something was done in a second, and how long each time took, in nanoseconds.
    pub fn rate(&mut self, name: &str, per_second: f64, latencies_ns: &Histogram<u64>) {
        let us = |share| latencies_ns.value_at_quantile(share) as f64 / 1e3;
        let (p50, p99, p999) = (us(0.5), us(0.99), us(0.999));
        println!(
            "{name:<60} {per_second:>12.1} /s  p50 {p50:.0} µs, p99 {p99:.0} µs, p99.9 {p999:.0} µs"
        );
        self.rows.push(json!({
            "name": name, "unit": "1/s", "mean": per_second, "p50_us": p50, "p99_us": p99,
            "p99_9_us": p999, "count": latencies_ns.len(),
        }));
    }

    /// A row of its own shape.
    pub fn row(&mut self, shown: &str, row: Value) {
        println!("{shown}");
        self.rows.push(row);
    }

    /// Writes everything with the machine's facts.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        let since = self
            .started_at
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let document = json!({
            "suite": self.suite,
            "started_at_unix_s": since.as_secs(),
            "profile": profile(),
            "machine": {
                "cpus": cpus(),
                "cpu": first_value("/proc/cpuinfo", "model name"),
                "memory": first_value("/proc/meminfo", "MemTotal"),
                "kernel": read("/proc/sys/kernel/osrelease"),
                "load": read("/proc/loadavg"),
            },
            "rows": self.rows,
        });
        std::fs::write(path, format!("{document:#}\n"))
    }
}

fn read(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

fn first_value(path: &str, key: &str) -> String {
    let text = read(path);
    let line = text.lines().find(|line| line.starts_with(key));
    let value = line.and_then(|line| line.split_once(':'));
    value
        .map(|(_, value)| value.trim().to_owned())
        .unwrap_or_default()
}

/// CPUs that this process may use.
#[must_use]
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
