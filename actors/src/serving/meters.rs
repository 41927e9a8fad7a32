//! An endpoint in metrics of its router's process: what each version answered, by Triton's names, and what
//! the endpoint as a whole has.
//!
//! Triton's counters are gauges here that only grow: the format that workers speak would append `_total` to
//! the name of a counter, and dashboards made for Triton would not find them.

use std::collections::BTreeMap;

use mobula::metrics::{Counter, Gauge, MetricError, counter, gauge, remove};

use super::autoscaler::decision::Figures;
use super::guard::traffic::Counts;
use super::sentinels::AnswerCounts;
use super::statistics::{FailureReason, ModelStatistics};

/// What a version has, in the order of [`version_values`].
const VERSION_NAMES: [&str; 15] = [
    "nv_inference_request_success",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
    "nv_cache_num_hits_per_model",
    "nv_cache_num_misses_per_model",
    "nv_cache_hit_duration_per_model",
    "nv_cache_miss_duration_per_model",
    "mobula_serving_cache_answers",
    "mobula_serving_cache_bytes",
];

/// The one that has a reason beside its version.
const FAILURES: &str = "nv_inference_request_failure";

/// What an endpoint has, in the order of [`Meters::show`].
const ENDPOINT_NAMES: [&str; 7] = [
    "mobula_serving_replicas_wanted",
    "mobula_serving_replicas_answering",
    "mobula_serving_replicas_floor",
    "mobula_serving_replicas_ceiling",
    "mobula_serving_requests_in_flight",
    "mobula_serving_requests_per_second",
    "mobula_serving_p99_seconds",
];

/// What is counted for an endpoint, with the label `reason` where it has one, in the order of [`counted`].
const COUNTERS: [(&str, Option<&str>); 6] = [
    ("mobula_serving_requests_refused", Some("rate_limit")),
    ("mobula_serving_requests_refused", Some("queue")),
    ("mobula_serving_requests_refused", Some("deadline")),
    ("mobula_serving_retries", None),
    ("mobula_serving_retries_refused", None),
    ("mobula_serving_replicas_ejected", None),
];

/// What is counted of each version that may be asked its sentinels, with the label `result`.
const SENTINEL_ANSWERS: &str = "mobula_serving_sentinel_answers";

/// What comes of asking a replica, in the order of [`Meters::count_sentinels`].
const SENTINEL_RESULTS: [&str; 3] = ["right", "wrong", "unanswered"];

/// Versions whose answers to sentinels are shown, unless more answer requests: those that were asked last stay, for one that is wrong
/// is gone before anybody reads it.
const SENTINEL_VERSIONS_MAX: usize = 6;

fn counted(counts: &Counts) -> [u64; COUNTERS.len()] {
    [
        counts.rate_limited,
        counts.shed,
        counts.late,
        counts.retries,
        counts.retries_refused,
        counts.ejections,
    ]
}

/// One version of an endpoint.
struct VersionMeters {
    values: Vec<Gauge>,
    /// By reason.
    failures: Vec<(FailureReason, Gauge)>,
}

/// What one version has answered, and how many requests wait for it.
pub(super) struct VersionSeen {
    pub(super) version: u64,
    pub(super) statistics: ModelStatistics,
    pub(super) pending: u64,
    /// Answers that are kept, and what they take.
    pub(super) kept: (usize, u64),
}

/// The metrics of an endpoint.
pub(super) struct Meters {
    endpoint: String,
    values: Vec<Gauge>,
    counters: Vec<Counter>,
    counted: [u64; COUNTERS.len()],
    versions: BTreeMap<u64, VersionMeters>,
    /// Counters of [`SENTINEL_RESULTS`] by version, in the order in which these came.
    sentinels: Vec<(u64, Vec<Counter>)>,
}

impl Meters {
    /// The metrics of an endpoint that no other router of this process has.
    pub(super) fn new(endpoint: &str) -> Result<Self, MetricError> {
        let labels = [("endpoint", endpoint)];
        let values = ENDPOINT_NAMES.iter().map(|name| gauge(name, &labels));
        let counters = COUNTERS.iter().map(|(name, reason)| match reason {
            Some(reason) => counter(name, &[labels[0], ("reason", reason)]),
            None => counter(name, &labels),
        });
        Ok(Meters {
            endpoint: endpoint.to_owned(),
            values: values.collect::<Result<_, _>>()?,
            counters: counters.collect::<Result<_, _>>()?,
            counted: [0; COUNTERS.len()],
            versions: BTreeMap::new(),
            sentinels: Vec::new(),
        })
    }

