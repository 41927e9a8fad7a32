//! A library in NVML's place, which says of GPUs what a test wants: loading it and calling it is as with the driver's.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A folder with the library, made by a C++ compiler (which the build of RocksDB needs anyway), and the file that it
/// reads.
pub(crate) struct StandIn {
    folder: tempfile::TempDir,
}

impl StandIn {
    /// A machine with these GPUs, one a line as `stand_in.cpp` describes them.
    pub(crate) fn with(gpus: &str) -> StandIn {
        let stand_in = StandIn::without_driver();
        stand_in.says(gpus);
        stand_in
    }

    /// The library is there, and the driver is not loaded.
    pub(crate) fn without_driver() -> StandIn {
        let folder = tempfile::tempdir().expect("a folder for the library");
        let stand_in = StandIn { folder };
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        // Not by its path: another checkout may have built this, as they share what is built.
        let source = stand_in.folder.path().join("stand_in.cpp");
        std::fs::write(&source, include_str!("stand_in.cpp")).expect("a file in that folder");
        let output = Command::new(&compiler)
            .args([
                "-std=c++17",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-shared",
                "-fPIC",
            ])
            .arg(format!("-DMACHINE={:?}", stand_in.machine()))
            .arg("-o")
            .arg(stand_in.library())
            .arg(source)
            .output()
            .unwrap_or_else(|error| panic!("`{compiler}` compiles the stand-in: {error}"));
        let messages = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{messages}");
        stand_in
    }

    /// What to load.
    pub(crate) fn library(&self) -> PathBuf {
        self.folder.path().join("libnvidia-ml.so.1")
    }

    /// From now on there are these GPUs.
    pub(crate) fn says(&self, gpus: &str) {
        // Who reads meanwhile finds all of one or all of the other.
        let next = self.folder.path().join("next");
        fs::write(&next, gpus).expect("the folder can be written to");
        fs::rename(next, self.machine()).expect("the folder can be written to");
    }

    /// Whether a call does not return.
    pub(crate) fn hangs(&self) -> bool {
        self.machine().with_extension("hangs").exists()
    }

    fn machine(&self) -> PathBuf {
        self.folder.path().join("machine")
    }
}
