//! Where the checkout and its build output are, and how cargo is called.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::{failed, progress, steps};

/// How every building command selects packages.
///
/// Cargo unifies features over the selected packages, and counts dev-dependencies only when
/// examples or tests are selected. `cargo build -p mobula-cli` would therefore compile rustls,
/// quinn, tonic and all that rests on them a second time. Selecting the whole workspace with its
/// examples gives the same features as `cargo test --workspace` and `cargo clippy --all-targets`.
pub(crate) const SHARED_BUILD: [&str; 4] = ["build", "--workspace", "--bins", "--examples"];

/// The same features for one program: a single example stands for all of them, and nothing else is linked.
pub(crate) const BUILD_OF_ONE: [&str; 5] =
    ["build", "--workspace", "--example", "counter", "--bin"];

/// The checkout that this binary was built from, and where its build output goes.
#[derive(Debug, Clone)]
pub(crate) struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// Finds the checkout and decides on the target directory.
    pub(crate) fn find() -> Self {
        let xtask = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = xtask.parent().map_or(xtask.clone(), Path::to_path_buf);
        let target = target_directory(
            env::var_os("CARGO_TARGET_DIR").map(PathBuf::from),
            env::var_os("HOME").map(PathBuf::from),
            &root,
        );
        // A relative CARGO_TARGET_DIR means relative to where the user stands, as in cargo itself;
        // cargo is run from the root here, so it is made absolute first.
        let target = std::path::absolute(&target).unwrap_or(target);
        Self { root, target }
    }

    /// The checkout.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where build output goes.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Where a binary of the dev profile lies once built.
    pub(crate) fn binary(&self, name: &str) -> PathBuf {
        let file = format!("{name}{}", env::consts::EXE_SUFFIX);
        self.target.join("debug").join(file)
    }

    /// Runs a build to its end; what to exit with if it failed.
    pub(crate) fn build(&self, arguments: &[&str]) -> Result<(), ExitCode> {
        let mut build = self.cargo(arguments);
        eprintln!("+ {}", steps::shown(&build));
        match progress::run(&mut build, &self.target) {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(failed(&format!(
                "the build failed ({status}); cargo's message is above"
            ))),
            Err(error) => Err(failed(&format!("cannot start cargo: {error}"))),
        }
    }

    /// A cargo command that runs in the root of the checkout with the shared target directory.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Command {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(arguments).current_dir(&self.root);
        command.env("CARGO_TARGET_DIR", &self.target);
        // `cargo run` describes this package in the environment. Build scripts that watch these
        // variables (ring's does) would see a change against a plain `cargo build`, and rebuild.
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(describes_this_package) {
                command.env_remove(&name);
            }
        }
        command
    }

    /// Whether a cargo subcommand or component can be started at all.
    pub(crate) fn has_cargo_subcommand(&self, name: &str) -> bool {
        self.cargo(&[name, "--version"])
            .output()
            .is_ok_and(|output| output.status.success())
    }
}

fn target_directory(set: Option<PathBuf>, home: Option<PathBuf>, root: &Path) -> PathBuf {
    if let Some(set) = set.filter(|path| !path.as_os_str().is_empty()) {
        return set;
    }
    match home.filter(|path| path.is_absolute()) {
        Some(home) => home.join(".cache/mobula/target"),
        None => root.join("target"),
    }
}

fn describes_this_package(variable: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"]
        .iter()
        .any(|prefix| variable.starts_with(prefix))
        || matches!(
            variable,
            "CARGO_CRATE_NAME" | "CARGO_PRIMARY_PACKAGE" | "OUT_DIR"
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_directory_prefers_what_is_set() {
        let root = Path::new("/checkout");
        let home = || Some(PathBuf::from("/home/ada"));
        let shared = PathBuf::from("/home/ada/.cache/mobula/target");
        for (set, home, expected) in [
            (Some("/elsewhere"), home(), PathBuf::from("/elsewhere")),
            (None, home(), shared.clone()),
            (Some(""), home(), shared),
            (None, None, PathBuf::from("/checkout/target")),
            (None, Some("".into()), PathBuf::from("/checkout/target")),
        ] {
            assert_eq!(
                target_directory(set.map(PathBuf::from), home, root),
                expected
            );
        }
    }

    #[test]
    fn only_variables_of_this_package_are_hidden_from_cargo() {
        for hidden in ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR", "CARGO_CRATE_NAME"] {
            assert!(describes_this_package(hidden), "{hidden}");
        }
        for kept in ["CARGO_TARGET_DIR", "CARGO_HOME", "CARGO_BUILD_JOBS", "PATH"] {
            assert!(!describes_this_package(kept), "{kept}");
        }
    }
}
