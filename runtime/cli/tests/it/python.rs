//! Peers that are Python packages: environments with them, where PyPI can be reached.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long an environment may take to be made: some hundred MB come from PyPI.
const MADE_WITHIN: Duration = Duration::from_secs(180);

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
    let said = tempfile::NamedTempFile::new().unwrap();
    let [out, err] = [(); 2].map(|()| said.as_file().try_clone().unwrap());
    let command = command.stdin(Stdio::null()).stdout(out).stderr(err);
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let ended = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status.success(),
            Ok(None) if begun.elapsed() < MADE_WITHIN => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(None) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{command:?} did not end within {MADE_WITHIN:?}"));
            }
        }
    };
    match ended {
        true => Ok(()),
        false => Err(std::fs::read_to_string(said.path()).unwrap_or_default()),
    }
}
