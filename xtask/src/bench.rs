//! `cargo xtask bench core`, `head`, `train`, `serve` and `drift`: build a suite, run it, and keep its figures; the core
//! suite is put beside Ray, the training suite beside PyTorch, the serving suite beside a tritonserver and the drift suite
//! beside river where that is asked for.
//!
//! Ray comes from PyPI into a virtual environment under the target folder and is asked with its own
//! `ray microbenchmark`, one pattern of its `TESTS_TO_RUN` after the other, in the same run as ours.

mod drift;
mod serve;
mod train;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crate::install::{self, StillMissing};
use crate::workspace::{BUILD_OF_ONE, Workspace};
use crate::{EXIT_USAGE_OR_MISSING, failed, steps};

/// What of `ray microbenchmark` has a row of ours, as parts of its rows' names.
const PATTERNS: [&str; 8] = [
    "1:1 actor calls",
    "1:n actor calls",
    "n:n actor calls",
    "single client get calls",
    "single client put calls",
    "single client put gigabytes",
    "client tasks",
    "single client wait 1k refs",
];

pub(crate) use drift::drift;
pub(crate) use serve::serve;
pub(crate) use train::train;

/// How Ray names the rows that go through its client's server, which ours have no part in.
const THROUGH_CLIENT: &str = "client: ";

/// What is built besides, for suites that start clusters.
const CLUSTER: [&str; 2] = ["--bin", "mobula"];

/// This repository's own code is measured as a release would have it; dependencies stay as they
/// are, so that RocksDB is not compiled once more.
const OPTIMIZED: &str = "profile.dev.opt-level=3";

/// The packages whose code is measured. With debug assertions each unaligned load of a vector checks its pointers
/// and goes through the stack.
const MEASURED: [&str; 12] = [
    "mobula",
    "mobula-actors",
    "mobula-benches",
    "mobula-cli",
    "mobula-core",
    "mobula-head",
    "mobula-host",
    "mobula-net",
    "mobula-scheduler",
    "mobula-storage",
    "mobula-wire",
    "mobula-worker",
];

/// How cargo is told that.
fn as_released() -> Vec<String> {
    let unchecked = MEASURED.iter().flat_map(|package| {
        ["debug-assertions", "overflow-checks"]
            .map(|check| format!("profile.dev.package.{package}.{check}=false"))
    });
    std::iter::once(OPTIMIZED.to_owned())
        .chain(unchecked)
        .flat_map(|config| ["--config".to_owned(), config])
        .collect()
}

/// A rate by its name.
#[derive(Debug, Clone, PartialEq)]
struct Rate {
    name: String,
    per_second: f64,
}

/// Runs the core suite; `arguments` may hold `--peers`, everything else is the suite's own.
pub(crate) fn core(arguments: &[String]) -> ExitCode {
    let peers = arguments.iter().any(|argument| argument == "--peers");
    let own: Vec<&String> = arguments.iter().filter(|arg| *arg != "--peers").collect();
    let measured = match run_suite("core", &CLUSTER, &own, our_rate) {
        Ok(measured) => measured,
        Err(code) => return code,
    };
    if !peers {
        return ExitCode::SUCCESS;
    }
    match ray(&measured.workspace) {
        Ok((version, theirs)) => {
            let table = compared(&measured.rates, &theirs, &format!("{version} names"), "ray");
            println!("\n{table}");
            let path = measured
                .results
                .join(format!("core-peers-{}.md", measured.date));
            match std::fs::write(&path, table) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => failed(&format!("{}: {error}", path.display())),
            }
        }
        Err(reason) => failed(&reason),
    }
}

/// Runs the head suite; `arguments` are its own.
pub(crate) fn head(arguments: &[String]) -> ExitCode {
    let own: Vec<&String> = arguments.iter().collect();
    match run_suite("head", &CLUSTER, &own, our_rate) {
        Ok(_) => ExitCode::SUCCESS,
        Err(code) => code,
    }
}

/// A suite that has run.
struct Measured<T> {
    workspace: Workspace,
    /// Where figures are kept.
    results: PathBuf,
    date: String,
    rates: Vec<T>,
}

/// Builds the program `mobula-bench-<suite>` and what it starts, runs it, and reads its rows.
fn run_suite<T>(
    suite: &str,
    starts: &[&str],
    own: &[&String],
    parse: fn(&str) -> Option<T>,
) -> Result<Measured<T>, ExitCode> {
    if let Err(StillMissing) = install::ensure_requirements() {
        return Err(ExitCode::from(EXIT_USAGE_OR_MISSING));
    }
    let workspace = Workspace::find();
    let program = format!("mobula-bench-{suite}");
    let as_released = as_released();
    let as_released: Vec<&str> = as_released.iter().map(String::as_str).collect();
    let arguments = [
        &BUILD_OF_ONE[..],
        &[program.as_str()],
        starts,
        &as_released[..],
    ]
    .concat();
    workspace.build(&arguments)?;
    let results = workspace.root().join("benches/results");
    if let Err(error) = std::fs::create_dir_all(&results) {
        return Err(failed(&format!("{}: {error}", results.display())));
    }
    let date = today();
    let mut command = Command::new(workspace.binary(&program));
    command
        .env_remove("MOBULA_CLUSTER")
        .arg("--output")
        .arg(results.join(format!("{suite}-{date}.json")))
        .args(own);
    let (rates, end) = rates_of(&mut command, parse);
    end.map_err(|reason| failed(&reason))?;
    Ok(Measured {
        workspace,
        results,
        date,
        rates,
    })
}

/// The day in UTC, for the names of files.
fn today() -> String {
    let output = Command::new("date").args(["-u", "+%F"]).output();
    output
        .ok()
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .map_or_else(|| "undated".to_owned(), |text| text.trim().to_owned())
}

