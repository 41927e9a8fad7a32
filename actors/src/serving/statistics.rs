//! What a model version has answered, in the form the protocol's statistics extension asks for.
//!
//! 1. Every key of the extension is there from the first moment, as a number: clients index without checking.
//! 2. Memory is bounded by the largest batch: there is one row a batch size.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::oip::OipError;

/// How often something happened and how long it took in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DurationCount {
    /// Occurrences.
    pub count: u64,
    /// Nanoseconds, summed.
    pub ns: u64,
}

impl DurationCount {
    fn add(&mut self, duration: Duration) {
        self.count += 1;
        self.ns = self
            .ns
            .saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    fn merge(&mut self, other: Self) {
        self.count += other.count;
        self.ns = self.ns.saturating_add(other.ns);
    }

    fn to_json(self) -> Value {
        json!({"count": self.count, "ns": self.ns})
    }
}

/// Why a request failed, in Triton's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureReason {
    /// It was not executed: queues are full or too long, or nothing runs.
    Rejected,
    /// Its caller went away, or its time passed.
    Canceled,
    /// The model or its replica failed on it.
    Backend,
    /// It does not fit the model, or something else.
    Other,
}

impl FailureReason {
    /// All of them, in the order in which they are counted.
    pub const ALL: [FailureReason; 4] = [
        FailureReason::Rejected,
        FailureReason::Canceled,
        FailureReason::Backend,
        FailureReason::Other,
    ];

    /// The name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rejected => "REJECTED",
            Self::Canceled => "CANCELED",
            Self::Backend => "BACKEND",
            Self::Other => "OTHER",
        }
    }

    /// The reason of an error.
    #[must_use]
    pub fn of(error: &OipError) -> Self {
        match error {
            OipError::DeadlineExceeded { .. } | OipError::NodesLate { .. } => Self::Canceled,
            OipError::ReplicaLost { .. } | OipError::Failed { .. } | OipError::Encode(_) => {
                Self::Backend
            }
            OipError::Node { error, .. } => Self::of(error),
            error if error.is_retryable() => Self::Rejected,
            _ => Self::Other,
        }
    }
}

/// Where one request's time went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestTimes {
    /// Waiting for its batch.
    pub queue: Duration,
    /// Preparing inputs.
    pub compute_input: Duration,
    /// The model's computation.
    pub compute_infer: Duration,
    /// Preparing outputs.
    pub compute_output: Duration,
}

impl RequestTimes {
    fn total(self) -> Duration {
        self.queue + self.compute_input + self.compute_infer + self.compute_output
    }
}

/// Whether the answer of a request was known, and how long it was looked for and kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cached {
    /// It was.
    Hit(Duration),
    /// It was not.
    Miss(Duration),
}

/// The executions of one batch size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct BatchTimes {
    pub(super) compute_input: DurationCount,
    pub(super) compute_infer: DurationCount,
    pub(super) compute_output: DurationCount,
}

/// Counts of one model version; those of several replicas add up with [`Self::merge`].
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ModelStatistics {
    pub(super) last_inference_unix_ms: u64,
    pub(super) inference_count: u64,
    pub(super) execution_count: u64,
    pub(super) success: DurationCount,
    pub(super) fail: DurationCount,
    /// Failures in the order of [`FailureReason::ALL`].
    failures: [u64; FailureReason::ALL.len()],
    pub(super) queue: DurationCount,
    pub(super) compute_input: DurationCount,
    pub(super) compute_infer: DurationCount,
    pub(super) compute_output: DurationCount,
    pub(super) cache_hit: DurationCount,
    pub(super) cache_miss: DurationCount,
    pub(super) batches: BTreeMap<u64, BatchTimes>,
}

