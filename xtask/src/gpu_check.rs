//! `cargo xtask gpu-check`: builds the GPU kernels with their checks and runs them, where there is a GPU.
//!
//! Whether there is one is found out first, without building anything: the kernel driver shows a device file, and the
//! loader knows its library. What is checked is in `actors/src/kernels/cuda/check`.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::workspace::Workspace;
use crate::{EXIT_USAGE_OR_MISSING, failed, steps};

/// Exit status where there is no GPU: nothing was checked, so it is neither a pass nor a failure.
pub(crate) const EXIT_NO_GPU: u8 = 3;

/// What is built. One package: it needs neither RocksDB nor the head.
const BUILD: [&str; 7] = [
    "build",
    "--package",
    "mobula-actors",
    "--features",
    "cuda",
    "--example",
    "gpu_check",
];

/// Builds and runs the checks.
pub(crate) fn check() -> ExitCode {
    if let Err(lack) = find_gpu(Path::new("/"), env::var_os("LD_LIBRARY_PATH")) {
        eprintln!("no GPU: {lack}");
        eprintln!("nothing was built and nothing was checked (exit status {EXIT_NO_GPU})");
        return ExitCode::from(EXIT_NO_GPU);
    }
    let toolkits = toolkits();
    if !has_nvcc(&toolkits) {
        eprintln!(
            "missing: nvcc\nto install: CUDA 13's toolkit (https://developer.nvidia.com/cuda-downloads); then set \
             CUDA_HOME to where it is, or NVCC to its compiler"
        );
        return ExitCode::from(EXIT_USAGE_OR_MISSING);
    }
    let workspace = Workspace::find();
    if let Err(code) = workspace.build(&BUILD) {
        return code;
    }
    let mut program = Command::new(workspace.binary("examples/gpu_check"));
    let libraries = library_path(&toolkits, env::var_os("LD_LIBRARY_PATH"));
    program.env("LD_LIBRARY_PATH", libraries);
    eprintln!("+ {}", steps::shown(&program));
    match program.status() {
        Ok(status) => match status.code().and_then(|code| u8::try_from(code).ok()) {
            Some(code) => ExitCode::from(code),
            None => failed(&format!("the checks ended by {status}")),
        },
        Err(error) => failed(&format!("cannot start the checks: {error}")),
    }
}

/// Why no GPU can be used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    /// No GPU, or no kernel driver for it.
    Device,
    /// A GPU whose driver library the loader would not find.
    Library,
}

impl fmt::Display for Lack {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Device => {
                "this machine has no /dev/nvidia0 (nor any other NVIDIA device), so no NVIDIA GPU or no driver for it"
            }
            Self::Library => {
                "there is an NVIDIA device, but no libcuda.so.1; install the driver's libraries, or give the container \
                 access to them"
            }
        })
    }
}

/// Looks for a device file and the driver's library below `root`.
fn find_gpu(root: &Path, library_path: Option<OsString>) -> Result<(), Lack> {
    let is_gpu = |name: &str| {
        let number = name.strip_prefix("nvidia");
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // The second is a GPU under Windows' Linux.
        number.is_some_and(is_number) || name == "dxg"
    };
    let devices = fs::read_dir(root.join("dev"))
        .into_iter()
        .flatten()
        .flatten();
    if !devices
        .into_iter()
        .any(|entry| entry.file_name().to_str().is_some_and(is_gpu))
    {
        return Err(Lack::Device);
    }
    const LIBRARY: &str = "libcuda.so.1";
    let set = library_path.unwrap_or_default();
    let usual = [
        "usr/lib/x86_64-linux-gnu",
        "usr/lib/aarch64-linux-gnu",
        "usr/lib64",
        "usr/lib",
    ];
    let is_there = env::split_paths(&set)
        .chain(usual.map(|folder| root.join(folder)))
        .any(|folder| folder.join(LIBRARY).exists());
    // The loader's cache holds names as they are.
    let is_cached = || {
        let cache = fs::read(root.join("etc/ld.so.cache")).unwrap_or_default();
        cache
            .windows(LIBRARY.len())
            .any(|part| part == LIBRARY.as_bytes())
    };
    if is_there || is_cached() {
        Ok(())
    } else {
        Err(Lack::Library)
    }
}

