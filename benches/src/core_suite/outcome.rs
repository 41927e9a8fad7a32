//! The figures of one run: printed as they come, written as JSON at the end.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::Options;

/// All figures of one run.
pub(crate) struct Outcome {
    rows: Vec<Value>,
    started_at: SystemTime,
}

impl Outcome {
    pub(crate) fn begin() -> Self {
        let built = if cfg!(debug_assertions) {
            "dev"
        } else {
            "release"
        };
        println!("core suite, {built} profile, {} CPUs", cpus());
        Outcome {
            rows: Vec::new(),
            started_at: SystemTime::now(),
        }
    }

    /// A rate, as Ray reports it: mean and standard deviation over the rounds.
    pub(crate) fn rate(&mut self, name: &str, rate: &Rate) {
        println!("{name:<44} {:>12.1} /s  ± {:.1}", rate.mean, rate.deviation);
        self.rows.push(json!({
            "name": name, "unit": "1/s", "mean": rate.mean, "deviation": rate.deviation,
        }));
    }

    /// One figure with its unit.
    pub(crate) fn figure(&mut self, name: &str, value: f64, unit: &str) {
        println!("{name:<44} {value:>12.2} {unit}");
        self.rows
            .push(json!({ "name": name, "unit": unit, "mean": value }));
    }

    /// Latencies in nanoseconds.
    pub(crate) fn latencies(&mut self, name: &str, latencies_ns: &Histogram<u64>) {
        let us = |share| latencies_ns.value_at_quantile(share) as f64 / 1e3;
        let (p50, p99, p999) = (us(0.5), us(0.99), us(0.999));
        println!("{name:<44} p50 {p50:.1} µs, p99 {p99:.1} µs, p99.9 {p999:.1} µs");
        self.rows.push(json!({
            "name": name, "unit": "us", "p50": p50, "p99": p99, "p99_9": p999,
            "count": latencies_ns.len(),
        }));
    }

    /// What cannot be measured, and why.
    pub(crate) fn absent(&mut self, name: &str, why: &str) {
        println!("{name:<44} not measured: {why}");
        self.rows.push(json!({ "name": name, "absent": why }));
    }

    pub(crate) fn save(&self, path: &Path) -> std::io::Result<()> {
        let at = self
            .started_at
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let document = json!({
            "suite": "core",
            "started_at_unix_s": at.as_secs(),
            "profile": if cfg!(debug_assertions) { "dev" } else { "release" },
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
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn first_value(path: &str, key: &str) -> String {
    let text = read(path);
    let line = text.lines().find(|line| line.starts_with(key));
    line.and_then(|line| line.split_once(':'))
        .map(|(_, value)| value.trim().to_owned())
        .unwrap_or_default()
}

pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How often something happened in a second.
pub(crate) struct Rate {
    mean: f64,
    deviation: f64,
}

impl Rate {
    /// Ray's `timeit`: repeats `operation` for some rounds, each of which counts `multiplier` for
    /// every time.
    pub(crate) async fn measure<F, E>(
        options: &Options,
        multiplier: usize,
        mut operation: impl FnMut() -> F,
    ) -> Result<Rate, E>
    where
        F: Future<Output = Result<(), E>>,
    {
        let mut round = async |length: Duration| {
            let start = Instant::now();
            let mut count = 0;
            loop {
                operation().await?;
                count += 1;
                let elapsed = start.elapsed();
                if elapsed >= length {
                    return Ok((count * multiplier) as f64 / elapsed.as_secs_f64());
                }
            }
        };
        round(options.warm_up).await?;
        let mut rates = Vec::new();
        for _ in 0..options.rounds {
            rates.push(round(options.round).await?);
        }
        Ok(Rate::of(&rates))
    }

    /// The same in units of which one operation makes `factor`.
    pub(crate) fn times(self, factor: f64) -> Rate {
        Rate {
            mean: self.mean * factor,
            deviation: self.deviation * factor,
        }
    }

    pub(crate) fn of(rates: &[f64]) -> Rate {
        let count = rates.len().max(1) as f64;
        let mean = rates.iter().sum::<f64>() / count;
        let variance = rates.iter().map(|rate| (rate - mean).powi(2)).sum::<f64>() / count;
        Rate {
            mean,
            deviation: variance.sqrt(),
        }
    }
}
