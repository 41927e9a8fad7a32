//! Child processes: started by one thread that lives as long as the agent, seen to die by pidfd.
//!
//! Invariants:
//! 1. A child leads a session (and so a process group) of its own, and the whole group is killed
//!    when it dies: nothing that it started is left behind.
//! 2. A child dies with the agent, even when the agent is killed with SIGKILL. The kernel sends the
//!    parent-death signal when the *thread* that forked exits, hence the thread of its own.
//! 3. No signal goes to a process id that may have been reused: signals are sent only before the
//!    child is reaped, under the same lock.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use parking_lot::Mutex;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::limits::OutOfMemory;

/// Starts that may wait for the spawner thread. One takes about a millisecond, and more than this
/// many hosts at once would be beyond any machine's memory.
const SPAWN_QUEUE: usize = 256;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProcessEnd {
    /// It ended by itself with this code.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
    /// The kernel ended it for want of memory.
    OutOfMemory(OutOfMemory),
}

impl std::fmt::Display for ProcessEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ProcessEnd::Exited(code) => write!(f, "exited with code {code}"),
            ProcessEnd::Signaled(signal) => write!(f, "was ended by signal {signal}"),
            ProcessEnd::OutOfMemory(_) => f.write_str("was ended for want of memory"),
        }
    }
}

/// What to start.
#[derive(Debug)]
pub(crate) struct ProcessSpec {
    /// The program's file.
    pub(crate) program: PathBuf,
    /// Its arguments.
    pub(crate) args: Vec<OsString>,
    /// All of its environment; nothing is inherited.
    pub(crate) env: BTreeMap<OsString, OsString>,
    /// Its working directory.
    pub(crate) working_dir: PathBuf,
    /// Where its standard output and standard error go.
    pub(crate) output: File,
    /// By which it enters its control groups.
    pub(crate) entrances: Vec<File>,
}

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    /// The operating system does not start the program.
    #[error("cannot start `{}`: {source}", program.display())]
    Start {
        /// The program's file.
        program: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Too many starts are waiting.
    #[error("{SPAWN_QUEUE} host processes are waiting to be started, which is the limit")]
    Busy,
    /// The agent is ending.
    #[error("the agent is ending")]
    Ended,
}

struct SpawnRequest {
    spec: ProcessSpec,
    reply: oneshot::Sender<Result<HostProcess, SpawnError>>,
}

/// The thread that starts processes. When the last clone is dropped the thread ends, and the
/// kernel kills every process it started.
#[derive(Debug, Clone)]
pub(crate) struct Spawner {
    requests: SyncSender<SpawnRequest>,
}

impl Spawner {
    /// Starts the thread.
    pub(crate) fn start() -> std::io::Result<Spawner> {
        let (requests, receiver) = sync_channel(SPAWN_QUEUE);
        std::thread::Builder::new()
            .name("mobula-spawner".to_owned())
            .spawn(move || serve(&receiver))?;
        Ok(Spawner { requests })
    }

    /// Starts a process.
    pub(crate) async fn spawn(&self, spec: ProcessSpec) -> Result<HostProcess, SpawnError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .try_send(SpawnRequest { spec, reply })
            .map_err(|error| match error {
                TrySendError::Full(_) => SpawnError::Busy,
                TrySendError::Disconnected(_) => SpawnError::Ended,
            })?;
        answer.await.map_err(|_| SpawnError::Ended)?
    }
}

fn serve(requests: &Receiver<SpawnRequest>) {
    while let Ok(SpawnRequest { spec, reply }) = requests.recv() {
        if let Err(Ok(unwanted)) = reply.send(spawn(spec)) {
            // Whoever asked has gone away; a process that nobody watches must not live.
            unwanted.kill();
            let _ = unwanted.reap();
        }
    }
}

fn spawn(spec: ProcessSpec) -> Result<HostProcess, SpawnError> {
    let program = spec.program.clone();
    let start_error = |source| SpawnError::Start { program, source };
    match spawn_command(spec) {
        Ok(process) => Ok(process),
        Err(source) => Err(start_error(source)),
    }
}

fn spawn_command(spec: ProcessSpec) -> std::io::Result<HostProcess> {
    let error_output = spec.output.try_clone()?;
    let mut command = Command::new(&spec.program);
    command
        .args(&spec.args)
        .env_clear()
        .envs(&spec.env)
        .current_dir(&spec.working_dir)
        .stdin(Stdio::null())
        .stdout(spec.output)
        .stderr(error_output);
    let agent = std::process::id();
    let entrances = spec.entrances;
    // SAFETY: the closure runs in the forked child before exec and makes only system calls that
    // are safe there (write, setsid, prctl, getppid); it neither allocates nor takes locks.
    unsafe {
        command.pre_exec(move || {
            for entrance in &entrances {
                // 0 means whoever writes it.
                rustix::io::write(entrance, b"0")?;
            }
            prepare_child(agent)
        });
    }
    let child = command.spawn()?;
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .expect("a process id is a positive i32");
    // The child is not reaped before `reap` below, so its id still means it.
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    Ok(HostProcess {
        pid,
        pidfd: Arc::new(pidfd),
        reaped: Arc::new(Mutex::new(None)),
    })
}

