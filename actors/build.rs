//! Compiles the inference protocol's messages, and with the feature `cuda` the kernels of `src/kernels/cuda/source` to
//! PTX.
//!
//! `nvcc` is that of `NVCC`, of `CUDA_HOME`, `CUDA_PATH` or of the search path, in this order. `CUDA_COMPUTE_CAP` is the
//! oldest GPU that the result runs on (`90` for an H100); a driver compiles PTX for the GPU that it finds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const SOURCES: [&str; 12] = [
    "adamw",
    "affine",
    "attention",
    "convolution",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "product",
    "softmax",
    "tree_add",
];

/// The oldest that CUDA 13 compiles for. The kernels use nothing newer.
const COMPUTE_CAPABILITY: &str = "75";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=proto");
    if let Err(error) = compile_protocol() {
        println!("cargo::error=proto/inference.proto: {error}");
        return ExitCode::FAILURE;
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    println!("cargo::rerun-if-changed=src/kernels/cuda/source");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let nvcc = nvcc();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for source in SOURCES {
        if let Err(error) = compile(&nvcc, source, &out) {
            println!("cargo::error={error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// With protox, so that no `protoc` is needed.
fn compile_protocol() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = protox::compile(["inference.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .bytes(".inference.ModelInferRequest.raw_input_contents")
        .compile_fds(descriptors)?;
    Ok(())
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(|toolkit| Path::new(&toolkit).join("bin/nvcc"))
        .find(|nvcc| nvcc.exists())
        .unwrap_or_else(|| "nvcc".into())
}

fn compile(nvcc: &Path, source: &str, out: &Path) -> Result<(), String> {
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| COMPUTE_CAPABILITY.to_owned());
    let mut command = Command::new(nvcc);
    command.args(["--ptx", "-O3", "-std=c++17"]);
    // The sources say where they fuse and round each operation once; these keep the compiler to it where they do not.
    command.args([
        "--fmad=false",
        "--ftz=false",
        "--prec-div=true",
        "--prec-sqrt=true",
    ]);
    command.arg(format!("--gpu-architecture=compute_{capability}"));
    command.arg("-o").arg(out.join(format!("{source}.ptx")));
    command.arg(format!("src/kernels/cuda/source/{source}.cu"));
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{} refused {source}.cu ({}): {}",
            nvcc.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).replace('\n', " | ")
        )),
        Err(error) => Err(format!(
            "the feature `cuda` needs CUDA 13's compiler, and {} cannot be started ({error}): install the toolkit and \
             set NVCC or CUDA_HOME",
            nvcc.display()
        )),
    }
}
