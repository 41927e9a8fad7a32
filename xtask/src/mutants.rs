//! `cargo xtask mutants`: builds the hunt with the defects in it, and runs it.
//!
//! The defects are behind a feature that nothing else turns on, so this build shares only what is
//! below the crates that hold them; RocksDB is.

use std::process::ExitCode;

use crate::install::{self, StillMissing};
use crate::workspace::Workspace;
use crate::{EXIT_USAGE_OR_MISSING, failed, steps};

/// What is built: the one program, with the one feature. The whole workspace is selected, and an
/// example with it, because only then does cargo choose the features of the dependencies as in
/// [`crate::workspace::SHARED_BUILD`], and compiles none of them twice.
const BUILD: [&str; 8] = [
    "build",
    "--workspace",
    "--bin",
    "mobula-mutants",
    "--example",
    "counter",
    "--features",
    "mobula-chaos/mutants",
];

/// Builds and runs the hunt; `arguments` are its own.
pub(crate) fn hunt(arguments: &[String]) -> ExitCode {
    if let Err(StillMissing) = install::ensure_requirements() {
        return ExitCode::from(EXIT_USAGE_OR_MISSING);
    }
    let workspace = Workspace::find();
    if let Err(code) = workspace.build(&BUILD) {
        return code;
    }
    let mut hunt = std::process::Command::new(workspace.binary("mobula-mutants"));
    hunt.args(arguments);
    eprintln!("+ {}", steps::shown(&hunt));
    match hunt.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => failed(&error.to_string()),
    }
}
