//! One head or worker: its machine, its process, and how the process is started again.
//!
//! Invariants:
//! 1. There is at most one process at a time, and who starts the next one has waited for the end of
//!    the last.
//! 2. A process that ended without being asked to is noticed, not taken for one that was killed.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;

use super::disk::Disk;
use super::machine::Machine;
use crate::faults::{FaultError, Target};

/// How long a killed process may take to be gone, also on a busy machine.
const GONE_MAX: Duration = Duration::from_secs(30);

/// How long a process may take to serve: a head replays its log first.
const READY_MAX: Duration = Duration::from_secs(60);

/// How long one that is asked to end may take before it is killed: a worker's actors say goodbye.
const END_MAX: Duration = Duration::from_secs(20);

/// How often a file or a process is looked at while it is waited for.
const POLL: Duration = Duration::from_millis(20);

/// Lines of a log that are shown when something went wrong.
const LOG_LINES: usize = 12;

/// The variable that names the run's directory, by which its processes are known.
pub(super) const RUN_VARIABLE: &str = "MOBULA_CHAOS_RUN";

/// Why a process is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// It cannot be started.
    #[error("{name} cannot be started: {reason}")]
    Start {
        /// The node.
        name: String,
        /// Why.
        reason: io::Error,
    },
    /// It ended instead of serving.
    #[error("{name} ended with {status} before it served; its log ends with:\n{log}")]
    Ended {
        /// The node.
        name: String,
        /// How.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// It does not serve.
    #[error("{name} does not serve after {} s; its log ends with:\n{log}", READY_MAX.as_secs())]
    NotReady {
        /// The node.
        name: String,
        /// The end of its log.
        log: String,
    },
    /// A signal did not do what it should.
    #[error("{name}: {reason}")]
    Fault {
        /// The node.
        name: String,
        /// Why.
        reason: FaultError,
    },
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A head.
    Head,
    /// A worker.
    Worker,
}

/// A head or a worker.
#[derive(Debug)]
pub struct Node {
    name: String,
    role: Role,
    program: PathBuf,
    dir: PathBuf,
    machine: Machine,
    disk: Option<Disk>,
    life: Mutex<Life>,
    /// Held by the fault that is about this node's process, so that no two mix.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct Life {
    arguments: Vec<String>,
    /// Where a head listens, once known: it comes back there.
    addresses: Option<(SocketAddr, SocketAddr)>,
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    target: Arc<Target>,
}

impl Node {
    pub(super) fn new(
        name: String,
        role: Role,
        program: &Path,
        dir: &Path,
        machine: Machine,
        disk: Option<Disk>,
    ) -> Node {
        Node {
            name,
            role,
            program: program.to_owned(),
            dir: dir.to_owned(),
            machine,
            disk,
            life: Mutex::default(),
            turn: Arc::default(),
        }
    }

