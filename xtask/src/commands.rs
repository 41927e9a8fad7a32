//! The commands themselves: `demo`, `test`, `doctor`.

use std::process::{Command, ExitCode};

use crate::install::{self, StillMissing};
use crate::requirements::Requirement;
use crate::steps::{self, Step};
use crate::workspace::{BUILD_OF_ONE, SHARED_BUILD, Workspace};
use crate::{EXIT_USAGE_OR_MISSING, progress};

/// Space a full build and its tests take, with room to spare.
const DISK_BYTES_WANTED: u64 = 12 << 30;

/// Cargo's subcommands without which `cargo xtask test` cannot run, and who brings them.
const TEST_COMPONENTS: [(&str, &str); 2] = [("fmt", "rustfmt"), ("clippy", "clippy")];

/// How much `cargo xtask test` checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TestScope {
    Full,
    /// Format, clippy, unit tests and layering: what to run between two edits.
    Quick,
}

/// Builds `mobula` and becomes `mobula demo <arguments>`.
pub(crate) fn demo(arguments: &[String]) -> ExitCode {
    if let Err(StillMissing) = install::ensure_requirements() {
        return ExitCode::from(EXIT_USAGE_OR_MISSING);
    }
    let workspace = Workspace::find();
    announce_build(&workspace);
    if let Err(code) = workspace.build(&[&BUILD_OF_ONE[..], &["mobula"]].concat()) {
        return code;
    }
    let mut mobula = Command::new(workspace.binary("mobula"));
    mobula.arg("demo").args(arguments);
    eprintln!("+ {}", steps::shown(&mobula));
    become_command(&mut mobula)
}

