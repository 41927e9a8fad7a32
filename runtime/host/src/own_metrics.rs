//! What actors measure themselves, for whoever reads the worker's metrics.
//!
//! Invariants:
//! 1. Measuring never waits and never fails: a handle is an atomic. Only asking for a new series can be refused.
//! 2. The number of series is bounded, and so is the text of each.
//! 3. One name is either a gauge or a counter.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use mobula_wire::host::OwnSeries;
use parking_lot::Mutex;

/// Series of one process: more than a dashboard shows of it, and a bound on what a reader gets.
pub const SERIES_MAX: usize = 256;
/// Labels of a series beside the host and the job, which are added by whoever collects.
pub const LABELS_MAX: usize = 4;
/// Bytes of a name, of a label's name and of its value.
pub const TEXT_BYTES_MAX: usize = 64;
/// Labels that are added by whoever collects, or mean something to Prometheus.
const RESERVED: [&str; 4] = ["host", "job", "le", "quantile"];

/// Why there is no such series.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetricError {
    /// A name that Prometheus does not take.
    #[error(
        "`{0}` is no name of a metric or label: it has letters, digits and `_`, begins with none of the digits, and \
         has at most {TEXT_BYTES_MAX} bytes"
    )]
    Name(String),
    /// A label that is given by others, or a value that is too long.
    #[error(
        "the label {name}=\"{value}\" cannot be used: `host`, `job`, `le` and `quantile` are taken, and a value has at \
         most {TEXT_BYTES_MAX} bytes"
    )]
    Label {
        /// Its name.
        name: String,
        /// Its value.
        value: String,
    },
    /// Too many labels.
    #[error("`{name}` has {count} labels, the limit is {LABELS_MAX}")]
    TooManyLabels {
        /// The metric.
        name: String,
        /// How many.
        count: usize,
    },
    /// The name is taken by the other kind.
    #[error("`{0}` is a counter here and a gauge there: give them two names")]
    Kind(String),
    /// No room.
    #[error(
        "this process has {SERIES_MAX} series, the limit: a label whose values are without end does not belong into a \
         metric"
    )]
    TooManySeries,
}

/// A value that goes up and down.
#[derive(Debug, Clone)]
pub struct Gauge(Arc<AtomicU64>);

impl Gauge {
    /// It is this now.
    pub fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Relaxed);
    }

    /// What it is now.
    #[must_use]
    pub fn value(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }
}

/// A value that only grows.
#[derive(Debug, Clone)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// It has grown by one.
    pub fn increment(&self) {
        self.add(1.0);
    }

    /// It has grown by `amount`; one that is negative or no number is ignored.
    pub fn add(&self, amount: f64) {
        if amount > 0.0 {
            let grown = |bits| Some((f64::from_bits(bits) + amount).to_bits());
            // The closure never declines.
            let _ = self.0.fetch_update(Relaxed, Relaxed, grown);
        }
    }

    /// How far it has grown.
    #[must_use]
    pub fn value(&self) -> f64 {
        f64::from_bits(self.0.load(Relaxed))
    }
}

/// Name and labels.
type Key = (String, Vec<(String, String)>);

#[derive(Default)]
struct Series {
    values: BTreeMap<Key, Arc<AtomicU64>>,
    is_counter: BTreeMap<String, bool>,
}

// A process is a host once in its life.
static SERIES: Mutex<Series> = Mutex::new(Series {
    values: BTreeMap::new(),
    is_counter: BTreeMap::new(),
});

/// The gauge `name` with `labels`: the same one for all of this process who ask for it.
pub fn gauge(name: &str, labels: &[(&str, &str)]) -> Result<Gauge, MetricError> {
    SERIES.lock().find(name, labels, false).map(Gauge)
}

/// The counter `name` with `labels`: the same one for all of this process who ask for it.
pub fn counter(name: &str, labels: &[(&str, &str)]) -> Result<Counter, MetricError> {
    SERIES.lock().find(name, labels, true).map(Counter)
}

/// Shows a series no more, so that its room is another's. Whoever has its handle counts for nobody.
pub fn remove(name: &str, labels: &[(&str, &str)]) {
    let labels = labels
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let mut labels: Vec<(String, String)> = labels.collect();
    labels.sort();
    let key = (name.to_owned(), labels);
    SERIES.lock().values.remove(&key);
}

