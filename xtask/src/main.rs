//! `cargo xtask`: the two commands a newcomer needs, `demo` and `test`; `bench`, `mutants`, `gpu-check`
//! and `doctor`.
//!
//! Invariants:
//! 1. No dependencies. This crate compiles in seconds on a machine that has only Rust, and only
//!    then looks for what the rest needs.
//! 2. One build. Every cargo command here selects packages and features the same way (see
//!    [`workspace::SHARED_BUILD`]), so that the dependencies are compiled once for all of them.
//! 3. No silent change to the machine. A package is installed only through apt-get, only with
//!    rights that are already there, and the command is printed first.

mod bench;
mod commands;
mod gpu_check;
mod install;
mod libclang;
mod mutants;
mod progress;
mod requirements;
mod steps;
mod workspace;

use std::process::ExitCode;

/// Exit status for a wrong command line, or for a machine that lacks something.
const EXIT_USAGE_OR_MISSING: u8 = 2;

/// Says why nothing came of it; what to exit with.
fn failed(reason: &str) -> ExitCode {
    eprintln!("error: {reason}");
    ExitCode::FAILURE
}

const HELP: &str = "\
usage: cargo xtask <command>

commands:
  demo [args]     build mobula and run `mobula demo [args]`: a whole cluster on this machine
                  trains, survives a preemption, serves and detects drift
  test [--quick]  every check: format, clippy, docs, unit, property and process-level tests,
                  doc tests, dependency policy; --quick leaves out docs and process-level tests
  bench core [--peers] [args]
                  the core suite on a cluster of processes, under the names of Ray's own
                  benchmark; --peers runs Ray from PyPI beside it; `--quick` and
                  `--only <part of a name>` go to the suite (see benches/README.md)
  bench head [args]
                  commands a second, failover, start, tables and simulator of a group of heads;
                  `--quick` and `--only <part>` go to the suite
  bench train [--peers] [args]
                  steps of whole networks, and kernels by themselves; --peers installs PyTorch
                  from PyPI (6 GB under the target folder) and does the same with it; `--quick`
                  and `--only <part of a name>` go to the suite
  bench serve [--peers] [args]
                  requests to an endpoint: callers that wait, requests that come when they come, where
                  the time goes, texts, overload; --peers asks a tritonserver, Ray Serve and PyTorch
                  from PyPI (7 GB under the target folder) the same; `--quick` and `--only <part>`
                  go to the suite
  bench drift [--peers] [args]
                  detectors number by number, and windows of rows against a reference; --peers gives
                  the same streams to river from PyPI; `--quick` goes to the suite
  mutants [NAME...] [--minutes T]
                  plant one known defect after the other in the head, and let the simulator look
                  for it (see chaos/README.md)
  gpu-check       build the GPU kernels (feature `cuda`; needs CUDA 13's toolkit) and check each against
                  the CPU and against candle's; says so where there is no GPU (see docs/gpu.md)
  doctor          say what this machine has and lacks, and how to install the rest
  help            this text

environment:
  CARGO_TARGET_DIR   where build output goes (default: $HOME/.cache/mobula/target, so that every
                     checkout shares one build of the dependencies)
  MOBULA_NO_INSTALL  if set, nothing is installed: missing packages are only named

exit status: 0 all well; 1 a check failed; 2 wrong command line, or something is missing;
             `gpu-check`: 3 there is no GPU, nothing was checked;
             `demo` passes on the status of `mobula demo`";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((command, rest)) = arguments.split_first() else {
        eprintln!("{HELP}");
        return ExitCode::from(EXIT_USAGE_OR_MISSING);
    };
    match (command.as_str(), rest) {
        ("demo", demo_arguments) => commands::demo(demo_arguments),
        ("test", []) => commands::test(commands::TestScope::Full),
        ("test", [flag]) if flag == "--quick" => commands::test(commands::TestScope::Quick),
        ("bench", [suite, bench_arguments @ ..]) if suite == "core" => bench::core(bench_arguments),
        ("bench", [suite, bench_arguments @ ..]) if suite == "head" => bench::head(bench_arguments),
        ("bench", [suite, bench_arguments @ ..]) if suite == "drift" => {
            bench::drift(bench_arguments)
        }
        ("bench", [suite, bench_arguments @ ..]) if suite == "serve" => {
            bench::serve(bench_arguments)
        }
        ("bench", [suite, bench_arguments @ ..]) if suite == "train" => {
            bench::train(bench_arguments)
        }
        ("mutants", hunt_arguments) => mutants::hunt(hunt_arguments),
        ("gpu-check", []) => gpu_check::check(),
        ("doctor", []) => commands::doctor(),
        ("help" | "--help" | "-h", _) => {
            println!("{HELP}");
            ExitCode::SUCCESS
        }
        ("test" | "gpu-check" | "doctor", [help, ..]) if help == "--help" || help == "-h" => {
            println!("{HELP}");
            ExitCode::SUCCESS
        }
        ("bench", _) => usage_error(
            "`bench` takes the name of a suite: `core`, `head`, `train`, `serve` or `drift`",
        ),
        ("test" | "gpu-check" | "doctor", unexpected) => usage_error(&format!(
            "`{command}` does not take `{}`",
            unexpected.join(" ")
        )),
        (unknown, _) => usage_error(&format!("unknown command `{unknown}`")),
    }
}

fn usage_error(message: &str) -> ExitCode {
    eprintln!("error: {message}\n\n{HELP}");
    ExitCode::from(EXIT_USAGE_OR_MISSING)
}