    /// Shows an endpoint as it is now.
    pub(super) fn show(&mut self, replicas: u32, figures: &Figures, counts: &Counts) {
        let milli = |value: u64| value as f64 / 1e3;
        let values = [
            f64::from(replicas),
            f64::from(figures.ready),
            f64::from(figures.floor),
            f64::from(figures.ceiling),
            figures.in_flight as f64,
            milli(figures.rate_milli),
            figures.p99_us.unwrap_or_default() as f64 / 1e6,
        ];
        for (gauge, value) in self.values.iter().zip(values) {
            gauge.set(value);
        }
        let counted = counted(counts);
        for ((counter, now), before) in self.counters.iter().zip(counted).zip(self.counted) {
            counter.add((now - before) as f64);
        }
        self.counted = counted;
    }

    /// Shows the versions that are answered with, and no others.
    pub(super) fn show_versions(&mut self, seen: &[VersionSeen]) -> Result<(), MetricError> {
        let gone = |version: &u64| !seen.iter().any(|seen| seen.version == *version);
        let gone: Vec<u64> = self.versions.keys().copied().filter(gone).collect();
        for version in gone {
            self.versions.remove(&version);
            self.forget(version);
        }
        for seen in seen {
            if !self.versions.contains_key(&seen.version) {
                let meters = self.begin(seen.version)?;
                self.versions.insert(seen.version, meters);
            }
            let meters = &self.versions[&seen.version];
            let statistics = &seen.statistics;
            for (gauge, value) in meters.values.iter().zip(version_values(seen)) {
                gauge.set(value);
            }
            for (reason, gauge) in &meters.failures {
                gauge.set(statistics.failures_for(*reason) as f64);
            }
        }
        Ok(())
    }

    /// Counts what versions have answered to their sentinels. Those that are `here` are shown from the beginning.
    pub(super) fn count_sentinels(
        &mut self,
        here: &[u64],
        counts: impl Iterator<Item = (u64, AnswerCounts)>,
    ) -> Result<(), MetricError> {
        for version in here {
            self.sentinel_counters(*version, here)?;
        }
        for (version, counts) in counts {
            let counters = self.sentinel_counters(version, here)?;
            let counts = [counts.right, counts.wrong, counts.unanswered];
            for (counter, count) in counters.iter().zip(counts) {
                counter.add(count as f64);
            }
        }
        Ok(())
    }

    /// The counters of a version, for which the oldest of the versions makes room that is not `here` any more.
    fn sentinel_counters(&mut self, version: u64, here: &[u64]) -> Result<&[Counter], MetricError> {
        let known = self
            .sentinels
            .iter()
            .position(|(known, _)| *known == version);
        if let Some(at) = known {
            return Ok(&self.sentinels[at].1);
        }
        if self.sentinels.len() >= SENTINEL_VERSIONS_MAX
            && let Some(oldest) = self
                .sentinels
                .iter()
                .position(|(known, _)| !here.contains(known))
        {
            let (gone, _) = self.sentinels.remove(oldest);
            self.with_sentinel_labels(gone, |labels| remove(SENTINEL_ANSWERS, labels));
        }
        let counters =
            self.with_sentinel_labels(version, |labels| counter(SENTINEL_ANSWERS, labels));
        let counters = counters.into_iter().collect::<Result<Vec<_>, _>>()?;
        let at = self.sentinels.len();
        self.sentinels.push((version, counters));
        Ok(&self.sentinels[at].1)
    }

    /// What comes of the labels of each result.
    fn with_sentinel_labels<T>(
        &self,
        version: u64,
        each: impl Fn(&[(&str, &str)]) -> T,
    ) -> [T; SENTINEL_RESULTS.len()] {
        let version = version.to_string();
        let [endpoint, version] = [("endpoint", &*self.endpoint), ("version", &*version)];
        SENTINEL_RESULTS.map(|result| each(&[endpoint, version, ("result", result)]))
    }

    fn begin(&self, version: u64) -> Result<VersionMeters, MetricError> {
        let version = version.to_string();
        let [model, version] = [("model", &*self.endpoint), ("version", &*version)];
        let values = VERSION_NAMES
            .iter()
            .map(|name| gauge(name, &[model, version]));
        let failures = FailureReason::ALL.into_iter().map(|reason| {
            let labels = [model, version, ("reason", reason.name())];
            Ok((reason, gauge(FAILURES, &labels)?))
        });
        Ok(VersionMeters {
            values: values.collect::<Result<_, _>>()?,
            failures: failures.collect::<Result<_, _>>()?,
        })
    }

