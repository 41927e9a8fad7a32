//! The table that a bench prints.

use std::fmt::{self, Write};
use std::time::Duration;

use crate::measure::Samples;

/// One line of the table.
#[derive(Debug, Clone)]
struct Row {
    name: String,
    samples: Samples,
    /// Another figure, in its own unit.
    note: String,
}

/// What one bench measured.
#[derive(Debug, Clone)]
pub struct Report {
    title: String,
    rows: Vec<Row>,
}

impl Report {
    /// A table without lines; its title says how the program was built.
    #[must_use]
    pub fn new(title: &str) -> Self {
        let built = if cfg!(debug_assertions) {
            "with debug assertions: slower than a release"
        } else {
            "without debug assertions"
        };
        Report {
            title: format!("{title} ({built})"),
            rows: Vec::new(),
        }
    }

    /// Adds a line.
    pub fn add(&mut self, name: impl Into<String>, samples: Samples) {
        self.add_with(name, samples, "");
    }

    /// Adds a line with another figure.
    pub fn add_with(&mut self, name: impl Into<String>, samples: Samples, note: impl Into<String>) {
        self.rows.push(Row {
            name: name.into(),
            samples,
            note: note.into(),
        });
    }

    /// Prints the table.
    pub fn print(&self) {
        println!("{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.chars().count()).max();
        let width = width.unwrap_or(0);
        writeln!(f, "\n{}", self.title)?;
        let heading = ["per second", "p50", "p99", "p99.9"];
        write!(f, "  {:<width$}", "")?;
        for name in heading {
            write!(f, "  {name:>10}")?;
        }
        for row in &self.rows {
            let mut line = format!("  {:<width$}", row.name);
            write!(line, "  {:>10}", per_second(row.samples.per_second()))?;
            for share in [0.5, 0.99, 0.999] {
                write!(line, "  {:>10}", latency(row.samples.quantile(share)))?;
            }
            write!(f, "\n{line}  {}", row.note)?;
        }
        Ok(())
    }
}

/// A rate with about four digits.
fn per_second(rate: f64) -> String {
    if rate >= 100.0 {
        format!("{rate:.0}")
    } else {
        format!("{rate:.1}")
    }
}

/// A latency in the unit in which it has one to three digits before the point.
fn latency(latency: Duration) -> String {
    let microseconds = latency.as_secs_f64() * 1e6;
    if microseconds < 1e3 {
        format!("{microseconds:.1} µs")
    } else if microseconds < 1e6 {
        format!("{:.2} ms", microseconds / 1e3)
    } else {
        format!("{:.2} s", microseconds / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Settings, repeat};

    #[test]
    fn figures_are_shown_in_units_that_people_read() {
        assert_eq!(latency(Duration::from_nanos(1_500)), "1.5 µs");
        assert_eq!(latency(Duration::from_micros(2_346)), "2.35 ms");
        assert_eq!(latency(Duration::from_millis(2_346)), "2.35 s");
        assert_eq!(per_second(12.34), "12.3");
        assert_eq!(per_second(12_345.6), "12346");
    }

    #[test]
    fn a_table_names_each_row() {
        let settings = Settings {
            warm_up: Duration::ZERO,
            length: Duration::ZERO,
        };
        let mut report = Report::new("things");
        report.add("ours", repeat(settings, || ()));
        report.add_with("limit: the machine's", repeat(settings, || ()), "7 GB/s");
        let text = report.to_string();
        assert!(text.contains("\n  ours  "), "{text}");
        assert!(text.ends_with("7 GB/s"), "{text}");
    }
}
