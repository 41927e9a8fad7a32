//! `cargo xtask bench train`: the training suite, with PyTorch beside it where that is asked for.
//!
//! The suite leaves its first weights, its data and its losses in a folder; `peers.py` reads them, so that both
//! train the same network, and fails where the losses part.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::{failed, python_with, rates_of, run_suite};
use crate::workspace::Workspace;

/// The peer's program, from the root of the checkout.
const PEER: &str = "benches/src/train_suite/peers.py";

/// A row of the suite or of its peer.
#[derive(Debug, Clone, PartialEq)]
struct Figure {
    name: String,
    value: f64,
    unit: String,
}

/// Runs the training suite; `arguments` may hold `--peers`, everything else is the suite's own.
pub(crate) fn train(arguments: &[String]) -> ExitCode {
    let peers = arguments.iter().any(|argument| argument == "--peers");
    let mut own: Vec<&String> = arguments.iter().filter(|arg| *arg != "--peers").collect();
    let exchange = Workspace::find().target().join("peers/train-exchange");
    let folder = ["--exchange".to_owned(), exchange.display().to_string()];
    if peers {
        // What an earlier run left may be of another build.
        if exchange.exists()
            && let Err(error) = std::fs::remove_dir_all(&exchange)
        {
            return failed(&format!("{}: {error}", exchange.display()));
        }
        if let Err(error) = std::fs::create_dir_all(&exchange) {
            return failed(&format!("{}: {error}", exchange.display()));
        }
        own.extend(&folder);
    }
    let measured = match run_suite("train", &[], &own, figure) {
        Ok(measured) => measured,
        Err(code) => return code,
    };
    if !peers {
        return ExitCode::SUCCESS;
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let (theirs, end) = match torch(&measured.workspace, &exchange, quick) {
        Ok(ran) => ran,
        Err(reason) => return failed(&reason),
    };
    let table = compared(&measured.rates, &theirs);
    println!("\n{table}");
    let path = measured
        .results
        .join(format!("train-peers-{}.md", measured.date));
    if let Err(error) = std::fs::write(&path, table) {
        return failed(&format!("{}: {error}", path.display()));
    }
    match end {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => failed(&reason),
    }
}

/// PyTorch's rows, and how its program ended: an error where losses part.
fn torch(
    workspace: &Workspace,
    exchange: &Path,
    quick: bool,
) -> Result<(Vec<Figure>, Result<(), String>), String> {
    let environment = workspace.target().join("peers/torch");
    // PyPI has PyTorch for Linux with CUDA only, and it does not load without CUDA's libraries.
    let python = python_with(&environment, &["torch", "numpy"])?;
    let mut command = Command::new(python);
    command.arg(workspace.root().join(PEER)).arg(exchange);
    if quick {
        command.arg("--quick");
    }
    Ok(rates_of(&mut command, figure))
}

/// `product 512x512x512 NN, 1 thread(s)          123.4 GFLOP/s  more`
fn figure(line: &str) -> Option<Figure> {
    let (name, rest) = line.split_once("  ")?;
    let mut words = rest.split_whitespace();
    let value = words.next()?.parse().ok()?;
    Some(Figure {
        name: name.to_owned(),
        value,
        unit: words.next()?.to_owned(),
    })
}

/// Rows that both have, in our order, with how many times as fast ours is.
fn compared(ours: &[Figure], theirs: &[Figure]) -> String {
    let mut table = String::from("| | mobula | PyTorch | as fast |\n|---|---|---|---|\n");
    for Figure { name, value, unit } in ours {
        let same = |peer: &&Figure| peer.name == *name && peer.unit == *unit;
        let Some(peer) = theirs.iter().find(same) else {
            continue;
        };
        let ratio = match unit.as_str() {
            "ms" => peer.value / value.max(f64::MIN_POSITIVE),
            _ => value / peer.value.max(f64::MIN_POSITIVE),
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            table,
            "| {name} | {value:.2} {unit} | {:.2} {unit} | {ratio:.2}× |",
            peer.value
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, value: f64, unit: &str) -> Figure {
        Figure {
            name: name.into(),
            value,
            unit: unit.into(),
        }
    }

    #[test]
    fn figures_are_read_out_of_rows_and_of_nothing_else() {
        let row = "step, mlp 64-128-64-10, batch 128, 1 thread(s)        0.523 ms  p99 0.6 ms";
        let name = "step, mlp 64-128-64-10, batch 128, 1 thread(s)";
        assert_eq!(figure(row), Some(of(name, 0.523, "ms")));
        for other in [
            "torch 2.15.0",
            "written to a  file",
            "losses of x: first 1.0",
        ] {
            assert_eq!(figure(other), None);
        }
    }

    #[test]
    fn faster_is_above_one_for_times_and_for_rates() {
        let ours = [
            of("a", 2.0, "ms"),
            of("b", 50.0, "GB/s"),
            of("c", 1.0, "ms"),
        ];
        let theirs = [of("a", 3.0, "ms"), of("b", 100.0, "GB/s")];
        let table = compared(&ours, &theirs);
        assert!(
            table.contains("| a | 2.00 ms | 3.00 ms | 1.50× |"),
            "{table}"
        );
        assert!(
            table.contains("| b | 50.00 GB/s | 100.00 GB/s | 0.50× |"),
            "{table}"
        );
        assert!(!table.contains("| c |"), "{table}");
    }
}