    /// Its name, in logs and lists.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Head or worker.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Where it runs.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The address of its machine.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.machine.address()
    }

    /// Its own disk, where it has one.
    #[must_use]
    pub fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// Where it keeps its state.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// What it printed, over all its lives.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.name))
    }

    fn ready_file(&self) -> PathBuf {
        // Beside the data directory: that may be a disk of the machine's own.
        self.dir.join(format!("{}.ready.json", self.name))
    }

    /// A head's control API, once it has served.
    #[must_use]
    pub fn api_address(&self) -> Option<SocketAddr> {
        self.life.lock().addresses.map(|(api, _)| api)
    }

    /// What it is started with from now on, besides its addresses.
    pub(super) fn set_arguments(&self, arguments: Vec<String>) {
        self.life.lock().arguments = arguments;
    }

    /// Starts its process; a head's comes back where it listened before.
    pub fn start(&self) -> Result<(), NodeError> {
        let mut life = self.life.lock();
        let mut command = Command::new(&self.program);
        command.args(&life.arguments);
        if self.role == Role::Head {
            // A file of an earlier life would be taken for this one's.
            let _ = std::fs::remove_file(self.ready_file());
            let (api, cluster) = life.addresses.map_or_else(
                || self.first_addresses(),
                |(api, cluster)| (api.to_string(), cluster.to_string()),
            );
            command.args(["--api-listen", &api, "--cluster-listen", &cluster]);
            command.arg("--ready-file").arg(self.ready_file());
        }
        let failed = |reason| NodeError::Start {
            name: self.name.clone(),
            reason,
        };
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file())
            .map_err(failed)?;
        let errors = log.try_clone().map_err(failed)?;
        command
            .env_remove("MOBULA_CLUSTER")
            .env_remove("MOBULA_TOKEN")
            .env(RUN_VARIABLE, &self.dir)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let child = self.machine.spawn(command).map_err(failed)?;
        let target = Target::running(child.id()).map_err(|reason| NodeError::Fault {
            name: self.name.clone(),
            reason,
        })?;
        life.process = Some(Process {
            child,
            target: Arc::new(target),
        });
        Ok(())
    }

    /// Its own network has every port; a shared one gives free ones.
    fn first_addresses(&self) -> (String, String) {
        let address = self.address();
        if address.is_loopback() {
            return (format!("{address}:0"), format!("{address}:0"));
        }
        (format!("{address}:7100"), format!("{address}:7101"))
    }

    /// Waits until a head serves.
    pub async fn wait_ready(&self) -> Result<(), NodeError> {
        let deadline = Instant::now() + READY_MAX;
        loop {
            if let Some(addresses) = self.read_ready() {
                self.life.lock().addresses = Some(addresses);
                return Ok(());
            }
            if let Some(status) = self.ended() {
                return Err(NodeError::Ended {
                    name: self.name.clone(),
                    status,
                    log: self.last_lines(),
                });
            }
            if Instant::now() >= deadline {
                return Err(NodeError::NotReady {
                    name: self.name.clone(),
                    log: self.last_lines(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn read_ready(&self) -> Option<(SocketAddr, SocketAddr)> {
        let text = std::fs::read_to_string(self.ready_file()).ok()?;
        let ready: Value = serde_json::from_str(&text).ok()?;
        let address = |key: &str| ready[key].as_str()?.parse().ok();
        Some((address("api_address")?, address("cluster_address")?))
    }

    /// How its process ended, if it did and nobody waited for it yet.
    pub fn ended(&self) -> Option<ExitStatus> {
        let mut life = self.life.lock();
        let status = life.process.as_mut()?.child.try_wait().ok().flatten()?;
        life.process = None;
        Some(status)
    }

    /// Whether it has a process.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let life = self.life.lock();
        let process = life.process.as_ref();
        process.is_some_and(|process| process.target.is_alive())
    }

    /// Its process, to be hurt.
    #[must_use]
    pub fn target(&self) -> Option<Arc<Target>> {
        let life = self.life.lock();
        Some(Arc::clone(&life.process.as_ref()?.target))
    }

    /// Kills its process and waits for its end. Nothing happens where there is none.
    pub fn kill(&self) -> Result<(), NodeError> {
        self.finish(|target| target.kill(), GONE_MAX)
    }

    /// Asks its process to end, and kills it if it does not.
    pub fn end(&self) -> Result<(), NodeError> {
        match self.finish(Target::terminate, END_MAX) {
            Err(NodeError::Fault {
                reason: FaultError::StillRuns { .. },
                ..
            }) => self.kill(),
            other => other,
        }
    }

    /// Waits until its process has ended by itself, and kills it if it does not.
    pub fn wait_for_end(&self) -> Result<(), NodeError> {
        match self.finish(|_| Ok(()), END_MAX) {
            Err(NodeError::Fault {
                reason: FaultError::StillRuns { .. },
                ..
            }) => self.kill(),
            other => other,
        }
    }

    fn finish(
        &self,
        signal: impl FnOnce(&Target) -> Result<(), FaultError>,
        limit: Duration,
    ) -> Result<(), NodeError> {
        let Some(target) = self.target() else {
            return Ok(());
        };
        let done = match signal(&target) {
            // It has ended meanwhile, which is what was asked for.
            Ok(()) | Err(FaultError::Gone { .. }) => target.wait_until_gone(limit),
            Err(error) => Err(error),
        };
        done.map_err(|reason| NodeError::Fault {
            name: self.name.clone(),
            reason,
        })?;
        if let Some(mut process) = self.life.lock().process.take() {
            // It is gone, so this returns at once.
            let _ = process.child.wait();
        }
        Ok(())
    }

    /// The end of its log.
    #[must_use]
    pub fn last_lines(&self) -> String {
        let text = std::fs::read_to_string(self.log_file()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// Removes everything that it has stored.
    pub(super) fn wipe(&self) -> io::Result<()> {
        let dir = self.data_dir();
        self.machine.run(move || {
            for entry in std::fs::read_dir(dir)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    std::fs::remove_dir_all(entry.path())?;
                } else {
                    std::fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        })
    }

    /// A file below its data directory, as the machine sees it.
    pub(super) fn read(&self, file: &str) -> Option<String> {
        let path = self.data_dir().join(file);
        self.machine.run(move || std::fs::read_to_string(path).ok())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Also one that is stopped: a signal that kills does not wait.
        let _ = self.kill();
    }
}