fn prepare_child(agent: u32) -> std::io::Result<()> {
    // SAFETY: plain system calls without pointers.
    unsafe {
        if libc::setsid() == -1 {
            return Err(std::io::Error::last_os_error());
        }
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1 {
            return Err(std::io::Error::last_os_error());
        }
        // The agent may have died before the signal was armed.
        if u32::try_from(libc::getppid()) != Ok(agent) {
            return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    Ok(())
}

/// A process that was started here. Clones mean the same process.
#[derive(Debug, Clone)]
pub(crate) struct HostProcess {
    pid: Pid,
    pidfd: Arc<OwnedFd>,
    reaped: Arc<Mutex<Option<ProcessEnd>>>,
}

impl HostProcess {
    /// The process id, which is also that of its session and process group.
    #[must_use]
    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Kills the process and all of its group. Nothing happens when it is dead already.
    pub(crate) fn kill(&self) {
        let reaped = self.reaped.lock();
        if reaped.is_none() {
            // An error means that nobody of the group is left.
            let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
        }
    }

    /// Waits for the end of the process, ends what is left of its group, and reaps it.
    ///
    /// Must be called inside a tokio runtime.
    pub(crate) async fn wait(&self) -> std::io::Result<ProcessEnd> {
        let pidfd = self.pidfd.try_clone()?;
        // SAFETY: `AsyncFd` owns the duplicate, which nobody else closes, and always names it.
        let readable = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        // A pidfd becomes readable once, when the process ends, and stays so.
        let _guard = readable.readable().await?;
        self.reap()
    }

    /// Reaps the process, waiting for its end if need be.
    fn reap(&self) -> std::io::Result<ProcessEnd> {
        // Waits without reaping, and without the lock: `kill` must get through meanwhile.
        if let Some(end) = *self.reaped.lock() {
            return Ok(end);
        }
        loop {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            match rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
                Ok(Some(_)) => break,
                Ok(None) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    std::thread::yield_now();
                }
                Err(error) => return Err(error.into()),
            }
        }
        let mut reaped = self.reaped.lock();
        if let Some(end) = *reaped {
            return Ok(end);
        }
        // The dead leader still holds the group's id, so this can hit nobody else.
        let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
        let status =
            rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED)?;
        let end = match status {
            Some(status) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => ProcessEnd::Exited(code),
                (None, Some(signal)) => ProcessEnd::Signaled(signal),
                (None, None) => ProcessEnd::Signaled(0),
            },
            None => ProcessEnd::Signaled(0),
        };
        *reaped = Some(end);
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::time::Duration;

    /// Far above what the kernel needs; a test that waits this long has failed.
    const BOUND: Duration = Duration::from_secs(20);

    fn shell(script: &str, output: File) -> ProcessSpec {
        ProcessSpec {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: BTreeMap::from([("PATH".into(), "/usr/bin:/bin".into())]),
            working_dir: "/".into(),
            output,
            entrances: Vec::new(),
        }
    }

    fn text_of(mut file: File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn exit_codes_and_output_arrive() {
        let spawner = Spawner::start().unwrap();
        let output = tempfile::tempfile().unwrap();
        let script = "echo out; echo err >&2; echo \"home=$HOME\"; exit 3";
        let process = spawner
            .spawn(shell(script, output.try_clone().unwrap()))
            .await
            .unwrap();
        let end = end_of(&process).await;
        assert_eq!(end, ProcessEnd::Exited(3));
        assert_eq!(
            text_of(output),
            "out\nerr\nhome=\n",
            "and nothing is inherited"
        );
        assert_eq!(
            process.wait().await.unwrap(),
            end,
            "a second wait says the same"
        );
        process.kill();
    }

    #[tokio::test]
    async fn a_killed_process_takes_its_group_along() {
        let spawner = Spawner::start().unwrap();
        let output = tempfile::tempfile().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let mut spec = shell("sleep 1000 & wait", output);
        // Both sleepers hold the pipe; its end is the proof that both are gone.
        spec.output = File::from(OwnedFd::from(writer));
        let process = spawner.spawn(spec).await.unwrap();
        process.kill();
        let end = end_of(&process).await;
        assert_eq!(end, ProcessEnd::Signaled(libc::SIGKILL));
        wait_for_end_of(reader).await;
    }

    #[tokio::test]
    async fn what_a_process_left_behind_is_killed_when_it_exits() {
        let spawner = Spawner::start().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let spec = shell("sleep 1000 & exit 0", File::from(OwnedFd::from(writer)));
        let process = spawner.spawn(spec).await.unwrap();
        let end = end_of(&process).await;
        assert_eq!(end, ProcessEnd::Exited(0));
        wait_for_end_of(reader).await;
    }

    #[tokio::test]
    async fn processes_die_with_the_spawner_thread() {
        let spawner = Spawner::start().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let spec = shell("exec sleep 1000", File::from(OwnedFd::from(writer)));
        let process = spawner.spawn(spec).await.unwrap();
        drop(spawner);
        let end = end_of(&process).await;
        assert_eq!(end, ProcessEnd::Signaled(libc::SIGKILL));
        wait_for_end_of(reader).await;
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let spawner = Spawner::start().unwrap();
        let mut spec = shell("", tempfile::tempfile().unwrap());
        spec.program = "/nowhere/at-all".into();
        let error = spawner.spawn(spec).await.unwrap_err().to_string();
        assert!(
            error.starts_with("cannot start `/nowhere/at-all`: No such file"),
            "{error}"
        );
    }

    async fn end_of(process: &HostProcess) -> ProcessEnd {
        tokio::time::timeout(BOUND, process.wait())
            .await
            .unwrap()
            .unwrap()
    }

    async fn wait_for_end_of(mut reader: std::io::PipeReader) {
        let read = tokio::task::spawn_blocking(move || reader.read_to_end(&mut Vec::new()));
        tokio::time::timeout(BOUND, read)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}
