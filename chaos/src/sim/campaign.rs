//! Many seeds, one after the other or on several threads.
//!
//! Invariant: which thread runs a seed changes nothing about it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Counts, Report, run};

/// Failures that are kept with all that is known of them: nobody reads more at once.
const FAILURES_KEPT: usize = 16;

/// Which seeds, and when to stop.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// The first seed; the others follow it.
    pub first_seed: u64,
    /// How many; `None`: until the time is up.
    pub seeds: Option<u64>,
    /// After which time no seed is begun.
    pub time_max: Option<Duration>,
    /// Events after which a run counts as endless.
    pub events_max: u64,
    /// Threads, each with a seed of its own.
    pub threads: usize,
    /// Whether to stop at the first failure.
    pub stops_at_failure: bool,
}

/// What many seeds came to.
#[derive(Debug, Clone, Default)]
pub struct Summary {
    /// Seeds that ran.
    pub seeds: u64,
    /// Those that failed.
    pub failed: u64,
    /// The first of those, by seed.
    pub failures: Vec<Report>,
    /// Wall-clock time.
    pub elapsed: Duration,
    /// Virtual time of all seeds.
    pub virtual_ms: u64,
    /// What all seeds came across.
    pub counts: Counts,
}

impl Summary {
    /// How many seeds one core runs in an hour.
    #[must_use]
    pub fn seeds_per_core_hour(&self, threads: usize) -> f64 {
        let core_hours = self.elapsed.as_secs_f64() * threads.max(1) as f64 / 3_600.0;
        if core_hours > 0.0 {
            self.seeds as f64 / core_hours
        } else {
            0.0
        }
    }

    fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.virtual_ms += report.virtual_ms;
        self.counts.add(&report.counts);
        if report.violation.is_some() {
            self.failed += 1;
            self.failures.push(report);
            self.failures.sort_by_key(|report| report.seed);
            self.failures.truncate(FAILURES_KEPT);
        }
    }
}

/// Runs `campaign`; `prepare` is called first in each thread, `done` after each seed.
pub fn run_many(
    campaign: &Campaign,
    prepare: impl Fn() + Sync,
    done: impl Fn(&Report) + Sync,
) -> Summary {
    let began = Instant::now();
    let next = AtomicU64::new(0);
    let is_over = AtomicBool::new(false);
    let summary = Mutex::new(Summary::default());
    let work = || {
        prepare();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let is_late = campaign.time_max.is_some_and(|max| began.elapsed() >= max);
            let is_last = campaign.seeds.is_some_and(|seeds| number >= seeds);
            if is_late || is_last || is_over.load(Ordering::Relaxed) {
                return;
            }
            let report = run(
                campaign.first_seed.wrapping_add(number),
                campaign.events_max,
                false,
            );
            done(&report);
            if report.violation.is_some() && campaign.stops_at_failure {
                is_over.store(true, Ordering::Relaxed);
            }
            let mut summary = summary.lock().expect("nobody panics with it");
            summary.add(report);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..campaign.threads.max(1) {
            scope.spawn(work);
        }
    });
    let mut summary = summary.into_inner().expect("nobody panics with it");
    summary.elapsed = began.elapsed();
    summary
}
