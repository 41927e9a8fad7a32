//! Peers that are Python packages: environments with them, where PyPI can be reached.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::text_of;

/// The Python of an environment with `packages` from PyPI; `None`, and a line that says so, where they cannot be had.
/// An environment that is there already is used as it is.
pub(crate) fn python_with(name: &str, packages: &[&str]) -> Option<PathBuf> {
    let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let python = environment.join("bin/python");
    let made = || -> Result<(), String> {
        if !python.exists() {
            let make = ["-m", "venv"];
            run(Command::new("python3").args(make).arg(&environment))?;
        }
        // Not its `pip`, whose first line names the place where the environment was made.
        let install = ["-m", "pip", "install", "--quiet", "--retries", "1"];
        run(Command::new(&python).args(install).args(packages))
    };
    match made() {
        Ok(()) => Some(python),
        Err(reason) => {
            eprintln!("skipped: {} cannot be had from PyPI: {reason}", packages[0]);
            None
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(text_of(&output)),
        Err(error) => Err(error.to_string()),
    }
}
