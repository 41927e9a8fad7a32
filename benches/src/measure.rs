//! Repeating something for a while, and remembering how long each time took.

use std::future::Future;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// The longest latency that is told apart from longer ones.
const LATENCY_MAX: Duration = Duration::from_secs(60);

/// Digits that are kept of a latency: three are a thousandth, finer than any run repeats.
const DIGITS: u8 = 3;

/// How long each row of a table is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Before measuring: caches, connections, lazily made things.
    pub warm_up: Duration,
    /// Measuring.
    pub length: Duration,
}

impl Settings {
    /// The settings that the command line asks for; `None` where it asks for no measuring at all
    /// (`--list` and `--test`, with which test runners look for tests).
    #[must_use]
    pub fn from_args() -> Option<Settings> {
        Settings::parse(std::env::args().skip(1))
    }

    fn parse(args: impl Iterator<Item = String>) -> Option<Settings> {
        let mut length = Duration::from_secs(3);
        for arg in args {
            match arg.as_str() {
                "--list" | "--test" => return None,
                "--quick" => length = Duration::from_millis(300),
                // Cargo gives `--bench`; filters of other harnesses mean nothing here.
                _ => {}
            }
        }
        Some(Settings {
            warm_up: length / 10,
            length,
        })
    }
}

impl Settings {
    /// The settings of one of so many rounds.
    #[must_use]
    pub fn round_of(self, rounds: u32) -> Settings {
        Settings {
            warm_up: self.warm_up / rounds,
            length: self.length / rounds,
        }
    }
}

/// What came out of measuring one thing.
#[derive(Debug, Clone)]
pub struct Samples {
    latencies_ns: Histogram<u64>,
    elapsed: Duration,
}

impl Samples {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        let max = u64::try_from(LATENCY_MAX.as_nanos()).expect("a minute in nanoseconds fits");
        Samples {
            latencies_ns: Histogram::new_with_bounds(1, max, DIGITS)
                .expect("the bounds and digits are in the allowed range"),
            elapsed: Duration::ZERO,
        }
    }

    fn record(&mut self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latencies_ns.saturating_record(nanoseconds);
    }

    /// Takes in what another round of the same measured.
    pub fn merge(&mut self, other: &Samples) {
        self.latencies_ns += &other.latencies_ns;
        self.elapsed += other.elapsed;
    }

    /// How many times it was done.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.latencies_ns.len()
    }

    /// How many times a second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.count() as f64 / self.elapsed.as_secs_f64().max(f64::EPSILON)
    }

    /// The latency that this share of all (0 to 1) does not exceed.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Duration {
        Duration::from_nanos(self.latencies_ns.value_at_quantile(share))
    }
}

impl Default for Samples {
    fn default() -> Self {
        Samples::new()
    }
}

/// Does something again and again on this thread.
pub fn repeat(settings: Settings, mut operation: impl FnMut()) -> Samples {
    let start = Instant::now();
    while start.elapsed() < settings.warm_up {
        operation();
    }
    let mut samples = Samples::new();
    let start = Instant::now();
    // At least once, however short the time is.
    loop {
        let began = Instant::now();
        operation();
        samples.record(began.elapsed());
        if start.elapsed() >= settings.length {
            break;
        }
    }
    samples.elapsed = start.elapsed();
    samples
}

/// Does something from `callers` callers at once, each again and again, on the present task: the
/// callers wait for what they ask, they do not compute.
pub async fn repeat_async<F, Fut>(settings: Settings, callers: usize, operation: F) -> Samples
where
    F: Fn() -> Fut,
    Fut: Future<Output = ()>,
{
    let operation = &operation;
    let together = async |length: Duration| {
        let start = Instant::now();
        let caller = async || {
            let mut latencies = Samples::new();
            while start.elapsed() < length {
                let began = Instant::now();
                operation().await;
                latencies.record(began.elapsed());
            }
            latencies
        };
        let all: Vec<_> = (0..callers).map(|_| Box::pin(caller())).collect();
        let mut sum = Samples::new();
        for one in futures::future::join_all(all).await {
            sum.merge(&one);
        }
        sum.elapsed = start.elapsed();
        sum
    };
    together(settings.warm_up).await;
    together(settings.length).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_runners_are_told_nothing_and_people_choose_the_length() {
        let parse = |args: &[&str]| Settings::parse(args.iter().map(ToString::to_string));
        assert_eq!(parse(&["--list", "--format", "terse"]), None);
        let normal = parse(&["--bench"]).unwrap();
        let quick = parse(&["--bench", "--quick"]).unwrap();
        assert!(quick.length < normal.length);
    }

    #[test]
    fn every_repetition_is_counted_once() {
        let settings = Settings {
            warm_up: Duration::ZERO,
            length: Duration::from_millis(1),
        };
        let mut done = 0;
        let samples = repeat(settings, || done += 1);
        assert_eq!(samples.count(), done);
        assert!(samples.quantile(0.5) <= samples.quantile(0.99));
        let mut twice = samples.clone();
        twice.merge(&samples);
        assert_eq!(twice.count(), 2 * done);
    }
}
