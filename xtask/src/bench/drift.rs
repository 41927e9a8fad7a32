//! `cargo xtask bench drift`: the drift suite, with river's detectors beside it where that is asked for.

use std::process::{Command, ExitCode};

use super::{compared, failed, our_rate, python_with, rates_of, run_suite};

/// The peer's program, from the root of the checkout.
const PEER: &str = "benches/src/drift_suite/peers.py";

/// The peer, whose detectors have the same parameters.
const RIVER: &str = "river==0.26.1";

/// Runs the drift suite; `arguments` may hold `--peers`, everything else is the suite's own.
pub(crate) fn drift(arguments: &[String]) -> ExitCode {
    let own: Vec<&String> = arguments.iter().filter(|arg| *arg != "--peers").collect();
    let measured = match run_suite("drift", &[], &own, our_rate) {
        Ok(measured) => measured,
        Err(code) => return code,
    };
    if own.len() == arguments.len() {
        return ExitCode::SUCCESS;
    }
    let workspace = &measured.workspace;
    let python = match python_with(&workspace.target().join("peers/river"), &[RIVER]) {
        Ok(python) => python,
        Err(reason) => return failed(&reason),
    };
    let mut command = Command::new(python);
    command.arg(workspace.root().join(PEER));
    if arguments.iter().any(|argument| argument == "--quick") {
        command.arg("--quick");
    }
    let (theirs, end) = rates_of(&mut command, our_rate);
    if let Err(reason) = end {
        return failed(&reason);
    }
    let table = compared(&measured.rates, &theirs, "the drift suite", "river");
    println!("\n{table}");
    let path = measured
        .results
        .join(format!("drift-peers-{}.md", measured.date));
    match std::fs::write(&path, table) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&format!("{}: {error}", path.display())),
    }
}
