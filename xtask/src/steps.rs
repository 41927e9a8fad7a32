//! A row of steps, each with a heading and its time, that stops at the first failure and ends in a
//! table.

use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use crate::progress;

/// One thing to do.
#[derive(Debug)]
pub(crate) struct Step {
    name: &'static str,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Run(Command),
    Skip { why: &'static str },
}

impl Step {
    pub(crate) fn run(name: &'static str, command: Command) -> Self {
        let work = Work::Run(command);
        Self { name, work }
    }

    /// A step that this machine cannot do, kept in the table so that nobody takes it for done.
    pub(crate) fn skipped(name: &'static str, why: &'static str) -> Self {
        let work = Work::Skip { why };
        Self { name, work }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Passed(Duration),
    Failed(Duration),
    Skipped(&'static str),
    NotRun,
}

/// Does the steps in order; true if none failed. The table is printed in any case.
pub(crate) fn run_all(steps: Vec<Step>, target: &Path) -> bool {
    let start = Instant::now();
    let mut outcomes: Vec<(&'static str, Outcome)> = Vec::new();
    let mut all_well = true;
    for step in steps {
        let outcome = match step.work {
            _ if !all_well => Outcome::NotRun,
            Work::Skip { why } => {
                eprintln!("\n=== {}: skipped, {why}", step.name);
                Outcome::Skipped(why)
            }
            Work::Run(mut command) => run_one(step.name, &mut command, target),
        };
        all_well &= !matches!(outcome, Outcome::Failed(_));
        outcomes.push((step.name, outcome));
    }
    eprintln!("\n{}", table(&outcomes, start.elapsed()));
    all_well
}

fn run_one(name: &str, command: &mut Command, target: &Path) -> Outcome {
    eprintln!("\n=== {name}: {}", shown(command));
    let start = Instant::now();
    let result = progress::run(command, target);
    let took = start.elapsed();
    if let Some(problem) = problem(&result) {
        eprintln!(
            "=== {name} failed after {}: {problem}",
            minutes_seconds(took)
        );
        eprintln!("    to repeat only this: {}", shown(command));
        return Outcome::Failed(took);
    }
    eprintln!("=== {name}: passed in {}", minutes_seconds(took));
    Outcome::Passed(took)
}

fn problem(result: &io::Result<ExitStatus>) -> Option<String> {
    match result {
        Ok(status) if status.success() => None,
        Ok(status) => Some(status.to_string()),
        Err(error) => Some(format!("cannot start: {error}")),
    }
}

fn table(outcomes: &[(&str, Outcome)], total: Duration) -> String {
    let width = outcomes
        .iter()
        .map(|(name, _)| name.len())
        .chain(["total".len()])
        .max()
        .unwrap_or_default();
    let mut lines: Vec<String> = outcomes
        .iter()
        .map(|(name, outcome)| {
            let (result, time) = match outcome {
                Outcome::Passed(took) => ("pass", minutes_seconds(*took)),
                Outcome::Failed(took) => ("FAIL", minutes_seconds(*took)),
                Outcome::Skipped(why) => ("skip", (*why).to_owned()),
                Outcome::NotRun => ("-", "not run".to_owned()),
            };
            format!("{name:width$}  {result:4}  {time}")
        })
        .collect();
    lines.push(format!(
        "{:width$}  {:4}  {}",
        "total",
        "",
        minutes_seconds(total)
    ));
    lines.join("\n")
}

/// A command as a person would type it, with the variables it adds.
pub(crate) fn shown(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        let (name, value) = (name.to_str()?, value?.to_str()?);
        let quoted = quote_where_needed(value);
        // Where the output goes is said once, at the start.
        (name != "CARGO_TARGET_DIR").then(|| format!("{name}={quoted}"))
    });
    // Cargo names itself by its full path; "cargo" is what a person types.
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program());
    let name = name.to_string_lossy().into_owned();
    let arguments = command
        .get_args()
        .map(|argument| quote_where_needed(&argument.to_string_lossy()));
    variables
        .chain([name])
        .chain(arguments)
        .collect::<Vec<_>>()
        .join(" ")
}

fn quote_where_needed(text: &str) -> String {
    if text.contains(char::is_whitespace) {
        format!("'{text}'")
    } else {
        text.to_owned()
    }
}

/// `75 s` as `1:15`.
pub(crate) fn minutes_seconds(duration: Duration) -> String {
    let seconds = duration.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn stops_at_the_first_failure() {
        let marker = std::env::temp_dir().join(format!("mobula-step-{}", std::process::id()));
        let touch = format!("touch {}", marker.display());
        let steps = vec![
            Step::run("first", sh("exit 0")),
            Step::skipped("second", "its tool is not installed"),
            Step::run("third", sh("exit 3")),
            Step::run("fourth", sh(&touch)),
        ];
        assert!(!run_all(steps, &std::env::temp_dir()));
        assert!(!marker.exists(), "a step ran after one had failed");
    }

    #[test]
    fn a_skipped_step_is_no_failure() {
        let steps = vec![Step::skipped("only", "no tool"), Step::run("then", sh(":"))];
        assert!(run_all(steps, &std::env::temp_dir()));
    }

    #[test]
    fn the_table_tells_each_outcome() {
        let outcomes = [
            ("format", Outcome::Passed(Duration::from_secs(2))),
            ("clippy", Outcome::Failed(Duration::from_secs(75))),
            ("policy", Outcome::Skipped("cargo-deny is not installed")),
            ("tests", Outcome::NotRun),
        ];
        let expected = "\
format  pass  0:02
clippy  FAIL  1:15
policy  skip  cargo-deny is not installed
tests   -     not run
total         1:17";
        assert_eq!(table(&outcomes, Duration::from_secs(77)), expected);
    }

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("/opt/rust/bin/cargo");
        command.args(["doc", "--no-deps"]);
        command
            .env("RUSTDOCFLAGS", "-D warnings")
            .env("CARGO_TARGET_DIR", "/cache");
        assert_eq!(
            shown(&command),
            "RUSTDOCFLAGS='-D warnings' cargo doc --no-deps"
        );
    }
}