/// All of them as they are now.
pub(crate) fn snapshot() -> Vec<OwnSeries> {
    let series = SERIES.lock();
    let each = series
        .values
        .iter()
        .map(|((name, labels), value)| OwnSeries {
            name: name.clone(),
            labels: labels.clone(),
            is_counter: series.is_counter[name],
            value_bits: value.load(Relaxed),
        });
    each.collect()
}

impl Series {
    fn find(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        is_counter: bool,
    ) -> Result<Arc<AtomicU64>, MetricError> {
        check_name(name)?;
        if labels.len() > LABELS_MAX {
            return Err(MetricError::TooManyLabels {
                name: name.to_owned(),
                count: labels.len(),
            });
        }
        for (label, value) in labels {
            check_name(label)?;
            if RESERVED.contains(label) || value.len() > TEXT_BYTES_MAX {
                return Err(MetricError::Label {
                    name: (*label).to_owned(),
                    value: (*value).to_owned(),
                });
            }
        }
        if self
            .is_counter
            .get(name)
            .is_some_and(|known| *known != is_counter)
        {
            return Err(MetricError::Kind(name.to_owned()));
        }
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let mut labels: Vec<(String, String)> = labels.iter().map(owned).collect();
        labels.sort_unstable();
        let key = (name.to_owned(), labels);
        if let Some(known) = self.values.get(&key) {
            return Ok(Arc::clone(known));
        }
        if self.values.len() >= SERIES_MAX {
            return Err(MetricError::TooManySeries);
        }
        let value = Arc::new(AtomicU64::new(0.0_f64.to_bits()));
        self.is_counter.insert(name.to_owned(), is_counter);
        self.values.insert(key, Arc::clone(&value));
        Ok(value)
    }
}

fn check_name(name: &str) -> Result<(), MetricError> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let begins_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if begins_well && name.len() <= TEXT_BYTES_MAX && name.chars().all(is_allowed) {
        Ok(())
    } else {
        Err(MetricError::Name(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(found: &Arc<AtomicU64>) -> f64 {
        f64::from_bits(found.load(Relaxed))
    }

    #[test]
    fn who_asks_again_gets_the_same_series() {
        let mut series = Series::default();
        let a = series.find("steps", &[("model", "a"), ("part", "b")], true);
        let again = series.find("steps", &[("part", "b"), ("model", "a")], true);
        let counter = Counter(a.unwrap());
        counter.increment();
        counter.add(0.5);
        for ignored in [-3.0, f64::NAN] {
            counter.add(ignored);
        }
        assert_eq!(value(&again.unwrap()), 1.5);
        let other = series.find("steps", &[("model", "c")], true).unwrap();
        assert_eq!(value(&other), 0.0);
        let gauge = Gauge(series.find("loss", &[], false).unwrap());
        gauge.set(-2.5);
        assert_eq!(value(&gauge.0), -2.5);
    }

    #[test]
    fn what_prometheus_or_a_reader_would_choke_on_is_refused() {
        let mut series = Series::default();
        let long = "x".repeat(TEXT_BYTES_MAX + 1);
        for name in ["", "9lives", "a-b", "a b", &long, "größe"] {
            let error = series.find(name, &[], false).unwrap_err();
            assert_eq!(error, MetricError::Name(name.to_owned()));
        }
        for label in [("job", "1"), ("le", "2"), ("part", &*long)] {
            let error = series.find("ok", &[label], false).unwrap_err();
            assert!(matches!(error, MetricError::Label { .. }), "{error}");
        }
        let many = [("a", ""), ("b", ""), ("c", ""), ("d", ""), ("e", "")];
        let error = series.find("ok", &many, false).unwrap_err();
        assert!(error.to_string().contains("5 labels"), "{error}");
        series.find("ok", &[], false).unwrap();
        let error = series.find("ok", &[], true).unwrap_err();
        assert_eq!(error, MetricError::Kind("ok".to_owned()));
        for number in 1..SERIES_MAX {
            series
                .find("ok", &[("n", &number.to_string())], false)
                .unwrap();
        }
        let error = series.find("ok", &[("n", "more")], false).unwrap_err();
        assert_eq!(error, MetricError::TooManySeries);
        series
            .find("ok", &[("n", "7")], false)
            .expect("it is there already");
    }
}
