//! The rows of this suite, as Ray reports its own: mean and deviation over some rounds.

use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mobula_benches::results::Results;
use serde_json::json;

use crate::Options;

/// All figures of one run.
pub(crate) struct Outcome(Results);

impl Outcome {
    pub(crate) fn begin() -> Self {
        Outcome(Results::begin("core"))
    }

    /// A rate, as Ray reports it: mean and standard deviation over the rounds.
    pub(crate) fn rate(&mut self, name: &str, rate: &Rate) {
        let shown = format!("{name:<60} {:>12.1} /s  ± {:.1}", rate.mean, rate.deviation);
        let row = json!({
            "name": name, "unit": "1/s", "mean": rate.mean, "deviation": rate.deviation,
        });
        self.0.row(&shown, row);
    }

    /// One figure with its unit.
    pub(crate) fn figure(&mut self, name: &str, value: f64, unit: &str) {
        self.0.figure(name, value, unit);
    }

    /// Latencies in nanoseconds.
    pub(crate) fn latencies(&mut self, name: &str, latencies_ns: &Histogram<u64>) {
        let us = |share| latencies_ns.value_at_quantile(share) as f64 / 1e3;
        let (p50, p99, p999) = (us(0.5), us(0.99), us(0.999));
        let shown = format!("{name:<60} p50 {p50:.1} µs, p99 {p99:.1} µs, p99.9 {p999:.1} µs");
        let row = json!({
            "name": name, "unit": "us", "p50": p50, "p99": p99, "p99_9": p999,
            "count": latencies_ns.len(),
        });
        self.0.row(&shown, row);
    }

    /// What cannot be measured, and why.
    pub(crate) fn absent(&mut self, name: &str, why: &str) {
        let shown = format!("{name:<60} not measured: {why}");
        self.0.row(&shown, json!({ "name": name, "absent": why }));
    }

    pub(crate) fn save(&self, path: &Path) -> std::io::Result<()> {
        self.0.save(path)
    }
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