impl ModelStatistics {
    /// Counts an answered request of some rows; the time is milliseconds since 1970.
    pub fn record_success(&mut self, rows: u64, times: RequestTimes, now_unix_ms: u64) {
        self.last_inference_unix_ms = self.last_inference_unix_ms.max(now_unix_ms);
        self.inference_count += rows;
        self.success.add(times.total());
        self.queue.add(times.queue);
        self.compute_input.add(times.compute_input);
        self.compute_infer.add(times.compute_infer);
        self.compute_output.add(times.compute_output);
    }

    /// Counts a request whose answer was known, and which no model computed.
    pub fn record_cache_hit(&mut self, times: RequestTimes, looked: Duration) {
        self.success.add(times.total() + looked);
        self.queue.add(times.queue);
        self.cache_hit.add(looked);
    }

    /// Counts that an answer was looked for and not there; what became of the request is counted besides.
    pub fn record_cache_miss(&mut self, looked: Duration) {
        self.cache_miss.add(looked);
    }

    /// Counts a request that failed after some time.
    pub fn record_failure(&mut self, duration: Duration, reason: FailureReason) {
        self.fail.add(duration);
        self.failures[reason as usize] += 1;
    }

    /// Counts one execution of the model, which may answer many requests: call it for the first request of a batch.
    pub fn record_execution(&mut self, batch_rows: u64, times: RequestTimes) {
        self.execution_count += 1;
        let batch = self.batches.entry(batch_rows).or_default();
        batch.compute_input.add(times.compute_input);
        batch.compute_infer.add(times.compute_infer);
        batch.compute_output.add(times.compute_output);
    }

    /// Adds another replica's counts.
    pub fn merge(&mut self, other: &Self) {
        self.last_inference_unix_ms = self
            .last_inference_unix_ms
            .max(other.last_inference_unix_ms);
        self.inference_count += other.inference_count;
        self.execution_count += other.execution_count;
        self.success.merge(other.success);
        self.fail.merge(other.fail);
        for (count, more) in self.failures.iter_mut().zip(other.failures) {
            *count += more;
        }
        self.queue.merge(other.queue);
        self.compute_input.merge(other.compute_input);
        self.compute_infer.merge(other.compute_infer);
        self.compute_output.merge(other.compute_output);
        self.cache_hit.merge(other.cache_hit);
        self.cache_miss.merge(other.cache_miss);
        for (rows, times) in &other.batches {
            let batch = self.batches.entry(*rows).or_default();
            batch.compute_input.merge(times.compute_input);
            batch.compute_infer.merge(times.compute_infer);
            batch.compute_output.merge(times.compute_output);
        }
    }

    /// Rows answered.
    #[must_use]
    pub fn inference_count(&self) -> u64 {
        self.inference_count
    }

    /// Batches computed.
    #[must_use]
    pub fn execution_count(&self) -> u64 {
        self.execution_count
    }

    /// Requests that failed.
    #[must_use]
    pub fn failure_count(&self) -> u64 {
        self.fail.count
    }

    /// Requests that failed for this reason.
    #[must_use]
    pub fn failures_for(&self, reason: FailureReason) -> u64 {
        self.failures[reason as usize]
    }