/// Runs every check in order; stops at the first that fails.
pub(crate) fn test(scope: TestScope) -> ExitCode {
    if let Err(StillMissing) = install::ensure_requirements() {
        return ExitCode::from(EXIT_USAGE_OR_MISSING);
    }
    let workspace = Workspace::find();
    for (subcommand, component) in TEST_COMPONENTS {
        if !workspace.has_cargo_subcommand(subcommand) {
            eprintln!(
                "missing: cargo {subcommand}\nto install:\n  rustup component add {component}"
            );
            return ExitCode::from(EXIT_USAGE_OR_MISSING);
        }
    }
    announce_build(&workspace);
    let steps = match scope {
        TestScope::Full => full_steps(&workspace),
        TestScope::Quick => quick_steps(&workspace),
    };
    if steps::run_all(steps, workspace.target()) {
        if scope == TestScope::Quick {
            eprintln!("quick: docs, process-level tests, doc tests and dependency policy not run");
        }
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Reports what this machine has and lacks; changes nothing.
pub(crate) fn doctor() -> ExitCode {
    let workspace = Workspace::find();
    let mut missing = Vec::new();
    println!("needed:");
    for requirement in Requirement::ALL {
        match requirement.find() {
            Ok(place) => println!("  ok       {requirement}: {place}"),
            Err(problem) => {
                println!(
                    "  MISSING  {requirement} ({}): {problem}",
                    requirement.reason()
                );
                missing.push(requirement);
            }
        }
    }
    let mut components_missing = false;
    for (subcommand, component) in TEST_COMPONENTS {
        if workspace.has_cargo_subcommand(subcommand) {
            println!("  ok       cargo {subcommand}");
        } else {
            println!("  MISSING  cargo {subcommand}: rustup component add {component}");
            components_missing = true;
        }
    }
    println!("used by `cargo xtask test` where it is there:");
    for (subcommand, without) in [
        ("nextest", "`cargo test` is used instead"),
        ("deny", "dependency policy is not checked"),
    ] {
        if workspace.has_cargo_subcommand(subcommand) {
            println!("  ok       cargo {subcommand}");
        } else {
            println!("  absent   cargo {subcommand}: {without}");
        }
    }
    println!("build output: {}", workspace.target().display());
    if progress::rocksdb_is_cold(workspace.target()) {
        println!("  RocksDB is not compiled there yet: 15 to 20 minutes on two cores, once");
    } else {
        println!("  RocksDB is compiled there");
    }
    if let Some(free_bytes) = free_bytes(&workspace) {
        let free_gib = free_bytes >> 30;
        let wanted_gib = DISK_BYTES_WANTED >> 30;
        let verdict = if free_bytes < DISK_BYTES_WANTED {
            "LOW"
        } else {
            "ok"
        };
        println!("  {verdict}: {free_gib} GiB free, a full build wants about {wanted_gib} GiB");
    }
    if !missing.is_empty() {
        println!("{}", install::instructions(&missing));
    }
    if missing.is_empty() && !components_missing {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_USAGE_OR_MISSING)
    }
}

fn full_steps(workspace: &Workspace) -> Vec<Step> {
    // Examples are selected although they have no docs: see `SHARED_BUILD`. Binaries are not,
    // because the docs of the binary `mobula` would overwrite those of the library `mobula`.
    let mut doc = workspace.cargo(&["doc", "--workspace", "--no-deps", "--lib", "--examples"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    vec![
        format_step(workspace),
        clippy_step(workspace),
        Step::run("docs", doc),
        // Process-level tests start the binary and the examples from the target directory.
        Step::run("build", workspace.cargo(&SHARED_BUILD)),
        Step::run("tests", test_command(workspace, &[])),
        Step::run(
            "doc tests",
            workspace.cargo(&["test", "--workspace", "--doc"]),
        ),
        if workspace.has_cargo_subcommand("deny") {
            Step::run("dependency policy", workspace.cargo(&["deny", "check"]))
        } else {
            Step::skipped("dependency policy", "cargo-deny is not installed")
        },
    ]
}

fn quick_steps(workspace: &Workspace) -> Vec<Step> {
    let units = ["--lib", "--bins", "--test", "layering"];
    vec![
        format_step(workspace),
        clippy_step(workspace),
        Step::run("unit tests", test_command(workspace, &units)),
    ]
}

fn format_step(workspace: &Workspace) -> Step {
    Step::run("format", workspace.cargo(&["fmt", "--all", "--check"]))
}

fn clippy_step(workspace: &Workspace) -> Step {
    let arguments = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    Step::run("clippy", workspace.cargo(&arguments))
}

fn test_command(workspace: &Workspace, selection: &[&str]) -> Command {
    let runner: &[&str] = if workspace.has_cargo_subcommand("nextest") {
        &["nextest", "run", "--workspace"]
    } else {
        &["test", "--workspace"]
    };
    workspace.cargo(&[runner, selection].concat())
}

fn announce_build(workspace: &Workspace) {
    eprintln!("build output: {}", workspace.target().display());
    if progress::rocksdb_is_cold(workspace.target()) {
        eprintln!(
            "first build here: RocksDB's C++ takes about 15 to 20 minutes on two cores, once; \
             later builds reuse it"
        );
    }
}

fn free_bytes(workspace: &Workspace) -> Option<u64> {
    // The directory may not exist yet; its nearest ancestor that does is on the same disk.
    let existing = workspace.target().ancestors().find(|path| path.exists())?;
    let output = Command::new("df").arg("-Pk").arg(existing).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let free_kib: u64 = text
        .lines()
        .nth(1)?
        .split_whitespace()
        .nth(3)?
        .parse()
        .ok()?;
    free_kib.checked_mul(1024)
}

/// Replaces this process, so that signals and the exit status need no passing on.
#[cfg(unix)]
fn become_command(command: &mut Command) -> ExitCode {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    eprintln!("error: cannot start {}: {error}", steps::shown(command));
    ExitCode::FAILURE
}

#[cfg(not(unix))]
fn become_command(command: &mut Command) -> ExitCode {
    match command.status() {
        Ok(status) => ExitCode::from(
            status
                .code()
                .and_then(|c| u8::try_from(c).ok())
                .unwrap_or(1),
        ),
        Err(error) => {
            eprintln!("error: cannot start {}: {error}", steps::shown(command));
            ExitCode::FAILURE
        }
    }
}