/// Runs a command, shows its output as it comes, picks the rates out of it, and says how it ended.
fn rates_of<T>(
    command: &mut Command,
    parse: fn(&str) -> Option<T>,
) -> (Vec<T>, Result<(), String>) {
    eprintln!("+ {}", steps::shown(command));
    let mut rates = Vec::new();
    let mut child = match command.stdout(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) => {
            let reason = format!("cannot start {}: {error}", steps::shown(command));
            return (rates, Err(reason));
        }
    };
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            println!("{line}");
            rates.extend(parse(&line));
        }
    }
    let end = match child.wait() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{} ended with {status}", steps::shown(command))),
        Err(error) => Err(error.to_string()),
    };
    (rates, end)
}

/// `1:1 actor calls sync        23456.7 /s  ± 12.3`
fn our_rate(line: &str) -> Option<Rate> {
    let (before, _) = line.split_once(" /s")?;
    let (name, number) = before.trim_end().rsplit_once(' ')?;
    Some(Rate {
        name: name.trim().to_owned(),
        per_second: number.parse().ok()?,
    })
}

/// `1:1 actor calls sync per second 804.12 +- 3.4`
fn rays_rate(line: &str) -> Option<Rate> {
    let (name, rest) = line.split_once(" per second ")?;
    let number = rest.split_whitespace().next()?;
    Some(Rate {
        name: name.trim().to_owned(),
        per_second: number.parse().ok()?,
    })
}

/// The Python of the virtual environment at `environment`, with `packages`, which are installed
/// from PyPI where they are missing; what is there already costs a second.
fn python_with(environment: &Path, packages: &[&str]) -> Result<PathBuf, String> {
    let python = environment.join("bin/python");
    if !python.exists() {
        run(Command::new("python3")
            .args(["-m", "venv"])
            .arg(environment))?;
    }
    // Not its `pip`, whose first line names the place where the environment was made, which a
    // target folder that was moved is not.
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet"])
        .args(packages))?;
    Ok(python)
}

/// Ray's version and rates.
fn ray(workspace: &Workspace) -> Result<(String, Vec<Rate>), String> {
    let environment = workspace.target().join("peers/ray");
    let program = |name: &str| -> PathBuf { environment.join("bin").join(name) };
    // Its microbenchmark imports Ray's client and numpy, which plain `ray` does not bring.
    python_with(&environment, &["ray[client]", "numpy"])?;
    let version = Command::new(program("ray"))
        .arg("--version")
        .output()
        .map_err(|error| error.to_string())?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    let mut rates = Vec::new();
    for pattern in PATTERNS {
        let mut command = Command::new(program("ray"));
        command
            .arg("microbenchmark")
            .env("TESTS_TO_RUN", pattern)
            .env("TESTS_TO_SKIP", THROUGH_CLIENT)
            .current_dir(workspace.target());
        let (measured, end) = rates_of(&mut command, rays_rate);
        // It also starts its client's server, for rows that are skipped; where that fails, what came
        // before is as good.
        match (measured.is_empty(), end) {
            (true, Err(reason)) => return Err(reason),
            (false, Err(reason)) => eprintln!("after its rows: {reason}"),
            (_, Ok(())) => {}
        }
        rates.extend(measured);
    }
    Ok((version, rates))
}

fn run(command: &mut Command) -> Result<(), String> {
    eprintln!("+ {}", steps::shown(command));
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{} ended with {status}", steps::shown(command))),
        Err(error) => Err(format!("cannot start {}: {error}", steps::shown(command))),
    }
}

/// Rows that both have, in our order, under `title`.
fn compared(ours: &[Rate], theirs: &[Rate], title: &str, peer: &str) -> String {
    let mut table = format!("| {title} | mobula, per second | {peer}, per second | ratio |\n");
    table.push_str("|---|---|---|---|\n");
    for Rate { name, per_second } in ours {
        let Some(peer) = theirs.iter().find(|peer| peer.name == *name) else {
            continue;
        };
        let ratio = per_second / peer.per_second.max(f64::MIN_POSITIVE);
        // Writing to a string does not fail.
        let _ = writeln!(
            table,
            "| {name} | {per_second:.0} | {:.0} | {} |",
            peer.per_second,
            times(ratio)
        );
    }
    table
}

/// `150×`, and `2.4×` where a digit more says something.
fn times(ratio: f64) -> String {
    match ratio < 10.0 {
        true => format!("{ratio:.1}×"),
        false => format!("{ratio:.0}×"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(name: &str, per_second: f64) -> Rate {
        Rate {
            name: name.into(),
            per_second,
        }
    }

    #[test]
    fn rates_are_read_out_of_both_programs_words() {
        let ours = "1:1 actor calls sync                              23456.7 /s  ± 12.3";
        assert_eq!(our_rate(ours), Some(rate("1:1 actor calls sync", 23456.7)));
        assert_eq!(our_rate("limit: memcpy     9.81 GB/s"), None);
        let theirs = "1:1 actor calls sync per second 804.12 +- 3.4";
        assert_eq!(
            rays_rate(theirs),
            Some(rate("1:1 actor calls sync", 804.12))
        );
        assert_eq!(rays_rate("2026-11-21 INFO worker.py:1942 -- Started"), None);
    }

    #[test]
    fn only_what_both_measured_is_compared() {
        let ours = [rate("a", 300.0), rate("b", 5.0)];
        let table = compared(&ours, &[rate("a", 2.0), rate("c", 1.0)], "ray 2", "ray");
        assert!(table.ends_with("| a | 300 | 2 | 150× |\n"), "{table}");
        assert_eq!((times(2.44), times(0.5)), ("2.4×".into(), "0.5×".into()));
        assert!(!table.contains("| b |"));
    }
}
