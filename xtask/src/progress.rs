//! Shows that a long build is alive.
//!
//! On a terminal cargo draws its own bar. Elsewhere (CI, a log file) it says nothing while
//! RocksDB's C++ compiles, so a plain line is printed at an even pace.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// Often enough that nobody takes a build for dead, seldom enough to keep a log readable.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// C++ files in RocksDB 11.8, for "so many of about so many"; a few more or less do no harm.
const ROCKSDB_OBJECTS_ABOUT: usize = 345;

/// Whether RocksDB's C++ still has to be compiled in this target directory.
pub(crate) fn rocksdb_is_cold(target: &Path) -> bool {
    !rocksdb_output(target)
        .iter()
        .any(|output| output.join("librocksdb.a").is_file())
}

/// Runs `command` to its end with the terminal's own progress, or a plain line now and then.
pub(crate) fn run(command: &mut Command, target: &Path) -> io::Result<ExitStatus> {
    if io::stderr().is_terminal() {
        return command.status();
    }
    thread::scope(|scope| {
        let (finished, waiting) = mpsc::sync_channel::<()>(1);
        scope.spawn(move || {
            let start = Instant::now();
            // Ends when `finished` is dropped, which is when the command has ended.
            while waiting.recv_timeout(LINE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{}", line(start.elapsed(), target));
            }
        });
        let status = command.status();
        drop(finished);
        status
    })
}

fn line(elapsed: Duration, target: &Path) -> String {
    let elapsed = crate::steps::minutes_seconds(elapsed);
    let objects = rocksdb_objects(target);
    if objects > 0 && rocksdb_is_cold(target) {
        return format!(
            "[{elapsed}] RocksDB: {objects} of about {ROCKSDB_OBJECTS_ABOUT} C++ files compiled"
        );
    }
    let units = children(&target.join("debug/.fingerprint")).len();
    format!("[{elapsed}] at work, {units} build units in the cache")
}

fn rocksdb_output(target: &Path) -> Vec<PathBuf> {
    children(&target.join("debug/build"))
        .into_iter()
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("librocksdb-sys-"))
        })
        .map(|path| path.join("out"))
        .collect()
}

fn rocksdb_objects(target: &Path) -> usize {
    rocksdb_output(target)
        .iter()
        .flat_map(|output| children(output))
        .filter(|path| path.extension().is_some_and(|extension| extension == "o"))
        .count()
}

fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_until_the_library_lies_there() {
        let target = std::env::temp_dir().join(format!("mobula-xtask-{}", std::process::id()));
        let output = target.join("debug/build/librocksdb-sys-0f/out");
        assert!(rocksdb_is_cold(&target));
        fs::create_dir_all(&output).expect("the temporary directory is writable");
        fs::write(output.join("1-db.o"), b"").expect("the temporary directory is writable");
        let while_building = line(Duration::from_secs(90), &target);
        assert_eq!(
            while_building,
            "[1:30] RocksDB: 1 of about 345 C++ files compiled"
        );
        fs::write(output.join("librocksdb.a"), b"").expect("the temporary directory is writable");
        assert!(!rocksdb_is_cold(&target));
        fs::remove_dir_all(&target).expect("this test made it");
    }

    #[test]
    fn the_status_of_the_command_is_passed_on() {
        let target = std::env::temp_dir();
        let status = run(Command::new("sh").args(["-c", "exit 7"]), &target).expect("sh starts");
        assert_eq!(status.code(), Some(7));
    }
}