    /// The answer to a statistics request.
    #[must_use]
    pub fn to_json(&self, model: &str, version: &str) -> Value {
        let batches = self.batches.iter().map(|(rows, times)| {
            json!({
                "batch_size": rows,
                "compute_input": times.compute_input.to_json(),
                "compute_infer": times.compute_infer.to_json(),
                "compute_output": times.compute_output.to_json(),
            })
        });
        json!({"model_stats": [{
            "name": model,
            "version": version,
            "last_inference": self.last_inference_unix_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": self.success.to_json(),
                "fail": self.fail.to_json(),
                "queue": self.queue.to_json(),
                "compute_input": self.compute_input.to_json(),
                "compute_infer": self.compute_infer.to_json(),
                "compute_output": self.compute_output.to_json(),
                "cache_hit": self.cache_hit.to_json(),
                "cache_miss": self.cache_miss.to_json(),
            },
            "batch_stats": batches.collect::<Vec<_>>(),
        }]})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_have_tritons_reasons() {
        let text = String::new;
        for (error, reason) in [
            (
                OipError::Overloaded {
                    queued: 1,
                    limit: 1,
                },
                "REJECTED",
            ),
            (OipError::ShuttingDown, "REJECTED"),
            (OipError::DeadlineExceeded { limit_ms: 1 }, "CANCELED"),
            (OipError::ReplicaLost { reason: text() }, "BACKEND"),
            (OipError::Failed { reason: text() }, "BACKEND"),
            (OipError::UnknownModel { model: text() }, "OTHER"),
        ] {
            assert_eq!(FailureReason::of(&error).name(), reason, "{error}");
        }
        for (at, reason) in FailureReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, at);
        }
    }

    #[test]
    fn known_answers_are_requests_and_no_inferences() {
        let mut statistics = ModelStatistics::default();
        let times = RequestTimes {
            queue: Duration::ZERO,
            compute_input: Duration::from_nanos(3),
            compute_infer: Duration::ZERO,
            compute_output: Duration::from_nanos(4),
        };
        statistics.record_cache_miss(Duration::from_nanos(9));
        statistics.record_success(2, times, 5);
        statistics.record_cache_hit(times, Duration::from_nanos(20));
        statistics.record_cache_hit(times, Duration::from_nanos(30));
        let json = statistics.to_json("m", "1");
        let stats = &json["model_stats"][0];
        assert_eq!(stats["inference_count"], 2);
        let of = &stats["inference_stats"];
        assert_eq!(of["success"], json!({"count": 3, "ns": 7 * 3 + 50}));
        assert_eq!(of["queue"]["count"], 3);
        assert_eq!(of["compute_infer"]["count"], 1);
        assert_eq!(of["cache_hit"], json!({"count": 2, "ns": 50}));
        assert_eq!(of["cache_miss"], json!({"count": 1, "ns": 9}));
    }

    #[test]
    fn counts_add_up_and_every_key_is_there() {
        let times = RequestTimes {
            queue: Duration::from_nanos(1),
            compute_input: Duration::from_nanos(10),
            compute_infer: Duration::from_nanos(100),
            compute_output: Duration::from_nanos(1_000),
        };
        let mut one = ModelStatistics::default();
        one.record_success(3, times, 70);
        one.record_success(1, times, 60);
        one.record_execution(4, times);
        let mut all = ModelStatistics::default();
        all.record_failure(Duration::from_nanos(5), FailureReason::Rejected);
        all.merge(&one);
        all.merge(&one);
        let json = all.to_json("m", "1");
        let stats = &json["model_stats"][0];
        assert_eq!(
            (&stats["name"], &stats["version"]),
            (&json!("m"), &json!("1"))
        );
        assert_eq!(stats["last_inference"], 70);
        assert_eq!(
            (&stats["inference_count"], &stats["execution_count"]),
            (&json!(8), &json!(2))
        );
        assert_eq!(
            stats["inference_stats"]["success"],
            json!({"count": 4, "ns": 4_444})
        );
        assert_eq!(
            stats["inference_stats"]["fail"],
            json!({"count": 1, "ns": 5})
        );
        assert_eq!(stats["batch_stats"][0]["batch_size"], 4);
        assert_eq!(
            stats["batch_stats"][0]["compute_infer"],
            json!({"count": 2, "ns": 200})
        );

        let failures = FailureReason::ALL.map(|reason| all.failures_for(reason));
        assert_eq!(failures, [1, 0, 0, 0]);

        let empty = ModelStatistics::default().to_json("m", "1");
        for key in [
            "success",
            "fail",
            "queue",
            "compute_input",
            "compute_infer",
            "compute_output",
            "cache_hit",
            "cache_miss",
        ] {
            let expected = json!({"count": 0, "ns": 0});
            assert_eq!(
                empty["model_stats"][0]["inference_stats"][key], expected,
                "{key}"
            );
        }
        assert_eq!(empty["model_stats"][0]["batch_stats"], json!([]));
    }
}