    fn forget(&self, version: u64) {
        let version = version.to_string();
        let [model, version] = [("model", &*self.endpoint), ("version", &*version)];
        for name in VERSION_NAMES {
            remove(name, &[model, version]);
        }
        for reason in FailureReason::ALL {
            remove(FAILURES, &[model, version, ("reason", reason.name())]);
        }
    }
}

fn version_values(seen: &VersionSeen) -> [f64; VERSION_NAMES.len()] {
    let statistics = &seen.statistics;
    let micros = |ns: u64| (ns / 1_000) as f64;
    [
        statistics.success.count as f64,
        statistics.inference_count as f64,
        statistics.execution_count as f64,
        micros(statistics.success.ns.saturating_add(statistics.fail.ns)),
        micros(statistics.queue.ns),
        micros(statistics.compute_input.ns),
        micros(statistics.compute_infer.ns),
        micros(statistics.compute_output.ns),
        seen.pending as f64,
        statistics.cache_hit.count as f64,
        statistics.cache_miss.count as f64,
        micros(statistics.cache_hit.ns),
        micros(statistics.cache_miss.ns),
        seen.kept.0 as f64,
        seen.kept.1 as f64,
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::statistics::DurationCount;
    use super::*;

    #[test]
    fn versions_come_and_go_without_end_and_leave_no_series() {
        let mut meters = Meters::new("come-and-go").unwrap();
        // More than a process has room for, if they stayed.
        for version in 1..=100 {
            let seen = VersionSeen {
                version,
                statistics: ModelStatistics::default(),
                pending: 0,
                kept: (0, 0),
            };
            meters.show_versions(&[seen]).unwrap();
        }
        meters.show_versions(&[]).unwrap();
    }

    /// No two numbers are equal, so that none can stand in another one's place.
    #[test]
    fn each_series_of_a_version_shows_what_its_name_says() {
        let times = |count: u64, us: u64| DurationCount {
            count,
            ns: us * 1_000,
        };
        let mut statistics = ModelStatistics::default();
        let reasons = [
            (FailureReason::Rejected, 1),
            (FailureReason::Canceled, 2),
            (FailureReason::Backend, 3),
            (FailureReason::Other, 4),
        ];
        for (reason, failures) in reasons {
            for _ in 0..failures {
                statistics.record_failure(Duration::ZERO, reason);
            }
        }
        statistics.success = times(11, 1_200);
        statistics.fail = times(10, 34);
        statistics.inference_count = 13;
        statistics.execution_count = 14;
        statistics.queue = times(15, 16);
        statistics.compute_input = times(17, 18);
        statistics.compute_infer = times(19, 20);
        statistics.compute_output = times(21, 22);
        statistics.cache_hit = times(23, 24);
        statistics.cache_miss = times(25, 26);
        let seen = VersionSeen {
            version: 3,
            statistics,
            pending: 27,
            kept: (28, 29),
        };
        let mut meters = Meters::new("shown").unwrap();
        meters.show_versions(&[seen]).unwrap();

        let labels = [("model", "shown"), ("version", "3")];
        let expected = BTreeMap::from([
            ("nv_inference_request_success", 11.0),
            ("nv_inference_count", 13.0),
            ("nv_inference_exec_count", 14.0),
            ("nv_inference_request_duration_us", 1_234.0),
            ("nv_inference_queue_duration_us", 16.0),
            ("nv_inference_compute_input_duration_us", 18.0),
            ("nv_inference_compute_infer_duration_us", 20.0),
            ("nv_inference_compute_output_duration_us", 22.0),
            ("nv_inference_pending_request_count", 27.0),
            ("nv_cache_num_hits_per_model", 23.0),
            ("nv_cache_num_misses_per_model", 25.0),
            ("nv_cache_hit_duration_per_model", 24.0),
            ("nv_cache_miss_duration_per_model", 26.0),
            ("mobula_serving_cache_answers", 28.0),
            ("mobula_serving_cache_bytes", 29.0),
        ]);
        let shown = |name| (name, gauge(name, &labels).unwrap().value());
        assert_eq!(BTreeMap::from(VERSION_NAMES.map(shown)), expected);
        for (reason, failures) in reasons {
            let labels = [labels[0], labels[1], ("reason", reason.name())];
            let shown = gauge("nv_inference_request_failure", &labels).unwrap();
            assert_eq!(shown.value(), f64::from(failures), "{}", reason.name());
        }
    }

    fn sentinel_answers(endpoint: &str, version: u64) -> [f64; 3] {
        let version = version.to_string();
        SENTINEL_RESULTS.map(|result| {
            let labels = [
                ("endpoint", endpoint),
                ("version", &*version),
                ("result", result),
            ];
            counter(SENTINEL_ANSWERS, &labels).unwrap().value()
        })
    }

    #[test]
    fn answers_to_sentinels_are_counted_by_version_and_result() {
        let mut meters = Meters::new("asked").unwrap();
        let counts = AnswerCounts {
            right: 3,
            wrong: 1,
            unanswered: 2,
        };
        for _ in 0..2 {
            meters
                .count_sentinels(&[1, 2], [(2, counts)].into_iter())
                .unwrap();
        }
        assert_eq!(sentinel_answers("asked", 2), [6.0, 2.0, 4.0]);
        assert_eq!(sentinel_answers("asked", 1), [0.0; 3]);
    }

    #[test]
    fn versions_that_were_asked_make_room_for_others_but_not_those_that_are_here() {
        let mut meters = Meters::new("asked-often").unwrap();
        let counts = AnswerCounts {
            wrong: 1,
            ..AnswerCounts::default()
        };
        // More than a process has room for, if they stayed.
        for version in 2..=100 {
            let asked = [(version, counts)].into_iter();
            meters.count_sentinels(&[1, version], asked).unwrap();
        }
        let kept: Vec<u64> = meters
            .sentinels
            .iter()
            .map(|(version, _)| *version)
            .collect();
        assert_eq!(kept, [1, 96, 97, 98, 99, 100]);
        // What has ended a rollout is there to be read when the version is gone.
        assert_eq!(sentinel_answers("asked-often", 99), [0.0, 1.0, 0.0]);
        let all = [1, 2, 3, 4, 5, 6, 7];
        meters.count_sentinels(&all, std::iter::empty()).unwrap();
        assert!(all.iter().all(|version| {
            let mut known = meters.sentinels.iter();
            known.any(|(known, _)| known == version)
        }));
        // Those that were shown before begin at zero.
        assert_eq!(sentinel_answers("asked-often", 2), [0.0; 3]);
    }

    #[test]
    fn each_series_of_an_endpoint_shows_what_its_name_says() {
        let figures = Figures {
            ready: 3,
            in_flight: 6,
            stable_in_flight_milli: 91,
            burst_in_flight_milli: 92,
            rate_milli: 7_500,
            p99_us: Some(8_000_000),
            target_in_flight: 93,
            wanted: 94,
            floor: 4,
            ceiling: 5,
            allowed_min: 95,
            allowed_max: 96,
            busy_milli: 97,
            memory_percent: 98,
            refused_milli: 99,
        };
        let counts = |times: u64| Counts {
            rate_limited: 10 * times,
            shed: 11 * times,
            late: 12 * times,
            retries: 13 * times,
            retries_refused: 14 * times,
            ejections: 15 * times,
        };
        let mut meters = Meters::new("shown-whole").unwrap();
        // What was counted before is not counted again.
        for times in 1..=2 {
            meters.show(2, &figures, &counts(times));
        }
        let endpoint = ("endpoint", "shown-whole");
        let expected = BTreeMap::from([
            ("mobula_serving_replicas_wanted", 2.0),
            ("mobula_serving_replicas_answering", 3.0),
            ("mobula_serving_replicas_floor", 4.0),
            ("mobula_serving_replicas_ceiling", 5.0),
            ("mobula_serving_requests_in_flight", 6.0),
            ("mobula_serving_requests_per_second", 7.5),
            ("mobula_serving_p99_seconds", 8.0),
        ]);
        let shown = |name| (name, gauge(name, &[endpoint]).unwrap().value());
        assert_eq!(BTreeMap::from(ENDPOINT_NAMES.map(shown)), expected);
        let refused = |reason| {
            let labels = [endpoint, ("reason", reason)];
            let found = counter("mobula_serving_requests_refused", &labels);
            found.unwrap().value()
        };
        assert_eq!(
            ["rate_limit", "queue", "deadline"].map(refused),
            [20.0, 22.0, 24.0]
        );
        let counted = |name| counter(name, &[endpoint]).unwrap().value();
        assert_eq!(
            [
                "mobula_serving_retries",
                "mobula_serving_retries_refused",
                "mobula_serving_replicas_ejected",
            ]
            .map(counted),
            [26.0, 28.0, 30.0]
        );
    }
}
