//! What actors measure themselves, of all hosts: under the names that they gave, with host and job beside their labels.

use std::collections::BTreeMap;

use mobula_core::id::HostId;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::HostNow;

/// Text of the series of actors on one worker, in bytes: half of what an answer may have.
const OWN_TEXT_BYTES_MAX: usize = 480 * 1024;
/// What a series takes beside its own name, labels and values: quotes, commas, host and job, and its value; and as
/// much again where it is the first of its name.
const SERIES_OVERHEAD_BYTES: usize = 128;

/// Labels by name.
type Labels = Vec<(String, String)>;

/// What actors measure.
#[derive(Debug, Default)]
pub(super) struct OwnMetrics {
    /// By name, and whether it only grows.
    families: BTreeMap<(String, bool), Vec<(Labels, f64)>>,
    /// Series that found no room.
    pub(super) dropped: u64,
}

impl OwnMetrics {
    pub(super) fn of(hosts: &BTreeMap<HostId, HostNow>) -> Self {
        let mut own = OwnMetrics::default();
        let mut kinds: BTreeMap<&str, bool> = BTreeMap::new();
        let mut bytes = 0;
        for (host, now) in hosts {
            for series in now.counted.iter().flat_map(|counted| &counted.own) {
                let kind = *kinds.entry(&series.name).or_insert(series.is_counter);
                // Two programs may mean two things by one name; a reader knows one.
                let texts = series
                    .labels
                    .iter()
                    .map(|(name, value)| name.len() + value.len());
                // Quotes and line breaks in a value become two bytes each.
                let length = 2 * (series.name.len() + texts.sum::<usize>()) + SERIES_OVERHEAD_BYTES;
                if bytes + length > OWN_TEXT_BYTES_MAX || kind != series.is_counter {
                    own.dropped += 1;
                    continue;
                }
                bytes += length;
                let mut labels = vec![
                    ("host".to_owned(), host.to_string()),
                    ("job".to_owned(), now.job.to_string()),
                ];
                labels.extend(series.labels.iter().cloned());
                let family = own.families.entry((series.name.clone(), kind));
                let value = f64::from_bits(series.value_bits);
                family.or_default().push((labels, value));
            }
        }
        own
    }
}

impl Collector for OwnMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for ((name, is_counter), series) in &self.families {
            let kind = match is_counter {
                true => MetricType::Counter,
                false => MetricType::Gauge,
            };
            let help = "Measured by actors";
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, value) in series {
                let mut one = family.encode_family(labels)?;
                match is_counter {
                    true => one.encode_counter::<NoLabelSet, f64, f64>(value, None)?,
                    false => one.encode_gauge(value)?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Now, WorkerMetrics};
    use mobula_core::id::JobId;
    use mobula_wire::host::{CALL_BUCKETS, CALL_OUTCOMES, HostMetrics, OwnSeries};

    fn series(name: &str, is_counter: bool, value: f64) -> OwnSeries {
        OwnSeries {
            name: name.to_owned(),
            labels: vec![("part".to_owned(), "a \"b\"".to_owned())],
            is_counter,
            value_bits: value.to_bits(),
        }
    }

    fn host_with(own: Vec<OwnSeries>) -> HostNow {
        HostNow {
            job: JobId(2),
            usage: None,
            counted: Some(HostMetrics {
                actors: 0,
                calls_in_flight: 0,
                calls: vec![0; CALL_OUTCOMES.len()],
                call_buckets: vec![0; CALL_BUCKETS],
                call_total_us: 0,
                spans_dropped: 0,
                own,
            }),
        }
    }

    #[test]
    fn what_actors_measure_stands_under_their_names_and_is_bounded() {
        let first = host_with(vec![
            series("kitchen_orders", true, 3.0),
            series("kitchen_heat", false, 0.5),
        ]);
        let mut many = vec![series("kitchen_orders", false, 9.0)];
        many.extend((0..4000).map(|n| series(&format!("k{n:04}"), false, 1.0)));
        let hosts = BTreeMap::from([(HostId(1), first), (HostId(2), host_with(many))]);
        let now = Now {
            hosts,
            ..Now::default()
        };
        let text = WorkerMetrics::default().text(now).unwrap();
        let labels = r#"{host="host-1",job="job-2",part="a \"b\""}"#;
        for line in [
            "# TYPE kitchen_orders counter",
            &format!("kitchen_orders_total{labels} 3.0"),
            &format!("kitchen_heat{labels} 0.5"),
            "k0000{host=\"host-2\",job=\"job-2\",part=\"a \\\"b\\\"\"} 1.0",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} in:\n{text}"
            );
        }
        assert!(!text.contains(" 9.0"), "a name has one kind");
        assert!(text.len() < OWN_TEXT_BYTES_MAX);
        let is_kept = |line: &&str| line.starts_with('k') && line.as_bytes()[1].is_ascii_digit();
        let kept = text.lines().filter(is_kept).count();
        assert!((1000..4000).contains(&kept), "{kept}");
        // And the one of the other kind.
        let dropped = format!("mobula_worker_own_series_dropped {}", 4001 - kept);
        assert!(text.lines().any(|line| line == dropped), "{dropped}");
        assert!(text.ends_with("# EOF\n"));
    }
}