/// Where CUDA's toolkit may be.
fn toolkits() -> Vec<PathBuf> {
    let set = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os);
    let folders = set.map(PathBuf::from).chain(["/usr/local/cuda".into()]);
    folders.filter(|folder| folder.is_dir()).collect()
}

fn has_nvcc(toolkits: &[PathBuf]) -> bool {
    let named = env::var_os("NVCC").map(PathBuf::from);
    let searched = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&searched).map(|folder| folder.join("nvcc"));
    let in_toolkits = toolkits.iter().map(|folder| folder.join("bin/nvcc"));
    named
        .into_iter()
        .chain(folders)
        .chain(in_toolkits)
        .any(|nvcc| nvcc.is_file())
}

/// Where the loader finds the toolkit's libraries: what is set, then the toolkits' own.
fn library_path(toolkits: &[PathBuf], set: Option<OsString>) -> OsString {
    let set = set.unwrap_or_default();
    let own = toolkits
        .iter()
        .flat_map(|toolkit| ["lib64", "lib"].map(|name| toolkit.join(name)));
    let folders: Vec<PathBuf> = env::split_paths(&set)
        .filter(|folder| !folder.as_os_str().is_empty())
        .chain(own.filter(|folder| folder.is_dir()))
        .collect();
    env::join_paths(folders).unwrap_or(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root folder with these empty files, removed at the end of the test.
    struct Root(PathBuf);

    impl Root {
        fn with(name: &str, files: &[(&str, &str)]) -> Self {
            let root = env::temp_dir().join(format!("xtask-gpu-{}-{name}", std::process::id()));
            for folder in ["dev", "etc", "usr/lib64"] {
                fs::create_dir_all(root.join(folder)).expect("a folder of the test's own");
            }
            for (file, content) in files {
                fs::write(root.join(file), content).expect("a file of the test's own");
            }
            Self(root)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            // What stays behind lies in the folder for temporary files.
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_gpu_is_a_device_file_and_a_library() {
        let cache = "ld.so-1.7.0\0libcuda.so.1\0/lib/libcuda.so.1\0";
        for (name, files, expected) in [
            ("none", &[][..], Err(Lack::Device)),
            (
                "ctl",
                &[("dev/nvidiactl", ""), ("dev/nvidia-uvm", "")],
                Err(Lack::Device),
            ),
            ("bare", &[("dev/nvidia0", "")], Err(Lack::Library)),
            (
                "other",
                &[("dev/nvidia0", ""), ("etc/ld.so.cache", "libcublas.so")],
                Err(Lack::Library),
            ),
            (
                "lib",
                &[("dev/nvidia3", ""), ("usr/lib64/libcuda.so.1", "")],
                Ok(()),
            ),
            (
                "cached",
                &[("dev/dxg", ""), ("etc/ld.so.cache", cache)],
                Ok(()),
            ),
        ] {
            let root = Root::with(name, files);
            assert_eq!(find_gpu(&root.0, None), expected, "{name}");
        }
        let root = Root::with("set", &[("dev/nvidia0", ""), ("etc/libcuda.so.1", "")]);
        let set = root.0.join("etc").into_os_string();
        assert_eq!(find_gpu(&root.0, Some(set)), Ok(()));
    }

    #[test]
    fn what_is_set_comes_before_the_toolkits_libraries() {
        let root = Root::with("path", &[]);
        let toolkit = root.0.join("usr");
        let path = library_path(std::slice::from_ref(&toolkit), Some("/a:/b".into()));
        let there: [PathBuf; 3] = ["/a".into(), "/b".into(), toolkit.join("lib64")];
        assert_eq!(path, env::join_paths(there).expect("no colons in these"));
        assert_eq!(
            library_path(std::slice::from_ref(&toolkit), None),
            toolkit.join("lib64")
        );
    }
}
