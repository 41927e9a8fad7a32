//! What a run leaves behind: nothing (I11).
//!
//! Namespaces have no names and devices go with their descriptors, so only processes and directories
//! can be left over: processes of this run are looked for by what their environment and working
//! directory name; directories of runs that were killed are removed by the next one.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::faults::start_time_of;

/// How the directory of a run begins, in the system's directory for temporary files.
pub(super) const DIR_PREFIX: &str = "mobula-chaos-run-";

/// The file in it that says whose it is: process id and start time.
const OWNER_FILE: &str = "owner";

/// How long what was killed may take to be gone: the kernel does it.
const GONE_MAX: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(50);

/// Whether a process was started by the run that keeps its files in `dir`, or by a process of it.
pub(super) fn is_of_run(pid: u32, dir: &Path) -> bool {
    let own = std::process::id();
    let began_before = start_time_of(pid) < start_time_of(own);
    if pid == own || began_before {
        return false;
    }
    let wanted = dir.as_os_str().as_bytes();
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let is_named = environment
        .windows(wanted.len().max(1))
        .any(|part| part == wanted);
    let working_dir = std::fs::read_link(format!("/proc/{pid}/cwd"));
    is_named || working_dir.is_ok_and(|working_dir| working_dir.starts_with(dir))
}

/// The processes of a run: id and command line.
pub(super) fn processes_of_run(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| start_time_of(*pid).is_some() && is_of_run(*pid, dir))
        .map(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            format!("{pid} {}", line.trim())
        })
        .collect()
}

/// The processes of a run that are still there after a while.
pub(super) fn left_over(dir: &Path) -> Vec<String> {
    let deadline = Instant::now() + GONE_MAX;
    loop {
        let left = processes_of_run(dir);
        if left.is_empty() || Instant::now() >= deadline {
            return left;
        }
        std::thread::sleep(POLL);
    }
}

/// A run's own directory, which the next run may remove when this process is gone.
pub(super) fn make_dir() -> io::Result<PathBuf> {
    let dir = tempfile::Builder::new().prefix(DIR_PREFIX).tempdir()?;
    let own = std::process::id();
    let started = start_time_of(own).unwrap_or(0);
    std::fs::write(dir.path().join(OWNER_FILE), format!("{own} {started}"))?;
    Ok(dir.keep())
}

/// A run's directory stays for whoever looks why it failed.
pub(super) fn keep_dir(dir: &Path) {
    // Without an owner nobody removes it.
    let _ = std::fs::remove_file(dir.join(OWNER_FILE));
}

/// Removes what runs left behind that did not end in order; how many they were.
pub(super) fn remove_of_dead_runs() -> usize {
    let entries = std::fs::read_dir(std::env::temp_dir());
    let dirs = entries.into_iter().flatten().flatten();
    let is_run = |name: &OsStr| name.as_bytes().starts_with(DIR_PREFIX.as_bytes());
    let dirs = dirs.filter(|entry| is_run(&entry.file_name()));
    dirs.filter(|entry| is_dead(&entry.path()) && std::fs::remove_dir_all(entry.path()).is_ok())
        .count()
}

/// Whether a run's directory names an owner that is gone.
fn is_dead(dir: &Path) -> bool {
    let Ok(owner) = std::fs::read_to_string(dir.join(OWNER_FILE)) else {
        return false;
    };
    let mut words = owner.split(' ').map(str::parse::<u64>);
    let (Some(Ok(pid)), Some(Ok(started))) = (words.next(), words.next()) else {
        return false;
    };
    u32::try_from(pid).is_ok_and(|pid| start_time_of(pid) != Some(started))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn processes_are_known_by_environment_or_working_directory() {
        let dir = tempfile::tempdir().unwrap();
        let sleeper = |command: &mut Command| {
            let command = command.arg("600").stdin(Stdio::null());
            command.spawn().unwrap()
        };
        let mut by_variable = sleeper(Command::new("sleep").env("SOME_PATH", dir.path().join("x")));
        let mut by_directory = sleeper(Command::new("sleep").current_dir(dir.path()));
        let mut stranger = sleeper(&mut Command::new("sleep"));
        // A child has its new environment and directory only once it has become the other program.
        let deadline = Instant::now() + GONE_MAX;
        while processes_of_run(dir.path()).len() < 2 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(is_of_run(by_variable.id(), dir.path()));
        assert!(is_of_run(by_directory.id(), dir.path()));
        assert!(!is_of_run(stranger.id(), dir.path()));
        assert!(!is_of_run(std::process::id(), dir.path()));
        for child in [&mut by_variable, &mut by_directory, &mut stranger] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(left_over(dir.path()), Vec::<String>::new());
    }

    #[test]
    fn only_directories_of_dead_owners_are_given_up() {
        let alive = make_dir().unwrap();
        assert!(!is_dead(&alive));
        let pid = std::process::id();
        std::fs::write(alive.join(OWNER_FILE), format!("{pid} 1")).unwrap();
        assert!(is_dead(&alive), "another process had this id");
        keep_dir(&alive);
        assert!(!is_dead(&alive), "kept for somebody");
        std::fs::remove_dir_all(alive).unwrap();
    }
}
