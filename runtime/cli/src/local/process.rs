//! Starting and ending the processes of a local cluster.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How often a file or a process is looked at while waiting for it.
const POLL: Duration = Duration::from_millis(20);

/// When a process was started, in clock ticks since boot; `None` where it does not run (any more).
pub(crate) fn start_time_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so fields are counted behind its end.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let is_zombie = *fields.first()? == "Z";
    if is_zombie {
        None
    } else {
        fields.get(19)?.parse().ok()
    }
}

/// Starts this binary with `arguments`, its output in `log`, in a process group of its own, so
/// that a Ctrl-C in this terminal does not reach it.
pub(crate) fn spawn(arguments: &[String], log: &Path) -> anyhow::Result<Child> {
    // What an earlier process wrote is kept beside, so that errors show this one's lines only.
    if log.exists() {
        std::fs::rename(log, log.with_extension("log.previous"))
            .with_context(|| format!("the log {} cannot be moved", log.display()))?;
    }
    let program = std::env::current_exe().context("this program's own path is not known")?;
    let output = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("the log {} cannot be opened", log.display()))?;
    let errors = output.try_clone()?;
    Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .process_group(0)
        .spawn()
        .with_context(|| format!("{} cannot be started", program.display()))
}

/// Waits until a child has written `file`, or has ended, or the time is over.
pub(crate) async fn wait_for_file(
    child: &mut Child,
    file: &Path,
    log: &Path,
    limit: Duration,
) -> anyhow::Result<serde_json::Value> {
    let deadline = Instant::now() + limit;
    loop {
        if let Ok(text) = std::fs::read_to_string(file) {
            return serde_json::from_str(&text)
                .with_context(|| format!("{} is damaged", file.display()));
        }
        if let Some(status) = child.try_wait()? {
            bail!("it ended at once ({status}):\n{}", last_lines(log));
        }
        if Instant::now() >= deadline {
            bail!(
                "it was not ready after {} s; its log ends with:\n{}",
                limit.as_secs(),
                last_lines(log)
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The end of a log, for error messages.
pub(crate) fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

/// Asks a process to end, waits, and kills it if it does not.
pub(crate) async fn end(pid: u32, start_time: u64, grace: Duration) {
    let runs = || start_time_of(pid) == Some(start_time);
    let signal = |number| {
        // SAFETY: kill takes two numbers and touches no memory of ours. That the id still is this
        // process was checked just before.
        unsafe { libc::kill(pid.cast_signed(), number) }
    };
    if runs() {
        signal(libc::SIGTERM);
    }
    let deadline = Instant::now() + grace;
    while runs() && Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
    }
    if runs() {
        signal(libc::SIGKILL);
    }
    while runs() {
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_its_successor() {
        let own = start_time_of(std::process::id()).unwrap();
        assert!(own > 0);
        assert_eq!(start_time_of(u32::MAX), None);
    }
}
