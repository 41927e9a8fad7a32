//! The drift suite: detectors number by number, and windows of rows against a reference.
//!
//! `cargo xtask bench drift` builds and starts it; with `--peers`, `peers.py` gives the same streams to river's detectors. See
//! `benches/README.md`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use mobula_actors::drift::sketches::Population;
use mobula_actors::drift::streams::{Adwin, Change, HddmA, HddmW, PageHinkley};
use mobula_actors::drift::{MonitorConfig, Reference, WindowMonitor};
use mobula_benches::results::Results;

/// What a part may end with.
type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Numbers that a detector is given between two looks at the clock.
const CHUNK: usize = 100_000;

/// Features of a row.
const FEATURES: usize = 50;

/// Rows of the reference, as many as a version's file has.
const REFERENCE_ROWS: usize = 1_000;

/// Rows of the larger data set, of which the reference is a sample and sketches.
const SKETCHED_ROWS: usize = 100_000;

/// Rows that are made once and given again and again.
const ROWS_MADE: usize = 20_000;

/// How much is measured, and where the figures go.
struct Options {
    /// For each detector.
    length: Duration,
    /// For each size of window.
    rows: usize,
    output: Option<PathBuf>,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            length: Duration::from_secs(3),
            rows: 1_000_000,
            output: None,
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--quick" => {
                    options.length = Duration::from_millis(300);
                    options.rows = 100_000;
                }
                "--output" => {
                    let path = args.next().ok_or("`--output` needs a value")?;
                    options.output = Some(path.into());
                }
                unknown => {
                    return Err(format!(
                        "unknown argument `{unknown}`: there are --quick and --output FILE"
                    ));
                }
            }
        }
        Ok(options)
    }
}

/// The stream that `peers.py` makes as well.
struct Lcg(u64);

impl Lcg {
    fn next_unit(&mut self) -> f64 {
        self.0 = (1_103_515_245 * self.0 + 12_345) % (1 << 31);
        self.0 as f64 / (1u64 << 31) as f64
    }
}

fn detector(
    name: &str,
    stream: &[f64],
    length: Duration,
    results: &mut Results,
    mut update: impl FnMut(f64) -> Option<Change>,
) {
    let mut count = 0u64;
    let began = Instant::now();
    while began.elapsed() < length {
        for value in stream {
            std::hint::black_box(update(*value));
        }
        count += stream.len() as u64;
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    results.figure(name, rate, "/s");
}

fn detectors(options: &Options, results: &mut Results) {
    let mut random = Lcg(12_345);
    let values: Vec<f64> = (0..CHUNK).map(|_| random.next_unit()).collect();
    let errors: Vec<f64> = values
        .iter()
        .map(|value| f64::from(u8::from(*value < 0.1)))
        .collect();
    let (mut adwin, mut page_hinkley) = (Adwin::new(), PageHinkley::new());
    let (mut hddm_a, mut hddm_w) = (HddmA::new(), HddmW::new());
    let length = options.length;
    detector("ADWIN, uniform numbers", &values, length, results, |x| {
        adwin.update(x)
    });
    detector(
        "Page-Hinkley, uniform numbers",
        &values,
        length,
        results,
        |x| page_hinkley.update(x),
    );
    detector("HDDM_A, errors at 10 %", &errors, length, results, |x| {
        hddm_a.update(x)
    });
    detector("HDDM_W, errors at 10 %", &errors, length, results, |x| {
        hddm_w.update(x)
    });
}

fn windows(options: &Options, results: &mut Results) -> Outcome {
    let mut random = Lcg(7);
    let mut rows = |count: usize| -> Vec<f32> {
        (0..count * FEATURES)
            .map(|_| random.next_unit() as f32)
            .collect()
    };
    let (reference, made) = (rows(REFERENCE_ROWS), rows(ROWS_MADE));
    let names = (0..FEATURES)
        .map(|index| format!("feature_{index}"))
        .collect();
    let classes: Vec<u32> = (0..REFERENCE_ROWS as u32).map(|row| row % 10).collect();
    let sample = Reference::new(names, &reference, &classes)?;
    let began = Instant::now();
    let mut population = Population::new(&[0.5; FEATURES], 7, 0);
    let all = made.chunks_exact(FEATURES).cycle().take(SKETCHED_ROWS);
    all.for_each(|row| population.add_rows(row));
    let seconds = began.elapsed().as_secs_f64();
    let name = format!("sketches of {SKETCHED_ROWS} rows of {FEATURES} features");
    results.figure(&name, seconds, "s");
    let sketched = sample.clone().with_population(population)?;
    for (kind, reference) in [("", &sample), (", sketched reference", &sketched)] {
        for window in [200, 1_000, 10_000] {
            let config = MonitorConfig::with_window_size(window);
            let monitor = WindowMonitor::new(reference.clone(), config)?;
            let name = format!("windows of {window}{kind}");
            watch(monitor, &made, &name, options, results)?;
        }
    }
    Ok(())
}

/// Gives a monitor rows that never drift.
fn watch(
    mut monitor: WindowMonitor,
    made: &[f32],
    name: &str,
    options: &Options,
    results: &mut Results,
) -> Outcome {
    let began = Instant::now();
    let given = made.chunks_exact(FEATURES).cycle().take(options.rows);
    for (number, row) in (0u32..).zip(given) {
        if let Some(report) = monitor.observe(row, number % 10)?
            && report.dataset_drift
        {
            return Err(format!("window {} drifts", report.window_index).into());
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let total = format!("{} rows of {FEATURES} features, {name}", options.rows);
    results.figure(&total, seconds, "s");
    let rate = format!("rows of {FEATURES} features, {name}");
    results.figure(&rate, options.rows as f64 / seconds, "/s");
    Ok(())
}

fn main() -> Outcome {
    let options = Options::parse(std::env::args().skip(1))?;
    let mut results = Results::begin("drift");
    detectors(&options, &mut results);
    windows(&options, &mut results)?;
    if let Some(path) = &options.output {
        results.save(path)?;
        println!("written to {}", path.display());
    }
    Ok(())
}
