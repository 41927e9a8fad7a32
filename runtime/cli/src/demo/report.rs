//! What a run of the demo showed, and how it says so while it goes on.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::output::print_table;

/// One thing that was shown, or not.
#[derive(Debug, Serialize)]
pub(super) struct Stage {
    /// What.
    stage: String,
    /// Whether it was shown.
    passed: bool,
    /// The figures.
    detail: String,
    /// How long it took, in milliseconds.
    wall_ms: u128,
}

/// All of it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    /// In order.
    stages: Vec<Stage>,
    /// A command that asks the endpoint, for a cluster that is left up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) curl: Option<String>,
}

impl Report {
    /// Notes what a stage that began at `started` showed.
    pub(super) fn note(
        &mut self,
        stage: &str,
        started: Instant,
        passed: bool,
        detail: impl Into<String>,
    ) {
        self.stages.push(Stage {
            stage: stage.to_owned(),
            passed,
            detail: detail.into(),
            wall_ms: started.elapsed().as_millis(),
        });
    }

    /// Notes something that went wrong outside the stages.
    pub(super) fn fail(&mut self, stage: &str, detail: String) {
        self.note(stage, Instant::now(), false, detail);
    }

    /// Whether everything was shown.
    pub(super) fn all_passed(&self) -> bool {
        !self.stages.is_empty() && self.stages.iter().all(|stage| stage.passed)
    }

    /// Prints the table.
    pub(super) fn print(&self) {
        let rows: Vec<Vec<String>> = self
            .stages
            .iter()
            .map(|stage| {
                vec![
                    if stage.passed { "pass" } else { "FAIL" }.to_owned(),
                    stage.stage.clone(),
                    format!("{:.1} s", stage.wall_ms as f64 / 1000.0),
                    stage.detail.clone(),
                ]
            })
            .collect();
        print_table(&["", "STAGE", "TOOK", "FIGURES"], &rows);
        println!(
            "{}",
            if self.all_passed() {
                "all stages passed"
            } else {
                "NOT all stages passed"
            }
        );
    }
}

/// A spinner or bar on a terminal, plain lines elsewhere.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    is_quiet: bool,
    started: Instant,
}

impl Progress {
    pub(super) fn start(is_quiet: bool) -> Self {
        let bar = (!is_quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new(0);
            bar.set_style(
                ProgressStyle::with_template("{spinner} [{elapsed}] {bar:30} {pos}/{len} {msg}")
                    .expect("the template above is well formed"),
            );
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Progress {
            bar,
            is_quiet,
            started: Instant::now(),
        }
    }

    /// Says what happens now.
    pub(super) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => {
                bar.println(format!(
                    "{:>6.1} s  {text}",
                    self.started.elapsed().as_secs_f64()
                ));
                bar.set_message(text.to_owned());
                bar.set_length(0);
            }
            None if self.is_quiet => {}
            None => eprintln!("{:>6.1} s  {text}", self.started.elapsed().as_secs_f64()),
        }
    }

    /// Says how far a long stage is.
    pub(super) fn at(&self, position: u64, length: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(length);
            bar.set_position(position);
        }
    }

    /// Clears the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
