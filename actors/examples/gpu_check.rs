//! Every GPU kernel against the CPU and against candle: what `cargo xtask gpu-check` builds and runs.
//!
//! Exit status: 0 all are right; 1 one is wrong, or the GPU failed; 3 there is no GPU.

use std::process::ExitCode;

use mobula_actors::kernels::cuda::check;

/// As `cargo xtask gpu-check` has it.
const EXIT_NO_GPU: u8 = 3;

fn main() -> ExitCode {
    match check::gpu_count() {
        Ok(0) => {
            eprintln!("the driver knows no GPU; nothing was checked");
            return ExitCode::from(EXIT_NO_GPU);
        }
        Ok(_) => {}
        Err(error) => {
            eprintln!("error: the NVIDIA driver does not answer: {error}");
            return ExitCode::FAILURE;
        }
    }
    match check_first() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn check_first() -> candle_core::Result<bool> {
    println!("GPU 0: {}", check::describe(0)?);
    println!("{}", check::heading());
    let outcomes = check::run(0, |outcome| println!("{outcome}"))?;
    let wrong = outcomes.iter().filter(|outcome| !outcome.passed()).count();
    println!("{} checks, {wrong} failed", outcomes.len());
    Ok(wrong == 0)
}
