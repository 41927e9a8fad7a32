//! Who asks, as a call's metadata say.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Request;
use tonic::metadata::MetadataMap;

use super::proto;
use crate::serving::fleet::affinity::AFFINITY;
use crate::serving::http::{LOW_PRIORITY, PRIORITY, ROUTING_KEY};
use crate::serving::oip::{EXPLAIN, OipError, is_asked};

/// What a call's metadata say: the same headers as HTTP's. One for all requests of a stream.
pub(super) struct Asker {
    pub(super) metadata: MetadataMap,
    pub(super) routing_key: Option<String>,
    pub(super) explain: bool,
    pub(super) low_priority: bool,
    /// What gRPC's own deadline allows, and until when: that of a stream holds for all of its requests.
    limit: Option<(Duration, Instant)>,
}

impl Asker {
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        let metadata = request.metadata();
        let value = |name: &str| metadata.get(name).map(|value| value.as_bytes());
        let key = value(ROUTING_KEY.as_str());
        let limit = metadata.get("grpc-timeout").and_then(|value| {
            let limit = time_limit(value.to_str().ok()?)?;
            Some((limit, Instant::now() + limit))
        });
        Asker {
            routing_key: key.map(|key| String::from_utf8_lossy(key).into_owned()),
            explain: is_asked(value(EXPLAIN)),
            low_priority: value(PRIORITY) == Some(LOW_PRIORITY.as_bytes()),
            limit,
            metadata: metadata.clone(),
        }
    }

    /// What is left of gRPC's own deadline, as the protocol's parameter.
    pub(super) fn time_left(&self) -> Result<Option<proto::InferParameter>, OipError> {
        let Some((limit, until)) = self.limit else {
            return Ok(None);
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(OipError::DeadlineExceeded {
                limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            });
        }
        // Zero would be no limit at all.
        let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX).max(1);
        let choice = proto::infer_parameter::ParameterChoice::Int64Param(micros);
        Ok(Some(proto::InferParameter {
            parameter_choice: Some(choice),
        }))
    }

    /// The headers that decide where a request goes, as far as the call has them.
    pub(super) fn headers(&self, wanted: Vec<String>) -> BTreeMap<String, String> {
        let read = |name: String| {
            let value = self.metadata.get(&name)?.to_str().ok()?.to_owned();
            Some((name, value))
        };
        let wanted = wanted.into_iter().chain([AFFINITY.to_owned()]);
        wanted.filter_map(read).collect()
    }
}

/// A value of `grpc-timeout`: at most eight digits and a unit.
fn time_limit(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok()?;
    if digits.len() > 8 || count == 0 {
        return None;
    }
    Some(match unit {
        "H" => Duration::from_secs(count * 3_600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
#[path = "asker_tests.rs"]
mod tests;
