//! A cluster for one program: real processes on this machine, gone with the program.
//!
//! Invariants:
//! 1. It is the same cluster as any other, started by the `mobula` binary; there is no second,
//!    simpler implementation behind it.
//! 2. It lives as long as its standard input is open, so that it ends with this process however
//!    this process ends.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::Instant;

use crate::connect::{CLIENT_TOKEN_FILE, CLUSTER_FILE};
use crate::error::{Error, Result};

/// The environment variable that names the `mobula` binary.
pub const BINARY_ENV: &str = "MOBULA_BIN";

/// Workers of an embedded cluster: two, so that what runs here has crossed a process boundary.
const WORKERS: &str = "2";

/// How long the cluster may take to come up; about two seconds on an idle machine.
const START_MAX: Duration = Duration::from_secs(60);

/// How long it may take to end before it is killed.
const END_MAX: Duration = Duration::from_secs(10);

const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A running local cluster.
pub(crate) struct LocalCluster {
    child: Child,
    directory: TempDir,
}

impl LocalCluster {
    pub(crate) async fn start() -> Result<Self> {
        let binary = find_binary()?;
        let failed = |error: &dyn std::fmt::Display| {
            Error::setup(format!("embedded cluster ({})", binary.display()), error)
        };
        let directory = tempfile::Builder::new()
            .prefix("mobula-")
            .tempdir()
            .map_err(|error| failed(&error))?;
        let log = std::fs::File::create(directory.path().join("local-up.log"))
            .map_err(|error| failed(&error))?;
        let output = log.try_clone().map_err(|error| failed(&error))?;
        let child = Command::new(&binary)
            .args([
                "local",
                "up",
                "--ephemeral",
                "--json",
                "--workers",
                WORKERS,
                "--data-dir",
            ])
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(log)
            .spawn()
            .map_err(|error| failed(&error))?;
        let mut cluster = LocalCluster { child, directory };
        cluster
            .wait_until_up()
            .await
            .map_err(|reason| failed(&reason))?;
        Ok(cluster)
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    async fn wait_until_up(&mut self) -> std::result::Result<(), String> {
        let last = Instant::now() + START_MAX;
        let files = [CLUSTER_FILE, CLIENT_TOKEN_FILE].map(|name| self.directory().join(name));
        while !files.iter().all(|file| file.exists()) {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("it ended with {status}: {}", self.last_words()));
            }
            if Instant::now() > last {
                let seconds = START_MAX.as_secs();
                return Err(format!(
                    "it is not up after {seconds} s: {}",
                    self.last_words()
                ));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// The end of what it printed.
    fn last_words(&self) -> String {
        let text = std::fs::read(self.directory().join("local-up.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(2048)..]).into_owned();
        match text.trim() {
            "" => "it printed nothing".to_owned(),
            words => words.to_owned(),
        }
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        // Closing its standard input asks it to end.
        drop(self.child.stdin.take());
        let last = std::time::Instant::now() + END_MAX;
        while matches!(self.child.try_wait(), Ok(None)) {
            if std::time::Instant::now() > last {
                tracing::warn!(
                    pid = self.child.id(),
                    "killing an embedded cluster that does not end"
                );
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

/// The `mobula` binary: named by the environment, beside or above this program (as in `target/`),
/// or on the path.
fn find_binary() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(BINARY_ENV) {
        let named = PathBuf::from(named);
        if named.is_file() {
            return Ok(named);
        }
        return Err(Error::setup(
            BINARY_ENV,
            format!("it names {}, which is not a file", named.display()),
        ));
    }
    let program = std::env::current_exe().map_err(|error| Error::setup("this program", error))?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let beside = program.ancestors().skip(1).take(3).map(Path::to_owned);
    beside
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join("mobula"))
        .find(|candidate| candidate.is_file() && *candidate != program)
        .ok_or_else(|| {
            Error::setup(
                "embedded cluster",
                format!(
                    "there is no `mobula` binary beside {}, in the two directories above it, or on \
                     the path: build it with `cargo build -p mobula-cli`, or name it in {BINARY_ENV}",
                    program.display()
                ),
            )
        })
}
